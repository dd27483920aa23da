"""evaluate.py: what is measured, against which LR images, and where it is written."""
import csv
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image

import evaluate
import srgan


@pytest.fixture
def test_set(tmp_path):
    """set/HR and set/LR_bicubic_x4, three images each; beside them tiny.pth, a checkpoint."""
    for i in range(3):
        write(tmp_path / "set/HR", i, hr := photo(64 + 4 * i, 72, i))
        lr = Image.fromarray(hr).resize((18, 16 + i), Image.Resampling.BICUBIC)
        write(tmp_path / "set/LR_bicubic_x4", i, np.asarray(lr))
    torch.manual_seed(0)
    srgan.save_checkpoint(tmp_path / "tiny.pth", srgan.Generator(channels=4, n_blocks=1))
    return tmp_path / "set"


def write(folder, i, pixels, name="i{}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name.format(i))


@pytest.fixture
def measured(script, tmp_path):
    """measured("--data", ...) runs evaluate.py without LPIPS: its JSON document."""
    def call(*args, status=0):
        found, _, err = script("evaluate", *args, "--no-lpips", "--json", "r.json")
        assert found == status, err
        return json.loads((tmp_path / "r.json").read_text())
    return call


def expected(test_set, upscale, **options):
    """PSNR and SSIM of each image: [3, 2]."""
    values = []
    for path in sorted((test_set / "HR").iterdir()):
        lr, hr = srgan.open_rgb(test_set / "LR_bicubic_x4" / path.name), srgan.open_rgb(path)
        sr = upscale(lr)
        values.append((srgan.psnr(sr, hr, **options), srgan.ssim(sr, hr, **options)))
    return np.array(values)


def test_table_json_and_csv_hold_what_was_measured(script, test_set, tmp_path):
    status, out, _ = script("evaluate", "--ckpt", "tiny.pth", "--data", "set", "--no-lpips",
                            "--per-image", "--json", "new/r.json", "--csv", "r.csv")
    assert status == 0 and out.splitlines()[-1] == "wrote new/r.json, r.csv"
    document = json.loads((tmp_path / "new/r.json").read_text())
    assert document["data"] == "set" and document["scale"] == 4
    assert document["protocol"] == {"channels": "Y", "shave": 4, "bits": 8,
                                    "lr": "LR images of the folder"}
    generator = srgan.load_generator(tmp_path / "tiny.pth")
    upscaling = {"nearest": lambda lr: lr.repeat(4, 0).repeat(4, 1), "bicubic": srgan.upsample,
                 "tiny.pth": lambda lr: srgan.upscale(generator, lr)}
    assert list(document["models"]) == list(upscaling)
    rows = list(csv.DictReader(open(tmp_path / "r.csv", newline="")))
    for model, upscale in upscaling.items():
        values, got = expected(test_set, upscale), document["models"][model]
        for column, name in zip(values.T, ("psnr", "ssim")):
            statistics = {"mean": column.mean(), "std": column.std()}
            assert got[name] == pytest.approx(statistics, abs=1e-2)
            one_by_one = [got["images"][f"i{i}"][name] for i in range(3)]
            assert one_by_one == pytest.approx(list(column), abs=1e-2)
            assert one_by_one == [float(row[name]) for row in rows if row["model"] == model]
        assert got["lpips"] is None and got["images"]["i0"]["lpips"] is None
        line = next(line for line in out.splitlines() if line.startswith(model))
        assert f"{got['psnr']['mean']:.2f} ± {got['psnr']['std']:.2f}" in line
        assert f"{got['ssim']['mean']:.4f} ± {got['ssim']['std']:.4f}" in line
    assert out.count("  i2 ") == 3 and "on Y, 4 border pixels" in out


def test_a_new_metric_is_a_row_in_METRICS(script, test_set, tmp_path, monkeypatch):
    def darkest(sr, hr, shave, luma):
        return int(sr.min())
    monkeypatch.setitem(srgan.METRICS, "dark", srgan.Metric(darkest, "Darkest", 1, min))
    monkeypatch.setattr(srgan.measure, "__defaults__", (tuple(srgan.METRICS), 4, True))
    status, out, _ = script("evaluate", "--data", "set", "--no-lpips", "--per-image",
                            "--csv", "r.csv", "--json", "r.json", "--save-images", "images")
    assert status == 0 and "Darkest" in out.splitlines()[1]
    got = json.loads((tmp_path / "r.json").read_text())["models"]["nearest"]["images"]["i1"]["dark"]
    assert got == srgan.open_rgb(test_set / "LR_bicubic_x4" / "i1.png").min()
    assert f" {got:.1f}\n" in out and (tmp_path / "r.csv").read_text().startswith(
        "model,image,psnr,ssim,lpips,dark\n")


def test_rgb_and_shave_change_the_protocol_and_the_output_says_so(measured, test_set):
    document = measured("--data", "set", "--rgb", "--shave", "0")
    assert document["protocol"] | {"channels": "RGB", "shave": 0} == document["protocol"]
    values = expected(test_set, srgan.upsample, luma=False, shave=0)
    assert document["models"]["bicubic"]["psnr"]["mean"] == pytest.approx(values[:, 0].mean())


def test_lr_is_made_from_hr_or_taken_from_elsewhere(measured, test_set, tmp_path):
    def bicubic(*args):
        return measured(*args)["models"]["bicubic"]["psnr"]["mean"]
    given, made = bicubic("--data", "set"), bicubic("--data", "set/HR")
    assert made == pytest.approx(given, abs=0.02)
    assert measured("--data", "set/HR")["protocol"]["lr"] == "bicubic x1/4 of HR"
    for i in range(3):
        darker = srgan.open_rgb(test_set / f"LR_bicubic_x4/i{i}.png") // 2
        write(tmp_path / "other", i, darker, "i{}x4.png")
    darker = bicubic("--data", "set", "--lr", "other")
    assert darker < given - 5
    assert bicubic("--data", "set/HR", "--kernel", "gaussian") != made
    assert bicubic("--data", "set/HR", "--scale", "2") > given
    generator = srgan.Generator(channels=4, n_blocks=1)
    srgan.save_checkpoint(tmp_path / "g.pth", generator, config={"kernel": "gaussian"})
    document = measured("--data", "set", "--ckpt", "g.pth")
    assert document["protocol"]["lr"] == "gaussian x1/4 of HR"
    (test_set / "LR_bicubic_x4").rename(tmp_path / "away"), (test_set / "LR_bicubic").mkdir()
    (tmp_path / "other").rename(test_set / "LR_bicubic/X4")      # the benchmark archive's layout
    assert bicubic("--data", "set") == darker


def test_a_folder_that_mixes_hr_and_lr_is_refused(script, test_set, tmp_path, one_line):
    for i in range(3):
        for source, flat, x4 in (("HR", "i{}_HR.png", "i{}.png"),
                                 ("LR_bicubic_x4", "i{}_LR.png", "i{}x4.png")):
            pixels = srgan.open_rgb(test_set / source / f"i{i}.png")
            write(tmp_path / "flat", i, pixels, flat), write(tmp_path / "x4", i, pixels, x4)
    test_set.rename((tmp_path / "all").mkdir() or tmp_path / "all/set")
    for folder in ("flat", "x4", "all"):
        status, _, err = script("evaluate", "--data", folder, "--no-lpips")
        assert status == 2 and "LR images" in err
        one_line(err)
    assert script("evaluate", "--data", "all/set", "--no-lpips")[0] == 0


@pytest.mark.parametrize("name", ["i{}.png", "i{}_SR.webp", "i{}x4_net-v2.png"])
def test_images_of_another_program_are_scored_like_those_of_a_checkpoint(measured, test_set,
                                                                         tmp_path, name):
    generator = srgan.load_generator(tmp_path / "tiny.pth")
    (tmp_path / "theirs").mkdir()
    for i in range(3):
        sr = srgan.upscale(generator, srgan.open_rgb(test_set / f"LR_bicubic_x4/i{i}.png"))
        Image.fromarray(sr).save(tmp_path / "theirs" / name.format(i), lossless=True)
    models = measured("--data", "set", "--sr", "theirs", "set/HR", "--ckpt", "tiny.pth")["models"]
    assert list(models) == ["nearest", "bicubic", "tiny.pth", "theirs", "set/HR"]
    for metric in ("psnr", "ssim"):
        assert models["theirs"][metric] == pytest.approx(models["tiny.pth"][metric], abs=1e-2)
    assert models["set/HR"]["psnr"] == {"mean": None, "std": None}    # inf, which JSON has not
    assert models["set/HR"]["ssim"]["mean"] == pytest.approx(1)


def test_sr_images_that_are_missing_or_of_another_size_are_left_out_for_all(script, measured,
                                                                            test_set, tmp_path):
    for i in range(2):
        write(tmp_path / "bicubic", i, photo(64 + 8 * i, 72), "i{}_out.png")
    status, _, err = script("evaluate", "--data", "set", "--no-lpips", "--sr", "bicubic")
    assert status == 1 and len(err.strip().splitlines()) == 2 and "Traceback" not in err
    assert "i1: the image of ./bicubic is not 72x68" in err and "bicubic/i2_out.png: no such" in err
    models = measured("--data", "set", "--sr", "bicubic", status=1)["models"]
    assert [list(scores["images"]) for scores in models.values()] == [["i0"]] * 3
    assert models["bicubic"] != models["./bicubic"]              # the row keeps its meaning


def test_sr_images_and_labelled_sheets_are_saved(script, test_set, tmp_path):
    status, out, _ = script("evaluate", "--ckpt", "tiny.pth", "--data", "set", "--no-lpips",
                            "--save-images", "images")
    assert status == 0 and out.splitlines()[-1] == "wrote images"
    lr = srgan.open_rgb(test_set / "LR_bicubic_x4/i0.png")
    saved = {path.parent.name: srgan.open_rgb(path) for path in tmp_path.glob("images/*/i0.png")}
    assert saved.keys() == {"nearest", "bicubic", "tiny", "comparison"}
    assert np.array_equal(saved["bicubic"], srgan.upsample(lr))
    sheet = saved["comparison"]
    assert sheet.shape[1] == 4 * 72 + 3 * 4 and sheet.shape[0] > 64
    images = [saved["nearest"], saved["bicubic"], saved["tiny"],
              srgan.open_rgb(test_set / "HR/i0.png")]
    for x, image in zip(range(0, 400, 76), images):
        assert np.array_equal(sheet[:64, x:x + 72], image)
        assert (sheet[64:, x:x + 72] < 128).any()                     # its label


def test_models_of_like_names_do_not_share_a_folder():
    models = ["bicubic", "a/b.pth", "x/a/b.v2.pth", "x/a/b.pth", "/a/b", "..", "comparison"]
    folders = evaluate.image_folders("out", models)
    assert len({str(path).lower() for path in folders.values()}) == len(folders) == 8
    assert all(path.parent == Path("out") and path.name.strip(".") for path in folders.values())


def test_an_image_that_cannot_be_measured_is_one_line_and_status_1(script, test_set):
    (test_set / "HR/i1.png").write_text("hello")
    write(test_set / "HR", 3, photo(3, 3)), write(test_set / "HR", 4, photo(16, 16), "s\n{}.png")
    write(test_set / "HR", 5, photo(40, 40), "\x1b[2J\udcff{}.png")
    status, out, err = script("evaluate", "--data", "set/HR", "--no-lpips", "--per-image")
    assert status == 1 and "3 images" in out and len(err.strip().splitlines()) == 3
    assert "i1.png" in err and "i3.png" in err and "s\\n4: SSIM needs 11x11" in err
    assert "\\x1b[2J" in out and "\x1b" not in out


def test_what_a_user_can_cause_is_one_line_and_status_2(script, test_set, tmp_path, one_line):
    (tmp_path / "empty").mkdir(), (tmp_path / "broken").mkdir()
    (test_set / "LR_bicubic_x4/i1.png").rename(tmp_path / "broken.png")
    srgan.save_checkpoint(tmp_path / "x2.pth", srgan.Generator(2, channels=4, n_blocks=1))
    srgan.save_checkpoint(tmp_path / "val.pth", srgan.Generator(4, 4, 1), val="elsewhere")
    for args in ("--data nowhere", "--data empty", "--data set", "--data set/HR --ckpt missing.pth",
                 "--data set/HR --ckpt tiny.pth x2.pth", "--data set/HR --ckpt broken.png",
                 "--data set/HR --ckpt tiny.pth --scale 2", "--data set/HR --device gpu",
                 "--data set/HR --ckpt val.pth --split val", "--data set/HR --sr nowhere",
                 "--data set/HR --sr empty"):
        status, _, err = script("evaluate", "--no-lpips", *args.split())
        assert status == 2, args
        one_line(err)
    (tmp_path / "broken/a.png").write_text("hello")
    status, _, err = script("evaluate", "--no-lpips", "--data", "broken")
    assert status == 2 and "no image could be measured" in err


def test_empty_arguments_are_refused(script, test_set):
    for option in "--data --lr --ckpt --sr --json --csv --save-images --device".split():
        status, _, err = script("evaluate", "--data", "set", "--no-lpips", option, "")
        assert status == 2 and "an argument is empty" in err


def test_lpips_is_measured_or_said_to_be_missing(script, test_set, tmp_path, monkeypatch):
    lpips, asked = pytest.importorskip("lpips"), []
    from torchvision.models import _api

    def fail(url, *args, **options):
        asked.append(url)
        raise OSError("no network")
    monkeypatch.setattr(_api, "load_state_dict_from_url", fail)
    command = ("evaluate", "--data", "set", "--json", "r.json")
    status, out, err = script(*command)
    assert status == 0 and "LPIPS is not available (no network); fetch" in err
    assert asked == [srgan.ALEXNET_URL] and asked[0] in err
    assert json.loads((tmp_path / "r.json").read_text())["models"]["bicubic"]["lpips"] is None
    monkeypatch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))
    assert script(*command)[0] == 0                              # its network's weights are random
    got = json.loads((tmp_path / "r.json").read_text())["models"]["bicubic"]
    assert got["lpips"]["mean"] > 0 and all(image["lpips"] > 0 for image in got["images"].values())
    assert srgan.load_lpips() is srgan.load_lpips()


