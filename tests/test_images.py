"One path from file to pixels: forty encodings of one picture, what is unusual and named, what is refused in one sentence, and files that are damaged."
import io, itertools, logging, random, re, struct, subprocess, sys, warnings, zlib
from pathlib import Path
import imagecodecs
import numpy as np
import psutil
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms, ImageOps
from skimage import io as skimage_io
from maskrcnn_edu.data import images
from maskrcnn_edu.data.files import DataError
from maskrcnn_edu.data.images import Pixels, image_size, read_image, read_pixels, scale_levels, to_picture, to_uint8
from maskrcnn_edu.data.tiff import from_cmyk, is_tiff, picture_axes, turn_upright

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
said = lambda e: str(e.value)
def is_sentence(text): return '\n' not in text and len(text) < 500 and 'Traceback' not in text


# -- the picture, and files of it that other libraries or the lines below write

def shapes(high, dtype, seed=0, size=(24, 34)):
    "Grey pictures of three channels with edges, slopes and noise, (H,W,3)."
    y, x = np.mgrid[:size[0], :size[1]]
    rng = np.random.default_rng(seed)
    waves = np.stack([np.sin(x / 5), np.cos(y / 4), ((x - 17) ** 2 + (y - 12) ** 2 < 60) * 1.], -1)
    return ((waves * .4 + .5 + rng.uniform(-.05, .05, waves.shape)).clip(0, 1) * high).astype(dtype)

