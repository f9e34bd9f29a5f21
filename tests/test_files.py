"Folders, zips and names: everything stays where it belongs, the file that was meant is found, and a data set reads once"
import json, os, random, stat, unicodedata, zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from maskrcnn_edu.data.coco import read_coco_json
from maskrcnn_edu.data.files import DataError, build_folder, cache_folder, file_key, folder_named, image_files, open_folder, write_atomic
from maskrcnn_edu.data.names import Finder, contradicts, free_names, link_or_copy, plain_parts, split_of, words
from maskrcnn_edu.data.records import Fault, ImageRecord, InstanceDataset, from_error

from fuzz import mutations, one_sentence, within

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MASKRCNN_EDU_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

def files_of(folder): return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*') if p.is_file())

def make_zip(path, *names, content=b'x', **info):
    with zipfile.ZipFile(path, 'w') as z:
        for n in names:
            i = zipfile.ZipInfo(n)
            for k, v in info.items(): setattr(i, k, v)
            z.writestr(i, content)
    return path

def put(folder, *names):
    for n in names:
        (folder/n).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (2, 2)).save(folder/n, 'PNG')
    return folder


# zips
@pytest.mark.parametrize('names,right', [
    (['images\\a.png', 'masks\\a\\1.png'], ['images/a.png', 'masks/a/1.png']),          # case zip_backslash
    (['set\\', 'set\\images\\', 'set\\images\\a.png'], ['set/images/a.png']),           # with entries for the folders
    (['a/b\\c.png', 'plain.txt'], ['a/b/c.png', 'plain.txt']), (['ö/é.png'], ['ö/é.png']),
    (['my: data/10:30.png'], ['my: data/10:30.png']), (['a/', 'b.png'], ['b.png'])])
def test_backslashes_part_folders(tmp_path, names, right):
    assert files_of(open_folder(make_zip(tmp_path/'a.zip', *names))) == right

@pytest.mark.parametrize('name', ['../x', 'a/../../x', '/etc/x', 'C:/x', 'c:\\x', 'C:x', '..\\x', 'a\\..\\..\\x', '\\\\server\\share\\x', '..'])
def test_a_member_that_climbs_out_stops_everything(tmp_path, cache, name):
    path = make_zip(tmp_path/'a.zip', 'fine.png', name)
    with pytest.raises(DataError, match='climbs out of the folder; nothing was unpacked'): open_folder(path)
    assert files_of(tmp_path) == ['a.zip']

def test_links_passwords_and_no_room(tmp_path, monkeypatch):
    with pytest.raises(DataError, match='climbs out'): open_folder(make_zip(tmp_path/'l.zip', 'x', external_attr=(stat.S_IFLNK | 0o777) << 16))
    data = bytearray(make_zip(tmp_path/'p.zip', 'x').read_bytes())
    for at in (6, data.find(b'PK\1\2') + 8): data[at] |= 1                              # the flag of a password
    (tmp_path/'p.zip').write_bytes(data)
    with pytest.raises(DataError, match='p.zip: the zip is protected by a password; unpack it'): open_folder(tmp_path/'p.zip')
    monkeypatch.setattr('shutil.disk_usage', lambda p: type('U', (), dict(free=10))())
    with pytest.raises(DataError, match='unpacked it takes .* GB .* are free'): open_folder(make_zip(tmp_path/'b.zip', 'x', content=bytes(11)))

def test_what_is_no_zip(tmp_path):
    whole = make_zip(tmp_path/'a.zip', 'x.png', content=b'x' * 500).read_bytes()
    for name, data, say in (('cut.zip', whole[:300], 'the zip was cut short; copy or download it again'), ('text.zip', b'hello', 'neither'), ('empty.zip', b'', 'neither')):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(DataError, match=f'{name}: .*{say}'): open_folder(tmp_path/name)
    with pytest.raises(DataError, match='there is no such folder or file'): open_folder(tmp_path/'none')
    flipped = bytearray(whole); flipped[100] ^= 255
    (tmp_path/'flip.zip').write_bytes(flipped)
    with pytest.raises(DataError, match='the zip is damaged .*; copy or make it again'): open_folder(tmp_path/'flip.zip')
    assert not [p for p in (tmp_path/'cache').glob('*') if p.name.startswith('flip')]

