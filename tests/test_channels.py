"N channels and 16 bits through the library, and three channels of 8 bits as they were."
import io, logging, re
from dataclasses import replace
from types import SimpleNamespace
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from torchvision.models import resnet18
from maskrcnn_edu import learner
from maskrcnn_edu.checkpoints import load_weights, save_weights
from maskrcnn_edu.core import composite, set_seed, show_image, show_instances
from maskrcnn_edu.data import CLASSES, DataError, make_shapes, open_dataset, open_part, shapes_folder, write_coco
from maskrcnn_edu.data.images import image_size, read_image, read_pixels, to_uint8
from maskrcnn_edu.evaluate import CocoEval
from maskrcnn_edu.learner import (FlipTurn, Recolour, ScaleCrop, Stretch, CentreCrop, ZoomWhole, check_channels, colour, enlarged, fill_up, load_imagenet,
    measure_channels, predict_instances, resize, stretch, to_input)
from maskrcnn_edu.mask_rcnn import MaskRCNN, SHAPES
from maskrcnn_edu.resnet import RESNET18
from maskrcnn_edu.trace import grad_cam, trace_model, trace_page

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

def tiff(pixels, **kwargs):
    "A TIFF file in memory."
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **kwargs)
    return io.BytesIO(out.getvalue())

def counts(seed, shape=(5, 40, 50), high=4000, dtype=np.uint16): return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


# -- three channels of 8 bits: the lines as they were before there were more channels

def old_stretch(image, percentiles=(.5, 99.5)):
    low, high = np.percentile(image[::2, ::2], percentiles)
    return (np.clip((image - low) / max(high - low, 1), 0, 1) * 255).round().astype(np.uint8)

def old_input(image, model, multiple=64):
    if model.config.stretch: image = old_stretch(image)
    h, w = (round(n * model.config.enlarge) for n in image.shape[:2])
    image = image if (h, w) == image.shape[:2] else np.asarray(Image.fromarray(image).resize((w, h), Image.BILINEAR))
    size, x = image.shape[:2], torch.tensor(image).permute(2, 0, 1) / 255
    h, w = (-(-n // multiple) * multiple for n in size)
    out = torch.tensor(model.config.backbone.mean).view(3, 1, 1).expand(3, h, w).clone()
    out[:, :size[0], :size[1]] = x
    return out[None]

@quick
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 70), st.integers(1, 70), st.just(3))), st.sampled_from([1., 1.5, 2., .7]), st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_colours_of_8_bits_are_what_they_were(image, factor, size):
    h, w = (round(n * factor) for n in image.shape[:2])
    assert (stretch(image) == old_stretch(image)).all()
    if min(h, w): assert (enlarged(image, factor) == np.asarray(Image.fromarray(image).resize((w, h), Image.BILINEAR))).all()
    nothing = make_shapes(1, 0)[0].instances[[]]
    assert (resize(image, replace(nothing, size=image.shape[:2]), size)[0] == np.asarray(Image.fromarray(image).resize(size[::-1], Image.BILINEAR))).all()
    set_seed(7); a = Recolour()((image, nothing), split_idx=0)[0]
    set_seed(7); b = image[..., np.random.permutation(3)]
    assert (a == b).all() or (a == 255 - b).all()
    filled = fill_up(torch.tensor(image).permute(2, 0, 1), 64)
    h, w = image.shape[:2]
    assert (filled[:, :h, :w] == torch.tensor(image).permute(2, 0, 1)).all() and [*map(int, filled[:, -1, -1])] == ([124, 116, 104] if filled.shape[-2:] != (h, w) else image[-1, -1].tolist())

@pytest.mark.parametrize('name', ['shapes', 'nuclei'])
def test_what_the_models_that_ship_are_given_is_what_it_was(name):
    model, _ = load_weights(name)
    assert model.config.backbone.in_channels == 3
    for s in make_shapes(3, seed=9, size=150): assert torch.equal(to_input(s.image, model), old_input(s.image, model))

