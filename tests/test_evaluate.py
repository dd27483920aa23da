"""evaluate.py: what is measured, against which LR images, and where it is written."""
import csv
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import photo
from PIL import Image

import evaluate
import srgan
import train


@pytest.fixture(autouse=True)
def test_set(script):
    """set/HR and set/LR_bicubic_x4, three images each; beside them tiny.pth. Tests run there."""
    for i in range(3):
        write("set/HR", i, hr := photo(64 + 4 * i, 72, i))
        write("set/LR_bicubic_x4", i, np.asarray(
            Image.fromarray(hr).resize((18, 16 + i), Image.Resampling.BICUBIC)))
    srgan.save_checkpoint("tiny.pth", srgan.Generator(channels=4, n_blocks=1))


def write(folder, i, pixels, name="i{}.png"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(Path(folder, name.format(i)), lossless=True)


@pytest.fixture
def run(script):
    """run("--data", ...) runs evaluate.py without LPIPS: (exit status, stdout, stderr)."""
    return functools.partial(script, "evaluate", "--no-lpips")


@pytest.fixture
def measured(run):
    """The same, but returns the JSON document."""
    def call(*args, status=0):
        found, _, err = run(*args, "--json", "r.json")
        assert found == status, err
        return json.loads(Path("r.json").read_text())
    return call


@pytest.mark.parametrize("options, channels, shave", [((), "Y", 4),
                                                      (("--rgb", "--shave", "0"), "RGB", 0)])
def test_table_json_and_csv_hold_what_was_measured_by_the_protocol(run, options, channels, shave):
    status, out, _ = run("--ckpt", "tiny.pth", "--data", "set", "--per-image", *options,
                         "--json", "new/r.json", "--csv", "r.csv")
    assert status == 0 and out.splitlines()[-1] == "wrote new/r.json, r.csv"
    assert out.count("  i2 ") == 3 and f"on {channels}, {shave} border pixels" in out
    document = json.loads(Path("new/r.json").read_text())
    assert document["data"] == "set" and document["scale"] == 4
    assert document["protocol"] == {"channels": channels, "shave": shave, "bits": 8,
                                    "lr": "LR images of the folder"}
    generator = srgan.load_generator("tiny.pth")
    models = {"nearest": lambda lr: lr.repeat(4, 0).repeat(4, 1), "bicubic": srgan.upsample,
              "tiny.pth": lambda lr: srgan.upscale(generator, lr)}
    assert list(document["models"]) == list(models)
    pairs = [[srgan.open_rgb(f"set/{folder}/i{i}.png") for folder in ("LR_bicubic_x4", "HR")]
             for i in range(3)]
    rows = list(csv.DictReader(open("r.csv", newline="")))
    for model, upscale in models.items():
        got = document["models"][model]
        line = next(line for line in out.splitlines() if line.startswith(model))
        for name, function, digits in (("psnr", srgan.psnr, 2), ("ssim", srgan.ssim, 4)):
            values = [function(upscale(lr), hr, shave, channels == "Y") for lr, hr in pairs]
            assert got[name] == pytest.approx({"mean": np.mean(values), "std": np.std(values)},
                                              abs=1e-2)
            one_by_one = [got["images"][f"i{i}"][name] for i in range(3)]
            assert one_by_one == pytest.approx(values, abs=1e-2)
            assert one_by_one == [float(row[name]) for row in rows if row["model"] == model]
            assert " ± ".join(f"{x:.{digits}f}" for x in got[name].values()) in line
        assert got["lpips"] is None and got["images"]["i0"]["lpips"] is None


def test_lr_is_made_from_hr_or_taken_from_elsewhere(measured):
    def bicubic(*args, lr=None):
        document = measured(*args)
        assert lr in (None, document["protocol"]["lr"])
        return document["models"]["bicubic"]["psnr"]["mean"]
    given, made = bicubic("--data", "set"), bicubic("--data", "set/HR", lr="bicubic x1/4 of HR")
    assert made == pytest.approx(given, abs=0.02)
    for i in range(3):
        write("other", i, srgan.open_rgb(f"set/LR_bicubic_x4/i{i}.png") // 2, "i{}x4.png")
    darker = bicubic("--data", "set", "--lr", "other", lr="other")
    assert darker < given - 5
    assert bicubic("--data", "set/HR", "--kernel", "gaussian") != made
    assert bicubic("--data", "set/HR", "--scale", "2") > given
    srgan.save_checkpoint("g.pth", srgan.load_generator("tiny.pth"), config={"kernel": "gaussian"})
    bicubic("--data", "set", "--ckpt", "g.pth", lr="gaussian x1/4 of HR")
    Path("set/LR_bicubic_x4").rename("away"), Path("set/LR_bicubic").mkdir()
    Path("other").rename("set/LR_bicubic/X4")                    # the benchmark archive's layout
    assert bicubic("--data", "set") == darker


@pytest.mark.parametrize("name", ["i{}.png", "i{}x4_net-v2.webp"])
def test_images_of_another_program_are_scored_like_those_of_a_checkpoint(measured, name):
    generator = srgan.load_generator("tiny.pth")
    for i in range(3):
        lr = srgan.open_rgb(f"set/LR_bicubic_x4/i{i}.png")
        write("theirs", i, srgan.upscale(generator, lr), name)
    models = measured("--data", "set", "--sr", "theirs", "set/HR", "--ckpt", "tiny.pth")["models"]
    assert list(models) == ["nearest", "bicubic", "tiny.pth", "theirs", "set/HR"]
    for metric in ("psnr", "ssim"):
        assert models["theirs"][metric] == pytest.approx(models["tiny.pth"][metric], abs=1e-2)
    assert models["set/HR"]["psnr"] == {"mean": None, "std": None}    # JSON has no infinity
    assert models["set/HR"]["ssim"]["mean"] == pytest.approx(1)


def test_what_cannot_be_measured_is_one_line_and_left_out_for_all_models(run, measured):
    for i in range(2):                                           # i1 of another size, i2 missing
        write("bicubic", i, photo(64 + 8 * i, 72), "i{}_out.png")
    models = measured("--data", "set", "--sr", "bicubic", status=1)["models"]
    assert [list(scores["images"]) for scores in models.values()] == [["i0"]] * 3
    assert models["bicubic"] != models["./bicubic"]              # a folder of a baseline's name
    write("set/HR", 3, photo(3, 3)), write("set/HR", 4, photo(16, 16))
    Path("set/HR/i1.png").write_text("hello")
    status, out, err = run("--data", "set/HR", "--per-image")
    assert status == 1 and "2 images" in out and len(err.strip().splitlines()) == 3
    assert "i1.png" in err and "i3.png" in err and "i4: SSIM needs 11x11" in err


def test_sr_images_and_sheets_that_compare_them_are_saved(run):
    status, out, _ = run("--ckpt", "tiny.pth", "--data", "set", "--save-images", "images")
    assert status == 0 and out.splitlines()[-1] == "wrote images"
    saved = {path.parent.name: srgan.open_rgb(path) for path in Path().glob("images/*/i0.png")}
    lr, saved["HR"] = (srgan.open_rgb(f"set/{folder}/i0.png") for folder in ("LR_bicubic_x4", "HR"))
    assert np.array_equal(saved["bicubic"], srgan.upsample(lr))
    for i, name in enumerate(("nearest", "bicubic", "tiny", "HR")):
        part = saved["comparison"][:, 76 * i:76 * i + 72]
        assert np.array_equal(part[:64], saved[name]) and (part[64:] < 128).any()   # its label


def test_what_a_user_can_cause_has_status_2(run):
    Path("empty").mkdir(), Path("broken").mkdir(), Path("broken/a.png").write_text("hello")
    Path("set/LR_bicubic_x4/i1.png").rename("broken.png")
    srgan.save_checkpoint("x2.pth", srgan.Generator(2, channels=4, n_blocks=1))
    srgan.save_checkpoint("val.pth", srgan.Generator(4, 4, 1), val="elsewhere")
    for args in ("nowhere", "empty", "broken", "set", "set/HR --ckpt missing.pth",
                 "set/HR --ckpt tiny.pth x2.pth", "set/HR --ckpt broken.png",
                 "set/HR --ckpt tiny.pth --scale 2", "set/HR --device gpu", "set/HR --sr nowhere",
                 "set/HR --ckpt val.pth --split val", "set/HR --sr empty", "set/HR --shave -1"):
        assert run("--data", *args.split())[0] == 2, args
    assert "none could be measured" in run("--data", "broken")[2]


def test_models_of_like_names_do_not_share_a_folder():
    models = ["bicubic", "a/b.pth", "x/a/b.v2.pth", "x/a/b.pth", "/a/b", "..", "comparison"]
    folders = evaluate.image_folders("out", models)
    assert len({str(path).lower() for path in folders.values()}) == len(folders) == 8
    assert all(path.parent == Path("out") and path.name.strip(".") for path in folders.values())


def test_lpips_is_measured_or_said_to_be_missing(script, monkeypatch):
    lpips = pytest.importorskip("lpips")
    from torchvision.models import _api

    def fail(url, *args, **options):
        raise OSError(f"no way to {url}")
    monkeypatch.setattr(_api, "load_state_dict_from_url", fail)
    for missing in (True, False):
        status, _, err = script("evaluate", "--data", "set", "--json", "r.json")
        got = json.loads(Path("r.json").read_text())["models"]["bicubic"]["lpips"]
        assert status == 0 and (got is None) == missing, err
        assert err.count(srgan.ALEXNET_URL) == 2 * missing       # the cause, and what to do
        monkeypatch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))