RGB8, RGB16 = shapes(255, np.uint8), shapes(4095, np.uint16)      # of a camera of 12 bits
GREY8, GREY16 = RGB8[..., 0], RGB16[..., 0]
ALPHA8 = (shapes(255, np.uint8, 5)[..., 1] // 2 + 100)
ALPHA16 = ALPHA8.astype(np.uint16) * 257
BITS = {b: (GREY8 >> (8 - b)) for b in (1, 2, 4)}
TABLE = np.random.default_rng(1).permutation(256)[:, None] * np.array([1, 3, 5]) % 256      # (256,3), any order
TABLE = TABLE.astype(np.uint8)

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def packed_rows(x, bits):
    "Rows of a PNG: a filter of none, then the samples, packed to bytes."
    if bits == 16: return b''.join(b'\0' + r.astype('>u2').tobytes() for r in x)
    if bits == 8: return b''.join(b'\0' + r.tobytes() for r in x)
    each = (x[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return b''.join(b'\0' + np.packbits(r).tobytes() for r in each.reshape(len(x), -1).astype(np.uint8))

PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]

def png(x, bits, kind, before=b'', after=b'', interlaced=False):
    "A PNG by hand, after its specification: kinds 0 grey, 2 colours, 3 palette, 4 grey with alpha, 6 colours with alpha."
    parts = [x[y::dy, x0::dx] for y, x0, dy, dx in PASSES] if interlaced else [x]
    rows = b''.join(packed_rows(p, bits) for p in parts if p.shape[0] and p.shape[1])
    head = struct.pack('>IIBBBBB', x.shape[1], x.shape[0], bits, kind, 0, 0, interlaced)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + before + chunk(b'IDAT', zlib.compress(rows)) + after + chunk(b'IEND', b'')

def pillow(x, kind, mode=None, **kwargs):
    out = io.BytesIO()
    im = x if isinstance(x, Image.Image) else Image.fromarray(x)
    (im.convert(mode) if mode else im).save(out, kind, **kwargs)
    return out.getvalue()

def tiff(x, **kwargs):
    out = io.BytesIO()
    tifffile.imwrite(out, x, **kwargs)
    return out.getvalue()

def npy(x):
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()

def exif(turn):
    e = Image.Exif()
    e[274] = turn
    return e

def stack(*parts): return np.concatenate([p if p.ndim == 3 else p[..., None] for p in parts], -1)

PLTE = chunk(b'PLTE', TABLE.tobytes())
def indexed(numbers, kind, **kwargs):
    im = Image.fromarray(numbers)
    im.putpalette(TABLE.tobytes())
    return pillow(im, kind, **kwargs)
COLOURMAP = TABLE.T.astype(np.uint16) * 257

# name -> file, values that were written, colour?, alpha, numbers, how far a value may be off
def entry(file, values, colour=False, alpha=None, numbers=None, off=0): return file, values, colour, alpha, numbers, off
FILES = {
    'png 1 bit': entry(png(BITS[1], 1, 0), BITS[1].astype(bool)),
    'png 2 bits': entry(png(BITS[2], 2, 0), BITS[2] * 85, numbers=BITS[2]),
    'png 4 bits': entry(png(BITS[4], 4, 0), BITS[4] * 17, numbers=BITS[4]),
    'png 8 bits': entry(png(GREY8, 8, 0), GREY8),
    'png 16 bits': entry(png(GREY16, 16, 0), GREY16),
    'png rgb': entry(png(RGB8, 8, 2), RGB8, True),
    'png rgb 16': entry(png(RGB16, 16, 2), RGB16, True),
    'png rgba': entry(png(stack(RGB8, ALPHA8), 8, 6), RGB8, True, ALPHA8),
    'png rgba 16': entry(png(stack(RGB16, ALPHA16), 16, 6), RGB16, True, ALPHA16),
    'png la': entry(png(stack(GREY8, ALPHA8), 8, 4), GREY8, False, ALPHA8),
    'png la 16': entry(png(stack(GREY16, ALPHA16), 16, 4), GREY16, False, ALPHA16),
    **{f'png palette {b}': entry(png(n, b, 3, chunk(b'PLTE', TABLE[:2**b].tobytes())), TABLE[n], True, numbers=n) for b, n in BITS.items()},
    'png palette 8': entry(png(GREY8, 8, 3, PLTE), TABLE[GREY8], True, numbers=GREY8),
    'png palette transparent': entry(png(GREY8, 8, 3, PLTE + chunk(b'tRNS', bytes(range(256)))), TABLE[GREY8], True, GREY8, GREY8),
    'png rgb transparent colour': entry(png(RGB8, 8, 2, chunk(b'tRNS', RGB8[3, 4].astype('>u2').tobytes())), RGB8, True, np.where((RGB8 == RGB8[3, 4]).all(-1), 0, 255)),
    'png rgb 16 transparent colour': entry(png(RGB16, 16, 2, chunk(b'tRNS', RGB16[3, 4].astype('>u2').tobytes())), RGB16, True, np.where((RGB16 == RGB16[3, 4]).all(-1), 0, 65535)),
    'png rgb interlaced': entry(png(RGB8, 8, 2, interlaced=True), RGB8, True),
    'png rgb 16 interlaced': entry(png(RGB16, 16, 2, interlaced=True), RGB16, True),
    'png 1 bit interlaced': entry(png(BITS[1], 1, 0, interlaced=True), BITS[1].astype(bool)),
    'jpeg grey': entry(pillow(GREY8, 'JPEG', quality=95), GREY8, off=12),
    'jpeg rgb': entry(pillow(RGB8, 'JPEG', quality=95, subsampling=0), RGB8, True, off=20),
    'jpeg cmyk': entry(pillow(RGB8, 'JPEG', 'CMYK', quality=95), RGB8, True, off=30),
    'jpeg 2000': entry(pillow(RGB8, 'JPEG2000'), RGB8, True),
    'jpeg 2000 16': entry(imagecodecs.jpeg2k_encode(RGB16, level=0, reversible=True), RGB16, True),
    'gif': entry(indexed(GREY8, 'GIF', optimize=False), TABLE[GREY8], True, numbers=GREY8),
    'gif transparent': entry(indexed(GREY8, 'GIF', optimize=False, transparency=int(GREY8[0, 0])), TABLE[GREY8], True, np.where(GREY8 == GREY8[0, 0], 0, 255), GREY8),
    'webp lossless': entry(pillow(RGB8, 'WEBP', lossless=True), RGB8, True),
    'webp lossless rgba': entry(pillow(stack(RGB8, ALPHA8), 'WEBP', lossless=True, exact=True), RGB8, True, ALPHA8),
    'webp lossy': entry(pillow(RGB8, 'WEBP', quality=95), RGB8, True, off=60),
    'bmp rgb': entry(pillow(RGB8, 'BMP'), RGB8, True),
    'bmp grey': entry(pillow(GREY8, 'BMP'), GREY8),
    'bmp 1 bit': entry(pillow(Image.fromarray(BITS[1].astype(bool)), 'BMP'), BITS[1].astype(bool)),
    'bmp palette': entry(indexed(GREY8, 'BMP'), TABLE[GREY8], True, numbers=GREY8),
    'ppm': entry(pillow(RGB8, 'PPM'), RGB8, True),
    'pgm 16': entry(b'P5\n34 24\n65535\n' + GREY16.astype('>u2').tobytes(), GREY16.astype(np.int32)),
    **{f'npy {x.dtype.str} {x.ndim}': entry(npy(x), x, x.ndim == 3) for x in (RGB8, RGB16, GREY8, GREY16.astype('>u2'), GREY16.astype(np.int64), (GREY8 / 255).astype(np.float16), RGB8 / 255, BITS[1].astype(bool))},
    'npy f order': entry(npy(np.asfortranarray(RGB16)), RGB16, True),
    'tiff palette': entry(tiff(GREY8, photometric='palette', colormap=COLOURMAP), TABLE[GREY8], True, numbers=GREY8),
    'tiff palette of 8 bits': entry(tiff(GREY8, photometric='palette', colormap=TABLE.T.astype(np.uint16)), TABLE[GREY8], True, numbers=GREY8),
    'tiff rgba': entry(tiff(stack(RGB8, ALPHA8), photometric='rgb', extrasamples=['unassalpha']), RGB8, True, ALPHA8),
    'tiff rgba 16 planar': entry(tiff(np.moveaxis(stack(RGB16, ALPHA16), -1, 0), photometric='rgb', planarconfig='separate', extrasamples=['unassalpha']), RGB16, True, ALPHA16),
    'tiff la': entry(tiff(stack(GREY16, ALPHA16), photometric='minisblack', planarconfig='contig', extrasamples=['unassalpha']), GREY16, False, ALPHA16),
    'tiff rgbx': entry(tiff(stack(RGB8, ALPHA8), photometric='rgb', extrasamples=['unspecified']), RGB8, True, ALPHA8),
    'tiff 4 bits': entry(tiff(BITS[4], bitspersample=4), BITS[4] * 17, numbers=BITS[4]),
    'tiff 12 bits': entry(tiff(GREY16, bitspersample=12), GREY16),
    'tiff ccitt': entry(pillow(Image.fromarray(BITS[1].astype(bool)), 'TIFF', compression='group4'), BITS[1].astype(bool)),
    'tiff cmyk': entry(pillow(RGB8, 'TIFF', 'CMYK'), RGB8, True, off=1),
    'tiff ycbcr': entry(pillow(RGB8, 'TIFF', 'YCbCr'), RGB8, True, off=8),
    'tiff jpeg': entry(tiff(RGB8, photometric='rgb', compression='jpeg', compressionargs=dict(level=98)), RGB8, True, off=60),
    'tiff jpeg by Pillow': entry(pillow(RGB8, 'TIFF', compression='jpeg', quality=98), RGB8, True, off=30),
    'tiff cyx': entry(tiff(np.moveaxis(RGB16, -1, 0), photometric='minisblack', metadata=dict(axes='CYX')), RGB16),
    'tiff imagej': entry(tiff(np.moveaxis(RGB16, -1, 0), imagej=True, metadata=dict(axes='CYX')), RGB16),
    'tiff ome': entry(tiff(np.moveaxis(RGB16, -1, 0), ome=True, photometric='minisblack', metadata=dict(axes='CYX')), RGB16),
}

@pytest.mark.parametrize('name', FILES)
def test_what_was_written_is_what_is_read(name):
    file, values, colour, alpha, numbers, off = FILES[name]
    found = read_pixels(io.BytesIO(file))
    assert found.values.shape == values.shape and found.colour == colour and not found.inverted
    if off: assert abs(found.values.astype(int) - values).max() <= off and abs(found.values.astype(float) - values).mean() < max(1, off / 5)
    else: assert (found.values == values).all() and found.values.dtype == values.dtype.newbyteorder('=') and found.values.dtype.isnative
    for ours, theirs in ((found.alpha, alpha), (found.numbers, numbers)):
        assert (ours is None) == (theirs is None) and (ours is None or (ours == theirs).all())
    assert image_size(io.BytesIO(file)) == values.shape[:2]
    picture = read_image(io.BytesIO(file))
    assert picture.dtype == np.uint8 and picture.shape == (24, 34, 3) and picture.flags.c_contiguous and (picture == to_picture(found)).all()

def test_forty_encodings_of_what_is_the_same_give_one_picture():
    groups = {}
    for name, (file, values, colour, alpha, numbers, off) in FILES.items():
        if not off: groups.setdefault((values.astype(float).tobytes(), values.dtype.kind == 'f', colour), []).append((name, read_image(io.BytesIO(file))))
    assert sum(map(len, groups.values())) >= 40 and max(map(len, groups.values())) >= 6
    for files in groups.values():
        for name, picture in files: assert (picture == files[0][1]).all(), (name, files[0][0])

def test_the_picture_of_8_bits_is_the_file():
    for name in ('png rgb', 'bmp rgb', 'webp lossless', 'ppm', 'png rgba'): assert (read_image(io.BytesIO(FILES[name][0])) == RGB8).all()
    assert (read_image(io.BytesIO(FILES['png 8 bits'][0])) == GREY8[..., None]).all() and (read_image(io.BytesIO(FILES['png 1 bit'][0])) == BITS[1][..., None] * 255).all()

DTYPES = [*map(np.dtype, ['?', 'u1', 'u2', 'u4', 'u8', 'i1', 'i2', 'i4', 'i8', 'f2', 'f4', 'f8'])]
TIFFS = list(itertools.product(DTYPES, [None, 'zlib', 'lzw', 'zstd', 'lzma', 'packbits'], ['contig', 'separate', 'grey'], '<>', [False, True], [None, (16, 16)]))

@pytest.mark.parametrize('kind', DTYPES, ids=str)
def test_tiff_of_every_type_packing_order_and_layout(kind):
    n = 0
    for dtype, packing, planes, order, big, tile in TIFFS:
        if dtype != kind: continue
        high = 1 if dtype == bool else min(np.iinfo(dtype).max, 2**60) if np.dtype(dtype).kind in 'ui' else 1
        x = shapes(high, np.float64)
        x = (x > .5) if dtype == bool else x.astype(dtype)
        x = x[..., 0] if planes == 'grey' else x
        if dtype == bool and planes == 'contig': continue        # three bits a pixel: tifffile does not read back what it wrote
        written = np.moveaxis(x, -1, 0) if planes == 'separate' else x
        kwargs = dict(photometric='minisblack') if planes == 'grey' else dict(planarconfig=planes, photometric='rgb')
        file = tiff(written, compression=packing, byteorder=order, bigtiff=big, tile=tile, **kwargs)
        found = read_pixels(io.BytesIO(file))
        assert (found.values == x).all() and found.values.dtype == dtype and found.colour == (planes != 'grey'), (packing, planes, order, big, tile)
        if n % 8 == 0: assert (read_image(io.BytesIO(file)) == read_image(io.BytesIO(npy(x)))).all()
        n += 1
    assert n >= 60

ANY = st.sampled_from([np.bool_, *'u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8 >u2 >i4 >f4'.split()]).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=20).filter(lambda s: len(s) == 2 or s[2] <= 5)))