@pytest.mark.parametrize('suffix,kwargs', [('png', {}), ('jpg', {}), ('bmp', {}), ('tif', {}), ('tif', dict(compression='tiff_lzw')), ('tif', dict(compression='jpeg')), ('tif', dict(compression='packbits'))])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'RGBA', 'CMYK', '1', 'LA', 'YCbCr'])
def test_files_of_8_bits_are_what_they_were(suffix, kwargs, mode, tmp_path):
    file = tmp_path/f'a.{suffix}'
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)).convert(mode)
    try: im.save(file, **kwargs)
    except (OSError, KeyError, ValueError): pytest.skip(f'{suffix} has no {mode}')
    with Image.open(file) as again: expected = np.array((again.convert('RGBA') if again.mode in ('P', 'PA') else again).convert('RGB'))
    stored = read_pixels(file)
    assert (read_image(file) == expected).all() and image_size(file) == (20, 30) == stored.values.shape[:2] and stored.colour == (mode not in ('1', 'L', 'LA'))
    assert (stored.alpha is not None) == (mode in ('RGBA', 'LA')) or suffix in ('jpg', 'bmp')      # which hold none

def test_the_order_of_random_numbers_is_what_it_was():
    "The same seed gives the same weights, whether or not the number of channels is said."
    set_seed(3); a = MaskRCNN(SHAPES).state_dict()
    set_seed(3); b = MaskRCNN(SHAPES.change(backbone=dict(mean=SHAPES.backbone.mean, std=SHAPES.backbone.std))).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and round(a['backbone.body.conv1.weight'].double().sum().item(), 3) == FIRST
FIRST = -2.732   # the sum of the first kernels before there was `in_channels`

def test_colour_of_three_channels_is_what_it_was():
    assert [type(t).__name__ for t in colour()] == ['Brightness', 'Contrast', 'Saturation'] and [type(t).__name__ for t in colour(channels=5)] == ['Brightness', 'Contrast']


# -- deep pixels

@quick
@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 20), st.integers(1, 20))), st.integers(1, 9), st.integers(0, 5000))
def test_8_bits_keep_the_order_and_forget_scale_and_offset(pixels, gain, offset):
    out = to_uint8(pixels)
    order = np.argsort(pixels, axis=None)
    assert (np.diff(out.ravel()[order].astype(int)) >= 0).all() and out.dtype == np.uint8 and out.shape == pixels.shape
    assert out.max() == (255 if pixels.max() > pixels.min() else 0) and out.min() == 0
    assert abs(to_uint8(pixels * float(gain) + offset).astype(int) - out).max() <= 1

@pytest.mark.parametrize('hot', [1, 10, 30])
def test_hot_pixels_do_not_darken_a_picture(hot):
    pixels = counts(0, (200, 200), 4096)
    clean, rng = to_uint8(pixels), np.random.default_rng(1)
    pixels.flat[where := rng.choice(pixels.size, hot, replace=False)] = 65535
    changed = np.delete(abs(to_uint8(pixels).astype(int) - clean).ravel(), where)
    assert changed.max() <= 1 and (to_uint8(pixels).flat[where] == 255).all()

def test_what_a_hot_pixel_costs():
    "The shapes that ship, exposed in 16 bits with one hot pixel: mask AP with the maximum as white, with percentiles, and with percentiles in floats."
    model, _ = load_weights('shapes')
    valid, ap = open_dataset(shapes_folder())[1], {}
    by_max = lambda x: (x * (255 / x.max())).round().astype(np.uint8)
    floats = lambda x: (((x - np.percentile(x, .1)) / np.ptp(np.percentile(x, (.1, 99.9)))).clip(0, 1) * 255).astype(np.float32)
    for name, scale in dict(maximum=by_max, percentiles=to_uint8, floats=floats).items():
        coco = CocoEval(CLASSES, model.config.detection.n_detections)
        for i in range(12):
            pixels = (100 + np.random.default_rng(i).poisson(valid[i].image / 255 * 4000)).astype(np.uint16)
            pixels[5, 5] = 65535
            coco.add(valid[i].instances, predict_instances(model, scale(pixels)))
        ap[name] = coco.compute()['mask_ap']
    print({k: f'{v:.3f}' for k, v in ap.items()})
    assert ap['maximum'] < ap['percentiles'] - .1 and abs(ap['percentiles'] - ap['floats']) < .02

