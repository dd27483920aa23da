import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, same
from PIL import Image

import srgan
import train


def run(script, photos, stage, *args):
    status, out, err = script("train", "--data", photos, "--val", photos, "--stage", stage, *TINY, *args)
    assert status == 0, err
    return out + err


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
    assert summary["best"]["psnr"]["mean"] == max(float(row["psnr"]) for row in rows) and summary["update"] == 60
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
    assert np.mean(scores) == pytest.approx(summary["best"]["psnr"]["mean"], abs=1e-6)


@pytest.mark.parametrize("stage", ["srresnet", "gan"])
def test_resuming_continues_bit_for_bit(script, photos, tmp_path, stage, stage_1):
    init = ("--init", stage_1 / "checkpoint_best_psnr.pth", *("--set", "gan.r1_penalty=1") * (stage == "gan"))
    run(script, photos, stage, "--epochs", "2", "--steps-per-epoch", "10", "--out", "whole", *init)
    run(script, photos, stage, "--epochs", "1", "--steps-per-epoch", "10", "--out", "parts", *init)
    run(script, photos, stage, "--epochs", "2", "--out", "parts", "--resume")
    whole, parts = (srgan.load_checkpoint(tmp_path / name / "checkpoint_latest.pth") for name in ("whole", "parts"))
    assert whole["step"] == 20 and same(whole["training"], parts["training"]) and same(whole["generator"], parts["generator"])
    assert same(whole["best"], parts["best"])
    a, b = (list(csv.DictReader(open(tmp_path / name / "metrics.csv"))) for name in ("whole", "parts"))
    assert all(x[key] == y[key] for x, y in zip(a, b, strict=True) for key in x if key not in ("updates_per_s", "memory_mb"))


def test_a_run_from_before_the_newest_losses_resumes(script, photos, tmp_path, stage_1):
    run(script, photos, "gan", "--epochs", "1", "--steps-per-epoch", "3")
    out, new = tmp_path / "runs/gan", ("grid", "spectrum", "stationarity")
    state = torch.load(out / "checkpoint_latest.pth", weights_only=True)
    state["training"]["sums"] = state["training"]["sums"][:-len(new)]
    for name in new:
        del state["config"]["gan"][name + "_weight"]
    del state["config"]["gan"]["r1_penalty"]
    torch.save(state, out / "checkpoint_latest.pth")
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    with open(out / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in train.COLUMNS if name not in new], extrasaction="ignore")
        writer.writeheader(), writer.writerows(rows)
    run(script, photos, "gan", "--epochs", "2", "--resume", "--set", "gan.stationarity_weight=1")
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert [row["stationarity"] == "" for row in rows] == [True, False] and float(rows[1]["stationarity"]) > 0
    assert srgan.load_checkpoint(out / "checkpoint_latest.pth")["step"] == 6


def test_stage_2_starts_from_stage_1s_best_and_trains_both_networks(script, photos, tmp_path, stage_1):
    message = run(script, photos, "gan", "--epochs", "1", "--steps-per-epoch", "4")
    assert "starting from runs/srresnet/checkpoint_best_psnr.pth" in message
    row, = csv.DictReader(open(tmp_path / "runs" / "gan" / "metrics.csv"))
    assert all(float(row[name]) > 0 for name in ("content", "adversarial", "discriminator"))
    assert float(row["pixel"]) == 0
    assert float(row["loss"]) == pytest.approx(float(row["content"]) + 1e-3 * float(row["adversarial"]), rel=1e-4)  # Eq. 3
    start = srgan.load_generator(stage_1 / "checkpoint_best_psnr.pth").state_dict()
    state = srgan.load_checkpoint(tmp_path / "runs" / "gan" / "checkpoint_latest.pth")
    moved = {key: (state["training"]["generator"][key] - start[key]).abs().max() for key in start if "num_batches" not in key}
    assert 0 < max(moved[key] for key in moved if "running" not in key) < 4.1e-4  # Adam moves a weight by at most its rate
    assert state["training"]["discriminator_optimizer"]["state"][0]["step"] == 4
    assert not same(state["generator"], state["training"]["generator"])  # the result is the average, not the last update