@settings(quick, max_examples=150)
@given(ANY)
def test_any_array_comes_back(x):
    if x.dtype.kind == 'f' and not np.isfinite(x).any(): x = np.zeros_like(x)
    true = x[..., 0] if x.shape[2:] == (1,) else x
    for how in ('npy', 'tiff', 'png'):
        if how == 'npy': file = npy(x)
        elif how == 'tiff': file = tiff(x, photometric='minisblack', metadata=dict(axes='YX' if x.ndim == 2 else 'YXC'))
        elif x.dtype.str in ('|u1', '<u2') and (x.ndim == 2 or x.shape[2] < 5): file = imagecodecs.png_encode(true)
        else: continue
        if how == 'png' and true.shape[2:] in ((2,), (4,)): found, expected = read_pixels(io.BytesIO(file)), true[..., :-1]
        else: found, expected = read_pixels(io.BytesIO(file)), true
        if expected.shape[2:] == (1,): expected = expected[..., 0]
        assert found.values.shape == expected.shape and found.values.dtype == expected.dtype.newbyteorder('='), how
        assert np.array_equal(found.values, expected, equal_nan=x.dtype.kind == 'f'), how
        picture = to_picture(found)
        assert picture.dtype == np.uint8 and picture.ndim == 3


# -- brightness

