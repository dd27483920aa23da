"""train.py: both stages, the run folder, resuming, and what ends a run."""
import copy
import csv
import importlib.machinery
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import OLD, ROOT, SMALL, photo, same
from PIL import Image

import srgan
import train


def options(**settings):
    """--set for each setting; gan__lr is gan.lr."""
    return [part for name, value in settings.items()
            for part in ("--set", f"{name.replace('__', '.')}={json.dumps(value)}")]


def rows(folder):
    return list(csv.DictReader(open(folder / "metrics.csv", newline="")))


def latest(folder):
    return srgan.load_checkpoint(folder / "checkpoint_latest.pth")


@pytest.fixture
def run(script, photos, start):
    """run("gan", ...) trains in tmp_path, from `start`, and returns what was printed."""
    def call(stage, *args, epochs=1, steps=2, fails=False, init=start, val=photos / "p0.png"):
        if init and not {"--resume", "--init"} & {*args}:
            args = ("--init", init, *args)
        if val:
            args = ("--val", val, *args)
        status, out, err = script("train", "--data", photos, *SMALL, "--stage", stage, "--epochs",
                                  epochs, "--steps-per-epoch", steps, *args)
        assert status == (2 if fails else 0) and err.count("train.py: ") == fails, err
        return out + err
    return call


@pytest.fixture
def updates(monkeypatch):
    """[(batch, (G, D) before the update, (G, D) after it)]"""
    seen, real = [], srgan.Update.__call__

    def call(update, *batch):
        before = copy.deepcopy((update.G, update.D))
        result = real(update, *batch)
        seen.append((batch, before, copy.deepcopy((update.G, update.D))))
        return result
    monkeypatch.setattr(srgan.Update, "__call__", call)
    return seen


# What a run learns and writes

def test_stage_1_learns_and_writes_its_run_folder(run, photos, tmp_path):
    run("srresnet", "--lr", "2e-3", epochs=3, steps=20, val=photos,
        *options(checkpoint_every=2, validate_every=2, srresnet__milestones=[2]))
    out = tmp_path / "runs/srresnet"
    assert {*os.listdir(out)} == {
        "checkpoint_best_psnr.pth", "checkpoint_best_ssim.pth", "checkpoint_epoch_0002.pth",
        "checkpoint_latest.pth", "config.json", "metrics.csv", "samples", "summary.json",
        *["curves.png"] * bool(importlib.util.find_spec("matplotlib"))}
    assert {*os.listdir(out / "samples")} == {"epoch_0002.png", "epoch_0003.png"}
    log = rows(out)
    assert [(row["epoch"], row["update"]) for row in log] == [("1", "20"), ("2", "40"), ("3", "60")]
    assert [float(row["lr"]) for row in log] == pytest.approx([2e-3, 2e-3, 2e-4])
    assert float(log[2]["loss"]) < 0.8 * float(log[0]["loss"]) == 0.8 * float(log[0]["pixel"])
    assert log[0]["psnr"] == "" and float(log[2]["psnr_std"]) > 0
    summary = json.loads((out / "summary.json").read_text())
    best = summary["best"]["psnr"]["mean"]
    assert best == max(float(row["psnr"]) for row in log[1:]) and summary["update"] == 60
    assert best > summary["start"]["psnr"]["mean"] + 1 and summary["bicubic"]["psnr"]["mean"] > 20
    generator = srgan.load_generator(out / "checkpoint_best_psnr.pth")
    pairs = map(srgan.open_pair, srgan.find_images(photos))
    assert np.mean([srgan.psnr(srgan.upscale(generator, lr), hr) for lr, hr in pairs]) == \
        pytest.approx(best)


