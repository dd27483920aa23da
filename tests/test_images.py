import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image

import srgan


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_bicubic_lr_is_pillows_within_one_grey_level(scale):
    hr = photo(96, 128, seed=3)
    lr = srgan.downsample(srgan.to_tensor(hr)[None], scale)[0] * 255
    pillow = np.array(Image.fromarray(hr).resize((128 // scale, 96 // scale), Image.Resampling.BICUBIC))
    assert torch.equal(lr, lr.round())  # on the 8-bit grid
    assert np.abs(lr.permute(1, 2, 0).numpy() - pillow).max() <= 1
    assert np.abs(lr.permute(1, 2, 0).numpy() - pillow).mean() < 0.05


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_gaussian_lr_lies_where_the_bicubic_lr_lies(scale):
    ramp = np.linspace(20, 230, 128).round().astype(np.uint8)
    hr = srgan.to_tensor(np.broadcast_to(ramp[None, :, None], (64, 128, 3)).copy())[None]
    a, b = (srgan.downsample(hr, scale, kernel)[0, 0, 4, 2:-2] * 255 for kernel in ("bicubic", "gaussian"))
    assert (a - b).abs().max() <= 1  # a shift by one HR pixel would show as 1.65 levels
    assert torch.equal(srgan.downsample(torch.full((1, 3, 64, 64), 0.2), scale, "gaussian"), torch.full((1, 3, 64 // scale, 64 // scale), 0.2))


def test_gaussian_blurs_with_its_sigma():
    hr = torch.zeros(1, 3, 64, 64)
    hr[:, :, 30:34, 30:34] = 1
    got = srgan.downsample(hr, 4, "gaussian")[0, 0] * 255
    x = np.arange(64)
    kernel = np.exp(-(x[:, None] - (4 * np.arange(16) + 1.5)) ** 2 / (2 * 1.6 ** 2))
    row = (kernel / kernel.sum(0))[30:34].sum(0)
    assert np.abs(got.numpy() - np.outer(row, row) * 255).max() < 1


def test_downsample_refuses_sides_that_do_not_divide():
    with pytest.raises(ValueError, match="30x32"):
        srgan.downsample(torch.zeros(1, 3, 30, 32))


def test_8_bit_pictures_survive_the_way_into_tensors_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(srgan.to_pixels(srgan.to_tensor(levels) * 2 - 1).numpy(), levels)
    assert srgan.to_tensor(levels).max() == 1 and srgan.to_tensor(levels).min() == 0


def save(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return srgan.open_image(tmp_path / name)


def test_every_kind_of_picture_opens_as_8_bits(tmp_path):
    rgb = Image.fromarray(photo(20, 30))
    grey = rgb.convert("L")
    grey16 = np.asarray(grey).astype(np.uint16) * 257
    assert np.array_equal(save(tmp_path, Image.fromarray(grey16), "16.png"), grey)
    assert save(tmp_path, grey, "grey.png").mode == "L"
    assert save(tmp_path, grey.convert("1"), "bits.png").mode == "L"
    assert save(tmp_path, rgb.quantize(16), "palette.png").mode == "RGB"
    assert save(tmp_path, rgb.quantize(16), "transparent.png", transparency=0).mode == "RGBA"
    assert save(tmp_path, grey, "keyed.png", transparency=7).mode == "LA"
    assert save(tmp_path, rgb.convert("CMYK"), "cmyk.jpg").mode == "RGB"
    assert save(tmp_path, rgb, "lossless.webp", lossless=True).tobytes() == rgb.tobytes()


def test_exif_orientation_is_applied_and_known_to_the_header_scan(tmp_path):
    rgb = Image.fromarray(photo(16, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned = save(tmp_path, rgb, "turned.png", exif=exif)
    assert turned.size == (16, 40)
    assert np.array_equal(turned, np.rot90(np.asarray(rgb), -1))
    assert srgan._read_size(tmp_path / "turned.png") == (40, 16)


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_what_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:
        Image.fromarray(photo(64, 64)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(srgan.InputError, match="broken.png"):
        srgan.open_image(path)
    with pytest.raises(srgan.InputError, match="no such file"):
        srgan.open_image(tmp_path / "missing.png")


def test_pairs_are_found_by_stem_and_usual_endings(tmp_path):
    (tmp_path / "HR").mkdir()
    (tmp_path / "LR_bicubic_x4").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for stem, lr in (("a", "ax4"), ("b", "b_LR"), ("c", "c"), ("img_SRF_4_HR", "img_SRF_4_LR")):
        Image.new("RGB", (9, 9)).save(tmp_path / "HR" / f"{stem}.png")
        Image.new("RGB", (2, 2)).save(tmp_path / "LR_bicubic_x4" / f"{stem}.png")
        Image.new("RGB", (2, 2)).save(tmp_path / "elsewhere" / f"{lr}.png")
    assert [p[2].parent.name for p in srgan.find_pairs(tmp_path)] == ["LR_bicubic_x4"] * 4
    assert [p[2].stem for p in srgan.find_pairs(tmp_path, tmp_path / "elsewhere")] == ["ax4", "b_LR", "c", "img_SRF_4_LR"]
    assert [p[2] for p in srgan.find_pairs(tmp_path / "HR")] == [None] * 4
    assert srgan.open_pair(tmp_path / "HR" / "a.png")[0].shape == (2, 2, 3)
    (tmp_path / "elsewhere" / "b_LR.png").unlink()
    with pytest.raises(srgan.InputError, match="b.png"):
        srgan.find_pairs(tmp_path, tmp_path / "elsewhere")
    with pytest.raises(srgan.InputError, match="expected 4x4"):
        srgan.open_pair(tmp_path / "HR" / "a.png", tmp_path / "LR_bicubic_x4" / "a.png", scale=2)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_header_scan_agrees_with_the_decoder_in_every_format(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo(16, 40)).save(tmp_path / name, exif=exif)
    assert srgan._read_size(tmp_path / name) == srgan.open_rgb(tmp_path / name).shape[:2]
