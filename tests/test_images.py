"""Section 4: opening images, most of them written here byte by byte; LR from HR; finding pairs."""
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import memory, photo
from PIL import Image, ImageCms

import srgan

LEVELS = np.random.default_rng(0).integers(0, 256, (5, 7, 4))
UPRIGHT = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1],
           4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
           7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: np.rot90(x)}


def tiff(path, pixels, bits=(8,), photometric=1, size=None, **more):
    """Write a little-endian TIFF of one strip; more: t<tag>=(type, values), None to omit it."""
    h, w = size or pixels.shape[:2]
    data = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    tags = {256: (4, [w]), 257: (4, [h]), 258: (3, bits), 259: (3, [1]), 262: (3, [photometric]),
            273: (4, [0]), 277: (3, [len(bits)]), 278: (4, [h]), 279: (4, [len(data)])}
    tags |= {int(name[1:]): value for name, value in more.items()}
    tags = {tag: value for tag, value in sorted(tags.items()) if value}
    at = 8 + 2 + 12 * len(tags) + 4                              # of the pixels, then long values
    entries, rest = b"", data
    for tag, (kind, values) in tags.items():
        values = [at] if tag in (273, 324) else values
        value = struct.pack(f"<{len(values)}{'BHI'[kind // 2]}", *values)
        if len(value) > 4:
            value, rest = struct.pack("<I", at + len(rest)), rest + value
        entries += struct.pack("<HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + rest)
    return path


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(path, pixels, bits, kind, *chunks, size=None):
    """Write a PNG from unsigned integers [h, w, ...], or from rows as bytes and (h, w)."""
    h, w = size or pixels.shape[:2]
    rows = pixels if isinstance(pixels, bytes) else b"".join(
        b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", w, h, bits, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks)
                     + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b""))
    return path


def is_opened_as(path, mode, expected):
    image = srgan.open_image(path)
    return image.mode == mode and np.array_equal(image, expected)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_tiffs_of_every_orientation_and_mode_open_upright(tmp_path, orientation, compressed):
    palette = np.random.default_rng(1).integers(0, 256, (256, 3))
    inks = LEVELS.astype(np.uint8)
    cmyk = (255 - LEVELS[..., :3]) * (255 - LEVELS[..., 3:]) / 255
    grey = LEVELS[..., 0]
    for name, pixels, tags, mode, expected in (
            ("L", inks[..., 0], {}, "L", grey),
            ("RGBA", inks, {"bits": [8] * 4, "photometric": 2, "t338": (3, [2])}, "RGBA", LEVELS),
            ("CMYK", inks, {"bits": [8] * 4, "photometric": 5}, "RGB", cmyk),
            ("I;16", (grey * 257).astype("<u2"), {"bits": [16]}, "L", grey),
            ("P", inks[..., 0], {"photometric": 3, "t320": (3, (palette.T * 257).ravel())},
             "RGB", palette[grey])):
        data = zlib.compress(pixels.tobytes()) if compressed else pixels
        more = {"t259": (3, [8]), "size": (5, 7)} if compressed else {}
        image = srgan.open_image(tiff(tmp_path / "a.tif", data, t274=(3, [orientation]),
                                      **tags, **more))
        expected = UPRIGHT[orientation](expected)
        assert image.mode == mode and image.size == expected.shape[1::-1], name
        assert np.abs(np.asarray(image) - expected).max() <= (name == "CMYK"), name


def test_tiffs_that_would_be_misread_are_refused(tmp_path):
    grey, path = LEVELS[..., 0], tmp_path / "a.tif"
    sixteen, signed = (grey * 257).astype("<u2"), {"t339": (3, [2])}
    for pixels, tags in ((bytes(60), {"bits": [12], "size": (5, 7)}),
                         (sixteen, {"bits": [16], "photometric": 0}),
                         (sixteen, {"bits": [16], **signed}), (grey.astype("u1"), signed),
                         (grey.astype("<u4"), {"bits": [32]}),
                         (grey.astype("<i4"), {"bits": [32], **signed}),
                         (grey.astype("<f4"), {"bits": [32], "t339": (3, [3])})):
        with pytest.raises(srgan.InputError, match="a.tif: only unsigned 8-bit and 16-bit TIFF"):
            srgan.open_image(tiff(path, pixels, **tags))
    assert is_opened_as(tiff(path, 255 - grey.astype("u1"), photometric=0), "L", grey)
    rgb16 = (LEVELS[..., :3] * 257).astype("<u2")
    assert is_opened_as(tiff(path, rgb16, [16] * 3, 2, t339=(3, [1] * 3)), "RGB", LEVELS[..., :3])


def test_16_bit_pngs_keep_grey_and_transparency(tmp_path):
    path, grey = tmp_path / "a.png", LEVELS[..., 0] * 257
    grey[0, :2] = 1000, 1001                                     # equal in 8 bits, not in 16
    key = chunk(b"tRNS", struct.pack(">H", 1000))
    expected = np.stack([(grey / 257).round(), np.where(grey == 1000, 0, 255)], 2)
    assert is_opened_as(png(path, grey, 16, 0), "L", expected[..., 0])
    assert is_opened_as(png(path, grey, 16, 0, key), "LA", expected)
    assert is_opened_as(png(path, LEVELS[..., :2] * 257, 16, 4), "LA", LEVELS[..., :2])
    rgb = LEVELS[..., :3] * 257
    rgb[0, :2] = [[0x1234] * 3, [0x3434] * 3]
    image = srgan.open_image(png(path, rgb, 16, 2, chunk(b"tRNS", struct.pack(">H", 0x1234) * 3)))
    assert image.mode == "RGBA" and (np.asarray(image)[..., 3] == 0).nonzero() == (0, 0)