def old_to_uint8(pixels, percentiles=(.1, 99.9), dyes=False):
    "The lines as they were."
    if dyes: return np.stack([old_to_uint8(c, percentiles) for c in np.moveaxis(pixels, -1, 0)], -1)
    known = pixels[np.isfinite(pixels)]
    if not len(known): return np.zeros(pixels.shape, np.uint8)
    low, high = np.percentile(known.astype(np.float64), percentiles)
    if low == high: low, high = float(known.min()), float(known.max())
    x = (pixels - np.float64(low)) / ((high - low) or 1)
    return (np.nan_to_num(x, copy=False).clip(0, 1) * 255).round().astype(np.uint8)

@quick
@given(st.sampled_from(['u2', 'i2', 'i4', 'f4', 'f8']).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=2, max_dims=3, max_side=12))), st.booleans())
def test_deep_pixels_are_scaled_as_they_were(x, dyes):
    dyes = dyes and x.ndim == 3
    if x.dtype.kind == 'f': x = np.where(abs(x) < 1e30, x, 0).astype(x.dtype)
    assert (to_uint8(x, dyes=dyes) == old_to_uint8(x, dyes=dyes)).all()

def test_bands_of_a_large_picture_are_no_different():
    x = np.random.default_rng(0).integers(0, 65536, (3000, 1500)).astype(np.uint16)
    assert (to_uint8(x) == old_to_uint8(x)).all()

@pytest.mark.parametrize('hole', ['corner of nan', 'row of inf', 'log of nothing', 'both'])
@pytest.mark.parametrize('write', [tiff, npy])
def test_what_is_not_finite_changes_no_other_pixel(hole, write):
    x = shapes(900, np.float32, size=(200, 240))[..., 2] + 30
    holed, where = x.copy(), np.zeros(x.shape, bool)
    if hole in ('corner of nan', 'both'): holed[:5, :7] = np.nan
    if hole in ('row of inf', 'both'): holed[100] = np.inf
    if hole == 'log of nothing':
        background = x < np.percentile(x, 30)
        with np.errstate(divide='ignore'): holed = np.log(np.where(background, 0, x))
        x = np.log(x)
    where = ~np.isfinite(holed)
    found = read_pixels(io.BytesIO(write(holed)))
    plain, picture = read_image(io.BytesIO(write(np.where(where, np.median(holed[~where]), holed)))), to_picture(found)
    assert np.array_equal(found.values, holed, equal_nan=True)
    assert abs(picture.astype(int) - plain)[~where].max() <= 6
    assert (picture[np.isposinf(holed)] == 255).all() and (picture[np.isnan(holed) | np.isneginf(holed)] == 0).all()
    assert any(f'{where.sum()} numbers that are NaN or infinite' == what for what, _ in found.notes)

def test_a_picture_without_a_number_is_refused():
    for write in (tiff, npy):
        with pytest.raises(DataError, match=r'^a\.tif: not one of its pixels is a finite number'): read_pixels(io.BytesIO(write(np.full((9, 9), np.nan, np.float32))), 'a.tif')

@pytest.mark.parametrize('make', [lambda x: png(x, 16, 2), lambda x: png(stack(x, ALPHA16), 16, 6), lambda x: tiff(x, photometric='rgb'), lambda x: tiff(np.moveaxis(x, -1, 0), planarconfig='separate', photometric='rgb'), npy])
def test_means_of_a_12_bit_camera(make):
    "What Pillow gives of a PNG like this is 16 times too small, and 0 where it is dim."
    found = read_pixels(io.BytesIO(make(RGB16)))
    inside = RGB16[..., 2] > 2000
    assert np.allclose(found.values[inside].mean(0), RGB16[inside].mean(0)) and found.values[inside].mean() > 1000
    assert (to_picture(found) == to_uint8(RGB16)).all() and to_picture(found).max() == 255

def test_white_is_zero():
    for x, bits in ((GREY8, {}), (GREY16, {}), (BITS[4], dict(bitspersample=4))):
        found = read_pixels(io.BytesIO(tiff(x, photometric='miniswhite', **bits)))
        assert ((found.numbers if bits else found.values) == x).all() and found.inverted and found.notes
        assert (to_picture(found) == 255 - to_picture(read_pixels(io.BytesIO(tiff(x, **bits))))).all()
    fax = io.BytesIO(tiff(BITS[1].astype(bool), photometric='miniswhite'))
    assert (read_pixels(fax).values == BITS[1]).all() and read_pixels(fax).inverted and (read_image(fax) == np.array(Image.open(fax).convert('RGB'))).all()

def test_inks_and_lightness_against_pillow():
    rng = np.random.default_rng(0)
    inks = rng.integers(0, 256, (40, 50, 4)).astype(np.uint8)
    assert (from_cmyk(inks) == np.array(Image.fromarray(inks, 'CMYK').convert('RGB'))).all()
    deep = from_cmyk(inks.astype(np.uint16) * 257)
    assert abs(deep / 257 - from_cmyk(inks)).max() <= .51
    lab = ImageCms.profileToProfile(Image.fromarray(RGB8), ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), outputMode='LAB')
    x = np.array(lab)
    for kind, stored in (('cielab', x), ('icclab', np.concatenate([x[..., :1], x[..., 1:] + np.uint8(128)], -1))):
        found = read_pixels(io.BytesIO(tiff(stored, photometric=kind)))
        off = abs(found.values.astype(int) - RGB8)        # another white, and other ways with colours that no screen has
        assert found.colour and np.percentile(off, 90) < 20 and off.mean() < 8, (kind, np.percentile(off, 90), off.mean())
    assert read_pixels(io.BytesIO(tiff(inks, photometric='separated'))).notes


# -- orientation

TURNS = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
def upright(x, turn): return x if TURNS[turn] is None else np.array(Image.fromarray(x).transpose(TURNS[turn]))

@pytest.mark.parametrize('turn', TURNS)
def test_each_turn_is_pillows(turn):
    assert (turn_upright(RGB8, turn) == upright(RGB8, turn)).all() and (turn_upright(GREY8, turn) == upright(GREY8, turn)).all() and turn_upright(None, turn) is None

