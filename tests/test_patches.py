"""Section 4: the store of decoded images, and the random patches that training sees."""
import os
import resource
import threading

import numpy as np
import pytest
import torch
from conftest import photo, same
from PIL import Image

import srgan


def make(folder, tmp_path, mode="auto", patch_size=32, **options):
    store = srgan.Store(srgan.find_images(folder), tmp_path / "cache", mode)
    return srgan.Patches(store, patch_size, **options)


def save(folder, **images):
    """A folder with these arrays as PNG files."""
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


# Patches

@pytest.mark.parametrize("kernel", srgan.KERNELS)
def test_a_patch_is_a_part_of_an_image_and_its_lr_of_the_whole_images_lr(photos, tmp_path, kernel):
    """Patches and reach: a patch's LR depends on HR outside it, as far as the kernel sees."""
    images = [srgan.open_pair(path, kernel=kernel) for path in srgan.find_images(photos)]
    for lr, hr in make(photos, tmp_path, augment="none", kernel=kernel).batches(4, 0, 5):
        assert lr.shape == (4, 3, 8, 8) and hr.shape == (4, 3, 32, 32)
        assert 0 <= lr.min() and lr.max() <= 1 and -1 <= hr.min() and hr.max() <= 1
        for lr_patch, hr_patch in zip(lr.mul(255).permute(0, 2, 3, 1).numpy(), srgan.to_pixels(hr)):
            (whole_lr, y, x), = [                                # on the grid of LR pixels
                (whole_lr, y, x) for whole_lr, whole in images
                for y in range(2, len(whole) // 4 - 9) for x in range(2, whole.shape[1] // 4 - 9)
                if np.array_equal(whole[4 * y:4 * y + 32, 4 * x:4 * x + 32], hr_patch)]
            assert np.abs(lr_patch - whole_lr[y:y + 8, x:x + 8]).max() < 1e-3


@pytest.mark.parametrize("crop_margin", [0, 0.1])
def test_patches_reach_every_place_inside_a_margin_that_grows_with_the_image(tmp_path, crop_margin):
    sizes = (100, 60), (163, 130)
    folder = save(tmp_path / "data", **{                         # each pixel is (y, x, image)
        str(i): np.stack([*np.mgrid[:h, :w], np.full((h, w), i)], 2).astype(np.uint8)
        for i, (h, w) in enumerate(sizes)})
    patches = make(folder, tmp_path, augment="none", crop_margin=crop_margin)
    corners = torch.cat([patches.windows(step, 2)[0][:, 0, 0] for step in range(500)])
    for image, size in enumerate(sizes):
        for axis, side in enumerate(size):                       # one place is always left
            margin = min(int(crop_margin * side / 4), (side // 4 - 12) // 2) * 4
            assert {*corners[corners[:, 2] == image, axis].tolist()} == \
                {*range(margin, side // 4 * 4 - 48 - margin + 1, 4)}


@pytest.mark.parametrize("augment, which", [("none", [0]), ("flip", [0, 4]), ("all", range(8))])
def test_augmentation_is_the_flips_and_rotations_it_names(tmp_path, augment, which):
    image = photo(48, 48, seed=9)
    patches = make(save(tmp_path / "data", only=image), tmp_path, augment=augment)
    centre = image[8:40, 8:40]
    every = [np.rot90(p, k).tobytes() for p in (centre, centre[:, ::-1]) for k in range(4)]
    seen = [srgan.to_pixels(hr[0]).numpy().tobytes() for _, hr in patches.batches(1, 0, 100)]
    assert {*seen} == {every[i] for i in which}
    assert min(map(seen.count, seen)) > 50 / len(which)          # about equally often


def test_given_lr_images_are_cut_where_hr_is(tmp_path, capsys):
    """HR repeats each LR pixel, so that in every patch LR must be every fourth pixel of HR."""
    small = {f"p{i}": photo(20 + i, 25, i) for i in range(3)}
    lr = save(tmp_path / "lr", **small)
    hr = save(tmp_path / "hr", **{name: x.repeat(4, 0).repeat(4, 1) for name, x in small.items()})

    def batches(n, last):
        store = srgan.Store(srgan.find_images(lr), tmp_path / "cache")
        return list(make(hr, tmp_path, lr=store).batches(n, 0, last))
    for x, y in batches(3, 30):
        assert x.shape == (3, 3, 8, 8) and torch.equal(x * 2 - 1, y[:, :, ::4, ::4])
    save(lr, p0=photo(20, 20))                                   # of the wrong size
    assert len(batches(2, 5)) == 5 and "lr/p0.png" in capsys.readouterr().err


def test_a_batch_is_of_distinct_images_and_depends_only_on_seed_rank_and_update(photos, tmp_path):
    a, b = make(photos, tmp_path), make(photos, tmp_path)
    list(a.batches(4, 0, 3))
    first, again = (next(p.batches(4, 7, 8)) for p in (a, b))
    assert same(first, again)
    others = [make(photos, tmp_path, seed=1), make(photos, tmp_path, rank=1)]
    for hr in (*(next(p.batches(4, 7, 8))[1] for p in others), next(a.batches(4, 8, 9))[1]):
        assert not torch.equal(first[1], hr)
    orders = {tuple(image for image, *_ in a.draw(step, 6)) for step in range(50)}
    assert len(orders) > 40 and all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders)
    assert len(a.draw(0, 16)) == 16                              # more than there are images


def test_streaming_gives_the_batches_of_the_store_and_leaves_no_threads(
        photos, tmp_path, monkeypatch, capsys):
    stored, streamed = make(photos, tmp_path), make(photos, tmp_path, "never")
    assert same(list(stored.batches(5, 3, 15)), list(streamed.batches(5, 3, 15)))
    assert stored.hr.pixels is not None and streamed.hr.pixels is None
    before, batches = threading.active_count(), streamed.batches(4, 0, 1000)
    next(batches), batches.close()
    assert threading.active_count() == before
    monkeypatch.setattr(srgan, "STORE_LIMIT", 1000)              # "auto" streams larger data
    assert make(photos, tmp_path / "other").hr.pixels is None and "GiB" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["always", "never"])
def test_broken_and_small_images_are_left_out_and_named(tmp_path, mode, capsys):
    folder = save(tmp_path / "mixed", p0=photo(60, 70), p1=photo(60, 70, 1), small=photo(20, 20))
    (folder / "text.png").write_text("no image")
    whole = (folder / "p1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])    # with a good header
    patches = make(folder, tmp_path, mode)
    assert all(hr.shape == (2, 3, 32, 32) for _, hr in patches.batches(2, 0, 10))
    err = capsys.readouterr().err
    assert all(err.count(name) == 1 for name in ("text.png", "small.png", "cut.png"))
    if mode == "always":
        assert "left out 3 of 5 images" in err
        assert {image for step in range(20) for image, *_ in patches.draw(step, 2)} == {1, 2}
    os.truncate(folder / "p0.png", 900), os.truncate(folder / "p1.png", 900)
    with pytest.raises(srgan.InputError):
        next(make(folder, tmp_path, mode).batches(2, 0, 1))


# The store

def test_the_store_holds_the_images_and_decodes_only_what_is_new(tmp_path, monkeypatch):
    folder = save(tmp_path / "data", a=photo(60, 70), b=photo(60, 70, 1))
    opened, real, cache = [], srgan.open_rgb, tmp_path / "cache"
    monkeypatch.setattr(srgan, "open_rgb", lambda path: opened.append(path.name) or real(path))

    def count():
        opened.clear()
        store = srgan.Store(srgan.find_images(folder), cache, "always")
        assert all(np.array_equal(store[i], np.array(Image.open(path)))
                   for i, path in enumerate(store.paths))
        return len(opened)
    assert (count(), count()) == (2, 0)
    save(folder, b=photo(60, 70, 2))
    assert (count(), count()) == (2, 0)
    os.truncate(folder / "b.png", 3000)                          # a broken one is not tried again
    opened.clear()
    assert [len(srgan.Store(srgan.find_images(folder), cache)[1]) for _ in range(2)] == [0, 0]
    assert len(opened) == 2


def test_a_store_that_does_not_fit_on_the_disk_leaves_nothing_behind(photos, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)           # stands in for a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(srgan.InputError, match="--cache.*store=never"):
            srgan.Store(srgan.find_images(photos), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert make(photos, tmp_path).hr.pixels.any()
