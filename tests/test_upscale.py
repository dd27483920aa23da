import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, photo
from PIL import Image, ImageCms

import srgan


@pytest.fixture
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ckpt") / "tiny.pth"
    srgan.save_checkpoint(path, srgan.Generator(channels=4, n_blocks=1))
    return path


RGB = Image.fromarray(photo(20, 30))


def upscaled(script, ckpt, tmp_path, image, name, out="out.png", *options, **save):
    image.save(tmp_path / name, **save)
    status, _, err = script("upscale", tmp_path / name, tmp_path / out, "--ckpt", ckpt, *options)
    assert status == 0, err
    return Image.open(tmp_path / out)


def near(a, b):
    """The generator of `ckpt` starts as a nearest-neighbour upsampling of less contrast: the picture is still recognisable."""
    a, b = (np.asarray(x.resize(b.size).convert("RGB"), float).ravel() for x in (a, b))
    return np.corrcoef(a, b)[0, 1] > 0.95


def test_every_kind_of_picture_keeps_what_it_is(script, ckpt, tmp_path):
    grey = RGB.convert("L")
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 30).astype(np.uint8), (20, 1)))
    rgba, la = RGB.copy(), grey.copy()
    rgba.putalpha(alpha), la.putalpha(alpha)
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    cases = [(RGB, "rgb.png", "RGB", RGB, {}), (grey, "grey.png", "L", grey, {}), (rgba, "rgba.png", "RGBA", RGB, {}),
             (la, "la.png", "LA", grey, {}), (RGB.quantize(64), "palette.png", "RGB", RGB, {}), (grey16, "16.png", "L", grey, {}),
             (RGB, "turned.jpg", "RGB", RGB.rotate(-90, expand=True), {"exif": turned, "quality": 95}),
             (RGB, "photo.webp", "RGB", RGB, {"quality": 95}), (RGB.convert("CMYK"), "print.jpg", "RGB", RGB, {"quality": 95})]
    for image, name, mode, expected, save in cases:
        result = upscaled(script, ckpt, tmp_path, image, name, **save)
        assert result.mode == mode and result.size == tuple(4 * n for n in expected.size), name
        assert near(result, expected), name
        if mode in ("RGBA", "LA"):
            assert near(result.getchannel("A"), alpha) and result.getchannel("A").getextrema() == (0, 255), name


def test_transparency_that_is_the_same_everywhere_stays_exactly(script, ckpt, tmp_path):
    rgba = RGB.copy()
    rgba.putalpha(77)
    assert upscaled(script, ckpt, tmp_path, rgba, "a.png").getchannel("A").getextrema() == (77, 77)


def test_icc_profile_and_dpi_are_kept(script, ckpt, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for out in ("out.png", "out.jpg"):
        result = upscaled(script, ckpt, tmp_path, RGB, "a.png", out, icc_profile=profile, dpi=(300, 300))
        assert result.info["icc_profile"] == profile
        assert result.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_outscale_sets_the_final_size(script, ckpt, tmp_path):
    assert upscaled(script, ckpt, tmp_path, RGB, "a.png", "out.png", "--outscale", "1.5").size == (45, 30)
    assert upscaled(script, ckpt, tmp_path, RGB, "a.png", "out.png", "--outscale", "6").size == (180, 120)


def test_tiles_ensemble_and_precision_are_options(script, ckpt, tmp_path):
    generator = srgan.load_generator(ckpt)
    torch.nn.init.normal_(generator.tail.weight, std=0.2)
    srgan.save_checkpoint(ckpt, generator)
    plain = np.asarray(upscaled(script, ckpt, tmp_path, RGB, "a.png", "out.png", "--precision", "fp32"))
    tiled = np.asarray(upscaled(script, ckpt, tmp_path, RGB, "a.png", "out.png", "--precision", "fp32", "--tile", "7"))
    assert np.abs(plain.astype(int) - tiled).max() <= 1
    for option in (("--ensemble",), ("--precision", "bf16")):
        other = np.asarray(upscaled(script, ckpt, tmp_path, RGB, "a.png", "out.png", *option))
        assert 0 < np.abs(plain.astype(int) - other).mean() < 30


def test_a_folder_becomes_a_folder_and_so_do_several_files(script, ckpt, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    RGB.save(tmp_path / "in" / "a.jpg"), RGB.save(tmp_path / "in" / "deep" / "b.png")
    assert script("upscale", "in", "out", "--ckpt", ckpt)[0] == 0
    assert sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "out").rglob("*.png")) == ["out/a.png", "out/deep/b.png"]
    assert script("upscale", "in/a.jpg", "in/deep/b.png", "many", "--ckpt", ckpt)[0] == 0
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["a.png", "b.png"]
    assert script("upscale", "in/a.jpg", "one/", "--ckpt", ckpt)[0] == 0
    assert Image.open(tmp_path / "one" / "a.png").size == (120, 80)