def test_the_parts_of_a_split_are_those_of_training(measured, tmp_path):
    for i in range(40):
        write(tmp_path / "faces", i, photo(24, 24, i), "{:06d}.png")

    def part(name, *args):
        document = measured("--data", "faces", "--split", name, *args)
        return set(document["models"]["bicubic"]["images"])
    parts = {name: part(name) for name in ("train", "val", "test")}
    for name, pairs in srgan.split(srgan.find_pairs(tmp_path / "faces")).items():
        assert parts[name] == {stem for stem, *_ in pairs}
    srgan.save_checkpoint(tmp_path / "g.pth", srgan.Generator(channels=4, n_blocks=1),
                          config={"split": [80, 15, 5], "validate_on": 2})
    val, train = part("val", "--ckpt", "g.pth"), part("train", "--ckpt", "g.pth")
    assert len(val) == 2 and val < parts["val"]                  # training used the others
    assert train == parts["train"] | parts["val"] - val


def test_results_never_take_the_place_of_inputs(script, test_set, tmp_path, one_line):
    for i in range(3):
        write(tmp_path / "results/other", i, photo(64 + 4 * i, 72))
    (tmp_path / "out/bicubic").mkdir(parents=True)
    (tmp_path / "out/bicubic/i2.png").symlink_to(test_set / "HR/i2.png")
    inputs = [path for path in tmp_path.rglob("*.p*") if path.is_file()]
    before = [path.read_bytes() for path in inputs]
    for option in ("--save-images set", "--save-images .", "--csv tiny.pth", "--csv out/bicubic",
                   "--json set/HR/i0.png", "--json set/LR_bicubic_x4/i0.png",
                   "--csv results/other/i0.png", "--save-images results", "--save-images out"):
        status, _, err = script("evaluate", "--data", "set", "--ckpt", "tiny.pth", "--no-lpips",
                                "--sr", "results/other", *option.split())
        assert status == 2 and "name another output" in err, option
        one_line(err)
        assert before == [path.read_bytes() for path in inputs]
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert script("evaluate", "--data", "set", "--no-lpips", "--csv", "link.csv",
                  "--json", "/dev/null")[0] == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").stat().st_size
    assert not Path("/dev/null").is_file()