TAG = {'TIFF': lambda t: dict(extratags=[(274, 3, 1, t, True)])}
TURNED = {
    'jpeg': (lambda t: pillow(RGB8, 'JPEG', quality=95, subsampling=0, exif=exif(t)), 20), 'webp': (lambda t: pillow(RGB8, 'WEBP', lossless=True, exif=exif(t)), 0),
    'png': (lambda t: pillow(RGB8, 'PNG', exif=exif(t)), 0), 'png after its pixels': (lambda t: png(RGB8, 8, 2, after=chunk(b'eXIf', exif(t).tobytes()[6:])), 0),
    'png after its pixels, in words': (lambda t: png(RGB8, 8, 2, after=chunk(b'tEXt', b'Raw profile type exif\0\nexif\n      26\n' + exif(t).tobytes().hex().encode())), 0),
    'png 16': (lambda t: png(RGB16, 16, 2, chunk(b'eXIf', exif(t).tobytes()[6:])), 0), 'tiff': (lambda t: tiff(RGB8, photometric='rgb', **TAG['TIFF'](t)), 0),
    'tiff 16 lzw': (lambda t: tiff(RGB16, photometric='rgb', compression='lzw', **TAG['TIFF'](t)), 0), 'tiff by Pillow': (lambda t: pillow(RGB8, 'TIFF', exif=exif(t)), 0),
    'tiff cyx': (lambda t: tiff(np.moveaxis(RGB16, -1, 0), photometric='minisblack', metadata=dict(axes='CYX'), **TAG['TIFF'](t)), 0),
    'tiff that Pillow unpacks': (lambda t: pillow(Image.fromarray(RGB8).convert('YCbCr'), 'TIFF', exif=exif(t)), 4),
}

@pytest.mark.parametrize('turn', TURNS)
@pytest.mark.parametrize('kind', TURNED)
def test_turned_exactly_once_in_every_kind_of_file(kind, turn):
    make, off = TURNED[kind]
    file, true = io.BytesIO(make(turn)), turn_upright(RGB16 if ' 16' in kind or 'cyx' in kind else RGB8, turn)
    found = read_pixels(file)
    assert found.values.shape == true.shape and abs(found.values.astype(int) - true).max() <= off
    assert image_size(file) == true.shape[:2] == read_image(file).shape[:2] and any('EXIF' in w for w, _ in found.notes) == (turn > 1)
    if off == 0 and true.dtype == np.uint8: assert (found.values == np.array(ImageOps.exif_transpose(Image.open(file)))).all()

@pytest.mark.parametrize('kind', TURNED)
def test_a_size_that_fits_only_what_is_stored_keeps_it(kind):
    make, off = TURNED[kind]
    for turn in (6, 8):
        file, stored = io.BytesIO(make(turn)), RGB16 if ' 16' in kind or 'cyx' in kind else RGB8
        kept = read_pixels(file, size=(24, 34))
        assert kept.values.shape == stored.shape and abs(kept.values.astype(int) - stored).max() <= off and any('kept as stored' in done for _, done in kept.notes)
        for size in (None, (34, 24), [34, 24], (7, 9)):
            found = read_pixels(file, size=size)
            assert found.values.shape[:2] == (34, 24) and any('upright' in done for _, done in found.notes)
            assert (read_image(file, size=size) == to_picture(found)).all()
    assert read_pixels(io.BytesIO(make(3)), size=(24, 34)).values.shape[:2] == (24, 34) and any('upright' in d for _, d in read_pixels(io.BytesIO(make(3)), size=(24, 34)).notes)

def test_opacity_and_palette_are_turned_with_the_colours():
    file = io.BytesIO(png(GREY8, 8, 3, PLTE + chunk(b'tRNS', bytes(range(256))) + chunk(b'eXIf', exif(6).tobytes()[6:])))
    found = read_pixels(file)
    assert (found.numbers == turn_upright(GREY8, 6)).all() and (found.alpha == found.numbers).all() and (found.values == TABLE[found.numbers]).all()

@pytest.mark.parametrize('said', [0, 9, 274])
def test_an_orientation_that_there_is_not(said):
    for file in (tiff(RGB8, photometric='rgb', **TAG['TIFF'](said)), pillow(RGB8, 'PNG', exif=exif(said))):
        found = read_pixels(io.BytesIO(file))
        assert (found.values == RGB8).all() and not found.notes

def test_damaged_words_beside_a_picture_do_no_harm():
    assert (read_pixels(io.BytesIO(png(RGB8, 8, 2, chunk(b'eXIf', b'nonsense')))).values == RGB8).all()


# -- refused in one sentence