def test_the_parts_of_a_split_are_those_of_training(measured):
    for i in range(40):
        write("faces", i, photo(24, 24, i), "{:06d}.png")
    config = {"split": [80, 15, 5], "validate_on": 2, "scale": 4, "kernel": "bicubic"}
    srgan.save_checkpoint("g.pth", srgan.Generator(channels=4, n_blocks=1), config=config)
    args = train.parse_args(["--data", "faces", "--stage", "gan"])
    whole = srgan.split(srgan.find_pairs("faces"))
    for more, parts in (((), (whole["train"], whole["val"])),
                        (("--ckpt", "g.pth"), train.find_data(args, config))):
        for name, part in zip(("train", "val"), parts):
            document = measured("--data", "faces", "--split", name, *more)
            assert [*document["models"]["bicubic"]["images"]] == [path.stem for _, path, _ in part]


def test_results_never_take_the_place_of_inputs(run):
    for i in range(3):
        write("results/other", i, photo(64 + 4 * i, 72))
    inputs = [path for path in Path().rglob("*.p*") if path.is_file()]
    before = [path.read_bytes() for path in inputs]
    for option in ("--save-images set", "--csv tiny.pth", "--json set/LR_bicubic_x4/i0.png",
                   "--csv results/other/i0.png", "--save-images results"):
        status, _, err = run("--data", "set", "--ckpt", "tiny.pth", "--sr", "results/other",
                             *option.split())
        assert status == 2 and "name another output" in err, option
        assert before == [path.read_bytes() for path in inputs]
    Path("link.csv").symlink_to("real.csv")
    assert run("--data", "set", "--csv", "link.csv", "--json", "/dev/null")[0] == 0
    assert Path("link.csv").is_symlink() and Path("real.csv").stat().st_size
    assert not Path("/dev/null").is_file()