def test_small_bright_objects_stay_white():
    pixels = np.full((300, 300), 100, np.uint16)
    pixels[10:13, 10:13] = 3000        # a ten-thousandth of the picture
    assert (to_uint8(pixels)[10:13, 10:13] == 255).all() and to_uint8(pixels)[0, 0] == 0

def test_floats_with_holes():
    pixels = np.random.default_rng(0).random((30, 30), np.float32)
    pixels[0] = np.nan; pixels[1, 0], pixels[1, 1] = np.inf, -np.inf
    out = to_uint8(pixels)
    assert (out[0] == 0).all() and out[1, 0] == 255 and out[1, 1] == 0 and out[5:].max() == 255
    assert to_uint8(np.full((3, 3), np.nan)).tolist() == [[0] * 3] * 3


# -- TIFF

DTYPES = [np.uint8, np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64]

@quick
@given(st.data())
def test_any_tiff_is_read(data):
    "Random type, shape, order of axes, packing and byte order; where letters lack, fewer channels than pixels a side."
    dtype, told = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(['CYX', 'YXC', 'YX', 'imagej', 'ome', 'contiguous', 'no letters, first', 'no letters, last']))
    c = 1 if told == 'YX' else data.draw(st.integers(2, 7))
    h, w = (data.draw(st.integers(8, 24)) for _ in 'hw')
    pixels = (np.random.default_rng(data.draw(st.integers(0, 99))).random((h, w, c)) * 250).astype(dtype)
    kwargs = dict(compression=data.draw(st.sampled_from([None, 'zlib'])), byteorder=data.draw(st.sampled_from('<>')), photometric='minisblack')
    first, planes = np.moveaxis(pixels, -1, 0), dict(planarconfig=None)
    if told == 'imagej' and dtype not in (np.uint8, np.uint16, np.float32): told = 'CYX'
    file = {'CYX': lambda: tiff(first, metadata=dict(axes='CYX'), **kwargs), 'YXC': lambda: tiff(pixels, metadata=dict(axes='YXC'), **kwargs), 'YX': lambda: tiff(pixels[..., 0], **kwargs),
            'imagej': lambda: tiff(first, imagej=True, metadata=dict(axes='CYX'), byteorder='>', photometric='minisblack'), 'ome': lambda: tiff(first, ome=True, metadata=dict(axes='CYX'), **kwargs),
            'contiguous': lambda: tiff(pixels, planarconfig='contig', **kwargs), 'no letters, first': lambda: tiff(first, metadata=None, **kwargs),
            'no letters, last': lambda: tiff(pixels, **kwargs)}[told]()
    image = read_image(file)
    expected = pixels if dtype == np.uint8 else to_uint8(pixels, dyes=True)
    assert image.dtype == np.uint8 and image.flags.c_contiguous and image.shape == (h, w, 3 if c == 1 else c), told
    stored = read_pixels(file).values
    assert stored.dtype == dtype and (stored == (pixels[..., 0] if c == 1 else pixels)).all(), told
    assert (image == expected).all(), told

@pytest.mark.parametrize('shape,axes', [((4, 3, 40, 50), 'ZCYX'), ((6, 40, 50), 'ZYX'), ((6, 40, 50), 'TYX'), ((20, 40, 50), 'QYX'), ((2, 3, 4, 40, 50), 'TZCYX')])
def test_a_stack_is_refused_in_one_sentence(shape, axes, tmp_path):
    tifffile.imwrite(tmp_path/'cells.tif', np.zeros(shape, np.uint16), metadata=None if axes == 'QYX' else dict(axes=axes))
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=r'cells\.tif: this is a stack \(.*save each plane') as e: read(tmp_path/'cells.tif')
        assert '\n' not in str(e.value)

def test_several_pictures_in_one_file(tmp_path):
    with tifffile.TiffWriter(tmp_path/'a.tif') as f:
        for i in range(2): f.write(counts(i, (40, 50)), contiguous=False, metadata=dict(axes='YX'))
    with pytest.raises(DataError, match='2 pictures in this file'): read_image(tmp_path/'a.tif')
    with tifffile.TiffWriter(tmp_path/'b.tif') as f:      # a small one for the preview is no second picture
        f.write(counts(0), metadata=dict(axes='CYX')); f.write(counts(0, (8, 10)))
    assert read_image(tmp_path/'b.tif').shape == (40, 50, 5) and image_size(tmp_path/'b.tif') == (40, 50)

