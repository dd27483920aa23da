"""train.py: both stages, the run folder, resuming, and what ends a run."""
import csv
import importlib.machinery
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
from conftest import ROOT, SMALL, photo, same
from PIL import Image

import srgan
import train

CPU = torch.device("cpu")


def options(**settings):
    """--set for each setting; gan__lr is gan.lr."""
    found = []
    for name, value in settings.items():
        found += ["--set", f"{name.replace('__', '.')}={json.dumps(value)}"]
    return found


def rows(folder):
    """The rows of metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def latest(folder):
    return srgan.load_checkpoint(folder / "checkpoint_latest.pth")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def run(script, photos, start):
    """run("gan", ...) trains in tmp_path, from `start`, and returns what was printed."""
    def call(stage, *args, epochs=1, steps=2, fails=False, init=start, val=photos / "p0.png"):
        if init and "--resume" not in args and "--init" not in args:
            args = ("--init", init, *args)
        if val:
            args = ("--val", val, *args)
        status, out, err = script("train", "--data", photos, *SMALL, "--stage", stage, "--epochs",
                                  epochs, "--steps-per-epoch", steps, *args)
        assert status == (2 if fails else 0), err
        assert err.count("train.py: ") == fails, err
        return out + err
    return call


@pytest.fixture
def srresnet(tmp_path):
    return tmp_path / "runs/srresnet"


@pytest.fixture
def gan(tmp_path):
    return tmp_path / "runs/gan"


@pytest.fixture
def updates(monkeypatch):
    """A record of each call of train.update: its pairs, and G's and D's state before and after."""
    seen = []
    real = train.update

    def states(tools):
        networks = [tools.G.network]
        if tools.D is not None:
            networks.append(tools.D.network)
        return [{name: tensor.clone() for name, tensor in network.state_dict().items()}
                for network in networks]

    def update(tools, pairs):
        record = types.SimpleNamespace(pairs=pairs, before=states(tools))
        losses = real(tools, pairs)
        record.after = states(tools)
        seen.append(record)
        return losses
    monkeypatch.setattr(train, "update", update)
    return seen


# What a run learns

def test_stage_1_learns(run, photos, srresnet):
    """train.train: the loss falls, and the best checkpoint is better than the start."""
    run("srresnet", "--lr", "2e-3", epochs=3, steps=20, val=photos)
    log = rows(srresnet)
    assert float(log[2]["loss"]) < 0.8 * float(log[0]["loss"])
    report = summary(srresnet)
    assert report["best"]["psnr"]["mean"] > report["start"]["psnr"]["mean"]


def test_metrics_csv_has_a_row_for_each_epoch(run, srresnet):
    """train, write_rows: validated every second epoch and at the end."""
    run("srresnet", "--lr", "2e-3", epochs=3, steps=2,
        *options(validate_every=2, srresnet__milestones=[2]))
    log = rows(srresnet)
    assert [(row["epoch"], row["update"]) for row in log] == [("1", "2"), ("2", "4"), ("3", "6")]
    assert [float(row["lr"]) for row in log] == pytest.approx([2e-3, 2e-3, 2e-4])
    assert [bool(row["psnr"]) for row in log] == [False, True, True]
    assert list(log[0]) == ["epoch", "update", "lr", *train.LOSSES, "psnr", "psnr_std", "ssim",
                            "ssim_std", "lpips", "lpips_std", "updates_per_s", "memory_mb"]


def test_a_run_folder_holds_what_the_readme_says(run, srresnet):
    """RunFolder: checkpoint_every is 2, and it is validated every second epoch."""
    run("srresnet", epochs=3, steps=1, *options(checkpoint_every=2, validate_every=2))
    names = {path.relative_to(srresnet).as_posix() for path in srresnet.rglob("[!.]*.*")}
    assert names - {"curves.png"} == {
        "checkpoint_best_psnr.pth", "checkpoint_best_ssim.pth", "checkpoint_epoch_0002.pth",
        "checkpoint_latest.pth", "config.json", "metrics.csv", "samples/epoch_0002.png",
        "samples/epoch_0003.png", "summary.json", "running.txt"}


def test_the_log_holds_the_means_of_the_losses_of_an_epoch(run, srresnet, monkeypatch):
    """State.record, State.mean_losses."""
    losses = []
    real = srgan.srresnet_step

    def step(*args):
        result = real(*args)
        losses.append(result["loss"].item())
        return result
    monkeypatch.setattr(srgan, "srresnet_step", step)
    run("srresnet", epochs=2, steps=3)
    found = [float(row["loss"]) for row in rows(srresnet)]
    assert found == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])], rel=1e-5)


def test_the_validation_scores_are_those_of_the_saved_generator(run, photos, srresnet):
    """RunFolder.validate, end_epoch and save_if_best."""
    run("srresnet", "--lr", "2e-3", val=photos)
    generator = srgan.load_generator(srresnet / "checkpoint_best_psnr.pth")
    scores = []
    for path in srgan.find_images(photos):
        lr, hr = srgan.open_pair(path)
        scores.append(srgan.psnr(srgan.upscale(generator, lr), hr))
    row, = rows(srresnet)
    assert float(row["psnr"]) == pytest.approx(np.mean(scores), rel=1e-9)
    assert float(row["psnr_std"]) == pytest.approx(np.std(scores), rel=1e-9)
    assert summary(srresnet)["best"]["psnr"]["mean"] == float(row["psnr"])


@pytest.mark.parametrize("scale", [2, 8])
def test_validation_leaves_out_a_border_of_scale_pixels(run, photos, srresnet, scale):
    """RunFolder.validate: the usual protocol."""
    run("srresnet", *options(scale=scale), init=None, steps=1)
    lr, hr = srgan.open_pair(photos / "p0.png", scale=scale)
    expected = srgan.psnr(srgan.interpolate(lr, scale), hr, shave=scale)
    assert summary(srresnet)["bicubic"]["psnr"]["mean"] == pytest.approx(expected, rel=1e-9)


def test_validation_makes_lr_with_the_kernel_of_the_settings(run, photos, srresnet):
    """RunFolder.validate."""
    run("srresnet", *options(kernel="gaussian"), steps=1)
    lr, hr = srgan.open_pair(photos / "p0.png", kernel="gaussian")
    expected = srgan.psnr(srgan.interpolate(lr), hr)
    assert summary(srresnet)["bicubic"]["psnr"]["mean"] == pytest.approx(expected, rel=1e-9)


def test_stage_2_minimises_equation_3_with_its_weights(run, gan):
    """make_tools: gan.adversarial_weight and gan.content_weight."""
    run("gan", *options(gan__adversarial_weight=0.05, gan__content_weight=2), steps=3)
    row, = rows(gan)
    expected = 2 * float(row["content"]) + 0.05 * float(row["adversarial"])
    assert float(row["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(row["adversarial"]) > 0.1
    assert float(row["pixel"]) == 0


def test_stage_2_trains_both_networks(run, gan, updates):
    """make_networks, make_tools."""
    run("gan", steps=3)
    for before, after in zip(updates[0].before, updates[-1].after, strict=True):
        for name, tensor in before.items():
            assert not torch.equal(tensor, after[name]), name
    assert latest(gan)["training"]["discriminator_adam"][0]["step"] == 3


def test_stage_2_starts_from_stage_1s_best_checkpoint(run, srresnet, gan):
    """find_start."""
    run("srresnet")
    text = run("gan", init=None, steps=1)
    assert "starting from runs/srresnet/checkpoint_best_psnr.pth\n" in text
    assert summary(gan)["start"]["psnr"]["mean"] == float(rows(srresnet)[0]["psnr"])


def test_stage_2_starts_from_the_bundled_weights_if_there_was_no_stage_1(
        run, start, tmp_path, monkeypatch):
    """find_start."""
    monkeypatch.setattr(train, "ROOT", tmp_path)
    shutil.copy(ROOT / "config.json", tmp_path)
    assert "name one with --init" in run("gan", init=None, fails=True)
    (tmp_path / "weights").mkdir()
    shutil.copy(start, tmp_path / "weights/srresnet.pth")
    assert "weights/srresnet.pth\n" in run("gan", init=None, steps=1)


def test_the_start_must_fit_the_settings(run, tmp_path):
    """find_start."""
    srgan.save_checkpoint(tmp_path / "wide.pth", srgan.Generator(channels=9, n_blocks=1))
    text = run("srresnet", "--init", "wide.pth", fails=True)
    assert "wide.pth has channels 9, the settings have 8" in text


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_keeps_its_statistics_if_it_is_frozen(run, start, gan, frozen):
    """make_networks: gan.freeze_batch_norm."""
    run("gan", *options(gan__freeze_batch_norm=frozen), steps=3)
    before = srgan.load_generator(start).state_dict()
    after = latest(gan)["training"]["generator"]
    statistics = [name for name in after if "running" in name]
    assert len(statistics) == 6
    for name in statistics:
        assert torch.equal(before[name], after[name]) == frozen


@pytest.mark.parametrize("setting, rate_of_d", [(0, 1e-4), (3e-4, 3e-4)])
def test_learning_rates_betas_and_warmup_reach_both_networks(run, updates, setting, rate_of_d):
    """State.set_rates: if both betas are 0, Adam moves each weight by its rate."""
    run("gan", "--lr", "1e-4", steps=3,
        *options(gan__betas=[0, 0], gan__discriminator_lr=setting, gan__warmup=2))
    assert len(updates) == 3
    for record, factor in zip(updates, (0.5, 1, 1)):
        for before, after, rate in zip(record.before, record.after, (1e-4, rate_of_d)):
            for name in before:
                if name.endswith(("weight", "bias")):
                    moved = (after[name] - before[name]).abs().mean().item()
                    assert moved == pytest.approx(factor * rate, rel=0.05)


def test_betas_may_be_whole_numbers(run):
    """State."""
    run("gan", *options(gan__betas=[0, 0.9]), steps=1)


def rates(**changes):
    """The factor of each of 100 updates, 10 to an epoch."""
    values = {"epochs": 10, "schedule": "constant", "milestones": [3, 6], "warmup": 0}
    values.update(changes)
    return [train.rate_factor(values, step, 10) for step in range(100)]


COSINE = [(1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)]


@pytest.mark.parametrize("schedule, expected", [
    ("constant", [1] * 100), ("step", [1] * 30 + [0.1] * 30 + [0.01] * 40), ("cosine", COSINE)])
def test_the_learning_rate_follows_its_schedule(schedule, expected):
    """rate_factor."""
    assert rates(schedule=schedule) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_the_learning_rate_rises_during_the_warmup(schedule):
    """rate_factor: the schedule's factor, times 1/20, 2/20 ... 1."""
    warm = rates(schedule=schedule, warmup=20)
    cold = rates(schedule=schedule)
    for step in range(100):
        assert warm[step] == pytest.approx(min(1, (step + 1) / 20) * cold[step], rel=1e-9)