def test_the_rate_falls_at_the_milestones(script, photos, tmp_path):
    run(script, photos, "srresnet", "--epochs", "3", "--steps-per-epoch", "1", "--set", "srresnet.milestones=[1,2]", "--set", "srresnet.schedule=step", "--lr", "1")
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
    parts = srgan.split(paths, (95, 5, 0))
    assert sorted(parts["train"] + parts["val"]) == paths and len(parts["val"]) == 1 and parts["test"] == []
    assert srgan.split(paths[::-1], (95, 5, 0)) == parts  # whatever the order


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
    assert (base["scale"], base["batch_size"], base["patch_size"], base["gan"]["betas"][0]) == (4, 16, 96, 0.9)
    assert base["srresnet"]["epochs"] * per_epoch == 1e6 and base["srresnet"]["lr"] == 1e-4 and base["srresnet"]["milestones"] == []
    assert base["gan"]["epochs"] * per_epoch == 2e5 and [m * per_epoch for m in base["gan"]["milestones"]] == [1e5]
    assert base["content_network"] == "vgg19:5_4" and base["gan"]["adversarial_weight"] == 1e-3
    assert base["srresnet"]["pixel_loss"] == "mse" and base["gan"]["pixel_weight"] == 0 and base["srresnet"]["content_weight"] == 0


@pytest.mark.parametrize("setting, words", [
    ("chanels=8", "channels"), ("gan.lrr=1", "gan.lr"), ("lr=1", "unknown setting lr"), ("channels=wide", "channels must be from 3 to 1024 (a whole number)"),
    ("channels=8.5", "channels"), ("channels=true", "channels"), ("gan=3", "gan"), ("scale=3", "2, 4, 8"), ("scale.x=3", "scale"),
    ("batch_size=0", "batch_size"), ("gan.lr=0", "gan.lr"), ("gan.lr=NaN", "gan.lr"), ("ema=1", "ema"), ("gan.betas=[0.9]", "gan.betas"), ("gan.betas=[0.9,\"x\"]", "gan.betas"),
    ("gan.milestones=[5,2]", "gan.milestones"), ("kernel=lanczos", "bicubic, gaussian"), ("content_network=vgg16", "vgg19"),
    ("patch_size=90", "patch_size 90"), ("gan.pixel_loss=huber", "mse, l1"), ("precision=fp8", "precision"), ("novalue", "key=value"),
    ("gan.adversarial_weight=-1", "gan.adversarial_weight"), ("srresnet.adversarial_weight=1", "unknown setting srresnet.adversarial_weight"),
    ("discriminator.channels=[]", "discriminator.channels"), ("discriminator.first_kernel=4", "1, 3, 5"), ("gan.grow=[[2,128]]", "discriminator.pool"),
    ("gan.grow=[[2]]", "gan.grow"), ("split=[80,15,6]", "make 100"), ("gan.content_weight=0", "both 0"), ("crop_margin=0.5", "crop_margin"), ("lpips=1", "lpips")])
def test_impossible_settings_are_refused_by_name(script, photos, one_line, setting, words):
    status, _, err = script("train", "--data", photos, "--stage", "gan", "--set", setting)
    assert status == 2 and words in err, err
    one_line(err)


