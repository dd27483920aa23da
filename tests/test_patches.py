"""Section 4: the store of decoded images, and the random patches that training sees."""
import multiprocessing
import os
import resource
import threading
import time

import numpy as np
import pytest
import torch
from conftest import photo, same
from PIL import Image

import srgan

CPU = torch.device("cpu")


def make(folder, tmp_path, mode="auto", patch_size=32, **options):
    """Patches of the images in a folder."""
    store = srgan.Store(srgan.find_images(folder), tmp_path / "cache", mode)
    return srgan.Patches(store, patch_size, **options)


def sampler(patches, n, first, last, augment="none", seed=0, rank=0):
    return srgan.RandomBatches(patches.usable, n, augment, seed, rank, first, last)


def draw(patches, *args, **options):
    """A list of batches (LR, HR), of n patches for each update from `first` to `last` - 1."""
    return list(srgan.batches(patches, sampler(patches, *args, **options), CPU))


def save(folder, **images):
    """A folder with these arrays as PNG files."""
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


# The kernels, as far as patches depend on them

def wide_taps(scale):
    """A blur that sees 5 LR pixels to each side: further than all of ours."""
    return srgan.gaussian(11 * scale, 2 * scale)


@pytest.fixture
def wide(monkeypatch):
    """One more kernel, as a newcomer would add it."""
    monkeypatch.setitem(srgan.KERNELS, "wide", wide_taps)


@pytest.mark.parametrize("scale", srgan.SCALES)
@pytest.mark.parametrize("kernel", [*srgan.KERNELS, "wide"])
def test_an_lr_pixel_sees_no_further_than_its_kernels_reach(wide, kernel, scale):
    """kernel_reach and downsample, of each row of KERNELS: pixels beyond it may have any value."""
    reach = srgan.kernel_reach(kernel, scale)
    hr = torch.randint(256, (1, 3, 13 * scale, 13 * scale)) / 255
    other = torch.randint(256, hr.shape) / 255
    start = 6 * scale - reach
    end = 7 * scale + reach
    other[:, :, start:end, start:end] = hr[:, :, start:end, start:end]
    lr = srgan.downsample(hr, scale, kernel)
    assert torch.equal(srgan.downsample(other, scale, kernel)[:, :, 6, 6], lr[:, :, 6, 6])


@pytest.mark.parametrize("scale", srgan.SCALES)
@pytest.mark.parametrize("kernel", [*srgan.KERNELS, "wide"])
def test_a_kernels_weights_lie_evenly_around_an_lr_pixel_and_add_up_to_1(wide, kernel, scale):
    """KERNELS: bicubic_taps, gaussian_taps."""
    taps = srgan.KERNELS[kernel](scale).double()
    assert len(taps) == scale + 2 * srgan.kernel_reach(kernel, scale)
    assert torch.equal(taps, taps.flip(0))
    assert taps.sum().item() == pytest.approx(1, abs=1e-9)


def test_weighted_sums_are_a_convolution_with_a_stride():
    """weighted_sums, along the rows and along the columns."""
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    taps = torch.randn(3, dtype=torch.float64)
    kernel = taps.view(1, 1, 3, 1).expand(3, 1, 3, 1)
    expected = torch.nn.functional.conv2d(x, kernel, stride=(2, 1), groups=3)
    found = srgan.weighted_sums(x, taps, 2, 2)
    assert (found - expected).abs().max() <= 1e-9
    assert torch.equal(srgan.weighted_sums(x.transpose(2, 3), taps, 3, 2), found.transpose(2, 3))


# Patches

