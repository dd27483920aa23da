"""Section 5: PSNR, SSIM, LPIPS, and what is done with them."""
import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image

import srgan

BLACK = np.zeros((20, 20, 3), np.uint8)
WHITE = np.full((20, 20, 3), 255, np.uint8)


def pair(h=64, w=80):
    """SR and HR: a worse version of an image, and the image."""
    hr = photo(h, w, seed=1)
    noise = np.random.default_rng(2).normal(0, 12, hr.shape)
    sr = np.clip(hr * 0.9 + noise + 5, 0, 255).astype(np.uint8)
    return sr, hr


def patterns():
    """SR and HR, from formulas, whose PSNR and SSIM on Y scikit-image was asked for."""
    y, x = np.mgrid[0:48, 0:64]
    hr = np.stack([3 * x + 2 * y, 5 * y, x * y], 2).astype(np.uint8)
    sr = np.stack([3 * x + 2 * y + x % 7, 5 * y + y % 5, x * y + 9], 2).astype(np.uint8)
    return sr, hr


# PSNR and SSIM

@pytest.mark.parametrize("metric, value", [(srgan.psnr, 32.785205), (srgan.ssim, 0.879417)])
def test_a_metric_agrees_with_scikit_image(metric, value):
    """psnr and ssim."""
    assert metric(*patterns()) == pytest.approx(value, abs=1e-6)


def test_psnr_on_rgb_is_0_db_from_black_to_white():
    """psnr, with luma=False: the MSE is 255^2."""
    assert srgan.psnr(BLACK, WHITE, luma=False) == 0


def test_psnr_on_y_sees_the_range_from_16_to_235():
    """psnr, with luma=True: from black to white, Y of BT.601 differs by 219."""
    assert srgan.psnr(BLACK, WHITE) == pytest.approx(20 * np.log10(255 / 219), abs=1e-9)


def test_identical_images_have_100_db():
    """psnr, where 10 log10(255^2 / 0) is infinite."""
    assert srgan.psnr(BLACK, BLACK) == 100


def test_identical_images_have_an_ssim_of_1():
    """ssim."""
    _, hr = pair()
    assert srgan.ssim(hr, hr) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("metric", [srgan.psnr, srgan.ssim])
def test_what_lies_in_the_border_does_not_count(metric):
    """psnr and ssim, with shave."""
    sr, hr = pair()
    spoiled = sr.copy()
    spoiled[:4] = 0
    spoiled[-4:] = 0
    spoiled[:, :4] = 255
    spoiled[:, -4:] = 255
    assert metric(spoiled, hr, shave=4) == metric(sr, hr, shave=4)


@pytest.mark.parametrize("metric", [srgan.psnr, srgan.ssim])
@pytest.mark.parametrize("row", [3, -4])
def test_what_lies_just_inside_the_border_counts(metric, row):
    """psnr and ssim, with shave."""
    sr, hr = pair()
    spoiled = sr.copy()
    spoiled[row] = 255 - hr[row]
    assert metric(spoiled, hr, shave=3) < metric(sr, hr, shave=3)


@pytest.mark.parametrize("metric", [srgan.psnr, srgan.ssim])
def test_images_of_different_sizes_are_refused(metric):
    """psnr and ssim: torch would broadcast one column over all."""
    with pytest.raises(ValueError, match="different sizes"):
        metric(BLACK, WHITE[:, :1])


@pytest.mark.parametrize("wrong", [
    np.zeros((20, 20, 3)), np.zeros((20, 20), np.uint8), np.zeros((20, 20, 4), np.uint8),
    torch.zeros(20, 20, 3, dtype=torch.uint8)])
def test_anything_but_uint8_arrays_of_rgb_is_refused(wrong):
    """psnr."""
    with pytest.raises(ValueError, match="uint8 arrays"):
        srgan.psnr(wrong, wrong)


@pytest.mark.parametrize("metric, side, words", [
    (srgan.psnr, 8, "nothing is left"), (srgan.ssim, 18, "11x11"), (srgan.lpips, 31, "32x32")])
def test_images_that_are_too_small_are_refused(metric, side, words):
    """psnr, ssim and lpips; the border of psnr and ssim is 4 pixels."""
    sr, hr = pair()
    with pytest.raises(srgan.InputError, match=words):
        metric(sr[:side], hr[:side])


# LPIPS