def test_colours_of_16_bits_keep_their_relation_and_dyes_do_not():
    pixels = counts(0, (40, 50, 3)) // np.array([1, 4, 16], np.uint16)
    rgb, dyes = read_image(tiff(pixels, photometric='rgb')), read_image(tiff(np.moveaxis(pixels, -1, 0), photometric='minisblack', metadata=dict(axes='CYX')))
    assert rgb[..., 2].max() < 20 and dyes[..., 2].max() == 255 and (rgb == to_uint8(pixels)).all() and (dyes == to_uint8(pixels, dyes=True)).all()
    alpha = np.concatenate([pixels, np.full((40, 50, 1), 9, np.uint16)], -1)
    assert (read_image(tiff(alpha, photometric='rgb', extrasamples=['unassalpha'])) == rgb).all()
    found = read_pixels(tiff(alpha, photometric='rgb', extrasamples=['unassalpha']))
    assert (found.values == pixels).all() and (found.alpha == 9).all() and found.colour

def test_white_is_zero_in_some_files():
    pixels = counts(0, (40, 50))
    assert (read_image(tiff(pixels, photometric='miniswhite'))[..., 0] == 255 - to_uint8(pixels)).all()

def test_packings_that_tifffile_leaves_to_others(tmp_path):
    pixels = counts(0, (5, 40, 50))
    pages = [Image.fromarray(p) for p in pixels]
    pages[0].save(tmp_path/'lzw.tif', compression='tiff_lzw', save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path/'grey.tif', compression='tiff_lzw')
    assert (read_image(tmp_path/'lzw.tif') == to_uint8(np.moveaxis(pixels, 0, -1), dyes=True)).all()
    assert (read_image(tmp_path/'grey.tif')[..., 1] == to_uint8(pixels[0])).all() and image_size(tmp_path/'lzw.tif') == (40, 50)

def test_a_packing_that_nobody_has_says_what_to_install(monkeypatch, tmp_path):
    def asarray(*args, **kwargs): raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")
    monkeypatch.setattr(tifffile.TiffPageSeries, 'asarray', asarray)
    tifffile.imwrite(tmp_path/'a.tif', counts(0, (40, 50, 5)), planarconfig='contig', photometric='minisblack')
    with pytest.raises(DataError, match=r"a\.tif: .*LZW.*imagecodecs.*install it with pip, or save the image without compression"): read_image(tmp_path/'a.tif')

def test_pixels_that_are_no_numbers(tmp_path):
    tifffile.imwrite(tmp_path/'a.tif', np.zeros((5, 40, 50), np.complex64))
    with pytest.raises(DataError, match=r'a\.tif: its pixels are of the type complex64'): read_image(tmp_path/'a.tif')

WAYS = [dict(metadata=dict(axes='CYX')), dict(compression='zlib'), dict(imagej=True), dict(metadata=None, bigtiff=True), dict(planarconfig='separate', photometric='minisblack')]

@quick
@given(st.sampled_from(WAYS), st.floats(0, .995))
def test_a_tiff_cut_short_is_an_error_and_not_a_picture_of_fewer_channels(way, share):
    raw = tiff(counts(0), **way).getvalue()
    try: image = read_image(io.BytesIO(raw[:int(len(raw) * share)]), 'cells.tif')
    except DataError as e: assert re.fullmatch(r'cells\.tif: the (image cannot be read \([^\n]*\); replace it or remove its entry|file is empty \(0 bytes\); copy it again)', str(e))
    else: assert share > .9 and (image == read_image(io.BytesIO(raw))).all()      # what was lost were words behind the pixels

@quick
@given(st.sampled_from(WAYS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20), st.booleans())
def test_a_damaged_tiff_is_a_picture_or_one_sentence(way, flips, head):
    raw = bytearray(tiff(counts(0), **way).getvalue())
    for share, value in flips: raw[min(int(share * (400 if head else len(raw))), len(raw) - 1)] = value
    try: image = read_image(io.BytesIO(raw), 'cells.tif')
    except DataError as e: assert str(e).startswith('cells.tif: ') and len(str(e).splitlines()) == 1
    else: assert image.dtype == np.uint8 and image.ndim == 3