def test_every_other_kind_opens_as_8_bits(tmp_path):
    rgb = Image.fromarray(photo(20, 30))
    grey, cmyk = rgb.convert("L"), rgb.convert("CMYK")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image, name, options, mode in (
            (grey.convert("1"), "a.png", {}, "L"), (rgb.quantize(16), "a.gif", {}, "RGB"),
            (rgb.quantize(16), "a.png", {"transparency": 0}, "RGBA"),
            (grey, "a.png", {"transparency": 7}, "LA"), (rgb, "a.webp", {"lossless": True}, "RGB"),
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
def test_orientation_is_applied_and_broken_data_about_the_image_is_ignored(tmp_path, name):
    image, exif = Image.fromarray(photo(16, 40)), Image.Exif()
    exif[0x0112] = 6                                             # taken in portrait format
    for data in (exif, b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", exif.tobytes()[:20]):
        image.save(tmp_path / name, exif=data)
        opened = srgan.open_image(tmp_path / name)
        assert opened.size == ((16, 40) if data is exif else (40, 16)) and not opened.getexif()
    image.save(tmp_path / "a.tif", dpi=(4e9, 4e9))
    assert "dpi" not in srgan.open_image(tmp_path / "a.tif").info
    tiff(tmp_path / "a.tif", LEVELS[..., 0].astype("u1"), t34675=(3, [7]))   # a number as profile
    assert "icc_profile" not in srgan.open_image(tmp_path / "a.tif").info


@pytest.mark.filterwarnings("ignore")                            # about bombs
def test_small_files_cannot_take_much_memory(tmp_path):
    data = zlib.compress(bytes(26_000 * 26_000), 1)
    tiff(tmp_path / "tile.tif", data, size=(16, 16), t259=(3, [8]), t273=None, t278=None, t279=None,
         t322=(4, [26_000]), t323=(4, [26_000]), t324=(4, [0]), t325=(4, [len(data)]))
    png(tmp_path / "tall.png", bytes(2 * 170_000_000), 8, 0, size=(170_000_000, 1))

    def open_both():
        for name in ("tile.tif", "tall.png"):
            with pytest.raises(srgan.InputError, match=name):
                srgan.open_image(tmp_path / name)
    assert memory(open_both) < 100


def test_files_that_are_no_images_are_refused_in_one_line(tmp_path):
    Image.fromarray(photo(32, 32)).save(tmp_path / "ico.png", "ICO")
    Image.fromarray(photo(64, 64)).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 2000), os.mkfifo(tmp_path / "pipe.png")
    for name, content in (("empty", ""), ("text", "hello"), ("eps", "%!PS-Adobe-3.0 EPSF-3.0\n")):
        (tmp_path / f"{name}.png").write_text(content)
    for name in ("empty.png", "text.png", "eps.png", "pipe.png", "cut.png", "ico.png", "none.png"):
        with pytest.raises(srgan.InputError, match=name) as error:
            srgan.open_image(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_bicubic_lr_is_pillows_within_one_grey_level(scale):
    hr = photo(96, 128, seed=3)
    lr = srgan.downsample(srgan.to_tensor(hr)[None], scale)[0] * 255
    pillow = Image.fromarray(hr).resize((128 // scale, 96 // scale), Image.Resampling.BICUBIC)
    assert torch.equal(lr, lr.round())                           # on the 8-bit grid
    error = np.abs(lr.permute(1, 2, 0).numpy() - np.asarray(pillow))
    assert error.max() <= 1 and error.mean() < 0.05


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


def save(path, h=16, w=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(h, w)).save(path)


def test_pairs_are_found_by_stem_and_usual_endings(tmp_path):
    for stem, lr in (("a", "ax4"), ("b", "b_LR"), ("c", "c"), ("img_SRF_4_HR", "img_SRF_4_LR"),
                     ("max2", "max2x4"), ("max3", "max3_x4")):   # HR names that look like LR names
        save(tmp_path / f"HR/{stem}.png", 9, 9), save(tmp_path / f"elsewhere/{lr}.png", 2, 2)
        save(tmp_path / f"LR_bicubic_x4/{stem}.png", 2, 2)
    assert {lr.parent.name for _, _, lr in srgan.find_pairs(tmp_path)} == {"LR_bicubic_x4"}
    found = srgan.find_pairs(tmp_path, tmp_path / "elsewhere")
    assert [lr.stem for *_, lr in found] == ["ax4", "b_LR", "c", "img_SRF_4_LR", "max2x4",
                                             "max3_x4"]
    assert {lr for *_, lr in srgan.find_pairs(tmp_path / "HR")} == {None}
    assert srgan.open_pair(tmp_path / "HR/a.png")[0].shape == (2, 2, 3)
    (tmp_path / "elsewhere/b_LR.png").unlink()
    with pytest.raises(srgan.InputError, match="b.png"):
        srgan.find_pairs(tmp_path, tmp_path / "elsewhere")
    with pytest.raises(srgan.InputError, match="expected 4x4"):
        srgan.open_pair(tmp_path / "HR/a.png", tmp_path / "LR_bicubic_x4/a.png", scale=2)


@pytest.mark.parametrize("hr, lr", [("i_HR.png", "i_LR.png"), ("i.png", "ix4.png"),
                                    ("Set5/HR/i.png", "Set5/LR_bicubic/X4/i.png")])
def test_a_folder_that_mixes_hr_and_lr_is_refused(tmp_path, hr, lr):
    save(tmp_path / hr), save(tmp_path / lr, 4, 4)
    with pytest.raises(srgan.InputError, match="LR images"):
        srgan.find_pairs(tmp_path)