def test_lpips_takes_whole_rgb_images_in_the_range_its_network_expects(monkeypatch):
    """lpips: [-1, 1], shown by a network that compares its inputs."""
    network = torch.nn.PairwiseDistance()
    network.weight = torch.nn.Parameter(torch.zeros(1))
    network.forward = lambda x, y: ((x - y).double().square().mean() + x.max())
    monkeypatch.setattr(srgan, "load_lpips", lambda: network)
    sr, hr = pair()
    expected = ((sr / 127.5 - hr / 127.5) ** 2).mean() + sr.max() / 127.5 - 1
    assert srgan.lpips(sr, hr, shave=4, luma=True) == pytest.approx(expected, abs=1e-6)


def test_lpips_is_left_out_where_it_is_not_wanted():
    """usable_metrics."""
    assert srgan.usable_metrics(with_lpips=False) == ["psnr", "ssim"]


def test_lpips_is_left_out_with_a_line_where_it_cannot_be_had(monkeypatch, capsys):
    """usable_metrics."""
    def fail():
        raise srgan.InputError("no network")

    monkeypatch.setattr(srgan, "load_lpips", fail)
    assert srgan.usable_metrics() == ["psnr", "ssim"]
    assert capsys.readouterr().err == "no network; going on without it\n"


# Several images

def test_measure_gives_a_value_for_the_metrics_asked_for_and_none_for_the_others():
    """measure."""
    sr, hr = pair()
    found = srgan.measure(sr, hr, names=["ssim"], shave=2, luma=False)
    assert found == {"psnr": None, "ssim": srgan.ssim(sr, hr, 2, False), "lpips": None}


def test_aggregate_is_the_mean_and_the_standard_deviation():
    """aggregate; a metric that is missing is missing in the result."""
    scores = [{"psnr": 20, "ssim": 0.5, "lpips": None}, {"psnr": 30, "ssim": 0.7, "lpips": None}]
    found = srgan.aggregate(scores)
    assert found["psnr"] == {"mean": 25, "std": 5}
    assert found["ssim"] == pytest.approx({"mean": 0.6, "std": 0.1}, abs=1e-12)
    assert found["lpips"] is None


def test_describe_prints_means_with_the_digits_of_their_metric():
    """describe."""
    summary = {"psnr": {"mean": 28.4267, "std": 1}, "ssim": {"mean": 0.81107, "std": 1},
               "lpips": None}
    assert srgan.describe(summary) == "PSNR 28.43  SSIM 0.8111"


@pytest.fixture
def images(tmp_path):
    """Pairs a, b and c of HR images of 32x40, without LR."""
    pairs = []
    for i, stem in enumerate("abc"):
        path = tmp_path / f"{stem}.png"
        Image.fromarray(photo(32, 40, i)).save(path)
        pairs.append((stem, path, None))
    return pairs


def bicubic(lr, stem):
    return srgan.interpolate(lr, 4)


def measure_all(pairs, save=None, **models):
    return srgan.measure_all(pairs, models, 4, "bicubic", save, names=["psnr"], shave=4)


