"""Settings: config.json, presets, --config, --set, flags, and what each of them changes."""
import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, kept_signals, same

import srgan
import train

FILE = json.loads((ROOT / "config.json").read_text())
PRESETS = FILE["presets"]
DEFAULTS = {name: default for name, (default, _) in train.flatten(FILE["settings"]).items()}
CPU = torch.device("cpu")


def resolve(*args, stage="gan", saved=None):
    args = train.parse_args(["--data", "x", "--stage", stage, *map(str, args)])
    return train.resolve_settings(args, saved)


def refuse(*args, words):
    """The settings are refused with one line that contains these words."""
    with pytest.raises(srgan.InputError) as error:
        resolve(*args)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def set_to(name, value):
    return ["--set", f"{name}={json.dumps(value)}"]


# Where settings come from

def test_without_arguments_settings_are_config_jsons_defaults():
    """resolve_settings, flatten."""
    assert resolve() == DEFAULTS
    assert resolve("--preset", "paper") == DEFAULTS


@pytest.fixture
def config(tmp_path):
    (tmp_path / "c.json").write_text('{"channels": 12, "n_blocks": 12, "gan": {"lr": 1}}')
    return "--config", tmp_path / "c.json"


SAVED = {"config": {"channels": 10, "n_blocks": 10, "batch_size": 10}}
SETS = ("--set", "channels=13", "--set", "gan.lr=2e-5")


@pytest.mark.parametrize("name, expected", [
    ("patch_size", DEFAULTS["patch_size"]), ("batch_size", 10), ("steps_per_epoch", 100),
    ("n_blocks", 12), ("channels", 13), ("gan.lr", 3e-5)])
def test_each_source_of_settings_changes_those_before_it(config, name, expected):
    """resolve_settings: defaults, a resumed run, a preset, --config, --set, flags."""
    settings = resolve("--preset", "quick", *config, *SETS, "--lr", "3e-5", saved=SAVED)
    assert settings[name] == expected


def test_a_preset_changes_the_settings_of_a_resumed_run():
    """resolve_settings: channels is 10 in the run and 32 in the preset."""
    assert resolve(saved=SAVED)["channels"] == 10
    assert resolve("--preset", "quick", saved=SAVED)["channels"] == 32


def test_a_runs_settings_are_a_config_file(tmp_path):
    """resolve_settings, change: what train.py writes, it reads."""
    settings = resolve("--preset", "nogrid", "--lr", 1e-5)
    srgan.write_json(tmp_path / "config.json", settings)
    assert resolve("--config", tmp_path / "config.json") == settings


@pytest.mark.parametrize("flag, value, name", [
    ("--epochs", 7, "gan.epochs"), ("--steps-per-epoch", 8, "steps_per_epoch"),
    ("--batch-size", 2, "batch_size"), ("--lr", 0.5, "gan.lr"), ("--seed", 5, "seed"),
    ("--precision", "bf16", "precision"), ("--feature-weights", "file.pth", "content_weights")])
def test_flags_are_short_for_settings(flag, value, name):
    """FLAGS: nothing else changes."""
    assert resolve(flag, value) == {**DEFAULTS, name: value}


@pytest.mark.parametrize("text, value", [
    ("3", 3), ("0.5", 0.5), ("true", True), ("[1, 2]", [1, 2]), ("gaussian", "gaussian"),
    ('"gaussian"', "gaussian"), ("weights/vgg19.pth", "weights/vgg19.pth")])
def test_a_value_is_json_or_a_word(text, value):
    """parse_value."""
    assert train.parse_value(text) == value


def test_groups_and_full_names_mean_the_same():
    """flatten, stage_settings."""
    flat = train.flatten({"seed": 1, "gan": {"lr": 2}, "srresnet.lr": 3})
    assert flat == {"seed": 1, "gan.lr": 2, "srresnet.lr": 3}
    assert train.stage_settings(flat, "gan") == {"lr": 2}


@pytest.mark.parametrize("text, words", [
    ("{", "not valid JSON"), ("[1]", "not a group of settings"), ('{"seed": NaN}', "seed must"),
    ('{"gan": {"sed": 1}}', "unknown setting gan.sed")])
def test_a_config_file_that_is_none_is_named(tmp_path, text, words):
    """read_json, change."""
    (tmp_path / "c.json").write_text(text)
    refuse("--config", tmp_path / "c.json", words=words)


# What is refused

@pytest.mark.parametrize("setting, words", [
    ("chanels=8", "did you mean channels?"), ("gan.lrr=1", "did you mean gan.lr?"),
    ("lr=1e-3", "unknown setting lr; did you mean srresnet.lr or gan.lr?"),
    ("gan=3", "unknown setting gan"), ("scale.x=3", "unknown setting scale.x"),
    ("novalue", "--set novalue: write NAME=VALUE")])
def test_a_misspelt_name_is_refused_with_those_that_are_near(setting, words):
    """change."""
    refuse("--set", setting, words=words)