def test_stage_2_starts_from_stage_1s_best_or_the_bundled_weights_and_trains_both_networks(
        run, tmp_path, start, monkeypatch):
    shutil.copy(ROOT / "config.json", tmp_path)
    monkeypatch.setattr(train, "ROOT", tmp_path)
    assert "--init" in run("gan", init=None, fails=True)
    (tmp_path / "weights").mkdir()
    shutil.copy(start, tmp_path / "weights/srresnet.pth")
    assert "weights/srresnet.pth\n" in run("gan", "--out", "bundled", init=None, steps=1)
    run("srresnet")
    assert "runs/srresnet/checkpoint_best_psnr.pth\n" in run("gan", init=None, steps=3)
    (stage_1,), (row,) = rows(tmp_path / "runs/srresnet"), rows(tmp_path / "runs/gan")
    summary = json.loads((tmp_path / "runs/gan/summary.json").read_text())
    assert summary["start"]["psnr"]["mean"] == pytest.approx(float(stage_1["psnr"]))
    content, adversarial = float(row["content"]), float(row["adversarial"])
    assert float(row["loss"]) == pytest.approx(content + 1e-3 * adversarial, rel=1e-4)     # Eq. 3
    assert min(content, adversarial, float(row["discriminator"])) > 0 == float(row["pixel"])
    assert latest(tmp_path / "runs/gan")["training"]["discriminator_adam"][0]["step"] == 3


@pytest.mark.parametrize("setting, rate_of_d", [(0, 1e-4), (3e-4, 3e-4)])
def test_learning_rates_betas_and_warmup_reach_both_networks(run, updates, setting, rate_of_d):
    """If both betas are 0, Adam moves each weight by its rate, whatever the gradient."""
    run("gan", "--lr", "1e-4", steps=3,
        *options(gan__betas=[0, 0], gan__discriminator_lr=setting, gan__warmup=2))
    for (_, before, after), factor in zip(updates, (0.5, 1, 1), strict=True):
        for *networks, rate in zip(before, after, (1e-4, rate_of_d)):
            for p, moved in zip(*(network.parameters() for network in networks)):
                assert (moved - p).abs().mean().item() == pytest.approx(factor * rate, rel=0.05)


def test_the_learning_rate_follows_its_schedule():
    def rates(**changes):
        stage = {"epochs": 10, "schedule": "constant", "milestones": [3, 6], "warmup": 0, **changes}
        return [train.rate_factor(stage, step, 10) for step in range(100)]
    expected = {"constant": [1] * 100, "step": [1] * 30 + [0.1] * 30 + [0.01] * 40,
                "cosine": [(1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)]}
    for schedule, cold in expected.items():
        warm = [(k + 1) / 20 * cold[k] for k in range(20)] + cold[20:]
        assert rates(schedule=schedule) == pytest.approx(cold)
        assert rates(schedule=schedule, warmup=20) == pytest.approx(warm)


def test_the_result_is_the_moving_average_with_its_decay(run, updates, start, tmp_path):
    """... which rises from 2 / 11 to the setting, so that the first weights are soon forgotten."""
    run("srresnet", "--lr", "1e-2", *options(ema=0.3), epochs=2, steps=3)
    average = srgan.load_generator(start).state_dict()
    for number, (_, _, (G, _)) in enumerate(updates, 1):
        share = 1 - min(0.3, (1 + number) / (10 + number))
        for key, value in G.network.state_dict().items():
            average[key] = average[key] + share * (value - average[key])
    result = latest(tmp_path / "runs/srresnet")["generator"]
    assert all(torch.allclose(result[key], average[key], rtol=1e-5, atol=1e-6)
               for key in result if "num_batches" not in key)