def test_the_result_is_the_moving_average_with_its_decay(run, updates, start, srresnet):
    """State.record: the decay rises from 2 / 11, so that the first weights are soon forgotten."""
    run("srresnet", "--lr", "1e-2", *options(ema=0.3), epochs=2, steps=3)
    average = srgan.load_generator(start).double().state_dict()
    for number, record in enumerate(updates, 1):
        decay = min(0.3, (1 + number) / (10 + number))
        for key, value in record.after[0].items():
            average[key] = decay * average[key] + (1 - decay) * value
    result = latest(srresnet)["generator"]
    for key in result:
        if "num_batches" not in key:
            scale = average[key].abs().max()
            assert (result[key] - average[key]).abs().max() <= 1e-6 * scale   # float32


def test_each_update_has_random_numbers_of_its_own_also_when_resumed(run, monkeypatch):
    """train.train: the seed of an update depends on its number."""
    drawn = []
    real = srgan.srresnet_step

    def step(*args):
        drawn.append(torch.rand(1).item())
        return real(*args)
    monkeypatch.setattr(srgan, "srresnet_step", step)
    run("srresnet", epochs=2, steps=3)
    run("srresnet", "--out", "parts", epochs=1, steps=3)
    run("srresnet", "--out", "parts", "--resume", epochs=2, steps=3)
    assert len(set(drawn[:6])) == 6
    assert drawn[6:] == drawn[:6]