def numbers(default):
    """The numbers of a default: one, those of a list, or none."""
    if type(default) is list:
        return default or [0]
    if type(default) in (int, float):
        return [default]
    return []


def with_number(default, number):
    """The default, with this number in it."""
    return [*default[:-1], number] if type(default) is list else number


def last_part(name):
    return name.split(".")[-1]


WRONG_TYPES = {int: [8.5, True, "8", None, [8]], float: ["x", True, None, [1.0]],
               str: [3, None, ["bicubic"]], list: [3, "x", None, [None], [[1]], ["x"]],
               bool: [1, "yes", None]}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_value_of_a_wrong_type_is_refused_by_name(name):
    """change, check_numbers, for each setting."""
    for value in WRONG_TYPES[type(DEFAULTS[name])]:
        refuse(*set_to(name, value), words=f"{name} must be")


@pytest.mark.parametrize("name", [name for name in DEFAULTS if last_part(name) in train.CHOICES])
def test_an_unknown_choice_is_refused_with_all_that_are_known(name):
    """CHOICES, PHI, change."""
    choices = ", ".join(map(str, train.CHOICES[last_part(name)]))
    unknown = "nonsense" if type(DEFAULTS[name]) is str else 3
    refuse(*set_to(name, unknown), words=f"{name} must be one of {choices}, not")


@pytest.mark.parametrize("name", [name for name in DEFAULTS if numbers(DEFAULTS[name])])
def test_no_number_may_be_negative(name):
    """check_numbers."""
    negative = with_number(DEFAULTS[name], -1)
    refuse(*set_to(name, negative), words=f"{name} must be")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_may_be_infinite_or_nan(value):
    """check_numbers."""
    refuse(*set_to("gan.tv_weight", value), words="gan.tv_weight must be 0 or above")


@pytest.mark.parametrize("name", [name for name in DEFAULTS if last_part(name) in train.POSITIVE])
def test_what_would_do_nothing_or_divide_by_0_must_be_above_0(name):
    """POSITIVE, check_numbers."""
    refuse(*set_to(name, with_number(DEFAULTS[name], 0)), words=f"{name} must be above 0, not 0")


@pytest.mark.parametrize("name", [name for name in DEFAULTS if last_part(name) in train.BELOW_1])
def test_a_moving_average_must_move(name):
    """BELOW_1, check_numbers."""
    refuse(*set_to(name, with_number(DEFAULTS[name], 1)), words=f"{name} must be below 1, not 1")


@pytest.mark.parametrize("setting, words", [
    ("patch_size=90", "patch_size must be a multiple of scale, 4"),
    ("discriminator.channels=[]", "discriminator.channels must be one or more whole numbers"),
    ("discriminator.channels=[8.5]", "discriminator.channels must be one or more whole numbers"),
    ("discriminator.first_kernel=4", "discriminator.first_kernel must be an odd number"),
    ("gan.betas=[0.9]", "gan.betas must be two numbers"),
    ("split=[80,15,6]", "split must be three percentages"), ("split=[100]", "split must be three"),
    ("gan.content_weight=0", "gan: the weights of all losses that compare SR with HR are 0")])
def test_settings_that_do_not_go_together_are_refused(setting, words):
    """resolve_settings."""
    refuse("--set", setting, words=words)


def test_total_variation_alone_is_no_content_loss():
    """resolve_settings: G would learn to draw nothing."""
    refuse("--set", "gan.content_weight=0", "--set", "gan.tv_weight=1", words="compare SR with HR")


# What is listed and what presets hold

def test_all_settings_and_presets_are_listed_with_their_defaults_and_meanings(script):
    """list_settings, main."""
    status, out, _ = script("train", "--list-settings")
    assert status == 0
    listed = {line.split()[0]: line for line in out.splitlines()}
    for name, (default, meaning) in train.flatten(FILE["settings"]).items():
        assert json.dumps(default) in listed[name]
        assert listed[name].endswith(meaning)
    for name, preset in PRESETS.items():
        assert f"--preset {name} " in out
        assert preset["about"] in out