def test_every_model_is_measured_on_every_image(images):
    """measure_all."""
    found = measure_all(images, bicubic=bicubic, dark=lambda lr, stem: bicubic(lr, stem) // 2)
    assert list(found) == ["a", "b", "c"]
    for stem, path, _ in images:
        lr, hr = srgan.open_pair(path)
        sr = bicubic(lr, stem)
        assert found[stem]["bicubic"]["psnr"] == srgan.psnr(sr, hr)
        assert found[stem]["dark"]["psnr"] == srgan.psnr(sr // 2, hr)


def test_the_protocol_reaches_the_metrics(images):
    """measure_all, with names, shave and luma."""
    found = srgan.measure_all(images, {"SR": bicubic}, 4, "bicubic", names=["ssim"], shave=1,
                              luma=False)
    lr, hr = srgan.open_pair(images[0][1])
    assert found["a"]["SR"] == srgan.measure(bicubic(lr, "a"), hr, ["ssim"], 1, False)


@pytest.mark.parametrize("scale, kernel", [(2, "bicubic"), (4, "gaussian")])
def test_lr_is_made_by_the_scale_and_the_kernel(images, scale, kernel):
    """measure_all: what the models are given."""
    seen = []

    def model(lr, stem):
        seen.append(lr)
        return srgan.interpolate(lr, scale)

    srgan.measure_all(images[:1], {"SR": model}, scale, kernel, names=["psnr"])
    expected, _ = srgan.open_pair(images[0][1], None, scale, kernel)
    assert np.array_equal(seen[0], expected)


def test_an_image_that_one_model_fails_on_is_left_out_for_all(images, capsys):
    """measure_all: the result of `broken` on b has another size."""
    def broken(lr, stem):
        sr = bicubic(lr, stem)
        return sr[1:] if stem == "b" else sr

    found = measure_all(images, bicubic=bicubic, broken=broken)
    assert list(found) == ["a", "c"]
    assert capsys.readouterr().err == "b: the image of broken is not 40x32\n"


def test_an_unreadable_image_is_left_out_with_a_line_that_names_it_once(images, capsys):
    """measure_all."""
    images[1][1].write_text("hello")
    assert list(measure_all(images, bicubic=bicubic)) == ["a", "c"]
    err = capsys.readouterr().err
    assert err.startswith(f"{images[1][1]}: ") and err.count("b.png") == err.count("\n") == 1


def test_an_image_of_one_colour_is_left_out_with_a_line(images, capsys):
    """measure_all: its PSNR would be that of rounding, or infinite."""
    Image.new("RGB", (40, 32), (9, 200, 77)).save(images[1][1])
    assert list(measure_all(images, bicubic=bicubic)) == ["a", "c"]
    assert "b: all pixels have one colour" in capsys.readouterr().err


def test_an_image_that_does_not_fit_into_memory_is_left_out_with_a_line(images, capsys):
    """measure_all."""
    def large(lr, stem):
        if stem == "b":
            raise MemoryError("out of memory; use smaller tiles")
        return bicubic(lr, stem)

    assert list(measure_all(images, large=large)) == ["a", "c"]
    assert capsys.readouterr().err == "b: out of memory\n"


def test_an_error_of_the_program_is_not_taken_for_a_failed_image(images):
    """measure_all."""
    def wrong(lr, stem):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        measure_all(images, wrong=wrong)


def test_save_gets_each_measured_image_with_its_scores(images):
    """measure_all, with save."""
    images[1][1].write_text("hello")
    saved = {}

    def save(stem, sr, hr, scores):
        saved[stem] = scores
        assert np.array_equal(hr, srgan.open_rgb(images["abc".index(stem)][1]))
        assert srgan.psnr(sr["bicubic"], hr) == scores["bicubic"]["psnr"]

    assert measure_all(images, save, bicubic=bicubic) == saved
    assert list(saved) == ["a", "c"]


# Images side by side

def test_a_sheet_holds_the_images_unchanged_and_each_label_below_its_image():
    """side_by_side."""
    first = photo(40, 60, 0)
    second = photo(40, 60, 1)
    sheet = np.asarray(srgan.side_by_side([first, second], ["one", "two\nlines"]))
    assert np.array_equal(sheet[:40, :60], first)
    assert np.array_equal(sheet[:40, 64:], second)
    for left in (0, 64):
        assert (sheet[40:, left:left + 60] < 128).any()
    assert (sheet[:, 60:64] == 255).all()


def test_letters_become_smaller_until_the_longest_line_fits():
    """side_by_side: a line of 14 letters under an image of 100 pixels."""
    image = photo(40, 100)
    sheet = np.asarray(srgan.side_by_side([image, image], ["W" * 7, "i"]))
    assert (sheet[40:, 96:] < 128).any() and (sheet[40:, 100:104] == 255).all()
    large = srgan.side_by_side([image], ["i"])
    assert sheet.shape[0] < large.height


# The baselines

@pytest.mark.parametrize("scale", srgan.SCALES)
def test_nearest_repeats_each_pixel(scale):
    """upsample, with Resampling.NEAREST."""
    lr = photo(5, 7)
    sr = srgan.interpolate(lr, scale, Image.Resampling.NEAREST)
    assert np.array_equal(sr, lr.repeat(scale, 0).repeat(scale, 1))


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_bicubic_lies_nearer_to_the_original_than_nearest(scale):
    """upsample, which is bicubic by default."""
    hr = np.array(Image.fromarray(photo(16, 20)).resize((20 * scale, 16 * scale), 3))
    lr = np.array(Image.fromarray(hr).resize((20, 16), 3))
    sr = srgan.interpolate(lr, scale)
    nearest = srgan.interpolate(lr, scale, Image.Resampling.NEAREST)
    assert sr.shape == hr.shape and srgan.psnr(sr, hr) > srgan.psnr(nearest, hr)