def test_damage_is_said_once_and_the_log_is_as_before(tmp_path, caplog):
    (tmp_path/'a.tif').write_bytes(tiff(counts(0)).getvalue()[:9000])
    with caplog.at_level(logging.WARNING), pytest.raises(DataError): read_image(tmp_path/'a.tif')
    assert not caplog.records and logging.getLogger('tifffile').propagate and not logging.getLogger('tifffile').handlers
    with pytest.raises(DataError, match='missing'): read_image(tmp_path/'b.tif')

def test_a_header_that_promises_too_much(tmp_path):
    raw = tiff(np.zeros((64, 64), np.uint16), compression='zlib').getvalue()
    with tifffile.TiffFile(io.BytesIO(raw)) as tif: tags = [tif.pages[0].tags[n] for n in ('ImageWidth', 'ImageLength')]
    raw = bytearray(raw)
    for t in tags: raw[t.valueoffset:t.valueoffset + 2] = (60000).to_bytes(2, 'little')
    (tmp_path/'a.tif').write_bytes(raw)
    with pytest.raises(DataError, match=r'a\.tif: '): read_image(tmp_path/'a.tif')


# -- a data set of five channels

def five(samples, depth=np.uint16):
    "The same objects as a microscope sees them: object i in channel i modulo 5, dim, with an offset and noise, C first."
    out = []
    for i, s in enumerate(samples):
        rng, where = np.random.default_rng(i), s.instances.label_map()
        out.append(np.stack([(where > 0) & (where % 5 == c) for c in range(5)]) * 900 + 100 + rng.poisson(50, (5, *s.instances.size)))
    return [x.astype(depth) for x in out]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('five')
    for split, n, seed in (('train', 4, 0), ('valid', 2, 1)):
        samples = make_shapes(n, seed, size=96)
        write_coco(samples, path, split, CLASSES)
        file = path/'annotations'/f'{split}.json'
        file.write_text(file.read_text().replace('.png', '.tif'))
        for s, pixels in zip(samples, five(samples)):
            (path/'images'/f'{s.name}.png').unlink()
            tifffile.imwrite(path/'images'/f'{s.name}.tif', pixels, metadata=dict(axes='CYX'))
    return path

def test_a_coco_folder_of_tiffs(folder):
    train, valid = open_dataset(folder)
    assert (len(train), len(valid)) == (4, 2) and all(s.image.shape == (96, 96, 5) for s in train)
    for s in train:
        for label, mask in enumerate(s.instances.masks(), 1):
            inside = s.image[mask > 0].mean(0)                                # (C,): bright in its channel alone
            assert inside.argmax() == label % 5 and np.sort(inside)[-2] < inside.max() / 2

def test_written_and_read_again(folder, tmp_path):
    train, _ = open_dataset(folder)
    again = open_part(write_coco(train, tmp_path, "train", CLASSES).parents[1], "all")[0]
    assert all((a.image == b.image).all() and a.name == b.name for a, b in zip(train, again)) and {p.suffix for p in (tmp_path/'images').iterdir()} == {'.tif'}

