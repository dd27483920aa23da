"""Section 4: opening images, LR from HR, finding pairs."""
import os
import struct
import zlib
from fractions import Fraction
from math import floor
from operator import mul
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image, ImageCms

import srgan

LEVELS = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint16)
INKS = LEVELS.astype(np.uint8)
GREY, GREY_16 = INKS[..., 0], LEVELS[..., 0] * 257
UPRIGHT = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1],
           4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
           7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: np.rot90(x)}


def is_opened_as(path, mode, expected):
    image = srgan.open_image(path)
    return image.mode == mode and np.array_equal(image, expected)


@pytest.mark.parametrize("compression", [None, "tiff_adobe_deflate"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_tiffs_of_every_orientation_and_mode_open_upright(tmp_path, orientation, compression):
    for mode, pixels, opened_as, expected in (
            ("L", GREY, "L", GREY), ("RGBA", INKS, "RGBA", INKS), ("I;16", GREY_16, "L", GREY),
            ("CMYK", INKS, "RGB", (255 - INKS[..., :3]) * ((255 - INKS[..., 3:]) / 255))):
        Image.frombytes(mode, (7, 5), pixels.tobytes()).save(
            tmp_path / "a.tif", tiffinfo={274: orientation}, compression=compression)
        opened, expected = srgan.open_image(tmp_path / "a.tif"), UPRIGHT[orientation](expected)
        assert opened.mode == opened_as and opened.size == expected.shape[1::-1], mode
        assert np.abs(np.asarray(opened) - expected * 1.0).max() <= (mode == "CMYK"), mode


def save_tiff(path, mode, pixels, tag, value):
    """Save a TIFF with another 16-bit number in its directory."""
    Image.frombytes(mode, (7, 5), pixels.tobytes()).save(path, tiffinfo={339: 1})
    before, entry, after = path.read_bytes().partition(struct.pack("<HHI", tag, 3, 1))
    path.write_bytes(before + entry + struct.pack("<H", value) + after[2:])
    return path


def test_tiffs_may_be_white_at_0_but_not_of_12_bits_signed_or_float(tmp_path):
    path = tmp_path / "a.tif"
    assert is_opened_as(save_tiff(path, "L", 255 - GREY, 262, 0), "L", GREY)
    assert is_opened_as(save_tiff(path, "I;16", 65535 - GREY_16, 262, 0), "L", GREY)
    for mode, dtype, tag, value in (("I;16", "u2", 258, 12), ("I;16", "u2", 339, 2),
                                    ("I", "i4", 339, 2), ("I", "i4", 339, 1), ("F", "f4", 339, 3)):
        with pytest.raises(srgan.InputError, match="a.tif.*only unsigned 8-bit and 16-bit images"):
            srgan.open_image(save_tiff(path, mode, GREY.astype(dtype), tag, value))


def test_16_bit_grey_pngs_stay_grey_and_keep_their_transparency(tmp_path):
    path, pixels = tmp_path / "a.png", GREY_16.copy()
    pixels[0, :2] = 1000, 1001                                   # equal in 8 bits, not in 16
    Image.frombytes("I;16", (7, 5), pixels.tobytes()).save(path, transparency=1000)
    grey, opaque = (pixels / 257).round(), np.where(pixels == 1000, 0, 255)
    assert is_opened_as(path, "LA", np.stack([grey, opaque], 2))
    before, header, after = path.read_bytes().partition(b"IHDR")  # grey with alpha: by hand
    header += after[:9] + b"\4" + after[10:13]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in LEVELS[..., :2] * 257)
    path.write_bytes(before + header + struct.pack(">I", zlib.crc32(header)) + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IDAT", zlib.compress(rows)), (b"IEND", b""))))
    assert is_opened_as(path, "LA", INKS[..., :2])


def test_every_other_kind_opens_as_8_bits(tmp_path):
    rgb = Image.fromarray(photo(20, 30))
    grey, cmyk = rgb.convert("L"), rgb.convert("CMYK")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image, name, options, mode in (
            (grey.convert("1"), "a.png", {}, "L"), (rgb.quantize(16), "a.gif", {}, "RGB"),
            (rgb.quantize(16), "a.png", {"transparency": 0}, "RGBA"),
            (grey, "a.png", {"transparency": 7}, "LA"), (grey.convert("LA"), "a.png", {}, "LA"),
            (cmyk, "a.jpg", {}, "RGB"), (cmyk, "a.jpg", {"icc_profile": profile}, "RGB")):
        image.save(tmp_path / name, **options)
        opened = srgan.open_image(tmp_path / name)
        assert opened.mode == mode and not opened.info.get("icc_profile"), (name, options)
        error = np.asarray(opened.convert("RGB"), int) - image.convert("RGB")
        assert np.abs(error).mean() < 8, (name, options)
    (tmp_path / "b.pgm").write_bytes(b"P5 2 1 1023\n" + struct.pack(">HH", 1023, 512))
    assert is_opened_as(tmp_path / "b.pgm", "L", [[255, 128]])


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_orientation_is_applied_and_broken_exif_is_ignored(tmp_path, name):
    image, exif = Image.fromarray(photo(16, 40)), Image.Exif()
    exif[0x0112] = 6                                             # taken in portrait format
    for data in (exif, b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", exif.tobytes()[:20]):
        image.save(tmp_path / name, exif=data)
        opened = srgan.open_image(tmp_path / name)
        assert opened.size == ((16, 40) if data is exif else (40, 16)) and not opened.getexif()


def test_files_that_are_no_images_are_refused_in_one_line(tmp_path):
    Image.fromarray(photo(32, 32)).save(tmp_path / "ico.png", "ICO")
    Image.fromarray(photo(64, 64)).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 2000)
    for name, content in (("empty", ""), ("text", "hello"), ("eps", "%!PS-Adobe-3.0 EPSF-3.0\n")):
        (tmp_path / f"{name}.png").write_text(content)
    for name in ("empty.png", "text.png", "eps.png", "cut.png", "ico.png", "none.png"):
        with pytest.raises(srgan.InputError, match=f"{name}: cannot be read") as error:
            srgan.open_image(tmp_path / name)
        assert "\n" not in str(error.value)


def bicubic_formula(hr, scale):
    """LR of [H, W] by the definition, in exact arithmetic: vertically, rounded, horizontally."""
    def weight(d):
        if d < 1:
            return 3 * d ** 3 / 2 - 5 * d ** 2 / 2 + 1
        return -d ** 3 / 2 + 5 * d ** 2 / 2 - 4 * d + 2 if d < 2 else Fraction(0)

    def shrink(columns):                                         # each column of pixels
        n = len(columns[0])
        matrix = [[Fraction(0)] * n for _ in range(n // scale)]
        for i, row in enumerate(matrix):
            for j in range(scale * (i - 2), scale * (i + 3)):
                centre = scale * i + Fraction(scale - 1, 2)
                row[min(max(j, 0), n - 1)] += weight(abs(j - centre) / scale) / scale
        sums = [[sum(map(mul, row, column)) for row in matrix] for column in columns]
        return [[min(max(floor(x + Fraction(1, 2)), 0), 255) for x in column] for column in sums]

    rows = [list(row) for row in zip(*shrink(hr.T.tolist()))]
    return np.array(shrink(rows))


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_bicubic_lr_is_the_formula_bit_for_bit_with_ties_and_borders(scale):
    """downsample, on noise, black and white, and a step that makes ties."""
    rng = np.random.default_rng(scale)
    noise = rng.integers(0, 256, (3 * scale, 5 * scale))
    extreme = rng.choice([0, 255], (4 * scale, 3 * scale))
    step = np.repeat([[7], [8]], 2 * scale, 0).repeat(2 * scale, 1)  # 7.5 between the two
    step[:, scale // 2::scale] += 1
    for image in (noise, extreme, step):
        hr = torch.from_numpy(image).float().expand(1, 3, -1, -1) / 255
        lr = srgan.downsample(hr, scale)[0] * 255
        for channel in lr:
            assert np.array_equal(channel.round().numpy(), bicubic_formula(image, scale))


@pytest.mark.parametrize("folder, n", [("Set5", 5), ("Set14", 14), ("BSD100", 100)])
def test_bicubic_lr_equals_the_benchmarks_bit_for_bit(folder, n):
    """downsample, on every image of the usual test sets, where they are at hand."""
    data = os.environ.get("SRGAN_TEST_DATA")
    if not data:
        pytest.skip("set SRGAN_TEST_DATA to a folder with Set5, Set14 and BSD100")
    pairs = srgan.find_pairs(Path(data, folder))
    assert len(pairs) == n
    for stem, hr, lr in pairs:
        assert np.array_equal(srgan.open_pair(hr)[0], srgan.open_rgb(lr)), stem


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_the_gaussian_kernel_has_its_sigma_and_is_centred_on_each_lr_pixel(scale):
    hr = torch.zeros(1, 3, 64, 64)
    hr[:, :, 28:36, 28:36] = 1
    got = srgan.downsample(hr, scale, "gaussian")[0, 0] * 255
    centres = scale * np.arange(64 // scale) + (scale - 1) / 2
    kernel = np.exp(-(np.arange(64)[:, None] - centres) ** 2 / (2 * (0.4 * scale) ** 2))
    row = (kernel / kernel.sum(0))[28:36].sum(0)
    assert np.abs(got.numpy() - np.outer(row, row) * 255).max() < 1
    flat = srgan.downsample(torch.full((1, 3, 64, 64), 0.2), scale, "gaussian")
    assert torch.equal(flat, torch.full((1, 3, 64 // scale, 64 // scale), 0.2))
    with pytest.raises(ValueError, match="63x64"):
        srgan.downsample(hr[:, :, 1:], scale)


def test_8_bit_images_survive_the_way_into_tensors_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(srgan.to_pixels(srgan.to_tensor(levels) * 2 - 1).numpy(), levels)
    assert srgan.to_tensor(levels).max() == 1 and srgan.to_tensor(levels).min() == 0