def test_no_batch_repeats_and_each_step_of_d_has_its_own(run, photos, tmp_path):
    """make_batches: the same batches from whatever update on."""
    args = train.parse_args(["--data", "x", "--stage", "gan", *SMALL, "--cache", str(tmp_path),
                             *options(gan__discriminator_steps=3)])
    settings = train.resolve_settings(args)
    pairs = [(path.stem, path, None) for path in srgan.find_images(photos)]
    patches = train.make_patches(args, settings, pairs)
    whole = list(train.make_batches(patches, settings, "gan", CPU, 0, 0, 8))
    seen = set()
    for batch in whole:
        assert len(batch) == 3
        for _, hr in batch:
            seen.add(hr.numpy().tobytes())
    assert len(seen) == 24
    assert same(list(train.make_batches(patches, settings, "gan", CPU, 0, 5, 8)), whole[5:])


@pytest.mark.parametrize("stage, expected", [("srresnet", 2), ("gan", 3)])
def test_compile_compiles_what_each_update_calls_but_not_the_d_of_penalties(
        photos, tmp_path, monkeypatch, stage, expected):
    """make_tools, speed_up: G and phi; in stage 2 also D."""
    compiled = []

    def compile(network, dynamic):
        compiled.append(network)
        return network
    monkeypatch.setattr(torch, "compile", compile)
    args = train.parse_args(["--data", "x", "--stage", stage, *SMALL, *options(
        compile="yes", srresnet__content_weight=1, gan__r1_penalty=1)])
    settings = train.resolve_settings(args)
    networks = train.make_networks(settings, stage, None, CPU)
    state = train.State(networks, train.stage_settings(settings, stage), CPU)
    tools = train.make_tools(settings, stage, state, CPU)
    assert len(compiled) == expected
    assert tools.G in compiled
    if stage == "gan":
        assert tools.D in compiled
        function = tools.penalty.terms["r1_penalty"][1]
        assert not any(function.args[0] is network for network in compiled)