def gif(n): return pillow(RGB8, 'GIF', save_all=True, append_images=[Image.fromarray(RGB8 // (i + 2)) for i in range(n - 1)])
def frames(kind, **kwargs): return pillow(RGB8, kind, save_all=True, append_images=[Image.fromarray(255 - RGB8)], **kwargs)
def pages(*arrays):
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as f:
        for a in arrays: f.write(a, contiguous=False, metadata=None)
    return out.getvalue()

REFUSED = {
    'gif of 3 frames': (gif(3), r'animation, or 3 pictures in one file \(GIF\).*save each as a file of its own'),
    'webp of 2 frames': (frames('WEBP'), r'animation, or 2 pictures'), 'apng': (frames('PNG'), r'animation, or 2 pictures in one file \(PNG\)'),
    'stack zyx': (tiff(np.zeros((6, 24, 34), np.uint16), metadata=dict(axes='ZYX')), r'stack \(6x24x34, axes ZYX\).*save each plane'),
    'stack tyx': (tiff(np.zeros((6, 24, 34), np.uint16), metadata=dict(axes='TYX')), r'stack'), 'stack czyx': (tiff(np.zeros((6, 2, 24, 34), np.uint16), imagej=True, metadata=dict(axes='ZCYX')), r'stack'),
    'stack without letters': (tiff(np.zeros((20, 24, 34), np.uint16), metadata=None), r'stack'),
    'pages': (pages(GREY16, GREY16, RGB16), r'2 pictures in this file|3 pictures in this file|stack'), 'small first': (pages(GREY16[:9, :9], GREY16), r'2 pictures in this file'),
    'npy channels first': (npy(np.moveaxis(RGB8, -1, 0)), r'channels first \(3x24x34\); save np\.moveaxis\(array, 0, -1\)'),
    'npy stack': (npy(np.zeros((20, 24, 34), np.uint8)), r'array of 20x24x34 numbers.*\(H,W,C\)'), 'npy of four axes': (npy(np.zeros((2, 2, 24, 34))), r'array of 2x2x24x34'), 'npy of one axis': (npy(np.zeros(9)), r'array of 9 numbers'),
    'npy of complex': (npy(np.zeros((9, 9), complex)), r'of the type complex128'), 'npy of text': (npy(np.array([['a', 'b']])), r'of the type <U1'), 'npy of objects': (npy(np.array([[1, None]], dtype=object)), r'of the type object'),
    'npy of records': (npy(np.zeros((3, 3), [('a', 'u1')])), r'of the type'), 'npy without pixels': (npy(np.zeros((0, 9))), r'no pixels'), 'tiff of complex': (tiff(np.zeros((9, 9), np.complex64)), r'of the type complex64'),
    'nothing': (b'', r'the file is empty \(0 bytes\)'), 'zeros': (bytes(5000), r'holds zeros and no picture'), 'web page': (b'<html><body>404</body></html>', r'a web page, not a picture'),
    'web page 2': (b'\n  <!DOCTYPE html>\n<html lang="en">', r'a web page'), 'git-lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12\n', r'a pointer of git-lfs.*git lfs pull'),
    'junk': (bytes(range(200)), r'cannot be read \(it is of no kind that is known\)'), 'text': (b'name,area\na,3\n', r'cannot be read'), 'npz': (b'PK\x03\x04' + bytes(50), r'cannot be read'),
    'pnm of 12 bits': (b'P6\n34 24\n4095\n' + RGB16.astype('>u2').tobytes(), r'save it as PNG or TIFF'),
}

@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.parametrize('read', [read_pixels, read_image, image_size])
def test_refused_in_one_sentence(name, read, tmp_path):
    file, sentence = REFUSED[name]
    path = tmp_path/'cells 100%.dat'
    path.write_bytes(file)
    with pytest.raises(DataError, match=sentence) as e: read(path)
    assert said(e).startswith(f'{path}: ') and is_sentence(said(e)) and said(e).count(str(path)) == 1
    with pytest.raises(DataError, match=sentence) as e: read(io.BytesIO(file), 'plate 3')
    assert said(e).startswith('plate 3: ') and e.value.__suppress_context__

def test_missing_and_folder(tmp_path):
    with pytest.raises(DataError, match=r'a\.png: the image is missing; add the file'): read_image(tmp_path/'a.png')
    with pytest.raises(DataError, match='cannot be read'): read_image(tmp_path)

def test_one_frame_and_previews_are_pictures():
    assert (read_image(io.BytesIO(gif(1))) == read_image(io.BytesIO(pillow(RGB8, 'GIF')))).all() and read_pixels(io.BytesIO(frames('MPO', quality=95))).values.shape == (24, 34, 3)
    preview = pages(GREY16, GREY16[::4, ::4])
    assert (read_pixels(io.BytesIO(preview)).values == GREY16).all()


# -- cut short and larger than can be

CUT = {'png': pillow(RGB8, 'PNG'), 'png 16': png(RGB16, 16, 2), 'jpeg': FILES['jpeg rgb'][0], 'gif': FILES['gif'][0], 'bmp': FILES['bmp rgb'][0], 'webp': FILES['webp lossless'][0], 'npy': npy(RGB16), 'jp2': FILES['jpeg 2000'][0],
       'tiff': tiff(RGB16, photometric='rgb'), 'tiff zlib strips': tiff(RGB16, photometric='rgb', compression='zlib', rowsperstrip=3), 'tiff lzw tiles': tiff(RGB16, photometric='rgb', compression='lzw', tile=(16, 16)),
       'tiff by Pillow': pillow(RGB8, 'TIFF', compression='tiff_lzw'), 'tiff fax': FILES['tiff ccitt'][0], 'tiff cyx': FILES['tiff cyx'][0], 'tiff imagej': FILES['tiff imagej'][0], 'tiff jpeg': FILES['tiff jpeg'][0]}

@pytest.mark.parametrize('kind', CUT)
def test_cut_short_is_a_sentence_or_the_whole_picture(kind):
    file, whole = CUT[kind], read_pixels(io.BytesIO(CUT[kind])).values
    refused = 0
    for end in sorted({*np.linspace(0, len(file) - 1, 60).astype(int).tolist(), len(file) - 1, len(file) - 2, len(file) - 5, len(file) - 9}):
        try: found = read_pixels(io.BytesIO(file[:end]), 'a').values
        except DataError as e: refused += 1; assert is_sentence(str(e))
        else: assert np.array_equal(found, whole), end
    assert refused >= 50

def test_a_plain_tiff_cut_short_is_told_so():
    with pytest.raises(DataError, match=r'^a: the image cannot be read \(it was cut short\)'): read_pixels(io.BytesIO(CUT['tiff'][:-100]), 'a')
    with pytest.raises(DataError, match=r'\(it was cut short\)'): image_size(io.BytesIO(CUT['tiff'][:-1]))

def grown_png(side):
    raw = bytearray(png(RGB8, 8, 2))
    raw[16:24] = struct.pack('>II', side, side)
    raw[29:33] = struct.pack('>I', zlib.crc32(bytes(raw[12:29])))
    return bytes(raw)

def grown_tiff(side, **kwargs):
    raw = tiff(np.zeros((64, 64), np.uint16), **kwargs)
    with tifffile.TiffFile(io.BytesIO(raw)) as tif: places = [tif.pages[0].tags[n].valueoffset for n in ('ImageWidth', 'ImageLength', 'RowsPerStrip')]
    raw = bytearray(raw)
    for p in places: raw[p:p + 2] = side.to_bytes(2, 'little')
    return bytes(raw)

def grown_npy(side): return npy(np.zeros((20, 20), np.uint16)).replace(b'(20, 20), }' + b' ' * 12, f'({side}, {side}), }}'.encode().ljust(23))

def grown_gif(side):
    raw = bytearray(FILES['gif'][0])
    at = raw.index(b',\0\0\0\0', 700)
    raw[6:10] = raw[at + 5:at + 9] = struct.pack('<HH', side, side)
    return bytes(raw)

def grown_jpeg(side):
    raw = bytearray(FILES['jpeg rgb'][0])
    at = raw.index(b'\xff\xc0')
    raw[at + 5:at + 9] = struct.pack('>HH', side, side)
    return bytes(raw)

@pytest.mark.parametrize('make', [grown_png, grown_tiff, lambda n: grown_tiff(n, compression='zlib'), lambda n: grown_tiff(n, compression='lzw'), grown_npy, grown_gif, grown_jpeg],
                         ids=['png', 'tiff', 'tiff zlib', 'tiff lzw', 'npy', 'gif', 'jpeg'])
def test_a_head_that_promises_too_much_takes_no_memory(make, monkeypatch):
    monkeypatch.setattr(images.psutil, 'virtual_memory', lambda: type('M', (), dict(available=10**15)))         # not for want of memory
    import tracemalloc
    tracemalloc.start()
    with pytest.raises(DataError, match=r'^a: the image cannot be read \([^\n]+\); replace it') as e: read_pixels(io.BytesIO(make(60000)), 'a')
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5e7 and is_sentence(said(e))

def test_more_than_memory_says_how_to_save(monkeypatch):
    monkeypatch.setattr(images.psutil, 'virtual_memory', lambda: type('M', (), dict(available=1000)))
    for name in ('png rgb 16', 'tiff rgba', 'npy <u2 3', 'webp lossless'):
        with pytest.raises(DataError, match=r'^big: this picture does not fit into the memory; save it as a TIFF in tiles without compression, which `predict` reads piece by piece') as e: read_pixels(io.BytesIO(FILES[name][0]), 'big')
        assert is_sentence(said(e)) and image_size(io.BytesIO(FILES[name][0])) == (24, 34)

@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'npy'])
def test_more_than_89_million_pixels(kind, tmp_path):
    flat = np.zeros((9000, 10000), np.uint8)
    flat[4000:4003, 5000:5004] = 200
    path = tmp_path/f'big.{kind.lower()}'
    if kind == 'PNG': Image.fromarray(flat).save(path, compress_level=1)
    elif kind == 'TIFF': tifffile.imwrite(path, flat, compression='zlib', rowsperstrip=500)
    else: np.save(path, flat)
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(action='error'): found = read_pixels(path).values
    assert image_size(path) == (9000, 10000) and found.sum() == 200 * 12 and found[4001, 5001] == 200 and Image.MAX_IMAGE_PIXELS == before and not found[:4000].any()

