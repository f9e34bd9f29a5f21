"Folders, zips and names: everything stays where it belongs, the file that was meant is found, and a data set reads once"
import os, random, stat, unicodedata, zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from maskrcnn_edu.data.files import DataError, build_folder, cache_folder, file_key, folder_named, image_files, open_folder, write_atomic
from maskrcnn_edu.data.names import Finder, contradicts, free_names, plain_parts, split_of, words
from maskrcnn_edu.data.records import Fault, ImageRecord, InstanceDataset, from_error

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
    (['a/b\\c.png', 'plain.txt'], ['a/b/c.png', 'plain.txt']), (['ö/é.png'], ['ö/é.png'])])
def test_backslashes_part_folders(tmp_path, names, right):
    assert files_of(open_folder(make_zip(tmp_path/'a.zip', *names))) == right

@pytest.mark.parametrize('name', ['../x', 'a/../../x', '/etc/x', 'C:/x', 'c:\\x', '..\\x', 'a\\..\\..\\x'])
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
    for name, data, say in (('cut.zip', whole[:300], 'neither a folder nor a zip'), ('text.zip', b'hello', 'neither'), ('empty.zip', b'', 'neither')):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(DataError, match=f'{name}: .*{say}'): open_folder(tmp_path/name)
    with pytest.raises(DataError, match='there is no such folder or file'): open_folder(tmp_path/'none')
    flipped = bytearray(whole); flipped[100] ^= 255
    (tmp_path/'flip.zip').write_bytes(flipped)
    with pytest.raises(DataError, match='the zip is damaged .*; copy or make it again'): open_folder(tmp_path/'flip.zip')
    assert not [p for p in (tmp_path/'cache').glob('*') if p.name.startswith('flip')]

def test_a_changed_zip_is_unpacked_anew_and_an_unchanged_one_is_not(tmp_path):
    first = open_folder(make_zip(tmp_path/'a.zip', 'x'))
    (first/'mark').write_text('')
    assert open_folder(tmp_path/'a.zip') == first and (first/'mark').exists()
    assert files_of(open_folder(make_zip(tmp_path/'a.zip', 'x', 'longer'))) == ['longer', 'x']

def test_damaged_zips_are_a_folder_or_a_sentence(tmp_path, cache):
    "100 mutations: no other exception, nothing outside of the cache"
    rng, opened = random.Random(0), 0
    whole = make_zip(tmp_path/'a.zip', 'images/a.png', 'images/b.png', 'x.json', content=b'some bytes' * 20, compress_type=zipfile.ZIP_DEFLATED).read_bytes()
    for i in range(100):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at, act = rng.randrange(len(data)), rng.random()
            if act < .6: data[at] = rng.randrange(256)
            elif act < .8: del data[at:at + rng.randint(1, 40)]
            else: data[at:at] = rng.randbytes(rng.randint(1, 40))
        (tmp_path/f'{i}.zip').write_bytes(data)
        try: open_folder(tmp_path/f'{i}.zip'); opened += 1
        except DataError as e: assert str(e).startswith(str(tmp_path/f'{i}.zip'))
    assert 5 < opened < 95 and {p.name for p in tmp_path.iterdir()} == {'a.zip', 'cache', *(f'{i}.zip' for i in range(100))}


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
    assert cache_folder().is_dir() and not cache_folder().is_relative_to(tmp_path/'file')
    key = file_key(tmp_path/'file'); (tmp_path/'file').write_text('longer')
    assert file_key(tmp_path/'file') != key

def test_folders_in_capitals_and_litter(tmp_path):
    put(tmp_path, 'Images/a.PNG', 'Images/._a.png', '__MACOSX/x.png', 'Images/deep/b.tif')
    assert folder_named(tmp_path, 'imgs', 'images') == tmp_path/'Images' and folder_named(tmp_path, 'masks') == tmp_path/'masks'
    assert [p.name for p in image_files(tmp_path, deep=True)] == ['a.PNG', 'b.tif'] and image_files(tmp_path/'none') == []


# names
FOUND = ['img 0.png', 'images/img 0.png', 'default\\img 0.png', 'C:\\Users\\me\\img 0.png', '\\\\server\\share\\img 0.png', '/home/me/img 0.png', 'img%200.png',
         'https://host.org/a/img%200.png?x=1#y', 'IMG 0.PNG', './img 0.png', '../elsewhere/img 0.png']

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
                      ('valid/7.png', 'missing'), ('', "the file name ''"), ('/', "file name '/'"), ('nothing.png', 'the image is missing, looked for in'), ('a\0b.png', 'missing'),
                      ('x' * 5000 + '.png', 'missing')):
        with pytest.raises(DataError, match=say): find(name)
    assert find('p2/A.png') == tmp_path/'p2/A.png' and Finder(tmp_path, [tmp_path/'p1'])('old/A.png') == tmp_path/'p1/A.png'

def test_nothing_outside_of_the_folder_is_found(tmp_path):
    put(tmp_path, 'secret.png', 'set/a.png')
    for name in ('../secret.png', str(tmp_path/'secret.png')):
        with pytest.raises(DataError): Finder(tmp_path/'set')(name)

def test_words_of_names():
    "Case word_val"
    assert words('trainVal_2017-Cells') == ['train', 'val', 'cells'] and words('COCOTrain') == ['coco', 'train'] and words('123') == []
    for name, half in (('instances_val2017', 'valid'), ('TRAIN', 'train'), ('valid-set', 'valid'), ('testing', 'test'), ('interval_5min', None), ('carnaval', None),
                       ('evaluation', None), ('restraining', None), ('trainval', None), ('train_val', None)): assert split_of(name) == half, name
    assert contradicts(('a', 'Train'), ('val',)) and not contradicts(('train', 'val'), ('val',))

@given(st.text(max_size=30))
def test_one_spelling_is_stable(name):
    try: parts = plain_parts(name)
    except ValueError: return                          # an address that is none
    assert '' not in parts and '.' not in parts
    if '%' not in name and '://' not in name: assert plain_parts('/'.join(parts)) == parts

@settings(max_examples=200)
@given(st.lists(st.sampled_from(['a.png', 'A.png', 'a_2.png', 'A_2.tif', 'p/a.tif', 'b.png', 'é.png', 'É.png', 'ß', 'SS'])))
def test_outputs_never_meet(paths):
    out = free_names(paths)
    assert len({Path(n).stem.casefold() for n in out}) == len(paths) == len(out) and [Path(n).suffix for n in out] == [Path(p).suffix for p in paths]


# records
def test_errors_as_faults():
    "Case folder_colon"
    assert from_error('/my: data', DataError('/my: data/images/a.png: broken; replace it')) == Fault('/my: data/images/a.png', 'broken', 'replace it', True)
    assert from_error('/x', DataError('other sentence')) == Fault('/x', 'other sentence', 'correct it', True)

def test_a_data_set_reads_once_and_shares_its_memory():
    reads = []
    ds = InstanceDataset([ImageRecord(str(i), None) for i in range(4)], ['background', 'x'], lambda r: (reads.append(r.name) or r.name, [Fault(r.name, 'f', 'a')]))
    half = ds.subset([2, 0])
    assert [*half] == ['2', '0'] and [*ds] == ['0', '1', '2', '3'] and reads == ['2', '0', '1', '3'] and half.faults is ds.faults and len(ds.faults) == 4
    plain = InstanceDataset(ds.records, ds.classes, ds.read, cache=False)
    assert plain[0] == plain[0] == '0' and reads.count('0') == 3 and ds.names == list('0123')