def test_what_a_user_can_cause_is_one_line_and_status_2(script, photos, tmp_path, one_line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    srgan.save_checkpoint(tmp_path / "wide.pth", srgan.Generator(channels=9, n_blocks=1))
    srgan.save_checkpoint(tmp_path / "tiny.pth", srgan.Generator(channels=8, n_blocks=1))
    data = ("--data", photos, "--val", photos, "--stage", "srresnet", *TINY)
    for args, words in [(("--data", "nowhere", "--stage", "srresnet"), "nowhere"), (("--data", "empty", "--stage", "srresnet"), "empty"),
                        ((*data, "--val", "nowhere"), "nowhere"), ((*data, "--preset", "huge"), "quick"), ((*data, "--config", "broken.json"), "not JSON"),
                        ((*data, "--init", "missing.pth"), "missing.pth"), ((*data, "--init", "wide.pth"), "another with --init"),
                        ((*data, "--resume"), "checkpoint_latest.pth"), ((*data, "--resume", "wide.pth"), "--init"),
                        ((*data, "--set", "srresnet.content_weight=1", "--set", "content_network=vgg19:9_9"), "9_9"),
                        ((*data, "--data", f"{photos}=much"), "weight"), ((*data, "--stage", "gan"), "name another with --init"),
                        ((*data, "--set", "patch_size=400"), "416x416"), ((*data, "--set", "patch_size=8", "--stage", "gan", "--init", "tiny.pth", "--set", "content_network=vgg19:5_4"), "too small"),
                        ((*data, "--device", "cuda:77"), "cuda:77")]:
        status, _, err = script("train", *args)
        assert status == 2 and words in err, (args, err)
        one_line("\n".join(line for line in err.splitlines() if "left out" not in line))


def test_presets_are_listed(script):
    status, out, _ = script("train", "--list-presets")
    presets = json.loads((ROOT / "config.json").read_text())["presets"]
    assert status == 0 and all(f"{name} " in out and preset["about"] in out for name, preset in presets.items())


def test_a_diverging_run_stops_and_keeps_its_last_good_state(script, photos, tmp_path, one_line, monkeypatch):
    monkeypatch.setitem(train.RULES, "lr", (lambda rate: rate > 0, "above 0"))  # beyond what is allowed
    args = ("--data", photos, "--val", photos, "--stage", "srresnet", *TINY, "--epochs", "3", "--steps-per-epoch", "10")
    status, _, err = script("train", *args, "--lr", "1e38")
    assert status == 2 and "after 3 recoveries" in err
    state = srgan.load_checkpoint(tmp_path / "runs/srresnet/checkpoint_latest.pth")
    assert state["step"] == 0 and all(torch.isfinite(v).all() for v in state["generator"].values())


def test_a_resumed_run_that_diverges_keeps_the_state_it_began_with(script, photos, tmp_path, stage_1, monkeypatch):
    monkeypatch.setitem(train.RULES, "lr", (lambda rate: rate > 0, "above 0"))  # beyond what is allowed
    before = (stage_1 / "checkpoint_latest.pth").read_bytes()
    args = ("--data", photos, "--val", photos, "--stage", "srresnet", *TINY, "--resume", "--epochs", "9", "--steps-per-epoch", "50")
    status, _, err = script("train", *args, "--lr", "1e38")
    assert status == 2 and "pixel not finite" in err and (stage_1 / "checkpoint_latest.pth").read_bytes() == before
    assert script("train", *args, "--lr", "1e-4")[0] == 0


@pytest.mark.parametrize("often", [1, 2])
def test_a_loss_that_is_not_finite_goes_back_to_the_last_checkpoint_with_half_the_rate(script, photos, tmp_path, monkeypatch, often):
    calls, real = [], srgan.PIXEL_LOSSES["mse"]
    bad = {1: (6,), 2: (6, 8)}[often]  # at the second update of epoch 2, and again when that is repeated
    monkeypatch.setitem(srgan.PIXEL_LOSSES, "mse", lambda sr, hr: (calls.append(1), real(sr, hr) * (math.nan if len(calls) in bad else 1))[1])
    message = run(script, photos, "srresnet", "--epochs", "3", "--steps-per-epoch", "4", "--set", "recoveries=2", "--lr", "1e-3")
    assert message.count("loss, pixel not finite at update 6; going on from update 4") == often
    rows = list(csv.DictReader(open(tmp_path / "runs/srresnet/metrics.csv")))
    assert [row["update"] for row in rows] == ["4", "8", "12"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-3] + [1e-3 / 2 ** often] * 2)
    assert len(calls) == 12 + 2 * often and all(np.isfinite(float(row["loss"])) for row in rows)


def test_compiled_networks_train_both_stages(script, photos, tmp_path, monkeypatch):
    compiled, real = [], torch.compile  # the eager backend calls the same wrappers without the compiler's wait
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(type(network).__name__) or real(network, backend="eager"))
    for stage in ("srresnet", "gan"):
        run(script, photos, stage, "--epochs", "1", "--steps-per-epoch", "2", "--set", "compile=yes", "--set", "srresnet.content_weight=1")
    assert compiled == ["Generator", "TruncatedVGG19", "Generator", "Discriminator", "TruncatedVGG19"]
    srgan.load_generator(tmp_path / "runs/gan/checkpoint_latest.pth")