@pytest.mark.parametrize('name', ['é ü.png', '細胞.png', 'cafe\u0301/1.png'])
def test_names_of_a_mac_that_are_not_marked_as_utf8(tmp_path, name):
    "The bit that says UTF-8 is taken away, as Archive Utility leaves it; letters of old DOS stay what they are"
    data = bytearray(make_zip(tmp_path/'m.zip', name).read_bytes())
    for at in (7, data.find(b'PK\1\2') + 9): data[at] &= ~8
    (tmp_path/'m.zip').write_bytes(data)
    with zipfile.ZipFile(tmp_path/'m.zip') as z: assert z.namelist() != [name]
    assert files_of(open_folder(tmp_path/'m.zip')) == [name]
    data = data.replace(name.encode(), b'\x82' * len(name.encode()))
    (tmp_path/'dos.zip').write_bytes(data)
    assert files_of(open_folder(tmp_path/'dos.zip')) == ['é' * len(name.encode())]

def test_a_way_of_packing_that_python_has_not(tmp_path):
    "Deflate64, which Windows takes for large files"
    data = bytearray(make_zip(tmp_path/'d.zip', 'a.png').read_bytes())
    for at in (8, data.find(b'PK\1\2') + 10): data[at] = 9
    (tmp_path/'d.zip').write_bytes(data)
    with pytest.raises(DataError, match='Python cannot unpack this kind of zip .*; unpack it and give the folder'): open_folder(tmp_path/'d.zip')

def test_a_damaged_stream_of_lzma(tmp_path):
    data = bytearray(make_zip(tmp_path/'l.zip', 'a.png', content=bytes(range(256)) * 9, compress_type=zipfile.ZIP_LZMA).read_bytes())
    data[50:90] = b'\xff' * 40
    (tmp_path/'l.zip').write_bytes(data)
    with pytest.raises(DataError, match='the zip is damaged .*; copy or make it again'): open_folder(tmp_path/'l.zip')

def test_a_changed_zip_is_unpacked_anew_and_an_unchanged_one_is_not(tmp_path):
    first = open_folder(make_zip(tmp_path/'a.zip', 'x'))
    (first/'mark').write_text('')
    assert open_folder(tmp_path/'a.zip') == first and (first/'mark').exists()
    assert files_of(open_folder(make_zip(tmp_path/'a.zip', 'x', 'longer'))) == ['longer', 'x']

METHODS = dict(stored=zipfile.ZIP_STORED, deflated=zipfile.ZIP_DEFLATED, bzip2=zipfile.ZIP_BZIP2, lzma=zipfile.ZIP_LZMA)