PAPER = {
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
TABLE_1 = {
    "paper": {}, "srresnet-mse": {}, "srgan-vgg54": {},
    "srgan-vgg22": {"content_network": "vgg19:2_2"},
    "srgan-mse": {"gan.pixel_weight": 1, "gan.content_weight": 0},
    "srresnet-vgg22": {"content_network": "vgg19:2_2", "srresnet.pixel_weight": 0,
                       "srresnet.content_weight": 1, "srresnet.tv_weight": 2e-8}}


@pytest.mark.parametrize("preset", TABLE_1)
def test_the_base_and_the_presets_of_table_1_are_the_papers(preset):
    """config.json: Sec. 2.1, 3.2 and 3.4; 1e6 and 2e5 updates, 1,000 to an epoch."""
    settings = resolve("--preset", preset)
    for name, value in {**PAPER, **TABLE_1[preset]}.items():
        assert settings[name] == value, name


@pytest.mark.parametrize("stage", ["srresnet", "gan"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_both_stages(script, photos, start_of, preset, stage):
    """config.json, main: each loss with a weight has a value, the others none."""
    status, _, err = script(
        "train", "--data", photos, "--stage", stage, "--preset", preset, *TINY, *start_of(preset),
        "--set", "discriminator.channels=[8,8,16,16]", "--set", "validate_on=1",
        "--batch-size", 1, "--epochs", 1, "--steps-per-epoch", 2, "--device", "cpu")
    assert status == 0, err
    out = Path("runs", stage)
    state = srgan.load_checkpoint(out / "checkpoint_latest.pth")
    assert all(torch.isfinite(value).all() for value in state["generator"].values())
    with open(out / "metrics.csv", newline="") as file:
        row, = csv.DictReader(file)
    for name in srgan.CONTENT_LOSSES:
        assert (float(row[name]) > 0) == (state["config"][f"{stage}.{name}_weight"] > 0)


@pytest.fixture
def start_of(tmp_path):
    """start_of(preset): --init and a generator that fits the preset."""
    def call(preset):
        settings = resolve("--preset", preset, *TINY)
        generator = srgan.make_generator(settings["block"], channels=8, n_blocks=1,
                                         tanh=settings["tanh"])
        srgan.save_checkpoint(tmp_path / "preset.pth", generator)
        return "--init", tmp_path / "preset.pth"
    return call


# What each setting changes

BASE = [*TINY]
for name, value in {
        "precision": "fp32", "steps_per_epoch": 1, "srresnet.epochs": 3, "gan.epochs": 3,
        "content_network": "vgg19:1_1", "discriminator.channels": [8, 8, 16],
        "srresnet.content_weight": 1, "gan.pixel_weight": 1}.items():
    BASE += set_to(name, value)
CHANGES = {
    "scale": 2, "channels": 6, "n_blocks": 2, "block": "rrdb", "tanh": False, "init": "torch",
    "discriminator.channels": [8, 8, 8], "discriminator.first_kernel": 5,
    "discriminator.norm": "instance", "discriminator.pool": 2, "content_network": "vgg19:1_2",
    "content_divisor": 1.0, "patch_size": 40, "batch_size": 3, "kernel": "gaussian",
    "augment": "none", "crop_margin": 0.2, "steps_per_epoch": 2, "ema": 0.1, "precision": "bf16",
    "seed": 1, "epochs": 4, "lr": 1e-3, "betas": [0.5, 0.9], "schedule": "cosine",
    "milestones": [1], "warmup": 2, "pixel_loss": "l1", "pixel_weight": 2.0, "content_weight": 2.0,
    "tv_weight": 1e-3, "grid_weight": 1.0, "fourier_weight": 1.0, "discriminator_lr": 1e-3,
    "adversarial_loss": "wasserstein", "adversarial_weight": 0.1, "gradient_penalty": 1.0,
    "r1_penalty": 1.0, "discriminator_steps": 2, "shift": 3, "freeze_batch_norm": True}
ELSEWHERE = {  # what does not change the weights
    "content_weights": "test_networks.py", "store": "test_patches.py", "split": "test_train.py",
    "validate_on": "test_train.py", "validate_every": "test_train.py",
    "checkpoint_every": "test_train.py", "lpips": "test_train.py", "compile": "test_train.py"}


def outcome(photos, cache, stage, *changes):
    """What three updates make of all networks and of the moving average."""
    args = train.parse_args(["--data", "x", "--stage", stage, "--cache", str(cache), *BASE,
                             *changes])
    settings = train.resolve_settings(args)
    pairs = [(path.stem, path, None) for path in srgan.find_images(photos)]
    networks = train.make_networks(settings, stage, None, CPU)
    state = train.State(networks, train.stage_settings(settings, stage), CPU)
    tools = train.make_tools(settings, stage, state, CPU)
    patches = train.make_patches(args, settings, pairs)
    total = settings[f"{stage}.epochs"] * settings["steps_per_epoch"]
    batches = train.make_batches(patches, settings, stage, CPU, 0, 0, total)
    with kept_signals():
        train.train(tools, state, batches, None, settings, stage, CPU, 1)
    return [dict(state.average.state_dict()), state.training()]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def unchanged(photos, cache):
    """The outcome of both stages with the base settings."""
    return {stage: outcome(photos, cache, stage) for stage in ("srresnet", "gan")}


@pytest.mark.parametrize("stage", ["srresnet", "gan"])
def test_the_same_settings_give_the_same_result(photos, cache, unchanged, stage):
    """train.train, make_tools and what they call."""
    assert same(outcome(photos, cache, stage), unchanged[stage])


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name not in ELSEWHERE])
def test_every_setting_changes_the_result(photos, cache, unchanged, name):
    """config.json, and what reads it: make_networks, State, make_tools, make_batches, train."""
    stage = "srresnet" if name.startswith("srresnet.") else "gan"
    key = name.removeprefix("srresnet.").removeprefix("gan.")
    result = outcome(photos, cache, stage, *set_to(name, CHANGES[key]))
    assert not same(result, unchanged[stage])