def test_lr_images_of_a_folder_are_trained_on(run, photos, updates, tmp_path):
    """find_data, make_patches: each LR image has a colour; test_patches.py checks the positions."""
    (tmp_path / "lr").mkdir()
    for i, path in enumerate(srgan.find_images(photos)):
        h, w, _ = srgan.open_rgb(path).shape
        image = Image.new("RGB", (w // 4, h // 4), (40 * i, 7, 9))
        image.save(tmp_path / "lr" / f"{path.stem}x4.png")
    run("srresnet", "--lr-data", "lr")
    assert "give it again" in run("srresnet", "--resume", epochs=2, fails=True)
    run("srresnet", "--resume", "--lr-data", "lr", epochs=2)
    reds = set()
    for record in updates:
        lr, _ = record.pairs[0]
        colours = lr.mul(255).round().int().permute(0, 2, 3, 1).reshape(-1, 3)
        assert set(colours[:, 1].tolist()) == {7}
        reds.update(colours[:, 0].tolist())
    assert len(reds) > 3
    assert reds <= {0, 40, 80, 120, 160, 200}


# The run folder

def test_the_best_checkpoints_are_the_highest_psnr_and_ssim_and_the_lowest_lpips(
        run, srresnet, monkeypatch):
    """RunFolder.save_if_best, of three epochs; before them come bicubic and the start."""
    values = {"psnr": [20, 19, 22, 21], "ssim": [0.5, 0.6, 0.4, 0.5], "lpips": [0.3, 0.4, 0.2, 0.5]}
    scores = fake_scores(values, order=(0, 0, 1, 2, 3))
    monkeypatch.setattr(srgan, "usable_metrics", lambda *_: [*srgan.METRICS])
    monkeypatch.setattr(train.RunFolder, "validate", lambda *_: next(scores))
    run("srresnet", epochs=3, steps=1)
    for name, step in (("psnr", 2), ("ssim", 1), ("lpips", 2)):
        assert srgan.load_checkpoint(srresnet / f"checkpoint_best_{name}.pth")["step"] == step


def fake_scores(values, order):
    """An iterator over what RunFolder.validate could return."""
    for i in order:
        yield {name: {"mean": float(value[i]), "std": 0.1} for name, value in values.items()}


def test_a_resumed_run_remembers_its_best_scores(run, srresnet, monkeypatch):
    """State.resume: the third epoch is better than the second, but not than the first."""
    values = {"psnr": [20, 25, 21, 23], "ssim": [0.5, 0.6, 0.4, 0.5], "lpips": [1, 1, 1, 1]}
    scores = fake_scores(values, order=(0, 0, 1, 2, 0, 3))       # bicubic again when resumed
    monkeypatch.setattr(train.RunFolder, "validate", lambda *_: next(scores))
    run("srresnet", epochs=2, steps=1)
    run("srresnet", "--resume", epochs=3, steps=1)
    assert srgan.load_checkpoint(srresnet / "checkpoint_best_psnr.pth")["step"] == 1
    assert summary(srresnet)["best"]["psnr"] == {"mean": 25, "std": 0.1, "epoch": 1}


def test_lpips_is_measured_if_it_is_wanted(run, monkeypatch):
    """RunFolder: the setting lpips."""
    asked = []

    def usable_metrics(with_lpips, device):
        asked.append(with_lpips)
        return ["psnr", "ssim"]
    monkeypatch.setattr(srgan, "usable_metrics", usable_metrics)
    run("srresnet", "--out", "with", *options(lpips=True), steps=1)
    run("srresnet", "--out", "without", *options(lpips=False), steps=1)
    assert asked == [True, False]


def test_a_sample_shows_bicubic_sr_and_hr_side_by_side(run, srresnet, photos):
    """RunFolder.save_sample, srgan.side_by_side."""
    run("srresnet", *options(validate_every=1), steps=1)
    sheet = srgan.open_rgb(srresnet / "samples/epoch_0001.png")
    lr, hr = srgan.open_pair(photos / "p0.png")
    h, w, _ = hr.shape
    assert np.array_equal(sheet[:h, :w], srgan.interpolate(lr))
    assert np.array_equal(sheet[:h, -w:], hr)


def test_curves_show_each_loss_and_metric_that_was_not_always_0(tmp_path, monkeypatch):
    """draw_curves."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    titles = []
    real = figure.savefig

    def savefig(figure, path):
        for axes in figure.axes:
            titles.append(axes.get_title())
        real(figure, path)
    monkeypatch.setattr(figure, "savefig", savefig)
    log = [{"update": "10", "loss": "0.5", "tv": "0", "psnr": ""},
           {"update": "20", "loss": "0.25", "tv": "0", "psnr": "21.5"}]
    train.draw_curves(log, tmp_path / "curves.png")
    assert titles == ["loss", "psnr"]
    assert srgan.open_rgb(tmp_path / "curves.png").std() > 0


def test_weights_and_biases_gets_what_metrics_csv_gets(run, srresnet, monkeypatch):
    """RunFolder.log, with a stand-in for wandb."""
    logged = []
    tracker = types.SimpleNamespace(
        log=lambda row, step: logged.append((step, row["psnr"])), finish=lambda: None)
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **_: tracker
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run("srresnet", "--wandb", epochs=2)
    assert logged == [(int(row["update"]), float(row["psnr"])) for row in rows(srresnet)]


@pytest.fixture
def command_line(monkeypatch, capsys):
    """command_line(...): what parse_args says of wrong arguments."""
    def call(*args):
        with pytest.raises(SystemExit) as exit:
            train.parse_args([*map(str, args)])
        assert exit.value.code == 2
        return capsys.readouterr().err
    return call


@pytest.mark.parametrize("args, words", [
    (["--stage", "gan"], "--data is missing"), (["--data", "x"], "--stage is missing"),
    (["--data", "a", "b", "--stage", "gan", "--lr-data", "x"], "one --data folder"),
    (["--data", "x", "--stage", "gan", "--preset", "nonsense"], "invalid choice"),
    (["--data", "x", "--stage", "gan", "--resume", "--init", "a.pth"], "--init")])
def test_wrong_arguments_are_refused(command_line, args, words):
    """parse_args."""
    assert words in command_line(*args)


def test_wandb_needs_its_package(command_line, monkeypatch):
    """parse_args."""
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    text = command_line("--data", "x", "--stage", "gan", "--wandb")
    assert "pip install wandb" in text


def content(folder):
    """The bytes of a run folder's files."""
    return {path: path.read_bytes() for path in folder.rglob("*.*") if path.name != "running.txt"}


def test_a_run_is_not_overwritten(run, srresnet):
    """open_run: neither by a new run nor by one that continues another."""
    run("srresnet")
    before = content(srresnet)
    run("srresnet", "--out", "other")
    assert "choose another folder with --out" in run("srresnet", fails=True)
    text = run("srresnet", "--resume", "other/checkpoint_latest.pth", epochs=2, fails=True)
    assert "holds another run" in text
    assert content(srresnet) == before


def test_a_run_can_be_continued_in_another_folder(run, tmp_path):
    """open_run: --resume CKPT --out."""
    run("srresnet")
    run("srresnet", "--resume", "runs/srresnet/checkpoint_latest.pth", "--out", "other", epochs=2)
    assert latest(tmp_path / "other")["step"] == 4


def test_two_trainings_do_not_write_to_one_folder(tmp_path, monkeypatch):
    """lock_run: the message names the process that holds the lock."""
    monkeypatch.setattr(train, "LOCKS", [])
    train.lock_run(tmp_path / "run")
    with pytest.raises(srgan.InputError, match=f"process {os.getpid()} since 20.*--out"):
        train.lock_run(tmp_path / "run")
    train.lock_run(tmp_path / "other")


def test_only_the_first_process_of_torchrun_locks_the_folder(tmp_path, monkeypatch):
    """lock_run."""
    monkeypatch.setattr(train, "LOCKS", [])
    train.lock_run(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    train.lock_run(tmp_path / "run")


def test_images_to_validate_on_are_held_out(run):
    """find_data."""
    assert "5 images, 1 to validate on" in run("srresnet", val=None, steps=1)


def test_one_image_is_too_few_for_training_and_validation(run, photos):
    """find_data."""
    text = run("srresnet", "--data", photos / "p0.png", val=None, fails=True)
    assert "too few" in text
    assert "--val" in text


@pytest.mark.parametrize("changes, expected", [
    ({"split": [50, 50, 0]}, "3 images, 3 to validate on"),
    ({"split": [50, 50, 0], "validate_on": 2}, "4 images, 2 to validate on"),
    ({"split": [60, 20, 20]}, "4 images, 1 to validate on")])
def test_the_split_is_that_of_the_settings(run, changes, expected):
    """find_data: split, validate_on."""
    assert expected in run("srresnet", *options(**changes), val=None, steps=1)


def test_images_that_cannot_be_measured_are_named_once_and_left_out(run, tmp_path):
    """RunFolder.validate."""
    (tmp_path / "val").mkdir()
    Image.fromarray(photo(60, 60)).save(tmp_path / "val/good.png")
    Image.fromarray(photo(9, 9)).save(tmp_path / "val/small.png")
    (tmp_path / "val/bad.png").write_text("no image")
    text = run("srresnet", val="val", epochs=2)
    assert "1 to validate on" in text
    assert text.count("bad.png: ") == text.count("small: ") == 1


def test_a_run_without_an_image_to_validate_on_does_not_begin(run, tmp_path):
    """RunFolder.validate."""
    (tmp_path / "val").mkdir()
    (tmp_path / "val/bad.png").write_text("no image")
    assert "none of the images to validate on" in run("srresnet", val="val", fails=True)


# Resuming

@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(step, number): send a signal before the update `step`, counted from 0."""
    def call(at, number):
        real = train.rate_factor

        def rate_factor(values, step, steps):
            if step == at:
                os.kill(os.getpid(), number)
            return real(values, step, steps)
        monkeypatch.setattr(train, "rate_factor", rate_factor)
    return call


@pytest.mark.parametrize("stage, number, settings", [
    ("srresnet", signal.SIGTERM, {"srresnet__schedule": "cosine"}),
    ("gan", signal.SIGINT, {"gan__adversarial_loss": "relativistic", "gan__r1_penalty": 0.1,
                            "gan__shift": 3}),
    ("gan", signal.SIGHUP, {"gan__adversarial_loss": "wasserstein", "gan__gradient_penalty": 10,
                            "gan__discriminator_steps": 3, "discriminator__norm": "instance"})])
def test_a_signal_ends_the_run_after_its_update_and_resuming_continues_bit_for_bit(
        run, signal_at, tmp_path, stage, number, settings):
    """record_signals, State.training, State.resume: weights, Adam, best and baselines."""
    run(stage, *options(**settings), "--out", "whole", epochs=2, steps=4)
    signal_at(2, number)                                         # before update 3
    text = run(stage, *options(**settings), "--out", "parts", epochs=2, steps=4)
    assert "stopped after update 3 of 8; continue with --resume" in text
    run(stage, "--resume", "--out", "parts", epochs=2, steps=4)
    whole = latest(tmp_path / "whole")
    parts = latest(tmp_path / "parts")
    assert whole["step"] == 8
    for key in ("step", "generator", "training", "best", "baselines"):
        assert same(whole[key], parts[key]), key
    check_log(rows(tmp_path / "whole"), rows(tmp_path / "parts"))


def check_log(whole, parts):
    """Two logs agree but for times, and for the losses of the epoch that was interrupted."""
    assert len(whole) == len(parts) == 2
    for epoch, (x, y) in enumerate(zip(whole, parts)):
        for key in x:
            if key in ("updates_per_s", "memory_mb") or (epoch == 0 and key in train.LOSSES):
                continue
            assert x[key] == y[key], key


def test_after_a_resumption_the_losses_are_the_means_since_then(run, signal_at, tmp_path):
    """State: update 4 alone is left of the first epoch."""
    run("srresnet", "--out", "whole", epochs=4, steps=1)
    signal_at(2, signal.SIGTERM)
    run("srresnet", "--out", "parts", steps=4)
    run("srresnet", "--out", "parts", "--resume", steps=4)
    row, = rows(tmp_path / "parts")
    assert row["loss"] == rows(tmp_path / "whole")[3]["loss"]


def test_a_second_signal_ends_the_program_at_once(run, signal_at):
    """record_signals."""
    signal_at(0, signal.SIGTERM)
    run("srresnet")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_was_stopped_before_its_first_update_can_be_resumed(run, tmp_path, monkeypatch):
    """restore_adam: the first checkpoint has no moments."""
    run("srresnet", "--out", "whole")
    with monkeypatch.context() as context:
        context.setattr(train, "train", lambda *args: None)
        run("srresnet", "--out", "parts")
    run("srresnet", "--out", "parts", "--resume")
    assert same(latest(tmp_path / "parts")["training"], latest(tmp_path / "whole")["training"])


def test_a_complete_run_says_how_it_can_be_made_longer(run):
    """main."""
    run("srresnet")
    text = run("srresnet", "--resume", fails=True)
    assert "complete at update 2; --epochs makes it longer" in text


@pytest.mark.parametrize("args, words", [
    (options(n_blocks=2), "blocks.1"), (options(channels=16), "head.0.weight"),
    (["--stage", "gan"], "a checkpoint of stage srresnet, not gan")])
def test_a_resumed_run_keeps_its_networks(run, args, words):
    """State.resume, open_run."""
    run("srresnet")
    path = "runs/srresnet/checkpoint_latest.pth"
    assert words in run("srresnet", "--resume", path, *args, epochs=2, fails=True)


def test_a_resumed_run_keeps_its_settings_and_takes_new_ones(run, srresnet):
    """main, resolve_settings."""
    run("srresnet", *options(srresnet__betas=[0.9, 0.9]))
    run("srresnet", "--resume", "--lr", "3e-6", epochs=2)
    config = json.loads((srresnet / "config.json").read_text())
    assert config["srresnet.betas"] == [0.9, 0.9]
    assert [row["lr"] for row in rows(srresnet)] == ["0.0001", "3e-06"]


def test_epochs_after_the_checkpoint_are_trained_again(tmp_path):
    """read_rows, write_rows."""
    train.write_rows(tmp_path / "m.csv", [{"epoch": 1, "update": 2}, {"epoch": 2, "update": 4}])
    assert [row["update"] for row in train.read_rows(tmp_path / "m.csv", 3)] == ["2"]
    assert train.read_rows(tmp_path / "absent.csv", 3) == []


@pytest.fixture
def adam():
    """An Adam that has taken a step."""
    p = torch.nn.Parameter(torch.randn(2, 3))
    adam = torch.optim.Adam([p], fused=True)
    p.square().sum().backward()
    adam.step()
    return adam


def test_adams_moments_are_restored(adam):
    """restore_adam."""
    saved = adam.state_dict()["state"]
    other = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2, 3))], fused=True)
    train.restore_adam(other, saved)
    assert same(other.state_dict()["state"], saved)


def test_moments_of_another_shape_are_refused(adam):
    """restore_adam: fused Adam would write outside of their memory."""
    saved = adam.state_dict()["state"]
    for name in ("exp_avg", "exp_avg_sq"):
        for wrong in (torch.zeros(1), torch.zeros(3, 2), torch.zeros(2, 4)):
            with pytest.raises(ValueError, match=f"{name} 0 is not of its parameter's shape"):
                train.restore_adam(adam, {0: {**saved[0], name: wrong}})


def test_moments_without_memory_of_their_own_are_copied(adam):
    """restore_adam: a stride of 0 says that all elements are one."""
    saved = adam.state_dict()["state"]
    spread = torch.tensor(2.0).expand(2, 3)
    train.restore_adam(adam, {0: {**saved[0], "exp_avg": spread}})
    moment = adam.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(moment, spread)
    assert moment.stride() == (3, 1)


@pytest.mark.parametrize("key, value", [
    ("step", "x"), ("best", 3), ("training", {}), ("generator", {}), ("seconds", None)])
def test_a_checkpoint_that_cannot_be_resumed_is_one_line(run, srresnet, key, value):
    """State.resume."""
    run("srresnet")
    path = srresnet / "checkpoint_latest.pth"
    saved = torch.load(path)
    saved[key] = value
    torch.save(saved, path)
    assert "cannot be resumed" in run("srresnet", "--resume", epochs=2, fails=True)


# What ends a run

@pytest.mark.parametrize("stage, what, number, last", [
    ("srresnet", "loss", 1, 2), ("srresnet", "weight", 4, 4), ("gan", "weight", 7, 4)])
def test_a_nan_ends_the_run_and_the_last_good_checkpoint_is_kept(
        run, tmp_path, monkeypatch, stage, what, number, last):
    """State.is_finite: NaN appears after the step `number`; in stage 2, D and G step in turn."""
    steps = []
    real = srgan.minimize

    def minimize(loss, adam):
        steps.append(adam)
        real(loss, adam)
        if len(steps) == number:
            spoiled = loss if what == "loss" else adam.param_groups[0]["params"][0]
            spoiled.data.fill_(math.nan)
    monkeypatch.setattr(srgan, "minimize", minimize)
    text = run(stage, epochs=3, fails=True)
    assert f"not finite at update {last}" in text
    assert "--resume it with a lower --lr" in text
    out = tmp_path / "runs" / stage
    assert latest(out)["step"] == last - 2
    for tensor in latest(out)["generator"].values():
        assert tensor.isfinite().all()
    run(stage, "--resume", "--lr", "1e-5", epochs=3)
    assert [row["update"] for row in rows(out)] == ["2", "4", "6"]


@pytest.mark.parametrize("args, words", [
    (["--data", "nowhere"], "nowhere: no such file"), (["--data", "empty"], "empty: no images"),
    (["--val", "nowhere"], "nowhere: no such file"), (["--init", "missing.pth"], "missing.pth"),
    (["--resume"], "checkpoint_latest.pth: no such file"),
    (["--resume", "start.pth"], "only a checkpoint_latest.pth can be resumed"),
    (["--device", "gpu"], "device 'gpu' cannot be used"),
    (options(patch_size=400), "no image is 416x416"),
    (["--feature-weights", "none.pth", *options(srresnet__content_weight=1)], "none.pth")])
def test_what_a_user_can_cause_is_named_in_one_line(run, tmp_path, args, words):
    """main and what it calls."""
    (tmp_path / "empty").mkdir()
    assert words in run("srresnet", *args, fails=True)


# Several processes and GPUs

@pytest.mark.parametrize("device, words", [("cuda:1", "--device cuda"), ("cpu", "torchrun")])
def test_a_process_that_torchrun_did_not_start_or_that_names_a_gpu_is_refused(
        run, monkeypatch, device, words):
    """set_up_process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert words in run("srresnet", "--device", device, fails=True)


# Beta 0 makes Adam's first moment the gradient.
TWO = ("--lr", "1e-12", *options(gan__betas=[0, 0.9], gan__r1_penalty=2))


@pytest.fixture
def of_each_rank(run, tmp_path, monkeypatch):
    """What one process would learn in the place of each of two: a checkpoint's "training"."""
    found = []
    real = train.make_batches
    for rank in (0, 1):
        def make_batches(patches, settings, stage, device, _, first, last, rank=rank):
            return real(patches, settings, stage, device, rank, first, last)
        with monkeypatch.context() as context:
            context.setattr(train, "make_batches", make_batches)
            run("gan", "--out", f"rank{rank}", *TWO, steps=1)
        found.append(latest(tmp_path / f"rank{rank}")["training"])
    return found


def test_two_processes_learn_as_one_from_the_mean_of_their_gradients_and_one_can_resume(
        run, of_each_rank, photos, start, gan):
    """average_gradients, set_up_process, any_process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         ROOT / "train.py", "--data", photos, "--val", photos / "p0.png", "--stage", "gan", *SMALL,
         "--init", start, "--epochs", "1", "--steps-per-epoch", "1", *TWO],
        capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starting from") == 1               # only rank 0 prints
    found = latest(gan)["training"]
    for adam in ("generator_adam", "discriminator_adam"):
        for i, state in found[adam].items():
            a = of_each_rank[0][adam][i]["exp_avg"]
            b = of_each_rank[1][adam][i]["exp_avg"]
            difference = (a - b).abs().max()
            assert (state["exp_avg"] - (a + b) / 2).abs().max() <= 0.01 * difference
            assert difference > 0.05 * a.abs().max()
    run("gan", "--resume", epochs=2, steps=1)
    assert latest(gan)["step"] == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("stage", ["srresnet", "gan"])
def test_on_a_gpu_both_stages_train_alike_compiled_and_not(run, tmp_path, stage):
    """main, speed_up."""
    losses = []
    for mode in ("no", "auto"):
        run(stage, "--device", "cuda", *options(compile=mode), "--out", mode, epochs=2, steps=8)
        losses.append([float(row["loss"]) for row in rows(tmp_path / mode)])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    run(stage, "--device", "cuda", "--out", "auto", "--resume", epochs=3, steps=8)
    assert latest(tmp_path / "auto")["step"] == 24


@pytest.mark.parametrize("precision, allowed", [("bf16", True), ("fp32", False)])
def test_fp32_means_without_tf32(precision, allowed):
    """set_up_arithmetic."""
    assert train.set_up_arithmetic(CPU, precision) == precision
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert torch.backends.cuda.matmul.allow_tf32 == allowed


def test_signals_that_are_ignored_stay_so():
    """record_signals and srgan.handle_signals: under nohup, SIGHUP must not end the run."""
    code = """if True:
        import signal, srgan, train
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        seen = train.record_signals()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM], seen
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_best_scores_start_anew_if_other_images_are_validated_on(run, photos, tmp_path):
    """State.resume."""
    run("srresnet", "--lr", "1e-9", epochs=1)
    run("srresnet", "--lr", "1e-9", "--resume", epochs=2, val=photos / "p1.png")
    best = latest(tmp_path / "runs/srresnet")["best"]
    assert best["psnr"]["epoch"] == 2


def test_a_run_resumes_whose_table_had_other_columns(run, tmp_path):
    """write_rows: metrics.csv of a version with one metric more."""
    run("srresnet", epochs=1)
    path = tmp_path / "runs/srresnet/metrics.csv"
    head, row = path.read_text().splitlines()
    path.write_text(f"{head},mae\n{row},0.1\n")
    run("srresnet", "--resume", epochs=2)
    assert len(rows(tmp_path / "runs/srresnet")) == 2