@pytest.mark.parametrize('method', METHODS)
def test_damaged_zips_are_a_folder_or_a_sentence(tmp_path, cache, method, n=int(os.environ.get('MUTATIONS', 100)) // 4):
    "100 mutations, of four ways of packing: no other exception, nothing outside of the cache"
    names = ['images/a.png', 'images/b.png', 'x.json', 'ö.txt']
    make_zip(tmp_path/'a.zip', *names, content=b'some bytes' * 3, compress_type=METHODS[method])
    opened = 0
    for i, data in enumerate(mutations((tmp_path/'a.zip').read_bytes(), n, seed=len(method))):
        (tmp_path/f'{i}.zip').write_bytes(data)
        try:
            with within(10): opened += bool(open_folder(tmp_path/f'{i}.zip'))
        except DataError as e: one_sentence(e, f'{i}.zip')
    assert 0 < opened < n and {p.name for p in tmp_path.iterdir()} == {'a.zip', 'cache', *(f'{i}.zip' for i in range(n))}
    assert all(p.is_dir() and not p.name.startswith('.') for p in cache.iterdir())


# files
def test_nothing_half_written(tmp_path, monkeypatch):
    write_atomic(tmp_path/'a.bin', b'old')
    monkeypatch.setattr('os.replace', lambda *a: (_ for _ in ()).throw(OSError('the disk is full')))
    with pytest.raises(OSError): write_atomic(tmp_path/'a.bin', b'new')
    assert files_of(tmp_path) == ['a.bin'] and (tmp_path/'a.bin').read_bytes() == b'old'

def test_a_folder_that_fails_half_way_is_not_there(tmp_path):
    def fill(folder): (folder/'a').write_text('a'); raise ValueError('stop')
    with pytest.raises(ValueError): build_folder(tmp_path/'out', fill)
    assert not list(tmp_path.iterdir())
    old = os.umask(0o022); os.umask(old)
    made = build_folder(tmp_path/'out', lambda f: (f/'a').write_text('a'))
    assert files_of(made) == ['a'] and stat.S_IMODE(made.stat().st_mode) == 0o777 & ~old

def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('MASKRCNN_EDU_CACHE', str(tmp_path/'file'/'below'))
    assert cache_folder().is_dir() and not cache_folder().is_relative_to(tmp_path/'file') and cache_folder() == cache_folder()
    key = file_key(tmp_path/'file'); (tmp_path/'file').write_text('longer')
    assert file_key(tmp_path/'file') != key

def test_folders_in_capitals_and_litter(tmp_path):
    put(tmp_path, 'Images/a.PNG', 'Images/._a.png', '__MACOSX/x.png', 'Images/deep/b.tif')
    assert folder_named(tmp_path, 'imgs', 'images') == tmp_path/'Images' and folder_named(tmp_path, 'masks') == tmp_path/'masks'
    assert [p.name for p in image_files(tmp_path, deep=True)] == ['a.PNG', 'b.tif'] and image_files(tmp_path/'none') == []


# names
FOUND = ['img 0.png', 'images/img 0.png', 'default\\img 0.png', 'C:\\Users\\me\\img 0.png', '\\\\server\\share\\img 0.png', '/home/me/img 0.png', 'img%200.png',
         'https://host.org/a/img%200.png?x=1#y', 'IMG 0.PNG', './img 0.png', '../elsewhere/img 0.png',
         'file:///home/me/img%200.png', 's3://bucket/a/img 0.png', '/data/local-files/?d=up/img 0.png', 'https://[broken/img 0.png', ' img 0.png ']

@pytest.mark.parametrize('place', ['images/img 0.png', 'images/default/img 0.png', 'images/Train/img 0.png', 'img 0.png', 'a/b/c/img 0.png'])
@pytest.mark.parametrize('name', FOUND)
def test_the_picture_that_is_meant(tmp_path, name, place):
    "Cases backslash, cvat_subset_*, and their kind"
    put(tmp_path, place, 'images/other.png')
    assert Finder(tmp_path, [tmp_path/'images'])(name) == tmp_path/place

@pytest.mark.parametrize('form', ['NFC', 'NFD'])
def test_accents_in_either_form(tmp_path, form):
    "Case nfd_names"
    other = 'NFD' if form == 'NFC' else 'NFC'
    put(tmp_path, unicodedata.normalize(form, 'images/é ü_1.png'))
    assert Finder(tmp_path)(unicodedata.normalize(other, 'é ü_1.png')).parent.name == 'images'

def test_what_cannot_be_told_is_said(tmp_path):
    "Cases empty_name, cvat_two_subsets, and their kind"
    put(tmp_path, 'p1/A.png', 'p2/A.png', 'train/7.png', 'img_1.png')
    find = Finder(tmp_path)
    for name, say in (('A.png', '2 files have this name .p1/A.png, p2/A.png.; write the folder'), ('img_1.jpg', 'img_1.png is there; add the file or correct'),
                      ('valid/7.png', 'missing'), ('', "the file name ''"), ('/', "file name '/'"), ('nothing.png', 'the image is missing, looked for in'), ("a\0b.png", r"^'a.x00b.png': the image is missing"), ('a\nb.png', r"^'a.nb.png': the image"),
                      ('x' * 5000 + '.png', 'missing')):
        with pytest.raises(DataError, match=say): find(name)
    assert find('p2/A.png') == find('X:\\P2\\a.png') == tmp_path/'p2/A.png' and Finder(tmp_path, [tmp_path/'p1'])('old/A.png') == tmp_path/'p1/A.png'

@pytest.mark.parametrize('name,near', [('img_1.jpg', 'img_1.png'), ('img_1', 'img_1.png'), ('img_7.jpeg', 'img_7.tif'), ('7', '7.png'), ('IMG_1.bmp', 'img_1.png'), ('imgs_1.png', 'img_1.png'), ('x', None)])
def test_the_near_file_is_named(tmp_path, name, near):
    "Another ending of the same name is nearer than another number"
    put(tmp_path, 'img_0.jpg', 'img_1.png', 'img_7.tif', '7.png', 'img_11.jpg')
    with pytest.raises(DataError) as e: Finder(tmp_path)(name)
    assert f'; {near} is there; add the file or correct its name' in str(e.value) if near else 'is there' not in str(e.value)

def test_a_picture_of_the_other_half_is_never_taken(tmp_path):
    "The annotations speak of valid, in a folder or by where they lie, and the picture is in train only"
    put(tmp_path, 'images/train2017/1.png', 'images/Val/2.png', 'images/train2017/2.png')
    valid = Finder(tmp_path, [tmp_path/'images'/'val2017', tmp_path/'images'])
    for find, name in ((valid, '1.png'), (valid, 'images/1.png'), (Finder(tmp_path), 'valid/1.png')):
        with pytest.raises(DataError, match='missing.*images/train2017/1.png is there'): find(name)
    assert valid('2.png') == tmp_path/'images/Val/2.png' and valid('train/1.png') == tmp_path/'images/train2017/1.png'
    (tmp_path/'images/Val/2.png').unlink()                       # a split whose pictures were left together
    assert Finder(tmp_path, valid.near)('2.png') == tmp_path/'images/train2017/2.png'

def test_two_subsets_in_capitals(tmp_path):
    "Kind of cvat_two_subsets: the same names in images/Train and images/Test, jsons in small letters"
    put(tmp_path, 'images/Train/1.png', 'images/Test/1.png')
    for half in ('Train', 'Test'): assert Finder(tmp_path, [tmp_path/'images'/half.lower(), tmp_path/'images'])('1.png') == tmp_path/'images'/half/'1.png'
    put(tmp_path, 'images/Job_1/2.png', 'images/Job_2/2.png')
    assert Finder(tmp_path, [tmp_path/'images'/'job_2', tmp_path/'images'])('2.png') == tmp_path/'images/Job_2/2.png'
    assert Finder(tmp_path, [tmp_path/'images'/'Job_1'])('old/2.png') == tmp_path/'images/Job_1/2.png'

@pytest.mark.parametrize('spell', [lambda i: 'a.png', lambda i: ['a.png', './a.png', 'images/a.png', 'A.PNG', 'images/../images/a.png', 'C:\\x\\a.png'][i]], ids=['alike', 'spelled'])
def test_a_row_for_each_object(tmp_path, spell):
    "Case row_per_object, and its kind: one picture under six ids and spellings is one image with all objects"
    put(tmp_path, 'images/a.png')
    rows = dict(images=[dict(id=i, file_name=spell(i)) for i in range(6)], categories=[dict(id=1, name='cell')],
                annotations=[dict(id=i, image_id=i, category_id=1, segmentation=[[0, 0, 1, 0, 1, 1]]) for i in range(6)])
    (tmp_path/'x.json').write_text(json.dumps(rows))
    records = read_coco_json(tmp_path/'x.json')
    assert [(r.path, len(r.objects)) for r in records.images] == [(tmp_path/'images/a.png', 6)] and not [f for f in records.faults if f.stops]

def test_nothing_outside_of_the_folder_is_found(tmp_path):
    put(tmp_path, 'secret.png', 'set/a.png')
    for name in ('../secret.png', str(tmp_path/'secret.png')):
        with pytest.raises(DataError): Finder(tmp_path/'set')(name)

def test_words_of_names():
    "Case word_val"
    assert words('trainVal_2017-Cells') == ['train', 'val', 'cells'] and words('COCOTrain') == ['coco', 'train'] and words('123') == []
    for name, half in (('instances_val2017', 'valid'), ('TRAIN', 'train'), ('valid-set', 'valid'), ('testing', 'test'), ('interval_5min', None), ('carnaval', None),
                       ('evaluation', None), ('restraining', None), ('trainval', None), ('train_val', None), ('éval', None), ('carne\u0301val', None), ('Médieval_1', None), ('Zellen-Val', 'valid'), ('細胞_train', 'train')): assert split_of(name) == half, name
    assert contradicts(('a', 'Train'), ('val',)) and not contradicts(('train', 'val'), ('val',))

@given(st.text(max_size=30))
def test_one_spelling_is_stable(name):
    parts = plain_parts(name)
    assert '' not in parts and '.' not in parts
    if '%' not in name and '://' not in name: assert plain_parts('/'.join(parts)) == parts

@settings(max_examples=200)
@given(st.lists(st.sampled_from(['a.png', 'A.png', 'a_2.png', 'A_2.tif', 'p/a.tif', 'b.png', 'é.png', 'É.png', 'e\u0301.png', 'ß', 'SS'])))
def test_outputs_never_meet(paths):
    out = free_names(paths)
    assert len({unicodedata.normalize('NFC', Path(n).stem).casefold() for n in out}) == len(paths) == len(out) and [Path(n).suffix for n in out] == [Path(p).suffix for p in paths]

def test_many_of_one_name_are_numbered_at_once():
    with within(5): assert free_names([f'{i}/a.png' for i in range(20_000)])[-1] == 'a_20000.png'

def test_a_copy_where_the_disk_has_no_links(tmp_path, monkeypatch):
    put(tmp_path, 'a.png')
    link_or_copy(tmp_path/'a.png', tmp_path/'b.png')
    monkeypatch.setattr('os.link', lambda *a: (_ for _ in ()).throw(OSError('no links here')))
    link_or_copy(tmp_path/'a.png', tmp_path/'c.png')
    assert (tmp_path/'a.png').read_bytes() == (tmp_path/'b.png').read_bytes() == (tmp_path/'c.png').read_bytes()
    assert (tmp_path/'b.png').stat().st_ino == (tmp_path/'a.png').stat().st_ino != (tmp_path/'c.png').stat().st_ino


# records
def test_errors_as_faults():
    "Case folder_colon"
    assert from_error('/my: data', DataError('/my: data/images/a.png: broken; replace it')) == Fault('/my: data/images/a.png', 'broken', 'replace it', True)
    assert from_error('/x', DataError('other sentence')) == Fault('/x', 'other sentence', 'correct it', True)

@pytest.mark.parametrize('name', ['my: data/a.png', 'images/10: 30.png', 'a: b: c/x: y.png', 'one; two/a.png'])
def test_a_file_whose_name_has_a_colon(tmp_path, name):
    "Kind of folder_colon: the longest name that is there is the file, from whatever folder above it was asked for"
    put(tmp_path, name)
    if ':' in name: (tmp_path/name.partition(':')[0]).mkdir(parents=True, exist_ok=True)      # a shorter name that is there as well
    for asked in (tmp_path, (tmp_path/name).parent, tmp_path/name):
        assert from_error(asked, DataError(f'{tmp_path/name}: no picture: broken; save it again')) == Fault(str(tmp_path/name), 'no picture: broken', 'save it again', True)
    assert from_error(tmp_path, DataError('x' * 5000 + ': gone; add it')).fault == 'x' * 5000 + ': gone'

def test_a_data_set_reads_once_and_shares_its_memory():
    reads = []
    ds = InstanceDataset([ImageRecord(str(i), None) for i in range(4)], ['background', 'x'], lambda r: (reads.append(r.name) or r.name, [Fault(r.name, 'f', 'a')]))
    half = ds.subset([2, 0])
    assert [*half] == ['2', '0'] and [*ds] == ['0', '1', '2', '3'] and reads == ['2', '0', '1', '3'] and half.faults is ds.faults and len(ds.faults) == 4
    plain = InstanceDataset(ds.records, ds.classes, ds.read, cache=False)
    assert plain[0] == plain[0] == '0' and reads.count('0') == 3 and len(plain.faults) == 1 and ds.names == list('0123')