def test_pillows_limit_is_set_aside_and_put_back(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    for name in ('png rgb', 'jpeg rgb', 'gif', 'webp lossless', 'bmp rgb', 'tiff ycbcr'):
        with warnings.catch_warnings(action='error'): assert read_image(io.BytesIO(FILES[name][0])).shape == (24, 34, 3), name
        assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(DataError): read_image(io.BytesIO(b'junk' * 30))
    assert Image.MAX_IMAGE_PIXELS == 100

def test_pieces_that_are_missing_are_no_zeros():
    for kwargs in (dict(compression='zlib', rowsperstrip=4), dict(tile=(16, 16))):
        raw = tiff(RGB16, photometric='rgb', **kwargs)
        with tifffile.TiffFile(io.BytesIO(raw)) as tif: tags = [tif.pages[0].tags[t] for t in tif.pages[0].tags.keys() if t in (279, 325)]
        t = tags[0]
        size = {3: 2, 4: 4, 16: 8}[int(t.dtype)]
        broken = raw[:t.valueoffset + size] + bytes(size) + raw[t.valueoffset + 2 * size:]
        with pytest.raises(DataError, match='pieces of it are missing'): read_pixels(io.BytesIO(broken))

def test_a_library_is_heard_once_and_nothing_stays_changed(tmp_path, caplog, capfd):
    (tmp_path/'a.tif').write_bytes(FILES['tiff cyx'][0][:900])
    log = logging.getLogger('tifffile')
    before = log.filters[:], log.handlers[:], log.propagate, log.level, Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as seen, caplog.at_level(logging.DEBUG):
        warnings.simplefilter('always')
        for file in (tmp_path/'a.tif', io.BytesIO(FILES['jpeg rgb'][0][:500])):
            with pytest.raises(DataError): read_pixels(file)
        read_pixels(io.BytesIO(pillow(RGB8, 'TIFF', 'CMYK', compression='jpeg')))
    assert not seen and not [r for r in caplog.records if r.levelno >= logging.WARNING] and capfd.readouterr() == ('', '')
    assert before == (log.filters, log.handlers, log.propagate, log.level, Image.MAX_IMAGE_PIXELS)

def test_an_open_file_may_be_read_twice_and_is_left_open():
    file = io.BytesIO(FILES['png rgb'][0])
    file.seek(30)
    assert image_size(file) == (24, 34) and (read_image(file) == RGB8).all() and (read_image(file) == RGB8).all() and not file.closed
    assert is_tiff(io.BytesIO(FILES['tiff rgba'][0])) and not is_tiff(file) and file.tell() == 0

def test_a_member_of_a_zip(tmp_path):
    import zipfile
    with zipfile.ZipFile(tmp_path/'a.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for name in ('png rgb', 'tiff cyx', 'npy <u2 3'): z.writestr(name, FILES[name][0])
    with zipfile.ZipFile(tmp_path/'a.zip') as z:
        for name in ('png rgb', 'tiff cyx', 'npy <u2 3'):
            with z.open(name) as f: assert (read_pixels(f).values == FILES[name][1]).all() and image_size(f) == (24, 34)

def test_notes_are_of_what_is_unusual():
    assert read_pixels(io.BytesIO(FILES['png rgb'][0])).notes == () == read_pixels(io.BytesIO(FILES['png 1 bit'][0])).notes
    assert read_pixels(io.BytesIO(png(stack(RGB8, ALPHA8 * 0 + 255), 8, 6))).notes == ()      # opaque everywhere: nothing was ignored
    for name, word in (('png rgba', 'opacity'), ('png rgb 16', 'uint16'), ('jpeg cmyk', 'CMYK'), ('npy <f8 3', 'float64')):
        notes = read_pixels(io.BytesIO(FILES[name][0])).notes
        assert notes and all(len(n) == 2 and all(isinstance(t, str) for t in n) for n in notes) and any(word in what for what, _ in notes), name


# -- damaged bytes

def mutated(file, rng):
    "Flip, cut, insert or swap, once or a few times."
    raw = bytearray(file)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        n, how = len(raw) or 1, rng.choice(['flip', 'flip', 'head', 'cut', 'insert', 'swap', 'number'])
        at = rng.randrange(n)
        if how == 'flip' and raw: raw[at] ^= 1 << rng.randrange(8)
        if how == 'head' and raw: raw[rng.randrange(min(n, 200))] = rng.randrange(256)
        if how == 'cut': del raw[at:at + rng.choice([1, 4, 100, n])]
        if how == 'insert': raw[at:at] = rng.randbytes(rng.choice([1, 2, 8, 300]))
        if how == 'swap':
            other, k = rng.randrange(n), rng.choice([1, 4, 16])
            raw[at:at + k], raw[other:other + k] = raw[other:other + k], raw[at:at + k]
        if how == 'number' and n > 8: raw[at:at + 4] = rng.choice([b'\xff' * 4, b'\x7f\xff\xff\xff', bytes(4), b'\0\0\1\0'])
    return bytes(raw)

SEEDS = {
    'png': ['png rgb', 'png palette transparent', 'png rgb 16', 'png la 16', 'png 1 bit interlaced'], 'jpeg': ['jpeg rgb', 'jpeg grey', 'jpeg cmyk'], 'gif': ['gif', 'gif transparent'],
    'npy': ['npy <u2 3', 'npy |u1 2', 'npy <f8 3'], 'tiff': ['tiff palette', 'tiff rgba 16 planar', 'tiff ccitt', 'tiff jpeg', 'tiff cyx', 'tiff imagej', 'tiff ome', 'tiff 12 bits', 'tiff ycbcr', 'tiff cmyk'],
    'other': ['webp lossless', 'webp lossy', 'bmp palette', 'jpeg 2000', 'pgm 16'],
}
EXTRA = {'jpeg': [pillow(RGB8, 'JPEG', exif=exif(6), progressive=True)], 'gif': [gif(2)], 'png': [frames('PNG')],
         'tiff': [tiff(RGB16, photometric='rgb', compression=c, tile=(16, 16)) for c in ('lzw', 'zlib', 'zstd', 'lzma')] + [pillow(RGB8, 'TIFF', exif=exif(6), compression='packbits')]}
def seed_files(kind): return [FILES[n][0] for n in SEEDS[kind]] + EXTRA.get(kind, [])

def try_mutations(kind, first, count):
    "How many were read and how many refused; anything else is raised."
    files, outcome = seed_files(kind), dict(read=0, refused=0)
    for i in range(first, first + count):
        rng = random.Random(f'{kind} {i}')
        file = mutated(rng.choice(files), rng)
        try: found = read_pixels(io.BytesIO(file), 'a.dat')
        except DataError as e:
            assert str(e).startswith('a.dat: ') and is_sentence(str(e)), (i, str(e))
            outcome['refused'] += 1
        else:
            picture = to_picture(found)
            assert picture.dtype == np.uint8 and picture.ndim == 3 and found.values.dtype.kind in 'buif', i
            assert found.alpha is None or found.alpha.shape == found.values.shape[:2], i
            outcome['read'] += 1
    return outcome

@pytest.mark.parametrize('kind', SEEDS)
def test_a_hundred_mutations(kind):
    "In a process of its own: no crash, no hang, no more than 2 GB beyond what it begins with."
    code = ('import sys, resource, faulthandler; sys.path.insert(0, sys.argv[1]); import test_images as t; faulthandler.dump_traceback_later(100, exit=True)\n'
            'size = int(open("/proc/self/statm").read().split()[0]) * 4096; resource.setrlimit(resource.RLIMIT_AS, (size + 2**31,) * 2)\n'
            'print(t.try_mutations(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))')
    done = subprocess.run([sys.executable, '-c', code, str(Path(__file__).parent), kind, '0', '100'], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = eval(done.stdout)
    assert sum(outcome.values()) == 100 and outcome['refused'] >= 5 and done.stderr == '', (outcome, done.stderr[:500])