def find(images, patch):
    """(LR of the image, y, x in LR pixels) of the only place where an HR patch comes from."""
    side = len(patch)
    found = []
    for lr, hr in images:
        for y in range(len(lr) - side // 4 + 1):
            for x in range(lr.shape[1] - side // 4 + 1):
                if np.array_equal(hr[4 * y:4 * y + side, 4 * x:4 * x + side], patch):
                    found.append((lr, y, x))
    place, = found
    return place


@pytest.mark.parametrize("kernel", [*srgan.KERNELS, "wide"])
def test_a_patchs_lr_is_a_part_of_the_whole_images_lr(wide, photos, tmp_path, kernel):
    """Patches, to_pair: LR depends on HR outside of the patch, as far as the kernel reaches."""
    images = [srgan.open_pair(path, kernel=kernel) for path in srgan.find_images(photos)]
    for lr, hr in draw(make(photos, tmp_path, kernel=kernel), 4, 0, 3):
        for lr_patch, hr_patch in zip(lr, hr):
            whole, y, x = find(images, srgan.to_pixels(hr_patch).numpy())
            pixels = srgan.to_pixels(lr_patch * 2 - 1).numpy()
            assert np.array_equal(pixels, whole[y:y + 8, x:x + 8])


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_patches_are_batches_of_lr_and_hr_in_the_ranges_of_the_paper(photos, tmp_path, scale):
    """batches: LR in [0, 1], HR in [-1, 1]."""
    (lr, hr), = draw(make(photos, tmp_path, scale=scale), 5, 0, 1)
    assert lr.shape == (5, 3, 32 // scale, 32 // scale)
    assert hr.shape == (5, 3, 32, 32)
    assert 0 <= lr.min() < 0.2 and 0.8 < lr.max() <= 1
    assert -1 <= hr.min() < -0.6 and 0.6 < hr.max() <= 1


def places(h, w, crop_margin):
    """The first HR row and column of all windows of 12 LR pixels that may be drawn."""
    for side in (h, w):
        free = side // 4 - 12
        margin = min(int(crop_margin * side / 4), free // 2)     # one place is always left
        yield set(range(4 * margin, 4 * (free - margin) + 1, 4))


@pytest.mark.parametrize("crop_margin", [0, 0.1])
@pytest.mark.parametrize("h, w", [(100, 60), (163, 130)])
def test_patches_reach_every_place_inside_a_margin_that_grows_with_the_image(
        tmp_path, crop_margin, h, w):
    """Patches.cut: each pixel of the image is (y, x, 0)."""
    y, x = np.mgrid[:h, :w]
    image = np.stack([y, x, 0 * y], 2).astype(np.uint8)
    patches = make(save(tmp_path / "data", a=image), tmp_path, crop_margin=crop_margin)
    rows = set()
    columns = set()
    for (drawn,) in sampler(patches, 1, 0, 800):
        (window,), _ = patches[drawn]
        rows.add(window[0, 0, 0].item())
        columns.add(window[0, 0, 1].item())
    expected_rows, expected_columns = places(h, w, crop_margin)
    assert rows == expected_rows
    assert columns == expected_columns


@pytest.mark.parametrize("augment, which", [("none", [0]), ("flip", [0, 4]), ("all", range(8))])
def test_augmentation_is_the_flips_and_rotations_it_names(tmp_path, augment, which):
    """SYMMETRIES, RandomBatches, cut_square: all of them, about equally often."""
    image = photo(48, 48, seed=9)
    patches = make(save(tmp_path / "data", only=image), tmp_path)
    centre = image[8:40, 8:40]
    views = []
    for mirrored in (centre, centre[:, ::-1]):
        for turns in range(4):
            views.append(np.rot90(mirrored, turns).tobytes())
    seen = []
    for _, hr in draw(patches, 1, 0, 100, augment=augment):
        seen.append(views.index(srgan.to_pixels(hr[0]).numpy().tobytes()))
    assert set(seen) == set(which)
    assert min(seen.count(view) for view in which) > 50 / len(which)


@pytest.fixture
def paired(tmp_path):
    """(HR folder, LR folder): HR repeats each LR pixel."""
    lr = {}
    hr = {}
    for i in range(3):
        lr[f"p{i}"] = photo(20 + i, 25, i)
        hr[f"p{i}"] = lr[f"p{i}"].repeat(4, 0).repeat(4, 1)
    return save(tmp_path / "hr", **hr), save(tmp_path / "lr", **lr)


def make_paired(paired, tmp_path):
    hr, lr = paired
    return make(hr, tmp_path, lr=srgan.Store(srgan.find_images(lr), tmp_path / "cache"))


def test_given_lr_images_are_cut_where_hr_is(paired, tmp_path):
    """Patches with lr: in every patch, LR must be every fourth pixel of HR."""
    for lr, hr in draw(make_paired(paired, tmp_path), 3, 0, 30, augment="all"):
        assert lr.shape == (3, 3, 8, 8)
        assert torch.equal(lr * 2 - 1, hr[:, :, ::4, ::4])


def test_a_pair_whose_sizes_differ_is_left_out_and_named(paired, tmp_path, capsys):
    """Patches.cut, batches."""
    save(paired[1], p0=photo(20, 20))
    assert len(draw(make_paired(paired, tmp_path), 2, 0, 5)) == 5
    assert capsys.readouterr().err.count("lr/p0.png") == 1


def test_a_batch_is_of_distinct_images(photos, tmp_path):
    """RandomBatches, Sec. 3.2; in another order for each update."""
    patches = make(photos, tmp_path)
    orders = set()
    for batch in sampler(patches, 6, 0, 50):
        order = tuple(image for image, *_ in batch)
        assert sorted(order) == [0, 1, 2, 3, 4, 5]
        orders.add(order)
    assert len(orders) > 40


def test_images_repeat_if_there_are_fewer_than_patches(photos, tmp_path):
    """RandomBatches."""
    (lr, hr), = draw(make(photos, tmp_path), 16, 0, 1)
    assert len(lr) == len(hr) == 16


def test_a_batch_depends_only_on_seed_rank_and_update(photos, tmp_path):
    """RandomBatches: so that a run can be resumed."""
    patches = make(photos, tmp_path)
    whole = draw(patches, 4, 0, 8, augment="all")
    assert same(draw(patches, 4, 5, 8, augment="all"), whole[5:])
    another_seed = draw(patches, 4, 7, 8, augment="all", seed=1)
    another_rank = draw(patches, 4, 7, 8, augment="all", rank=1)
    for _, hr in (whole[6], *another_seed, *another_rank):
        assert not torch.equal(hr, whole[7][1])


def test_streaming_gives_the_batches_of_the_store(photos, tmp_path):
    """batches, with and without worker processes."""
    stored = make(photos, tmp_path, "always")
    streamed = make(photos, tmp_path, "never")
    assert stored.hr.pixels is not None
    assert streamed.hr.pixels is None
    assert same(draw(stored, 5, 3, 9), draw(streamed, 5, 3, 9))


def test_streaming_leaves_no_processes_and_no_threads(photos, tmp_path):
    """batches, ended before its last update."""
    threads = threading.active_count()
    patches = make(photos, tmp_path, "never")
    pairs = srgan.batches(patches, sampler(patches, 4, 0, 1000), CPU)
    next(pairs)
    assert multiprocessing.active_children()
    pairs.close()
    assert not multiprocessing.active_children()
    for _ in range(200):                                         # queues end a little later
        if threading.active_count() > threads:
            time.sleep(0.05)
    assert threading.active_count() <= threads


def test_images_that_would_fill_the_disk_are_streamed(photos, tmp_path, monkeypatch, capsys):
    """Store.is_too_large, in the mode "auto"."""
    monkeypatch.setattr(srgan, "STORE_LIMIT", 1000)
    assert srgan.Store(srgan.find_images(photos), tmp_path / "cache").pixels is None
    assert "GiB" in capsys.readouterr().err


def test_too_little_shared_memory_is_said_with_what_to_do(photos, tmp_path, monkeypatch):
    """batches: torch's message becomes ours."""
    def fail(*args):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")
    monkeypatch.setattr(srgan, "to_pair", fail)
    with pytest.raises(srgan.InputError, match="store=always or enlarge /dev/shm"):
        draw(make(photos, tmp_path), 2, 0, 1)


@pytest.fixture
def mixed(tmp_path):
    """A folder of two good images and three that cannot be used."""
    folder = save(tmp_path / "mixed", p0=photo(60, 70), p1=photo(60, 70, 1), small=photo(20, 20))
    (folder / "text.png").write_text("no image")
    whole = (folder / "p1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])    # with a good header
    return folder


@pytest.mark.parametrize("mode", ["always", "never"])
def test_broken_and_small_images_are_left_out_and_named_once(mixed, tmp_path, mode, capsys):
    """Patches, batches."""
    for _, hr in draw(make(mixed, tmp_path, mode), 2, 0, 10):
        assert hr.shape == (2, 3, 32, 32)
    err = capsys.readouterr().err
    for name in ("text.png", "small.png", "cut.png"):
        assert err.count(name) == 1


def test_images_that_cannot_be_used_are_not_drawn(mixed, tmp_path, capsys):
    """Patches.usable, RandomBatches."""
    patches = make(mixed, tmp_path)
    assert "left out 3 of 5 images" in capsys.readouterr().err
    drawn = set()
    for batch in sampler(patches, 2, 0, 20):
        drawn.update(int(image) for image, *_ in batch)
    assert drawn == {1, 2}


def test_if_no_image_is_large_enough_a_line_says_how_large(photos, tmp_path):
    """Patches: a patch of 400 and its margin of 8 on each side."""
    with pytest.raises(srgan.InputError, match="416x416"):
        make(photos, tmp_path, patch_size=400)


def test_streaming_ends_if_no_image_can_be_used(mixed, tmp_path):
    """Patches.__getitem__, collate, batches."""
    for name in ("p0.png", "p1.png"):
        os.truncate(mixed / name, 900)
    with pytest.raises(srgan.InputError, match="most of the training images"):
        draw(make(mixed, tmp_path, "never"), 2, 0, 1)


# The store

@pytest.fixture
def opened(monkeypatch):
    """Names of the images that are decoded."""
    names = []
    real = srgan.open_rgb

    def open_rgb(path):
        names.append(path.name)
        return real(path)
    monkeypatch.setattr(srgan, "open_rgb", open_rgb)
    return names


def check_store(store):
    for i, path in enumerate(store.paths):
        assert np.array_equal(store[i], np.array(Image.open(path)))


def make_store(folder, tmp_path):
    return srgan.Store(srgan.find_images(folder), tmp_path / "cache", "always")


def test_the_store_holds_the_images_and_decodes_them_once(photos, tmp_path, opened):
    """Store, Store.decode, Store.open."""
    check_store(make_store(photos, tmp_path))
    check_store(make_store(photos, tmp_path))
    assert sorted(opened) == [f"p{i}.png" for i in range(6)]


def test_an_image_that_changes_is_decoded_again(tmp_path, opened):
    """Store: the file's name depends on the images' sizes and times."""
    folder = save(tmp_path / "data", a=photo(60, 70), b=photo(60, 70, 1))
    make_store(folder, tmp_path)
    save(folder, b=photo(60, 70, 2))
    check_store(make_store(folder, tmp_path))
    assert len(opened) == 4


def test_an_unreadable_image_is_empty_and_not_tried_again(mixed, tmp_path, opened):
    """decode_or_none, Store."""
    for _ in range(2):
        store = make_store(mixed, tmp_path)
        sizes = {path.name: len(image) for path, image in zip(store.paths, store)}
        assert sizes == {"p0.png": 60, "p1.png": 60, "small.png": 20, "cut.png": 0, "text.png": 0}
    assert len(opened) == 5


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_store_that_was_cut_short_is_made_again(photos, tmp_path, opened, share):
    """Store.open, as after a power cut."""
    make_store(photos, tmp_path)
    file, = (tmp_path / "cache").glob("*.pixels")
    os.truncate(file, int(share * file.stat().st_size))
    check_store(make_store(photos, tmp_path))
    assert len(opened) == 12


def test_a_store_that_does_not_fit_on_the_disk_leaves_nothing_behind(photos, tmp_path):
    """Store.decode; a limit on the size of files stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(srgan.InputError, match="--cache.*store=never"):
            make_store(photos, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").glob("*pixels"))
    check_store(make_store(photos, tmp_path))


def test_at_most_eight_images_are_decoded_ahead_by_four_threads(monkeypatch):
    """decode_ahead, on 16 cores: when image i arrives, those after i + 7 have not been opened."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    started = []
    threads = set()

    def open_rgb(path):
        started.append(path)
        threads.add(threading.current_thread())
        time.sleep(0.001)
        return np.full((1, 1, 3), path, np.uint8)
    monkeypatch.setattr(srgan, "open_rgb", open_rgb)
    for i, image in enumerate(srgan.decode_ahead(range(40))):
        assert image[0, 0, 0] == i
        if i < 5:
            time.sleep(0.1)                                      # time to open more
        assert len(started) <= i + 8
    assert len(started) == 40
    assert len(threads) <= 4


def test_a_store_that_exists_is_used_even_if_it_would_no_longer_fit(photos, tmp_path, monkeypatch):
    """Store, mode "auto": a second run must see the data that the first saw."""
    first = srgan.Store(srgan.find_images(photos), tmp_path / "cache", "auto")
    monkeypatch.setattr(srgan, "STORE_LIMIT", 1000)
    second = srgan.Store(srgan.find_images(photos), tmp_path / "cache", "auto")
    assert torch.equal(first.pixels, second.pixels)
    assert srgan.Store(srgan.find_images(photos), tmp_path / "other", "auto").pixels is None
