import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import srgan
import train


def run(script, photos, stage, *args):
    status, out, err = script("train", "--data", photos, "--val", photos, "--stage", stage, *TINY, *args)
    assert status == 0, err
    return out + err


def same(a, b):
    """Nested dictionaries and lists of tensors that are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def stage_1(script, photos, tmp_path):
    run(script, photos, "srresnet", "--epochs", "1", "--steps-per-epoch", "2")
    return tmp_path / "runs" / "srresnet"


def test_stage_1_learns_and_leaves_what_a_run_folder_holds(script, photos, tmp_path):
    run(script, photos, "srresnet", "--epochs", "3", "--steps-per-epoch", "20", "--lr", "2e-3", "--set", "checkpoint_every=2")
    out = tmp_path / "runs" / "srresnet"
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and [row["update"] for row in rows] == ["20", "40", "60"]
    assert float(rows[2]["loss"]) < 0.8 * float(rows[0]["loss"]) and float(rows[2]["psnr"]) > float(rows[0]["psnr"])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["best"]["psnr"]["value"] == max(float(row["psnr"]) for row in rows) and summary["update"] == 60
    assert summary["bicubic"]["psnr"]["mean"] > 10
    config = json.loads((out / "config.json").read_text())
    assert config["channels"] == 8 and config["srresnet"]["lr"] == 2e-3
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["epoch_0001.png", "epoch_0002.png", "epoch_0003.png"]
    names = ["checkpoint_best_psnr.pth", "checkpoint_best_ssim.pth", "checkpoint_epoch_0002.pth", "checkpoint_latest.pth"]
    assert sorted(p.name for p in out.glob("*.pth")) == names
    scores = []
    for _, hr, lr in srgan.find_pairs(photos):  # the best checkpoint gives the PSNR that was logged
        lr, hr = srgan.open_pair(hr, lr)
        scores.append(srgan.psnr(srgan.upscale(srgan.load_generator(out / names[0]), lr), hr))
    assert np.mean(scores) == pytest.approx(summary["best"]["psnr"]["value"], abs=1e-6)


@pytest.mark.parametrize("stage", ["srresnet", "gan"])
def test_resuming_continues_bit_for_bit(script, photos, tmp_path, stage, stage_1):
    init = ("--init", stage_1 / "checkpoint_best_psnr.pth")
    run(script, photos, stage, "--epochs", "2", "--steps-per-epoch", "10", "--out", "whole", *init)
    run(script, photos, stage, "--epochs", "1", "--steps-per-epoch", "10", "--out", "parts", *init)
    run(script, photos, stage, "--epochs", "2", "--out", "parts", "--resume")
    whole, parts = (srgan.load_checkpoint(tmp_path / name / "checkpoint_latest.pth") for name in ("whole", "parts"))
    assert whole["step"] == 20 and same(whole["training"], parts["training"]) and same(whole["generator"], parts["generator"])
    assert same(whole["best"], parts["best"])
    a, b = (list(csv.DictReader(open(tmp_path / name / "metrics.csv"))) for name in ("whole", "parts"))
    assert all(x[key] == y[key] for x, y in zip(a, b, strict=True) for key in x if key != "updates_per_s")


def test_stage_2_starts_from_stage_1s_best_and_trains_both_networks(script, photos, tmp_path, stage_1):
    message = run(script, photos, "gan", "--epochs", "1", "--steps-per-epoch", "4")
    assert "starting from runs/srresnet/checkpoint_best_psnr.pth" in message
    row, = csv.DictReader(open(tmp_path / "runs" / "gan" / "metrics.csv"))
    assert all(float(row[name]) > 0 for name in ("content", "adversarial", "discriminator", "d_real", "d_fake"))
    assert float(row["pixel"]) == 0
    assert float(row["loss"]) == pytest.approx(float(row["content"]) + 1e-3 * float(row["adversarial"]), rel=1e-4)  # Eq. 3
    start = srgan.load_generator(stage_1 / "checkpoint_best_psnr.pth").state_dict()
    state = srgan.load_checkpoint(tmp_path / "runs" / "gan" / "checkpoint_latest.pth")
    moved = {key: (state["training"]["generator"][key] - start[key]).abs().max() for key in start if "num_batches" not in key}
    assert 0 < max(moved[key] for key in moved if "running" not in key) < 4.1e-4  # Adam moves a weight by at most its rate
    assert state["training"]["discriminator_optimizer"]["state"][0]["step"] == 4


def test_the_rate_falls_at_the_milestones(script, photos, tmp_path):
    run(script, photos, "srresnet", "--epochs", "3", "--steps-per-epoch", "1", "--set", "srresnet.milestones=[1,2]", "--lr", "1")
    assert [float(row["lr"]) for row in csv.DictReader(open(tmp_path / "runs/srresnet/metrics.csv"))] == pytest.approx([1, 0.1, 0.01])


def test_a_run_is_not_overwritten(script, photos, stage_1, one_line):
    before = (stage_1 / "checkpoint_latest.pth").read_bytes()
    status, _, err = script("train", "--data", photos, "--stage", "srresnet", *TINY)
    assert status == 2 and "--resume" in err
    one_line(err)
    assert (stage_1 / "checkpoint_latest.pth").read_bytes() == before


def test_without_a_validation_folder_a_part_of_the_data_is_held_out(script, photos, tmp_path):
    status, out, err = script("train", "--data", photos, "--stage", "srresnet", *TINY, "--epochs", "1", "--steps-per-epoch", "1")
    assert status == 0 and "5 pictures, 1 to validate on" in out
    paths = srgan.find_images(photos)
    training, held_out = train.split(paths)
    assert set(training) | held_out == set(paths) and not set(training) & held_out
    assert train.split(paths[::-1])[1] == held_out  # whatever the order


@pytest.mark.parametrize("stage", ["srresnet", "gan"])
def test_sigterm_finishes_the_update_and_saves(photos, tmp_path, stage):
    srgan.save_checkpoint(tmp_path / "start.pth", srgan.Generator(channels=8, n_blocks=1))
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--data", photos, "--val", photos, "--stage", stage, *TINY,
                                "--init", tmp_path / "start.pth", "--epochs", "100000"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    latest, out = tmp_path / "runs" / stage / "checkpoint_latest.pth", ""
    try:
        while "to validate on" not in out:  # the line before the first update
            out += process.stdout.readline()
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        rest, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "stopped after update" in rest and "Traceback" not in err
    assert srgan.load_checkpoint(latest)["step"] > 0
    srgan.load_generator(latest)


def test_settings_come_from_the_base_a_preset_a_file_set_and_flags_in_this_order(tmp_path):
    def resolve(*args):
        return train.resolve_config(train.parse_args(["--data", "x", "--stage", "gan", *map(str, args)]))
    base = json.loads((ROOT / "config.json").read_text())["base"]
    assert resolve() == base == resolve("--preset", "paper")
    assert resolve("--preset", "quick")["channels"] == 32
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"channels": 12, "gan": {"lr": 1}}))
    config = resolve("--preset", "quick", "--config", file)
    assert config["channels"] == 12 and config["gan"]["lr"] == 1.0 and config["n_blocks"] == 4
    config = resolve("--config", file, "--set", "channels=13", "--set", "gan.lr=2e-5", "--set", "kernel=gaussian")
    assert config["channels"] == 13 and config["gan"]["lr"] == 2e-5 and config["kernel"] == "gaussian"
    config = resolve("--set", "gan.lr=2e-5", "--lr", "3e-5", "--epochs", "7", "--batch-size", "2", "--seed", "5")
    assert config["gan"]["lr"] == 3e-5 and config["gan"]["epochs"] == 7 and config["srresnet"] == base["srresnet"]
    assert config["batch_size"] == 2 and config["seed"] == 5


def test_the_base_is_the_papers(tmp_path):
    base = json.loads((ROOT / "config.json").read_text())["base"]
    per_epoch = base["steps_per_epoch"]
    assert (base["scale"], base["batch_size"], base["patch_size"], base["betas"][0]) == (4, 16, 96, 0.9)
    assert base["srresnet"]["epochs"] * per_epoch == 1e6 and base["srresnet"]["lr"] == 1e-4 and base["srresnet"]["milestones"] == []
    assert base["gan"]["epochs"] * per_epoch == 2e5 and [m * per_epoch for m in base["gan"]["milestones"]] == [1e5]
    assert base["content_network"] == "vgg19:5_4" and base["gan"]["adversarial_weight"] == 1e-3
    assert base["srresnet"]["pixel_loss"] == "mse" and base["gan"]["pixel_weight"] == 0 and base["srresnet"]["content_weight"] == 0


@pytest.mark.parametrize("setting, words", [
    ("chanels=8", "channels"), ("gan.lrr=1", "gan.lr"), ("lr=1", "unknown setting lr"), ("channels=wide", "channels must be of type int"),
    ("channels=8.5", "channels"), ("channels=true", "channels"), ("gan=3", "gan"), ("scale=3", "2, 4, 8"), ("scale.x=3", "scale"),
    ("batch_size=0", "batch_size"), ("gan.lr=0", "gan.lr"), ("gan.lr=NaN", "gan.lr"), ("ema=1", "ema"), ("betas=[0.9]", "betas"), ("betas=[0.9,\"x\"]", "betas"),
    ("gan.milestones=[5,2]", "gan.milestones"), ("kernel=lanczos", "bicubic, gaussian"), ("content_network=vgg16", "vgg19"),
    ("patch_size=90", "patch_size 90"), ("gan.pixel_loss=huber", "mse, l1"), ("precision=fp8", "precision"), ("novalue", "key=value"),
    ("srresnet.adversarial_weight=-1", "srresnet.adversarial_weight"), ("lpips=1", "lpips")])
def test_impossible_settings_are_refused_by_name(script, photos, one_line, setting, words):
    status, _, err = script("train", "--data", photos, "--stage", "gan", "--set", setting)
    assert status == 2 and words in err, err
    one_line(err)


def test_what_a_user_can_cause_is_one_line_and_status_2(script, photos, tmp_path, one_line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    srgan.save_checkpoint(tmp_path / "wide.pth", srgan.Generator(channels=9, n_blocks=1))
    data = ("--data", photos, "--val", photos, "--stage", "gan", *TINY)
    for args, words in [(("--data", "nowhere", "--stage", "srresnet"), "nowhere"), (("--data", "empty", "--stage", "srresnet"), "empty"),
                        ((*data, "--val", "nowhere"), "nowhere"), ((*data, "--preset", "huge"), "quick"), ((*data, "--config", "broken.json"), "not JSON"),
                        ((*data, "--init", "missing.pth"), "missing.pth"), ((*data, "--init", "wide.pth"), "another with --init"),
                        ((*data, "--resume"), "checkpoint_latest.pth"), ((*data, "--resume", "wide.pth"), "--init"),
                        ((*data, "--init", "wide.pth", "--set", "channels=9", "--set", "content_network=vgg19:9_9"), "9_9"),
                        ((*data, "--set", "patch_size=400"), "464x464"), ((*data, "--device", "cuda:77"), "cuda:77")]:
        status, _, err = script("train", *args)
        assert status == 2 and words in err, (args, err)
        one_line("\n".join(line for line in err.splitlines() if "left out" not in line))


def test_presets_are_listed(script):
    status, out, _ = script("train", "--list-presets")
    presets = json.loads((ROOT / "config.json").read_text())["presets"]
    assert status == 0 and all(f"{name} " in out and preset["about"] in out for name, preset in presets.items())


def test_a_diverging_run_stops_and_keeps_its_last_good_state(script, photos, tmp_path, one_line):
    args = ("--data", photos, "--val", photos, "--stage", "srresnet", *TINY, "--epochs", "3", "--steps-per-epoch", "10")
    status, _, err = script("train", *args, "--lr", "1e38")
    assert status == 2 and "not finite" in err
    state = srgan.load_checkpoint(tmp_path / "runs/srresnet/checkpoint_latest.pth")
    assert state["step"] == 0 and all(torch.isfinite(v).all() for v in state["generator"].values())


def test_two_processes_train_one_network(photos, tmp_path):
    srgan.save_checkpoint(tmp_path / "start.pth", srgan.Generator(channels=8, n_blocks=1))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", ROOT / "train.py", "--data", photos,
               "--val", photos, "--stage", "gan", *TINY, "--init", tmp_path / "start.pth", "--epochs", "1", "--steps-per-epoch", "3", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    state = srgan.load_checkpoint(tmp_path / "runs/gan/checkpoint_latest.pth")
    assert state["step"] == 3 and done.stdout.count("starting from") == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_both_stages_train_compiled_on_the_gpu(script, photos, tmp_path):
    run(script, photos, "srresnet", "--epochs", "1", "--steps-per-epoch", "3", "--device", "cuda")
    run(script, photos, "gan", "--epochs", "1", "--steps-per-epoch", "3", "--device", "cuda")
    srgan.load_generator(tmp_path / "runs" / "gan" / "checkpoint_latest.pth")