def test_patches_grow_at_their_epochs_and_no_batch_repeats(photos, tmp_path):
    """... wherever a run is resumed, and with a batch for each step of D."""
    store = srgan.Store(srgan.find_images(photos), tmp_path)
    changes = options(gan__grow=[[2, 40], [4, 64]], gan__discriminator_steps=3,
                      discriminator__pool=2, steps_per_epoch=2)
    args = train.parse_args(["--data", "x", "--stage", "gan", *SMALL, *changes])

    def draw(first, last):
        patches = srgan.Patches(store, 32)
        return list(train.batches(patches, train.resolve_config(args), "gan", first, last))
    whole = draw(0, 8)
    assert [[x.shape[-1] for x in batch] for batch in whole] == [
        [side // 4, side] * 3 for side in (32, 32, 40, 40, 40, 40, 64, 64)]
    seen = [hr[:, :, :32, :32].numpy().tobytes() for batch in whole for hr in batch[1::2]]
    assert len({*seen}) == 24
    for first in (1, 2, 5):
        assert same(draw(first, 8), whole[first:]) and same(draw(0, first), whole[:first])


def test_paired_training_takes_lr_from_its_folder(run, photos, updates, tmp_path):
    """Each LR image has a colour of its own; test_patches.py checks the positions."""
    (tmp_path / "lr").mkdir()
    for i, path in enumerate(srgan.find_images(photos)):
        h, w = (side // 4 for side in srgan.open_rgb(path).shape[:2])
        Image.new("RGB", (w, h), (40 * i, 7, 9)).save(tmp_path / "lr" / f"{path.stem}x4.png")
    run("srresnet", "--lr-data", "lr")
    assert "--lr-data" in run("srresnet", "--resume", epochs=2, fails=True)
    run("srresnet", "--resume", "--lr-data", "lr", epochs=2)
    colours = {tuple(image.mean((1, 2)).mul(255).round().int().tolist())
               for (lr, _), *_ in updates for image in lr}
    assert len(colours) > 3 and all(c[0] % 40 == 0 and c[1:] == (7, 9) for c in colours)


# The run folder

def test_the_best_checkpoints_are_the_highest_psnr_and_ssim_and_the_lowest_lpips(
        run, tmp_path, monkeypatch):
    values = {"psnr": [20, 19, 22, 21], "ssim": [0.5, 0.6, 0.4, 0.5], "lpips": [0.3, 0.4, 0.2, 0.5]}
    scores = iter([{name: {"mean": float(value[i]), "std": 0.1} for name, value in values.items()}
                   for i in (0, 0, 1, 2, 3)])                    # bicubic, the start, three epochs
    monkeypatch.setattr(srgan, "usable_metrics", lambda *_: [*srgan.METRICS])
    monkeypatch.setattr(train.RunFolder, "validate", lambda *_: next(scores))
    run("srresnet", epochs=3, steps=1)
    out = tmp_path / "runs/srresnet"
    assert {name: srgan.load_checkpoint(out / f"checkpoint_best_{name}.pth")["step"]
            for name in values} == {"psnr": 2, "ssim": 1, "lpips": 2}


def test_weights_and_biases_gets_what_metrics_csv_gets(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in run("srresnet", "--wandb", fails=True)
    logged, wandb = [], types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **_: types.SimpleNamespace(
        log=lambda row, step: logged.append((step, row["psnr"])), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run("srresnet", "--wandb", epochs=2)
    assert logged == [(int(row["update"]), float(row["psnr"]))
                      for row in rows(tmp_path / "runs/srresnet")]


def test_a_run_is_not_overwritten(run, tmp_path):
    run("srresnet")
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.*")}
    run("srresnet", "--out", "other")
    assert "--resume" in run("srresnet", fails=True)
    other = "--resume", "other/checkpoint_latest.pth"
    assert "another run" in run("srresnet", *other, epochs=2, fails=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.*")}
    run("srresnet", *other, "--out", "third", epochs=2)
    assert latest(tmp_path / "third")["step"] == 4


def test_images_are_validated_on_if_they_are_held_out_and_can_be_measured(run, photos, tmp_path):
    assert "5 images, 1 to validate on" in run("srresnet", val=None, steps=1)
    text = run("srresnet", "--data", photos / "p0.png", "--out", "b", val=None, fails=True)
    assert "too few" in text and "--val" in text
    (tmp_path / "val").mkdir()
    for name, side in ("good", 60), ("small", 9):
        Image.fromarray(photo(side, side)).save(tmp_path / "val" / f"{name}.png")
    (tmp_path / "val/bad.png").write_text("no image")
    text = run("srresnet", "--out", "c", val="val", epochs=2)
    assert "1 to validate on" in text and text.count("bad.png: ") == text.count("small: ") == 1
    (tmp_path / "val/good.png").unlink()
    assert "no image is left" in run("srresnet", "--out", "d", val="val", fails=True)


# Resuming

@pytest.mark.parametrize("stage, number, settings", [
    ("srresnet", signal.SIGTERM, {"srresnet__grow": [[2, 40]], "srresnet__schedule": "cosine"}),
    ("gan", signal.SIGINT, {"gan__adversarial_loss": "relativistic", "gan__r1_penalty": 0.1}),
    ("gan", signal.SIGHUP, {"gan__adversarial_loss": "wasserstein", "gan__gradient_penalty": 10,
                            "gan__discriminator_steps": 3, "discriminator__norm": "instance"}),
])
def test_a_signal_ends_the_run_after_its_update_and_resuming_continues_bit_for_bit(
        run, monkeypatch, tmp_path, stage, number, settings):
    run(stage, *options(**settings), "--out", "whole", epochs=2, steps=4)

    def rate_factor(values, step, steps, real=train.rate_factor):
        if step == 2:                                            # before update 3
            os.kill(os.getpid(), number)
        return real(values, step, steps)
    monkeypatch.setattr(train, "rate_factor", rate_factor)
    text = run(stage, *options(**settings), "--out", "parts", epochs=2, steps=4)
    assert "stopped after update 3 of 8; continue with --resume" in text
    assert signal.getsignal(number) == signal.SIG_DFL            # a second one ends it at once
    run(stage, "--resume", "--out", "parts", epochs=2, steps=4)
    a, b = (latest(tmp_path / name) for name in ("whole", "parts"))
    assert a["step"] == 8 and all(same(a[key], b[key]) for key in
                                  ("step", "generator", "training", "best", "baselines"))
    for x, y in zip(*(rows(tmp_path / name) for name in ("whole", "parts")), strict=True):
        assert all(x[key] == y[key] for key in x if key not in ("updates_per_s", "memory_mb"))


def test_a_resumed_run_keeps_its_networks_and_takes_new_settings(run, tmp_path):
    run("srresnet", *options(srresnet__betas=[0.9, 0.9]))
    assert "complete at update 2" in run("srresnet", "--resume", fails=True)
    for args, words in ((options(n_blocks=2), "blocks.1"), (options(channels=16), "head.0.weight"),
                        (("--init", "start.pth"), "--init"), (("--stage", "gan"), "stage gan")):
        args = ("--resume", "runs/srresnet/checkpoint_latest.pth", *args)
        assert words in run("srresnet", *args, epochs=2, fails=True)
    run("srresnet", "--resume", "--lr", "3e-6", epochs=2)
    config = json.loads((tmp_path / "runs/srresnet/config.json").read_text())
    assert config["srresnet"]["betas"] == [0.9, 0.9] and config["channels"] == 8
    assert [row["lr"] for row in rows(tmp_path / "runs/srresnet")] == ["0.0001", "3e-06"]


def test_a_run_of_an_earlier_version_resumes_with_settings_that_are_new(script, photos, tmp_path):
    old = srgan.load_checkpoint(OLD / "second_version.pth")
    status, _, err = script("train", "--data", photos, "--val", photos, "--stage", "srresnet",
                            "--resume", OLD / "second_version.pth", "--epochs", "2", "--out", "on",
                            "--set", "srresnet.tv_weight=1")
    assert status == 0 and "no longer a setting; ignored" in err, err
    new, (row,) = latest(tmp_path / "on"), rows(tmp_path / "on")
    assert new["step"] == 4 and float(row["tv"]) > 0 and old["best"].keys() == new["best"].keys()
    assert not same(old["generator"], new["generator"])


# What ends a run

@pytest.mark.parametrize("stage, what, number, last", [
    ("srresnet", "loss", 1, 2), ("srresnet", "weight", 4, 4), ("gan", "weight", 7, 4)])
def test_a_nan_ends_the_run_and_the_last_good_checkpoint_is_kept(
        run, tmp_path, monkeypatch, stage, what, number, last):
    """It appears after this optimiser step; in stage 2, D and G step in turn."""
    steps, real = [], srgan.minimize

    def minimize(loss, adam):
        steps.append(adam)
        real(loss, adam)
        if len(steps) == number:
            spoiled = loss if what == "loss" else adam.param_groups[0]["params"][0]
            spoiled.data.fill_(math.nan)
    monkeypatch.setattr(srgan, "minimize", minimize)
    text, out = run(stage, epochs=3, fails=True), tmp_path / "runs" / stage
    assert f"not finite at update {last}" in text and "--resume" in text
    assert latest(out)["step"] == last - 2
    for path in out.glob("*.pth"):
        weights = srgan.load_generator(path).state_dict().values()
        assert all(tensor.isfinite().all() for tensor in weights)
    run(stage, "--resume", "--lr", "1e-5", epochs=3)
    assert [row["update"] for row in rows(out)] == ["2", "4", "6"]


def test_what_a_user_can_cause_is_named_in_one_line(run, photos, tmp_path, start):
    (tmp_path / "empty").mkdir()
    srgan.save_checkpoint(tmp_path / "wide.pth", srgan.Generator(channels=9, n_blocks=1))
    for args, words in [
            (("--data", "nowhere"), "nowhere"), (("--data", "empty"), "empty"),
            (("--val", "nowhere"), "nowhere"), (("--init", "missing.pth"), "missing.pth"),
            (("--init", "wide.pth"), "channels 9"), (("--resume",), "checkpoint_latest.pth"),
            (("--resume", start), "--init"), (("--device", "gpu"), "gpu"),
            (("--lr-data", "x", "--data", "a", "b"), "one --data folder"),
            (("--data", photos / "p0.png", *options(patch_size=400)), "416x416"),
            (("--feature-weights", "none.pth", *options(srresnet__content_weight=1)), "none.pth")]:
        assert words in run("srresnet", *args, fails=True), args


# Several processes and GPUs

@pytest.mark.parametrize("device, words", [("cuda:1", "--device cuda"), ("cpu", "torchrun")])
def test_a_process_that_torchrun_did_not_start_or_that_names_a_gpu_is_refused(
        run, monkeypatch, device, words):
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", "0")
    assert words in run("srresnet", "--device", device, fails=True)


def test_two_processes_learn_as_one_from_the_mean_of_their_gradients_and_one_can_resume(
        run, photos, start, tmp_path, monkeypatch):
    """Beta 0 makes Adam's first moment the gradient; two runs give that of each process."""
    settings = "--lr", "1e-12", *options(gan__betas=[0, 0.9], gan__r1_penalty=2)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         ROOT / "train.py", "--data", photos, "--val", photos / "p0.png", "--stage", "gan", *SMALL,
         "--init", start, "--epochs", "1", "--steps-per-epoch", "1", *settings],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starting from") == 1               # only rank 0 prints
    make_patches, expected = train.make_patches, []
    for rank in (0, 1):
        monkeypatch.setattr(train, "make_patches", lambda *args: make_patches(*args[:-1], rank))
        run("gan", "--out", f"rank{rank}", *settings, steps=1)
        expected.append(latest(tmp_path / f"rank{rank}")["training"])
    found = latest(tmp_path / "runs/gan")["training"]
    for adam in ("generator_adam", "discriminator_adam"):
        for i, state in found[adam].items():
            a, b = (training[adam][i]["exp_avg"] for training in expected)
            assert torch.allclose(state["exp_avg"], (a + b) / 2, rtol=1e-3, atol=1e-7)
            assert not torch.allclose(a, b, rtol=1e-3, atol=1e-7)
    run("gan", "--resume", epochs=2, steps=1)
    assert latest(tmp_path / "runs/gan")["step"] == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_both_stages_train_alike_compiled_and_not(run, tmp_path):
    for stage in ("srresnet", "gan"):
        losses = []
        for mode in ("no", "auto"):
            run(stage, "--device", "cuda", *options(compile=mode), "--out", mode + stage,
                epochs=2, steps=8)
            losses.append([float(row["loss"]) for row in rows(tmp_path / (mode + stage))])
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    run("gan", "--device", "cuda", "--out", "autogan", "--resume", epochs=3, steps=8)
    assert latest(tmp_path / "autogan")["step"] == 24


def test_fp32_means_without_tf32():
    for precision, allowed in ("bf16", True), ("fp32", False):
        train.set_up_arithmetic(torch.device("cpu"), {"precision": precision})
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