def test_transforms_of_five_channels(folder):
    s = open_dataset(folder)[0][0]
    set_seed(0)
    for t in (Stretch(), FlipTurn(), ScaleCrop(64), ZoomWhole(), CentreCrop(64, 2.), Recolour()):
        for split in (0, 1):
            image, objects = t((s.image, s.instances), split_idx=split)
            assert image.shape == (*objects.size, 5) and image.dtype == np.uint8, type(t).__name__
    dim = np.stack([s.image[..., c] // 2**c for c in range(5)], -1)
    assert (stretch(dim).max((0, 1)) == 255).all()
    for c in range(5): assert (stretch(dim)[..., c] == stretch(dim[..., c:c + 1])[..., 0]).all()

@pytest.fixture(scope='module')
def run(folder, tmp_path_factory):
    "Two epochs on four pictures."
    from maskrcnn_edu.train import Recipe, finish, fit
    train, valid = open_dataset(folder)
    out = tmp_path_factory.mktemp('run')
    config = SHAPES.change(backbone=dict(width=16, channels=32, **measure_channels(train)), head=dict(hidden=64, mask_channels=32))
    recipe = Recipe(config, (Stretch(), ScaleCrop(64), FlipTurn(), Recolour(), CentreCrop(64)), tuple(colour(channels=5)), bs=2, epochs=2)
    learn = fit(recipe, train, valid, out, device='cpu')
    return SimpleNamespace(learn=learn, out=out, valid=valid, config=config, scores=finish(learn, valid, out))

def test_training_on_five_channels(run):
    assert run.config.backbone.in_channels == 5 and run.learn.model.backbone.body.conv1.weight.shape == (16, 5, 7, 7)
    assert np.isfinite(np.array(run.learn.recorder.values, float)).all() and (run.out/'results.png').stat().st_size > 5000

def test_save_load_predict_five_channels(run, folder):
    model, names = load_weights(run.out/'weights.safetensors')
    assert names == CLASSES and model.config == run.config and model.config.backbone.in_channels == 5
    image = run.valid[0].image
    plain = MaskRCNN(run.config).eval()
    plain.load_state_dict(run.learn.model.state_dict())
    a, b = predict_instances(model, image), predict_instances(plain, image)
    assert a.size == (96, 96) and (a.boxes == b.boxes).all() and (a.scores == b.scores).all()
    file = next((folder/'images').glob('*1_0000.tif'))
    with run.learn.no_bar(): found = run.learn.predict(file)[0]
    assert found.size == (128, 128)      # filled up to a multiple of 64, with the mean of each of the five channels
    filled = run.learn.dls.test_dl([file]).one_batch()[0].as_subclass(Tensor)
    assert (filled[0, :, -1, -1] * 255).round().tolist() == [round(255 * m) for m in run.config.backbone.mean]

def test_half_precision_and_stretched(run, tmp_path):
    model = MaskRCNN(run.config.change(stretch=True, enlarge=2.)).eval()
    model.load_state_dict(run.learn.model.state_dict())
    again, _ = load_weights(save_weights(model, tmp_path/'w.safetensors', CLASSES, half=True))
    assert to_input(run.valid[0].image, again).shape == (1, 5, 192, 192) and predict_instances(again, run.valid[0].image).size == (96, 96)

def test_the_pages_of_trace_and_grad_cam(run, tmp_path):
    model, names = load_weights(run.out/'weights.safetensors')
    page = trace_page(model, to_input(run.valid[0].image, model), tmp_path/'trace.html', names)
    assert page.read_text().count('data:image/png') > 10
    s = run.valid[0]
    images = to_input(s.image, model)
    gt = [torch.tensor(x)[None] for x in (s.instances.boxes, s.instances.labels, s.instances.masks())]
    pad = torch.nn.functional.pad(gt[2], (0, images.shape[-1] - 96, 0, images.shape[-2] - 96))
    training = trace_model(model, images, gt[0], gt[1], pad, names=names)
    for box in training.boxes(): assert training.show(box).axes
    eager = MaskRCNN(run.config.change(detection=dict(min_score=0.))).eval()
    eager.load_state_dict(model.state_dict())
    assert (cam := grad_cam(eager, images[0])).pixels.shape == images.shape[-2:] and cam.pixels.max() > 0

def test_pictures_of_five_channels(run, tmp_path):
    s = run.valid[0]
    shown = show_instances(s.image, s.instances, names=CLASSES).images[0].get_array()
    assert (shown == composite(s.image)).all() and shown.shape == (96, 96, 3)
    first = show_image(torch.tensor(s.image).permute(2, 0, 1) / 255).images[0].get_array()
    assert np.allclose(first * 255, composite(s.image), atol=.51)
    learn = learner.mask_rcnn_learner(run.learn.dls, run.config)
    for show in (lambda: learn.show_results(max_n=1, shuffle=False), lambda: learn.dls.show_batch(max_n=1)):
        plt.close('all')
        with learn.no_bar(): show()
        picture = plt.gcf().axes[0].images[0].get_array()
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and 0 < picture.mean() < 250

def test_show_batch_of_colours():
    "What is shown are the pixels of the image."
    train, valid = open_dataset(shapes_folder())
    dls = learner.instance_dls(train.subset(range(2)), valid.subset(range(2)), item_tfms=(), bs=2, device='cpu')
    plt.close('all')
    dls.valid.show_batch(max_n=1)
    assert (plt.gcf().axes[0].images[0].get_array() == valid[0].image).all()

@quick
@given(hnp.arrays(np.uint8, st.tuples(st.integers(8, 12), st.integers(8, 12), st.sampled_from([2, 4, 5, 7]))))
def test_a_composite_hides_no_channel(image):
    out = composite(image)
    assert out.shape == (*image.shape[:2], 3) and out.dtype == np.uint8
    assert abs(out.max(-1).astype(int) - image.max(-1)).max() <= 1


# -- the wrong number of channels

def test_one_sentence_for_the_wrong_number_of_channels(run):
    rgb = make_shapes(1, 0)[0]
    for image, config, a, b in ((rgb.image, run.config, 3, 5), (run.valid[0].image, SHAPES, 5, 3)):
        with pytest.raises(DataError, match=rf'^cells\.tif: the picture has {a} channels but the model was trained with {b}: [^\n]+$'): check_channels(image, config, 'cells.tif')
        with pytest.raises(DataError, match=rf'the picture has {a} channels but the model was trained with {b}'): predict_instances(MaskRCNN(config), image)
        with pytest.raises(ValueError, match=rf'have {a} channels but the model was made for {b}'): MaskRCNN(config).eval().predict(torch.zeros(1, a, 64, 64))

def test_a_learner_says_so_before_it_trains(folder):
    train, valid = open_dataset(folder)
    dls = learner.instance_dls(train, valid, bs=2, device='cpu')
    with pytest.raises(DataError, match=rf'^{re.escape(train.names[0])}: the picture has 5 channels but the model was trained with 3'): learner.mask_rcnn_learner(dls)

def test_mean_and_std_agree():
    with pytest.raises(ValueError, match='mean has 5 numbers and std 3'): SHAPES.change(backbone=dict(mean=(.5,) * 5))

def test_channels_are_measured(folder):
    train, _ = open_dataset(folder)
    pixels = np.concatenate([s.image.reshape(-1, 5) for s in train]) / 255
    found = measure_channels(train)
    assert np.allclose(found['mean'], pixels.mean(0), atol=1e-4) and np.allclose(found['std'], pixels.std(0), atol=1e-4)
    mixed = [train[0], replace(train[1], image=train[1].image[..., :4], name='odd')]
    data = type('Data', (list,), dict(names=['first', 'odd']))(mixed)
    with pytest.raises(DataError, match='^odd: the picture has 4 channels but first has 5'): measure_channels(data)


# -- weights of three channels

@pytest.mark.parametrize('n', [1, 2, 5])
def test_imagenet_weights_for_other_channels(n, monkeypatch):
    set_seed(0)
    state = resnet18(weights=None).state_dict()
    monkeypatch.setitem(learner.IMAGENET, ((2, 2, 2, 2), False), SimpleNamespace(get_state_dict=lambda progress: dict(state), url=''))
    config = SHAPES.change(backbone=dict(**RESNET18, width=64))
    three, other = (load_imagenet(MaskRCNN(c)).eval().backbone.body for c in (config, config.change(backbone=dict(mean=(.5,) * n, std=(.2,) * n))))
    assert torch.equal(three.conv1.weight, state['conv1.weight']) and other.conv1.weight.shape == (64, n, 7, 7)
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items() if k != 'conv1.weight')
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        for a, b in zip(three(x.expand(-1, 3, -1, -1)), other(x.expand(-1, n, -1, -1))): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

def test_predict_command_on_five_channels(run, folder, tmp_path):
    from typer.testing import CliRunner
    from maskrcnn_edu.train import app
    file = next((folder/'images').glob('*1_0000.tif'))
    done = CliRunner().invoke(app, ['predict', str(file), '--weights', str(run.out/'weights.safetensors'), '--out', str(tmp_path/'found'), '--min-score', '0', '--tile', '64'])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path/'found'/f'{file.stem}_overlay.png') as im: assert im.size == (96, 96) and im.mode == 'RGB'
    refused = CliRunner().invoke(app, ['predict', str(file), '--weights', 'shapes', '--out', str(tmp_path/'none')])
    assert refused.exit_code == 1 and '5 channels' in refused.output and file.name in refused.output