def test_a_resumed_run_keeps_its_networks_and_takes_new_settings(script, photos, tmp_path, stage_1, one_line):
    data = ("--data", photos, "--val", photos, "--stage", "srresnet", "--resume", "--epochs", "2")
    for args, words in ((("--set", "channels=16"), "not those of the configuration"), (("--init", stage_1 / "checkpoint_best_psnr.pth"), "--init")):
        status, _, err = script("train", *data, *args)
        assert status == 2 and words in err
        one_line(err)
    assert script("train", *data, "--set", "srresnet.betas=[0.5,0.6]")[0] == 0
    group, = srgan.load_checkpoint(stage_1 / "checkpoint_latest.pth")["training"]["generator_optimizer"]["param_groups"]
    assert tuple(group["betas"]) == (0.5, 0.6)


def torchrun(processes, cwd, *args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(ROOT / "train.py"),
            *map(str, args)], {"cwd": cwd, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def test_two_processes_train_one_network_and_one_goes_on_with_it(script, photos, tmp_path):
    srgan.save_checkpoint(tmp_path / "start.pth", srgan.Generator(channels=8, n_blocks=1))
    args = ["--data", photos, "--val", photos, "--stage", "gan", *TINY, "--steps-per-epoch", "3", "--device", "cpu"]
    command, options = torchrun(2, tmp_path, *args, "--init", "start.pth", "--epochs", "1")
    done = subprocess.run(command, capture_output=True, timeout=200, **options)
    assert done.returncode == 0, done.stderr
    latest = tmp_path / "runs/gan/checkpoint_latest.pth"
    state = srgan.load_checkpoint(latest)
    assert state["step"] == 3 and done.stdout.count("starting from") == 1  # one process speaks and writes
    assert len(list(csv.DictReader(open(latest.parent / "metrics.csv")))) == 1
    for out, processes in (("alone", 1), ("again", 1)):
        command, options = torchrun(processes, tmp_path, *args, "--init", "start.pth", "--epochs", "1", "--out", out)
        subprocess.run(command, capture_output=True, timeout=200, check=True, **options)
    alone, again = (srgan.load_checkpoint(tmp_path / out / "checkpoint_latest.pth")["training"] for out in ("alone", "again"))
    for name in ("generator", "discriminator"):  # rank 0 drew the same patches as the process alone; the other's gradients make the difference
        assert same(alone[name], again[name]) and not same(state["training"][name], alone[name])
    run(script, photos, "gan", "--epochs", "2", "--resume", "--device", "cpu")
    assert srgan.load_checkpoint(latest)["step"] == 6
    command, options = torchrun(2, tmp_path, *args, "--epochs", "3", "--resume")
    done = subprocess.run(command, capture_output=True, timeout=200, **options)
    assert done.returncode == 0 and srgan.load_checkpoint(latest)["step"] == 9, done.stderr


def test_a_killed_process_ends_the_run_with_the_last_checkpoint_intact(photos, tmp_path):
    command, options = torchrun(2, tmp_path, "--data", photos, "--val", photos, "--stage", "srresnet", *TINY, "--epochs", "1000",
                                "--steps-per-epoch", "2", "--device", "cpu")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    latest, deadline = tmp_path / "runs/srresnet/checkpoint_latest.pth", time.monotonic() + 100
    while not latest.exists() or srgan.load_checkpoint(latest)["step"] < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert process.wait(timeout=100) != 0
    assert srgan.load_checkpoint(latest)["step"] >= 2 and not list(latest.parent.glob(".[0-9]*"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_both_stages_train_on_the_gpu_by_a_graph_as_without(script, photos, tmp_path):
    init = ("--init", tmp_path / "start.pth")
    srgan.save_checkpoint(init[1], srgan.Generator(channels=8, n_blocks=1))
    for stage in ("srresnet", "gan"):
        losses = []
        for mode in ("auto", "no"):
            out = run(script, photos, stage, "--epochs", "2", "--steps-per-epoch", "8", "--device", "cuda", "--precision", "fp32",
                      "--set", f"compile={mode}", "--out", f"{stage}-{mode}", *init)
            assert "no CUDA graph" not in out
            losses.append([float(row["loss"]) for row in csv.DictReader(open(tmp_path / f"{stage}-{mode}" / "metrics.csv"))])
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    run(script, photos, "gan", "--epochs", "3", "--device", "cuda", "--out", "gan-auto", "--resume")
    srgan.load_generator(tmp_path / "gan-auto" / "checkpoint_latest.pth")


def presets():
    return json.loads((ROOT / "config.json").read_text())["presets"]


PAPER = {"scale": 4, "channels": 64, "n_blocks": 16, "block": "residual", "patch_size": 96, "batch_size": 16, "kernel": "bicubic",
         "discriminator.channels": [64, 64, 128, 128, 256, 256, 512, 512], "discriminator.first_kernel": 3, "discriminator.norm": "batch",
         "content_network": "vgg19:5_4", "content_divisor": 12.75, "gan.adversarial_loss": "bce", "gan.pixel_weight": 0, "srresnet.lr": 1e-4}
TWO_DOMAINS = {"discriminator.channels": [64, 128, 128, 256, 256, 512, 512, 512], "discriminator.pool": 6, "srresnet.pixel_loss": "l1",
               "gan.pixel_loss": "l1", "gan.pixel_weight": 1, "gan.content_weight": 0.006, "content_divisor": 1, "gan.adversarial_weight": 0.001,
               "content_network": "vgg19:5_4", "srresnet.lr": 1e-4, "srresnet.betas": [0.9, 0.999]}
SOURCES = {  # what the paper and the projects fix, written down once more
    "paper": PAPER,
    "quick": {},
    "srresnet-mse": {"srresnet.pixel_loss": "mse", "srresnet.pixel_weight": 1, "srresnet.content_weight": 0},
    "srresnet-vgg22": {"content_network": "vgg19:2_2", "srresnet.pixel_weight": 0, "srresnet.content_weight": 1},
    "srgan-mse": {"gan.pixel_loss": "mse", "gan.pixel_weight": 1, "gan.content_weight": 0, "gan.adversarial_weight": 1e-3},
    "srgan-vgg22": {"content_network": "vgg19:2_2", "gan.pixel_weight": 0, "gan.content_weight": 1, "gan.adversarial_weight": 1e-3},
    "srgan-vgg54": {"content_network": "vgg19:5_4", "gan.pixel_weight": 0, "gan.content_weight": 1, "gan.adversarial_weight": 1e-3},
    "div2k": {**TWO_DOMAINS, "augment": "all"},
    "celeba": {**TWO_DOMAINS, "augment": "flip", "crop_margin": 0.1, "split": [80, 15, 5], "validate_on": 0},
    "wgan-gp": {"discriminator.norm": "instance", "gan.adversarial_loss": "wasserstein", "gan.gradient_penalty": 10, "gan.discriminator_steps": 5,
                "srresnet.pixel_loss": "mse", "srresnet.pixel_weight": 1, "srresnet.content_weight": 1},
    "gaussian": {"kernel": "gaussian", "srresnet.epochs": 200, "srresnet.lr": 1e-4, "gan.epochs": 100, "gan.lr": 1e-4, "gan.milestones": [50],
                 "gan.schedule": "step", "gan.pixel_weight": 1},
    "coco": {"srresnet.pixel_loss": "mse", "discriminator.first_kernel": 9, "gan.adversarial_loss": "bce", "store": "never"},
    "progressive": {"patch_size": 96, "srresnet.grow": [[501, 128], [801, 256]], "gan.grow": [[101, 128], [151, 256]]},
    "esrgan": {"block": "rrdb", "gan.adversarial_loss": "relativistic", "gan.pixel_loss": "l1", "gan.pixel_weight": 0.01, "gan.adversarial_weight": 0.005},
    "light": {"content_network": "squeezenet1_1:4", "gan.grid_weight": 3, "gan.spectrum_weight": 3, "gan.shift": 7, "gan.freeze_batch_norm": True,
              "gan.adversarial_loss": "bce"},
    "frozen-bn": {"gan.freeze_batch_norm": True},
}


@pytest.mark.parametrize("preset", presets())
def test_every_preset_holds_what_its_source_fixes(preset):
    config = train.resolve_config(train.parse_args(["--data", "x", "--stage", "gan", "--preset", preset]))
    for name, value in SOURCES[preset].items():
        group, _, key = name.rpartition(".")
        assert (config[group] if group else config)[key] == value, name


@pytest.mark.parametrize("preset", presets())
def test_every_preset_trains_both_stages(script, photos, tmp_path, preset):
    """Small networks, on real photos where SRGAN_TEST_DATA names some."""
    if "SRGAN_TEST_DATA" in os.environ:
        (tmp_path / "real").mkdir()
        for path in srgan.find_images(os.environ["SRGAN_TEST_DATA"] + "/bsds400")[:8]:
            (tmp_path / "real" / path.name).symlink_to(path)
        photos = tmp_path / "real"
    small = (*TINY, "--set", "discriminator.channels=[8,16,16,16]", "--set", "checkpoint_every=0", "--batch-size", "2", "--epochs", "2", "--steps-per-epoch", "1")
    grow = ("--set", "srresnet.grow=[[2,64]]", "--set", "gan.grow=[[2,64]]") if preset == "progressive" else ()
    for stage in ("srresnet", "gan"):
        status, _, err = script("train", "--data", photos, "--stage", stage, "--preset", preset, *small, *grow)
        assert status == 0, err
        state = srgan.load_checkpoint(tmp_path / "runs" / stage / "checkpoint_latest.pth")
        row = list(csv.DictReader(open(tmp_path / "runs" / stage / "metrics.csv")))[-1]
        assert state["step"] == 2 and float(row["loss"]) != 0 and all(torch.isfinite(v).all() for v in state["generator"].values())
        for term in ("pixel", "content", "grid", "spectrum", "stationarity"):
            assert (float(row[term]) > 0) == (state["config"][stage].get(term + "_weight", 0) > 0)


def test_the_learning_rate_follows_its_schedule():
    def rates(**changes):
        stage = {"lr": 1.0, "epochs": 10, "schedule": "constant", "milestones": [3, 6], "warmup": 0, **changes}
        return [train.learning_rate(stage, step, 10) for step in range(100)]
    assert rates() == [1] * 100
    assert rates(schedule="step") == pytest.approx([1] * 30 + [0.1] * 30 + [0.01] * 40)
    cosine = rates(schedule="cosine")
    assert cosine == pytest.approx([(1 + np.cos(np.pi * k / 100)) / 2 for k in range(100)]) and cosine[-1] < 1e-3
    for schedule in ("constant", "step", "cosine"):
        warm, cold = rates(schedule=schedule, warmup=20), rates(schedule=schedule)
        assert warm[:20] == pytest.approx([(k + 1) / 20 * cold[k] for k in range(20)]) and warm[20:] == cold[20:]


def test_a_folders_pictures_are_drawn_as_often_as_its_weight_says(photos, tmp_path):
    for name in ("few", "many=2", "e=q"):
        (tmp_path / name).mkdir()
        Image.open(photos / "p0.png").save(tmp_path / name / "a.png")
    data = train.find_data([str(tmp_path / "few"), f"{tmp_path}/many=2=3", str(tmp_path / "e=q")])
    assert {path.parent.name: weight for path, weight in data.items()} == {"few": 1, "many=2": 3, "e=q": 1}
    with pytest.raises(srgan.InputError, match="weight"):
        train.find_data([f"{tmp_path / 'few'}=0"])


def test_critic_steps_see_batches_of_their_own(script, photos, tmp_path, stage_1, monkeypatch):
    seen = []
    real = srgan.wasserstein_discriminator_loss
    monkeypatch.setitem(srgan.ADVERSARIAL_LOSSES, "wasserstein", (srgan.wasserstein_adversarial_loss, lambda f, r: seen.append(r.detach()) or real(f, r)))
    run(script, photos, "gan", "--preset", "wgan-gp", "--epochs", "1", "--steps-per-epoch", "2")
    assert len(seen) == 10 and all(len(r) == 4 for r in seen)
    assert len({tuple(r.tolist()) for r in seen}) == 10  # no batch twice
    state = srgan.load_checkpoint(tmp_path / "runs/gan/checkpoint_latest.pth")["training"]
    assert state["discriminator_optimizer"]["state"][0]["step"] == 10 and state["generator_optimizer"]["state"][0]["step"] == 2


def test_r1_joins_the_discriminators_loss_every_so_many_updates(script, photos, tmp_path, stage_1, monkeypatch):
    penalties = []
    monkeypatch.setattr(srgan, "r1_penalty", lambda *args, real=srgan.r1_penalty: penalties.append(real(*args)) or penalties[-1])
    loss = {}
    for gamma in (0, 1, 10):
        run(script, photos, "gan", "--epochs", "1", "--steps-per-epoch", "1", "--out", f"r{gamma}", "--set", f"gan.r1_penalty={gamma}")
        loss[gamma] = float(list(csv.DictReader(open(tmp_path / f"r{gamma}/metrics.csv")))[-1]["discriminator"])
    assert len(penalties) == 2 and penalties[0] == penalties[1] > 0
    for gamma in (1, 10):
        assert loss[gamma] - loss[0] == pytest.approx(gamma / 2 * train.R1_EVERY * penalties[0].item(), rel=1e-3)
    run(script, photos, "gan", "--epochs", "1", "--steps-per-epoch", str(2 * train.R1_EVERY + 1), "--out", "more", "--set", "gan.r1_penalty=1")
    assert len(penalties) == 2 + 3


def test_frozen_batch_norm_keeps_the_statistics_of_stage_1(script, photos, tmp_path, stage_1):
    start = srgan.load_generator(stage_1 / "checkpoint_best_psnr.pth").state_dict()
    for name, frozen in (("frozen", "true"), ("free", "false")):
        run(script, photos, "gan", "--epochs", "1", "--steps-per-epoch", "2", "--out", name, "--set", f"gan.freeze_batch_norm={frozen}")
        after = srgan.load_generator(tmp_path / name / "checkpoint_latest.pth").state_dict()
        statistics = [key for key in start if "running" in key]
        assert all(torch.equal(start[key], after[key]) for key in statistics) == (name == "frozen")
        assert not torch.equal(start["tail.weight"], after["tail.weight"])


def test_the_last_k_milestones_are_kept(script, photos, tmp_path):
    run(script, photos, "srresnet", "--epochs", "5", "--steps-per-epoch", "1", "--set", "checkpoint_every=1", "--set", "keep=2", "--set", "validate_every=5")
    out = tmp_path / "runs/srresnet"
    assert sorted(p.name for p in out.glob("checkpoint_epoch*")) == ["checkpoint_epoch_0004.pth", "checkpoint_epoch_0005.pth"]
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert [row["psnr"] != "" for row in rows] == [False] * 4 + [True]
    assert float(rows[4]["psnr_std"]) > 0 and all(float(row["memory_mb"]) > 50 for row in rows)


def test_the_best_checkpoint_by_lpips_has_the_lowest(script, photos, tmp_path, monkeypatch):
    values = iter([0.5, 0.5, 0.2, 0.4])  # of bicubic and three epochs
    monkeypatch.setattr(srgan, "load_lpips", lambda device: lambda sr, hr: current[0])
    current = [next(values)]
    monkeypatch.setattr(train, "validate", lambda *a, real=train.validate: (real(*a), current.__setitem__(0, next(values, 0)))[0])
    run(script, photos, "srresnet", "--epochs", "3", "--steps-per-epoch", "1", "--set", "lpips=true")
    out = tmp_path / "runs/srresnet"
    assert srgan.load_checkpoint(out / "checkpoint_best_lpips.pth")["step"] == 2
    assert json.loads((out / "summary.json").read_text())["best"]["lpips"] == pytest.approx({"mean": 0.2, "std": 0, "epoch": 2})


def test_curves_are_drawn_where_matplotlib_is_installed(script, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "optional", lambda package: False)
    assert "without curves.png" in run(script, photos, "srresnet", "--epochs", "1", "--steps-per-epoch", "1")
    assert not (tmp_path / "runs/srresnet/curves.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run(script, photos, "srresnet", "--epochs", "3", "--steps-per-epoch", "1", "--out", "curved")
    assert Image.open(tmp_path / "curved/curves.png").size[0] > 300


def test_a_missing_wandb_is_one_line_before_training_starts(script, photos, tmp_path, one_line, monkeypatch):
    monkeypatch.setattr(train, "optional", lambda package: False)
    status, _, err = script("train", "--data", photos, "--stage", "srresnet", *TINY, "--wandb")
    assert status == 2 and "pip install wandb" in err and not (tmp_path / "runs").exists()
    one_line(err)


def test_wandb_gets_what_metrics_csv_gets(script, photos, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(script, photos, "srresnet", "--epochs", "2", "--steps-per-epoch", "1", "--wandb")
    log, = (tmp_path / "runs/srresnet/wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 20  # its own process writes the file
    while missing := [name for name in ("psnr", "updates_per_s", "samples") if name.encode() not in log.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)


def test_a_graph_is_replayed_on_the_inputs_of_each_call(monkeypatch):
    """The order of things, with stand-ins for CUDA that compute on the CPU when a graph is replayed."""
    calls = []

    def double(x):
        calls.append((x, 2 * x))
        return calls[-1][1]

    class Graph:
        def replay(self):
            self.result.copy_(2 * self.input)

    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        yield
        graph.input, graph.result = calls[-1]
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fake = {"Stream": lambda device: stream, "current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(),
            "CUDAGraph": Graph, "graph": capture}
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    graphed = train.Graphed(double, torch.device("cpu"))
    for shape in ((2,), (3,)):
        for i in range(6):
            assert torch.equal(graphed(torch.full(shape, float(i))), torch.full(shape, 2.0 * i))
    assert len(calls) == 2 * (train.Graphed.warmup + 1)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: (_ for _ in ()).throw(RuntimeError("capture failed")))
    plain = train.Graphed(double, torch.device("cpu"))
    assert all(torch.equal(plain(torch.ones(2)), torch.full((2,), 2.0)) for _ in range(6))  # without a graph, but right


def _update_of(rank, path, results):
    """Gradients of G and D for half of a batch each, as train.py's update takes them: D twice forward, then frozen for G."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.save(_gradients(slice(2 * rank, 2 * rank + 2), lambda network: train.parallel(network, torch.device("cpu"))), results / str(rank))
    torch.distributed.destroy_process_group()


def _gradients(part, wrap):
    torch.manual_seed(0)
    g, d = srgan.Generator(channels=8, n_blocks=1), srgan.Discriminator(16, (4, 4, 8, 8))
    for network in (g, d):  # a batch norm in training sees its own process's batch alone
        for module in network.train().modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    lr, hr = torch.rand(4, 3, 4, 4)[part], torch.rand(4, 3, 16, 16)[part]
    G, D = wrap(g), wrap(d)
    sr = G(lr)
    (srgan.discriminator_loss(D(sr.detach()), D(hr)) + srgan.r1_penalty(d, hr)).backward()
    d.requires_grad_(False)
    (torch.nn.functional.mse_loss(sr, hr) + srgan.adversarial_loss(d(sr))).backward()
    return [p.grad for network in (g, d) for p in network.parameters()]


def test_gradients_of_two_processes_are_those_of_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(_update_of, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    joined, first, second = _gradients(slice(None), lambda network: network), *(torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert len(joined) == len(first) and any(g.abs().max() > 1e-3 for g in joined)
    for whole, one, other in zip(joined, first, second):
        assert torch.equal(one, other) and torch.allclose(one, whole, rtol=1e-4, atol=1e-7)


def test_shifted_pictures_are_the_same_pictures_elsewhere(script, photos, tmp_path, stage_1, monkeypatch):
    """D and phi see SR and HR moved alike; the pixel loss does not change by it, and G gets its gradient."""
    seen, real = [], srgan.content_loss
    monkeypatch.setattr(srgan, "content_loss", lambda phi, sr, hr: (seen.append((sr.detach(), hr)), real(phi, sr, hr))[1])
    for shift in (0, 7):
        run(script, photos, "gan", "--epochs", "1", "--steps-per-epoch", "2", "--out", f"shift{shift}", "--set", f"gan.shift={shift}",
            "--set", "gan.pixel_weight=1", "--precision", "fp32")
    offsets = []
    for (sr, hr), (moved_sr, moved_hr) in zip(seen[:1], seen[2:3]):  # before the first update the networks are the same
        match = [(y, x) for y in range(8) for x in range(8) if torch.equal(torch.roll(hr, (y, x), (2, 3)), moved_hr)]
        assert len(match) == 1 and torch.allclose(torch.roll(sr, match[0], (2, 3)), moved_sr, atol=1e-6)
        offsets += match
    assert offsets != [(0, 0)]
    rows = [next(csv.DictReader(open(tmp_path / f"shift{n}/metrics.csv"))) for n in (0, 7)]
    assert float(rows[0]["pixel"]) == pytest.approx(float(rows[1]["pixel"]), rel=0.05) and rows[0]["content"] != rows[1]["content"]
