import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image

import srgan


@pytest.fixture
def test_set(tmp_path):
    """HR/ and LR_bicubic_x4/ of three pictures; a tiny checkpoint beside them."""
    for i in range(3):
        hr = photo(64 + 4 * i, 72, i)
        for folder, picture in (("HR", hr), ("LR_bicubic_x4", np.asarray(Image.fromarray(hr).resize((18, 16 + i), Image.Resampling.BICUBIC)))):
            (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "set" / folder / f"i{i}.png")
    torch.manual_seed(0)
    srgan.save_checkpoint(tmp_path / "tiny.pth", srgan.Generator(channels=4, n_blocks=1))
    return tmp_path / "set"


def expected(test_set, generator=None, **options):
    values = []
    for path in sorted((test_set / "HR").iterdir()):
        lr, hr = srgan.open_rgb(test_set / "LR_bicubic_x4" / path.name), srgan.open_rgb(path)
        sr = srgan.upscale(generator, lr) if generator else srgan.bicubic(lr)
        values.append((srgan.psnr(sr, hr, **options), srgan.ssim(sr, hr, **options)))
    return np.array(values)


def test_the_table_the_json_and_the_csv_hold_what_was_measured(script, test_set, tmp_path):
    status, out, _ = script("evaluate", "--ckpt", "tiny.pth", "--data", "set", "--no-lpips", "--per-image", "--json", "r.json", "--csv", "r.csv")
    assert status == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["data"] == "set" and document["scale"] == 4
    assert document["protocol"] == {"channels": "Y", "shave": 4, "bits": 8, "lr": "LR pictures of the folder"}
    rows = list(csv.DictReader(open(tmp_path / "r.csv")))
    for model, generator in (("bicubic", None), ("tiny.pth", srgan.load_generator(tmp_path / "tiny.pth"))):
        values, got = expected(test_set, generator), document["models"][model]
        for k, name in enumerate(("psnr", "ssim")):
            assert got[name]["mean"] == pytest.approx(values[:, k].mean(), abs=1e-2) and got[name]["std"] == pytest.approx(values[:, k].std(), abs=1e-2)
            assert [got["images"][f"i{i}"][name] for i in range(3)] == pytest.approx(list(values[:, k]), abs=1e-2)
            assert [float(r[name]) for r in rows if r["model"] == model] == pytest.approx(list(values[:, k]), abs=1e-2)
        assert got["lpips"] is None and got["images"]["i0"]["lpips"] is None
        line = next(line for line in out.splitlines() if line.startswith(model))
        assert f"{got['psnr']['mean']:.2f} ± {got['psnr']['std']:.2f}" in line and f"{got['ssim']['mean']:.4f} ±" in line
    assert out.count("  i2 ") == 2 and "on Y, 4 border pixels" in out


def test_rgb_and_shave_change_the_protocol_and_the_output_says_so(script, test_set, tmp_path):
    status, out, _ = script("evaluate", "--data", "set", "--no-lpips", "--rgb", "--shave", "0", "--json", "r.json")
    assert status == 0 and "on RGB, 0 border pixels" in out
    got = json.loads((tmp_path / "r.json").read_text())["models"]["bicubic"]
    assert got["psnr"]["mean"] == pytest.approx(expected(test_set, luma=False, shave=0)[:, 0].mean())


