import os

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image

import srgan


def whole_lr(hr, scale=4):
    return srgan.downsample(srgan.to_tensor(hr)[None], scale)[0]


def make(photos, tmp_path, **options):
    options = {"patch_size": 32, "cache": tmp_path / "cache", **options}
    return srgan.Patches(srgan.find_images(photos), **options)


def test_a_patch_is_a_part_of_the_picture_and_its_lr_of_the_whole_pictures_lr(photos, tmp_path):
    patches = make(photos, tmp_path, augment="none")
    for lr, hr in patches.batches(6, 0, 20):
        assert lr.shape == (6, 3, 8, 8) and hr.shape == (6, 3, 32, 32)
        assert hr.min() >= -1 and hr.max() <= 1 and lr.min() >= 0
    for step in range(20):
        (lr, hr), = patches.batches(6, step, step + 1)
        for n, (image, top, left, _) in enumerate(patches._draw(step, 6)):
            picture = srgan.open_rgb(patches.paths[image])
            picture = picture[:picture.shape[0] // 4 * 4, :picture.shape[1] // 4 * 4]
            top, left = top + 8, left + 8  # the margin of two LR pixels
            assert np.array_equal(srgan.to_pixels(hr[n]).numpy(), picture[top:top + 32, left:left + 32])
            expected = whole_lr(picture)[:, top // 4:top // 4 + 8, left // 4:left // 4 + 8]
            assert (lr[n] - expected).abs().max() * 255 <= 1.001
            pillow = np.array(Image.fromarray(picture).resize((picture.shape[1] // 4, picture.shape[0] // 4), Image.Resampling.BICUBIC))
            pillow = pillow[top // 4:top // 4 + 8, left // 4:left // 4 + 8]
            assert np.abs(lr[n].permute(1, 2, 0).numpy() * 255 - pillow).max() <= 1.001


def test_positions_reach_every_part_of_a_picture(photos, tmp_path):
    patches = make(photos, tmp_path)
    draws = np.concatenate([patches._draw(step, 6) for step in range(500)])
    first = draws[draws[:, 0] == 0]  # 100 x 130: windows of 48 on the LR grid
    assert set(first[:, 1]) == set(range(0, 53, 4)) and set(first[:, 2]) == set(range(0, 81, 4))
    assert set(first[:, 3]) == set(range(8))


def test_pictures_are_distinct_within_a_batch_while_there_are_enough(photos, tmp_path):
    patches = make(photos, tmp_path)
    assert all(len(set(patches._draw(step, 6)[:, 0])) == 6 for step in range(50))
    assert len(patches._draw(0, 16)) == 16
    weighted = make(photos, tmp_path, weights=[1, 1, 1, 1, 1, 95])
    assert np.mean([weighted._draw(step, 1)[0, 0] == 5 for step in range(500)]) > 0.9


@pytest.mark.parametrize("augment, count", [("none", 1), ("flip", 2), ("all", 8)])
def test_augmentation_is_the_flips_and_rotations_it_names(tmp_path, augment, count):
    picture = photo(48, 48, seed=9)
    Image.fromarray(picture).save(tmp_path / "only.png")
    patches = srgan.Patches([tmp_path / "only.png"], 32, augment=augment, cache=tmp_path / "cache")
    seen = {srgan.to_pixels(hr[0]).numpy().tobytes() for _, hr in patches.batches(1, 0, 100)}
    centre = picture[8:40, 8:40]
    every = [np.rot90(p, k).copy().tobytes() for k in range(4) for p in (centre[:, ::-1], centre)]
    expected = {"none": {every[1]}, "flip": {every[0], every[1]}, "all": set(every)}[augment]
    assert seen == expected and len(seen) == count


def test_a_batch_depends_on_seed_rank_and_update_alone(photos, tmp_path):
    a, b = make(photos, tmp_path), make(photos, tmp_path)
    list(a.batches(4, 0, 3))
    (x,), (y,) = (list(p.batches(4, 7, 8)) for p in (a, b))
    assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
    for other in (make(photos, tmp_path, seed=1), make(photos, tmp_path, rank=1)):
        assert not torch.equal(x[1], next(iter(other.batches(4, 7, 8)))[1])


def test_streaming_gives_the_batches_of_the_store(photos, tmp_path):
    stored, streamed = make(photos, tmp_path), make(photos, tmp_path, store="never")
    for (a, b), (c, d) in zip(stored.batches(5, 3, 8), streamed.batches(5, 3, 8), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_auto_streams_what_exceeds_the_limit(photos, tmp_path, monkeypatch):
    assert make(photos, tmp_path / "a", store="auto").pixels is not None
    monkeypatch.setattr(srgan, "STORE_LIMIT", 1000)
    assert make(photos, tmp_path / "b", store="auto").pixels is None
    assert not list((tmp_path / "b" / "cache").glob("*.pixels"))


@pytest.mark.parametrize("store", ["always", "never"])
def test_broken_and_small_pictures_are_left_out(photos, tmp_path, store, capfd):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, path in enumerate(srgan.find_images(photos)[:2]):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "text.png").write_text("no picture")
    whole = (folder / "p1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])  # its header is fine
    Image.fromarray(photo(20, 20)).save(folder / "small.png")
    patches = srgan.Patches(srgan.find_images(folder), 32, cache=tmp_path / "cache", store=store)
    good = {srgan.open_rgb(folder / n).shape for n in ("p0.png", "p1.png")}
    assert len(good) == 2
    assert all(hr.shape == (2, 3, 32, 32) for _, hr in patches.batches(2, 0, 5))
    message = capfd.readouterr().err
    assert "text.png" in message and "small.png" in message and "cut.png" in message
    if store == "always":
        assert all(patches.paths[i].name in ("p0.png", "p1.png") for step in range(20) for i in patches._draw(step, 2)[:, 0])


def test_no_usable_picture_is_an_error(tmp_path):
    Image.fromarray(photo(20, 20)).save(tmp_path / "small.png")
    with pytest.raises(srgan.InputError, match="48x48"):
        srgan.Patches([tmp_path / "small.png"], 32, cache=tmp_path / "cache")


def test_the_store_is_made_once_and_anew_when_a_file_changes(photos, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in srgan.find_images(photos):
        (folder / path.name).write_bytes(path.read_bytes())
    opened = []
    monkeypatch.setattr(srgan, "open_rgb", lambda path, real=srgan.open_rgb: opened.append(path) or real(path))
    make(folder, tmp_path)
    make(folder, tmp_path)
    assert len(opened) == 6
    Image.fromarray(255 - srgan.open_rgb(folder / "p0.png")).save(folder / "p0.png")
    os.utime(folder / "p0.png", ns=(1, 1))
    opened.clear()
    make(folder, tmp_path)
    assert len(opened) == 6


def test_a_store_that_was_cut_off_is_made_again(photos, tmp_path, monkeypatch):
    def fail(path):
        raise KeyboardInterrupt
    real = srgan.open_rgb
    monkeypatch.setattr(srgan, "open_rgb", fail)
    with pytest.raises(KeyboardInterrupt):
        make(photos, tmp_path)
    assert not list((tmp_path / "cache").glob("*.pixels"))
    monkeypatch.setattr(srgan, "open_rgb", real)
    assert make(photos, tmp_path).pixels.any()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_on_the_gpu_are_those_of_the_cpu(photos, tmp_path):
    cpu, gpu = make(photos, tmp_path), make(photos, tmp_path, device="cuda")
    assert gpu.pixels.device.type == "cuda"
    for (a, b), (c, d) in zip(cpu.batches(4, 0, 5), gpu.batches(4, 0, 5)):
        assert torch.equal(b, d.cpu()) and (a - c.cpu()).abs().max() * 255 <= 1.001


def test_a_crop_margin_keeps_to_the_centre_and_grows_with_the_picture(tmp_path):
    sizes = {"small.png": (100, 60), "large.png": (218, 178)}
    for name, (h, w) in sizes.items():
        Image.fromarray(photo(h, w)).save(tmp_path / name)
    patches = srgan.Patches(srgan.find_images(tmp_path), 32, crop_margin=0.1, cache=tmp_path / "cache")
    draws = np.concatenate([patches._draw(step, 2) for step in range(2000)])
    for image, path in enumerate(patches.paths):
        (h, w), seen = sizes[path.name], draws[draws[:, 0] == image]
        for side, first in ((h, seen[:, 1]), (w, seen[:, 2])):
            margin = min(int(0.1 * side / 4), (side // 4 - 12) // 2) * 4
            assert first.min() == margin and first.max() == side // 4 * 4 - 48 - margin
    assert all(hr.shape == (2, 3, 32, 32) for _, hr in patches.batches(2, 0, 3))


def test_patches_can_grow(photos, tmp_path):
    patches = make(photos, tmp_path)
    patches.resize(64)
    (lr, hr), = patches.batches(2, 0, 1)
    assert lr.shape == (2, 3, 16, 16) and hr.shape == (2, 3, 64, 64)
    with pytest.raises(srgan.InputError):
        patches.resize(200)


def test_headers_are_read_once(photos, tmp_path, monkeypatch):
    make(photos, tmp_path, store="never")
    monkeypatch.setattr(srgan, "_read_size", lambda path: pytest.fail("read again"))
    make(photos, tmp_path, store="never"), make(photos, tmp_path)


def test_a_stream_whose_pictures_are_all_broken_ends(photos, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in srgan.find_images(photos):
        (folder / path.name).write_bytes(path.read_bytes()[:5000])
    patches = srgan.Patches(srgan.find_images(folder), 32, cache=tmp_path / "cache", store="never")
    with pytest.raises(srgan.InputError, match="cannot be read"):
        next(iter(patches.batches(2, 0, 1)))


def test_sizes_are_read_without_decoding(photos, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert srgan._read_size(photos / "p1.png") == (103, 125)