def test_a_broken_picture_among_others_fails_alone(script, ckpt, tmp_path, one_line):
    (tmp_path / "in").mkdir()
    RGB.save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_text("hello")
    status, _, err = script("upscale", "in", "out", "--ckpt", ckpt)
    assert status == 1 and "b.png" in err
    assert script("upscale", "in/b.png", "in/c.png", "out", "--ckpt", ckpt)[0] == 2  # none was done
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


def test_what_a_user_can_cause_is_one_line_and_status_2(script, ckpt, tmp_path, one_line, monkeypatch):
    RGB.save(tmp_path / "a.png")
    RGB.save(tmp_path / "a.jpg")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    rgba = RGB.copy()
    rgba.putalpha(Image.fromarray(photo(20, 30)[:, :, 0]))
    rgba.save(tmp_path / "alpha.png")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    state = srgan.load_checkpoint(ckpt)
    torch.save({**state, "arch": {**state["arch"], "n_blocks": 2}}, tmp_path / "deeper.pth")
    before = (tmp_path / "a.png").read_bytes()
    cases = [(("missing.png", "out.png"), "missing.png"), (("text.png", "out.png"), "text.png"), (("cut.png", "out.png"), "cut.png"),
             (("empty", "out"), "empty"), (("a.png", "empty"), "is a folder"), (("a.png", "folder.png"), "is a folder"),
             (("a.png", "no/where.png"), "no such folder"), (("a.png", "out.xyz"), "out.xyz"), (("a.png", "out"), "out"),
             (("a.png", "a.jpg", "text.png"), "is a file"), (("a.png", "a.png"), "never overwritten"),
             (("a.png", "a.jpg", "both"), "would both become"), (("alpha.png", "out.jpg"), "transparency"),
             (("a.png", "out.png", "--ckpt", "text.png"), "text.png"), (("a.png", "out.png", "--ckpt", "missing.pth"), "missing.pth"),
             (("a.png", "out.png", "--ckpt", "other.pth"), "other.pth"), (("a.png", "out.png", "--ckpt", "deeper.pth"), "deeper.pth"),
             (("a.png", "out.png", "--device", "tpu9"), "tpu9"), (("a.png", "out.png", "--device", "cuda:99"), "cuda:99")]
    for args, words in cases:
        status, _, err = script("upscale", *args, *(() if "--ckpt" in args else ("--ckpt", ckpt)))
        lines = [line for line in err.splitlines() if ", x4, on" not in line]
        assert status == 2 and words in err, (args, err)
        one_line("\n".join(lines))
    assert (tmp_path / "a.png").read_bytes() == before and not (tmp_path / "out.png").exists()


def test_options_without_sense_are_refused(script, tmp_path):
    RGB.save(tmp_path / "a.png")
    for options in (("--blend", "1.5"), ("--outscale", "0"), ("--tile", "-1"), ("--ckpt", "x", "--model", "srgan"), ("--outscale", "nan"), ("--max-megapixels", "nan"), ("--max-megapixels", "0")):
        assert script("upscale", "a.png", "out.png", *options)[0] == 2