def test_lr_is_made_from_hr_or_taken_from_elsewhere(script, test_set, tmp_path):
    def mean(*args):
        assert script("evaluate", *args, "--no-lpips", "--json", "r.json")[0] == 0
        document = json.loads((tmp_path / "r.json").read_text())
        return document["models"]["bicubic"]["psnr"]["mean"], document["protocol"]["lr"]
    given, made = mean("--data", "set"), mean("--data", "set/HR")
    assert made[0] == pytest.approx(given[0], abs=0.02) and made[1] == "bicubic x1/4 of HR"
    (tmp_path / "other").mkdir()
    for path in (test_set / "LR_bicubic_x4").iterdir():
        Image.open(path).point(lambda v: v // 2).save(tmp_path / "other" / f"{path.stem}x4.png")
    assert mean("--data", "set", "--lr", "other")[0] < given[0] - 5
    assert mean("--data", "set/HR", "--kernel", "gaussian")[0] != made[0]
    assert mean("--data", "set/HR", "--scale", "2")[0] > given[0]


def test_pictures_are_saved_with_a_comparison(script, test_set, tmp_path):
    assert script("evaluate", "--ckpt", "tiny.pth", "--data", "set", "--no-lpips", "--save-images", "pictures")[0] == 0
    lr = srgan.open_rgb(test_set / "LR_bicubic_x4" / "i0.png")
    assert np.array_equal(srgan.open_rgb(tmp_path / "pictures" / "bicubic" / "i0.png"), srgan.bicubic(lr))
    assert Image.open(tmp_path / "pictures" / "tiny" / "i0.png").size == (72, 64)
    sheet = srgan.open_rgb(tmp_path / "pictures" / "comparison" / "i0.png")
    assert sheet.shape[1] == 3 * 72 + 2 * 4 and sheet.shape[0] > 64
    assert np.array_equal(sheet[:64, -72:], srgan.open_rgb(test_set / "HR" / "i0.png"))
    assert (sheet[64:] < 128).any()  # the figures are written below


def test_a_broken_picture_is_left_out_with_status_1(script, test_set, tmp_path):
    (test_set / "HR" / "i1.png").write_text("hello")
    status, out, err = script("evaluate", "--data", "set/HR", "--no-lpips")
    assert status == 1 and "i1.png" in err and "2 pictures" in out


def test_what_a_user_can_cause_is_one_line_and_status_2(script, test_set, tmp_path, one_line):
    (tmp_path / "empty").mkdir()
    (test_set / "LR_bicubic_x4" / "i1.png").rename(tmp_path / "gone.png")
    srgan.save_checkpoint(tmp_path / "x2.pth", srgan.Generator(2, channels=4, n_blocks=1))
    for args in (("--data", "nowhere"), ("--data", "empty"), ("--data", "set"), ("--data", "set/HR", "--ckpt", "missing.pth"),
                 ("--data", "set/HR", "--ckpt", "tiny.pth", "x2.pth"), ("--data", "set/HR", "--ckpt", "gone.png")):
        status, _, err = script("evaluate", "--no-lpips", *args)
        assert status == 2, args
        one_line(err)


def test_lpips_is_measured_where_it_can_be_had_and_said_to_be_missing_where_not(script, test_set, tmp_path, monkeypatch):
    lpips = pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    status, out, err = script("evaluate", "--data", "set", "--json", "r.json")
    assert status == 0 and "LPIPS is not available" in err
    assert json.loads((tmp_path / "r.json").read_text())["models"]["bicubic"]["lpips"] is None
    real = lpips.LPIPS  # the real network and calibration over a random backbone
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: real(pnet_rand=True, **options).eval())
    assert script("evaluate", "--data", "set", "--json", "r.json")[0] == 0
    got = json.loads((tmp_path / "r.json").read_text())["models"]["bicubic"]
    assert got["lpips"]["mean"] > 0 and all(image["lpips"] > 0 for image in got["images"].values())
    distance = srgan.load_lpips()
    assert distance(photo(64, 64), photo(64, 64)) == pytest.approx(0, abs=1e-6)


def test_the_three_parts_of_a_split_are_all_of_it(script, tmp_path):
    (tmp_path / "faces").mkdir()
    for i in range(40):
        Image.fromarray(photo(40, 40, i)).save(tmp_path / "faces" / f"{i:06d}.png")
    parts = {}
    for part in ("train", "val", "test"):
        assert script("evaluate", "--data", "faces", "--no-lpips", "--split", part, "--json", "r.json")[0] == 0
        parts[part] = set(json.loads((tmp_path / "r.json").read_text())["models"]["bicubic"]["images"])
    assert [len(parts[part]) for part in ("train", "val", "test")] == [32, 6, 2] and len(set.union(*parts.values())) == 40
    assert parts["test"] == {'000005', '000009'}  # on any machine
    srgan.save_checkpoint(tmp_path / "g.pth", srgan.Generator(channels=4, n_blocks=1), config={"split": [80, 15, 5], "validate_on": 2})
    for part, n in (("train", 36), ("val", 2), ("test", 2)):  # of val, training holds out validate_on pictures and uses the others
        assert script("evaluate", "--ckpt", "g.pth", "--data", "faces", "--no-lpips", "--split", part, "--json", "r.json")[0] == 0
        found = set(json.loads((tmp_path / "r.json").read_text())["models"]["bicubic"]["images"])
        assert len(found) == n and found & parts[part] == (found if part != "train" else parts[part])


def test_results_never_take_the_place_of_inputs(script, photos, tmp_path, one_line):
    hr = tmp_path / "set"
    hr.mkdir()
    (hr / "p0.png").write_bytes((photos / "p0.png").read_bytes())
    srgan.save_checkpoint(tmp_path / "g.pth", srgan.Generator(channels=4, n_blocks=1))
    for args, words in (((*("--save-images",), hr), "holds inputs"), (("--csv", "g.pth"), "never overwritten"), (("--json", hr / "p0.png"), "never overwritten"),
                        (("--json", "no/where.json"), "no such folder")):
        before = (hr / "p0.png").read_bytes(), (tmp_path / "g.pth").read_bytes()
        status, _, err = script("evaluate", "--data", hr, "--ckpt", "g.pth", "--no-lpips", *args)
        assert status == 2 and words in err, err
        one_line(err)
        assert before == ((hr / "p0.png").read_bytes(), (tmp_path / "g.pth").read_bytes())
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert script("evaluate", "--data", hr, "--no-lpips", "--csv", "link.csv", "--json", "/dev/null")[0] == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").stat().st_size and not Path("/dev/null").is_file()


def test_a_strange_checkpoints_configuration_is_no_traceback(script, photos, tmp_path, one_line):
    g = srgan.Generator(channels=4, n_blocks=1)
    for config, val in ((3, ""), ({"kernel": [1]}, ""), ({"split": "abc"}, ""), ({}, torch.ones(3))):
        srgan.save_checkpoint(tmp_path / "g.pth", g, config=config, val=val)
        status, _, err = script("evaluate", "--data", photos, "--ckpt", "g.pth", "--no-lpips", "--split", "val")
        assert status in (0, 2) and "Traceback" not in err
