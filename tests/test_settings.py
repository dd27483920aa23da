"""Settings: config.json, presets, --config, --set, flags, and what each of them may be."""
import csv
import json

import pytest
import torch
from conftest import ROOT, TINY

import srgan
import train

FILE = json.loads((ROOT / "config.json").read_text())
BASE, PRESETS = FILE["base"], FILE["presets"]
FLAT = train.settings(BASE)


def resolve(*args, stage="gan", saved=None):
    args = train.parse_args(["--data", "x", "--stage", stage, *map(str, args)])
    return train.resolve_config(args, saved)


def test_settings_come_from_the_base_a_preset_a_file_set_and_flags_in_this_order(tmp_path):
    def found(*args, saved=None):
        config = train.settings(resolve(*args, saved=saved))
        return [config[name] for name in ("channels", "n_blocks", "kernel", "gan.lr")]
    assert resolve() == BASE == resolve("--preset", "paper")
    (tmp_path / "c.json").write_text('{"channels": 12, "gan": {"lr": 1}}')
    file = ("--config", tmp_path / "c.json")
    assert found("--preset", "quick", *file) == [12, 4, "bicubic", 1.0]
    more = (*file, "--set", "channels=13", "--set", "kernel=gaussian", "--set", "gan.lr=2e-5")
    assert found(*more) == [13, 16, "gaussian", 2e-5]
    assert found(*more, "--lr", "3e-5") == [13, 16, "gaussian", 3e-5]
    assert found(*file, saved={"channels": 24, "n_blocks": 3}) == [12, 3, "bicubic", 1.0]  # resumed
    config = resolve("--lr", 1, "--epochs", 7, "--batch-size", 2, "--seed", 5, "--vgg-weights", "a")
    assert (config["gan"]["epochs"], config["batch_size"], config["seed"],
            config["content_weights"]) == (7, 2, 5, "a") and config["srresnet"] == BASE["srresnet"]
    for text, words in ("{", "JSON"), ("[1]", "group of settings"), ('{"seed": NaN}', "seed must"):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(srgan.InputError, match=words):
            resolve(*file)


WRONG = [None, "", "nonsense", [], {}, [None], [[]], [["x", "y"]], True, -1, -0.5, 10 ** 30, 1e300,
         float("nan"), float("inf")]


@pytest.mark.parametrize("name", FLAT)
def test_every_setting_refuses_impossible_values_and_names_itself(name):
    refused, kind = 0, type(FLAT[name])
    for value in WRONG:
        try:
            found = train.settings(resolve("--set", f"{name}={json.dumps(value)}"))[name]
            assert type(found) is kind and found == value
        except srgan.InputError as error:
            assert name.split(".")[-1] in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= len(WRONG) - (kind in (list, bool) or name == "content_weights")


@pytest.mark.parametrize("setting, words", [
    ("chanels=8", "did you mean channels?"), ("gan.lrr=1", "did you mean gan.lr?"),
    ("lr=1e-3", "unknown setting lr; did you mean srresnet.lr or gan.lr?"),
    ("channels=wide", "channels must be 3 to 1024"), ("channels=8.5", "channels"),
    ("gan=3", "gan"), ("scale.x=3", "scale"), ("novalue", "key=value"), ("patch_size=90", "scale"),
    ('gan.betas=[0.9,"x"]', "gan.betas"), ("gan.milestones=[0]", "gan.milestones"),
    ("kernel=lanczos", "bicubic, gaussian"), ("content_network=vgg19:9_9", "5_4"),
    ("split=[80,15,6]", "split"), ("gan.content_weight=0", "compare SR with HR"),
    ("gan.grow=[[2]]", "gan.grow"), ("gan.grow=[[3,64],[2,96]]", "gan.grow"),
    ("gan.grow=[[2,128]]", "discriminator.pool")])
def test_impossible_settings_are_refused_with_what_would_be_possible(setting, words):
    with pytest.raises(srgan.InputError) as error:
        resolve("--set", setting)
    assert words in str(error.value)


def test_all_settings_and_presets_are_listed_with_their_defaults_and_meanings(script):
    status, out, _ = script("train", "--list-settings")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0 and list(FLAT) == [name for name in lines if name != "--preset"]
    for name, default in FLAT.items():
        assert f" {json.dumps(default)} " in lines[name] and lines[name].endswith("]")
    assert "bicubic, gaussian" in lines["kernel"] and "0 to 1e+06" in lines["gan.tv_weight"]
    assert all(f"{name} " in out and preset["about"] in out for name, preset in PRESETS.items())


def test_the_base_and_the_presets_of_table_1_are_the_papers():
    """Ledig et al. 2017, Sec. 2.1, 3.2 and 3.4; 1e6 and 2e5 updates, 1,000 to an epoch."""
    paper = {
        "scale": 4, "channels": 64, "n_blocks": 16, "block": "residual", "patch_size": 96,
        "batch_size": 16, "kernel": "bicubic", "steps_per_epoch": 1000, "content_divisor": 12.75,
        "discriminator.channels": [64, 64, 128, 128, 256, 256, 512, 512],
        "discriminator.first_kernel": 3, "discriminator.norm": "batch", "discriminator.pool": 0,
        "content_network": "vgg19:5_4", "srresnet.epochs": 1000, "srresnet.lr": 1e-4,
        "srresnet.betas": [0.9, 0.999], "srresnet.milestones": [], "srresnet.pixel_loss": "mse",
        "srresnet.content_weight": 0, "gan.epochs": 200, "gan.lr": 1e-4, "gan.milestones": [100],
        "gan.schedule": "step", "gan.discriminator_lr": 0, "gan.betas": [0.9, 0.999],
        "gan.adversarial_loss": "bce", "gan.adversarial_weight": 1e-3, "gan.pixel_weight": 0,
        "gan.content_weight": 1, "gan.discriminator_steps": 1}
    vgg22 = {"content_network": "vgg19:2_2"}
    for preset, changes in {
            "paper": {}, "srresnet-mse": {}, "srgan-vgg54": {}, "srgan-vgg22": vgg22,
            "srgan-mse": {"gan.pixel_weight": 1, "gan.content_weight": 0},
            "srresnet-vgg22": vgg22 | {"srresnet.pixel_weight": 0, "srresnet.content_weight": 1,
                                       "srresnet.tv_weight": 2e-8}}.items():
        expected, found = paper | changes, train.settings(resolve("--preset", preset))
        assert {name: found[name] for name in expected} == expected, preset


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_both_stages(script, photos, tmp_path, preset):
    for stage in ("srresnet", "gan"):
        grow = () if preset != "progressive" else ("--set", f"{stage}.grow=[[1,64]]")
        status, _, err = script(
            "train", "--data", photos, "--stage", stage, "--preset", preset, *TINY, *grow,
            "--set", "discriminator.channels=[8,8,16,16]", "--set", "validate_on=1",
            "--batch-size", 1, "--epochs", 1, "--steps-per-epoch", 2, "--device", "cpu")
        assert status == 0, err
        state = srgan.load_checkpoint(tmp_path / "runs" / stage / "checkpoint_latest.pth")
        row, = csv.DictReader(open(tmp_path / "runs" / stage / "metrics.csv"))
        assert state["step"] == 2 and float(row["loss"]) != 0
        assert all(torch.isfinite(value).all() for value in state["generator"].values())
        for name in srgan.CONTENT_LOSSES:
            assert (float(row[name]) > 0) == (state["config"][stage][f"{name}_weight"] > 0)