def test_models_and_blends_come_from_the_weights_folder(script, tmp_path, monkeypatch):
    import upscale
    weights = tmp_path / "weights"
    weights.mkdir()
    monkeypatch.setattr(upscale, "WEIGHTS", weights)
    ends = [srgan.Generator(channels=4, n_blocks=1) for _ in range(2)]
    torch.nn.init.constant_(ends[1].tail.bias, 2.0)
    RGB.save(tmp_path / "a.png")
    srgan.save_checkpoint(weights / "srresnet.pth", ends[0])

    def mean(*options):
        status, _, err = script("upscale", "a.png", "out.png", *options)
        assert status == 0, err
        return np.asarray(Image.open(tmp_path / "out.png"), float).mean()
    assert mean() == mean("--model", "srresnet")
    assert script("upscale", "a.png", "out.png", "--model", "srgan")[0] == 2
    srgan.save_checkpoint(weights / "srgan.pth", ends[1])
    assert mean() == mean("--model", "srgan") == mean("--blend", "1")
    assert mean("--model", "srresnet") == mean("--blend", "0") < mean("--blend", "0.5") < mean("--blend", "1")


def test_the_readme_command_works_without_torchvision_or_lpips(tmp_path):
    """In a process of its own, where importing them fails, from the bundled weights."""
    code = ("import sys; sys.modules.update(torchvision=None, lpips=None, matplotlib=None, scipy=None)\n"
            f"sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'upscale.py'\nimport srgan, upscale; srgan.run(upscale.main)")
    sample = sorted((ROOT / "samples").glob("*.png"))[0]
    done = subprocess.run([sys.executable, "-c", code, sample, tmp_path / "out.png"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = Image.open(sample), Image.open(tmp_path / "out.png")
    assert large.size == tuple(4 * n for n in small.size)
    lr = np.asarray(large.resize(small.size, Image.Resampling.BICUBIC).convert("RGB"))
    assert srgan.psnr(lr, np.asarray(small.convert("RGB")), shave=2) > 30  # what was upscaled is the picture


def test_pictures_of_a_folder_are_computed_together_and_saved_meanwhile(script, ckpt, tmp_path, monkeypatch):
    import upscale
    (tmp_path / "in").mkdir()
    sizes = [(20, 30)] * 5 + [(30, 20)] * 2 + [(150, 150)] * 2 + [(20, 30)]
    for i, size in enumerate(sizes):
        Image.fromarray(photo(*size, i)).save(tmp_path / "in" / f"{i}.png")
    shapes, real = [], srgan.upscale
    monkeypatch.setattr(srgan, "upscale", lambda generator, pictures, **options: (shapes.append(pictures.shape[:3]), real(generator, pictures, **options))[1])
    monkeypatch.setattr(upscale, "TOGETHER", 3 * 20 * 30)
    assert script("upscale", "in", "out", "--ckpt", ckpt, "--precision", "fp32")[0] == 0
    assert shapes == [(3, 20, 30), (2, 20, 30), (2, 30, 20), (1, 150, 150), (1, 150, 150), (1, 20, 30)]
    generator = srgan.load_generator(ckpt)
    for i, size in enumerate(sizes):
        result = np.asarray(Image.open(tmp_path / "out" / f"{i}.png")).astype(int)
        assert np.abs(result - real(generator, photo(*size, i))).max() <= 1


def test_a_result_that_cannot_be_saved_fails_alone(script, ckpt, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        RGB.save(tmp_path / "in" / f"{name}.png")
    real = Image.Image.save

    def save(image, path, *args, **options):
        if len(list((tmp_path / "out").glob("[a-z].png"))) == 1:
            raise MemoryError
        real(image, path, *args, **options)
    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr("upscale.ThreadPoolExecutor", lambda real=__import__("concurrent.futures").futures.ThreadPoolExecutor: real(1))
    status, _, err = script("upscale", "in", "out", "--ckpt", ckpt)
    assert status == 1 and err.count("cannot be written (MemoryError)") == 2


def test_impossible_densities_are_dropped(script, ckpt, tmp_path):
    result = upscaled(script, ckpt, tmp_path, RGB, "a.tif", dpi=(4e9, 4e9))
    assert result.size == (120, 80) and "dpi" not in result.info
