r"""Train SRResNet (stage 1), then SRGAN (stage 2).

    python train.py --data DIV2K_train_HR --val DIV2K_valid_HR --stage srresnet
    python train.py --data DIV2K_train_HR --val DIV2K_valid_HR --stage gan

Stage 2 starts from stage 1's best checkpoint. Ctrl-C or SIGTERM finishes the update, saves and
exits; --resume goes on from there, on the CPU bit for bit. All settings, and how to change one:

    python train.py --list-settings
    python train.py --data photos --stage gan --preset srgan-vgg22 --set gan.lr=5e-5

Four GPUs; two machines with eight each and one run folder (--batch-size counts for each GPU):

    torchrun --nproc-per-node 4 train.py --data ...
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        train.py --data ...

The update itself is srgan.Update. Here: settings, the run folder, setting up, and the loop.
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import difflib
import functools
import importlib.util
import json
import math
import os
import reprlib
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":                                       # Ctrl-C while torch is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from tqdm import tqdm

import srgan
from srgan import InputError

ROOT = Path(__file__).parent
LOSSES = ("loss", *srgan.CONTENT_LOSSES, "adversarial", "discriminator", "d_real", "d_fake")
COLUMNS = ("epoch", "update", "lr", *LOSSES,
           *(name + end for name in srgan.METRICS for end in ("", "_std")),
           "updates_per_s", "memory_mb")


# Settings: defaults and presets are in config.json, allowed values and meanings here.

def between(low, high):
    return lambda value: low <= value <= high, f"{low:g} to {high:g}"


def one_of(*choices):
    return lambda value: value in choices, ", ".join(map(str, choices))


def ascending(values):
    return all(type(n) is int and n > 0 for n in values) and values == sorted({*values})


def is_layer(value):
    name, _, layer = value.partition(":")
    return name in srgan.CONTENT_NETWORKS and layer in srgan.CONTENT_NETWORKS[name].layers


WEIGHT, YES_NO = between(0, 1e6), one_of(True, False)
SETTINGS = {  # the last part of a setting's name, or all of it: ((check, allowed values), meaning)
    "scale": (one_of(*srgan.SCALES), "how many times larger SR is than LR"),
    "channels": (between(3, 1024), "feature maps of the generator"),
    "n_blocks": (between(0, 256), "residual blocks of the generator"),
    "block": (one_of(*srgan.GENERATORS), "kind of residual block"),
    "tanh": (YES_NO, "Tanh after the generator's last convolution"),
    "init": (one_of(*srgan.INITS), "how the generator starts: as nearest neighbour, or at random"),
    "discriminator.channels": ((lambda v: 0 < len(v) <= 16 and all(
        type(n) is int and 0 < n <= 4096 for n in v), "1 to 16 numbers"), "its feature maps"),
    "first_kernel": (one_of(1, 3, 5, 7, 9, 11), "the discriminator's first kernel"),
    "norm": (one_of(*srgan.NORMS), "the discriminator's normalisation"),
    "pool": (between(0, 64), "pool to so many positions, so that all patch sizes fit; 0: do not"),
    "content_network": ((is_layer, "vgg19:1_1 to 5_4, squeezenet1_1:0 to 12"), "phi of Eq. 5"),
    "content_weights": ((len, "imagenet, random or a file"), "where phi's weights come from"),
    "content_divisor": (between(1e-6, 1e6), "divides phi's feature maps (Sec. 3.2)"),
    "patch_size": (between(32, 4096), "side of the HR patches, a multiple of scale"),
    "batch_size": (between(1, 65536), "patches per update and GPU"),
    "kernel": (one_of(*srgan.KERNELS), "how LR is made: Sec. 3.2 says bicubic, Sec. 2 gaussian"),
    "augment": (one_of(*srgan.SYMMETRIES), "mirror images, or all flips and rotations"),
    "crop_margin": (between(0, 0.49), "part of each side that patches keep from the border"),
    "store": (one_of("auto", "always", "never"), "decoded images on disk, or decoded each time"),
    "split": ((lambda v: len(v) == 3 and all(type(n) is int and n >= 0 for n in v)
               and sum(v) == 100 and v[0] * v[1] > 0, "three percentages"),
              "training, validation and test, where there is no --val"),
    "validate_on": (between(0, 1e9), "at most so many of them to validate on; 0: all"),
    "steps_per_epoch": (between(1, 1e9), "updates per epoch"),
    "epochs": (between(1, 1e9), "length of the stage"),
    "lr": (between(1e-12, 10), "learning rate"),
    "discriminator_lr": (between(0, 10), "the discriminator's; 0: the same"),
    "betas": ((lambda v: len(v) == 2 and all(type(b) in (int, float) and 0 <= b < 1 for b in v),
               "two numbers below 1"), "of Adam"),
    "schedule": (one_of("constant", "step", "cosine"), "of the learning rate"),
    "milestones": ((ascending, "epochs"), "step: a tenth of the rate after each"),
    "warmup": (between(0, 1e9), "updates in which the rate rises from 0"),
    "grow": ((lambda v: all(type(g) is list and len(g) == 2 and type(g[1]) is int and
                            32 <= g[1] <= 4096 for g in v) and ascending([g[0] for g in v]),
              "[[first epoch, patch size], ...]"), "larger patches later"),
    "pixel_loss": (one_of(*srgan.PIXEL_LOSSES), "Eq. 4, or L1 in its place"),
    **{f"{name}_weight": (WEIGHT, f"of the {name} loss") for name in srgan.CONTENT_LOSSES},
    "adversarial_loss": (one_of(*srgan.ADVERSARIAL_LOSSES), "Eq. 2 and 6 (bce), or another game"),
    "adversarial_weight": (between(1e-12, 1e6), "of Eq. 6 in Eq. 3"),
    **{name: (WEIGHT, "its weight in D's loss") for name in srgan.PENALTIES},
    "discriminator_steps": (between(1, 100), "steps of D to one of G"),
    "freeze_batch_norm": (YES_NO, "keep stage 1's batch-norm statistics in G"),
    "ema": (between(0, 0.999999), "decay of the moving average of G, which is the result; 0: none"),
    "validate_every": (between(1, 1e9), "epochs"),
    "checkpoint_every": (between(0, 1e9), "epochs from one checkpoint_epoch_XXXX.pth to the next"),
    "lpips": (YES_NO, "measure LPIPS, too, which downloads AlexNet"),
    "precision": (one_of("auto", "bf16", "fp32"), "auto: what this machine computes faster"),
    "compile": (one_of("auto", "yes", "no"), "torch.compile; auto: on CUDA"),
    "seed": (between(0, 2 ** 62), "of initialisation and patches"),
}
RETIRED = {"recoveries", "keep", "grid_weight", "spectrum_weight", "stationarity_weight", "shift"}


def change(config, changes, prefix=""):
    """Change settings of `config` in place. Raises InputError, naming the setting at fault."""
    if not isinstance(changes, dict):
        raise InputError(f"{prefix.rstrip('.') or 'the configuration'}: a group of settings")
    for key, value in changes.items():
        name, known = prefix + str(key)[:80], [*settings(config, prefix)]
        if key in RETIRED:
            srgan.say(f"{name} is no longer a setting; ignored")
        elif key not in config:
            near = [n for n in known if n.split(".")[-1] == key] or difflib.get_close_matches(
                name, known, 1)
            raise InputError(f"unknown setting {name}" + f"; did you mean {' or '.join(near)}?" *
                             bool(near))
        elif isinstance(config[key], dict):
            change(config[key], value, name + ".")
        else:
            kind, ((check, allowed), _) = type(config[key]), SETTINGS.get(name) or SETTINGS[key]
            if kind is float and type(value) is int and abs(value) < 2 ** 63:
                value = float(value)
            if type(value) is not kind or not check(value):      # NaN passes no check
                raise InputError(f"{name} must be {allowed}, not {reprlib.repr(value)}")
            config[key] = value


def settings(config, prefix=""):
    """{full name: value} of a configuration."""
    flat = {}
    for key, value in config.items():
        flat |= settings(value, f"{prefix}{key}.") if isinstance(value, dict) \
            else {prefix + key: value}
    return flat


def read_json(path):
    """The content of a JSON file. Raises InputError."""
    try:
        srgan.check_file(path)
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no JSON file ({srgan.one_line(error)})") from None


def resolve_config(args, saved=None):
    """The base of config.json, or a resumed run's settings; then preset, --config, --set, flags."""
    file = read_json(ROOT / "config.json")
    config = copy.deepcopy(file["base"])
    change(config, saved or {})
    if args.preset:
        if args.preset not in file["presets"]:
            raise InputError(f"no preset {args.preset!r}; there are {', '.join(file['presets'])}")
        preset = dict(file["presets"][args.preset])
        preset.pop("about")
        change(config, preset)
    if args.config:
        change(config, read_json(args.config))
    for item in args.set:
        name, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"--set {item}: write key=value")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text                                         # a word needs no quotes
        for part in reversed(name.split(".")):
            value = {part: value}
        change(config, value)
    for key in ("steps_per_epoch", "batch_size", "content_weights", "precision", "seed"):
        change(config, {key: getattr(args, key)} if getattr(args, key) is not None else {})
    for key in ("epochs", "lr"):
        if getattr(args, key) is not None:
            change(config, {args.stage: {key: getattr(args, key)}})
    check_together(config, args.stage)
    return config


def check_together(config, stage):
    """Raise InputError for settings that do not go together."""
    values = config[stage]
    for size in (config["patch_size"], *(size for _, size in values["grow"])):
        if size % config["scale"]:
            raise InputError(f"patch_size {size} is no multiple of scale {config['scale']}")
    if stage == "gan" and values["grow"] and not config["discriminator"]["pool"]:
        raise InputError("gan.grow needs discriminator.pool, or D's dense layer fits one size only")
    if not values["pixel_weight"] and not values["content_weight"]:
        raise InputError(f"{stage}.pixel_weight and {stage}.content_weight are both 0: nothing "
                         "ties SR to HR")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", metavar="DIR", help="folders of HR images to train on")
    add("--lr-data", metavar="DIR", help="their LR images, if they are not to be made from HR")
    add("--val", metavar="DIR", help="HR images to validate on (default: held out of --data)")
    add("--stage", choices=("srresnet", "gan"))
    add("--preset", metavar="NAME", help="one of config.json's presets")
    add("--list-settings", "--list-presets", action="store_true",
        help="print all presets and settings, and exit")
    add("--config", metavar="FILE", help="settings from a JSON file laid out as config.json's base")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    add("--epochs", type=int, help="of steps_per_epoch updates each")
    add("--steps-per-epoch", type=int, metavar="N")
    add("--batch-size", type=int, metavar="N", help="patches per update and GPU")
    add("--lr", type=float, help="learning rate")
    add("--feature-weights", "--vgg-weights", dest="content_weights", metavar="FILE",
        help="weights of the content network: imagenet (downloaded on first use), a file, random")
    add("--init", metavar="CKPT", help="generator to start from (stage gan: by default "
        "runs/srresnet/checkpoint_best_psnr.pth, else weights/srresnet.pth)")
    add("--resume", nargs="?", const=True, metavar="CKPT",
        help="go on from the run folder's checkpoint_latest.pth, or from CKPT")
    add("--out", metavar="DIR", help="run folder (default: runs/STAGE)")
    add("--cache", default="cache", metavar="DIR", help="where decoded images are kept")
    add("--device", default="auto")
    add("--precision", choices=("auto", "bf16", "fp32"))
    add("--seed", type=int)
    add("--wandb", action="store_true", help="log to Weights & Biases, too (pip install wandb)")
    args = parser.parse_args(argv)
    if not (args.list_settings or args.data and args.stage):
        parser.error("--data and --stage are required")
    if args.lr_data and len(args.data) > 1:
        parser.error("--lr-data goes with one --data folder")
    if "" in [*vars(args).values(), *(args.data or [])]:
        parser.error("an argument is empty")
    return args


def list_settings():
    """--list-settings: the presets, then each setting's default, meaning and allowed values."""
    file = read_json(ROOT / "config.json")
    for name, preset in file["presets"].items():
        print(f"--preset {name:20s} {preset['about']}")
    for name, default in settings(file["base"]).items():
        (_, allowed), meaning = SETTINGS.get(name) or SETTINGS[name.split(".")[-1]]
        print(f"{name:28s} {json.dumps(default):30s} {meaning}  [{allowed}]")


# The state of a training, and its run folder.

class State:
    """Networks, optimisers and counters: what a checkpoint holds and --resume restores."""

    def __init__(self, networks, values, device):
        self.networks, self.average = networks, copy.deepcopy(networks["generator"])
        self.average.eval().requires_grad_(False)                # the moving average: the result
        rates = values["lr"], values.get("discriminator_lr") or values["lr"]
        self.base_rates = dict(zip(networks, rates))
        self.rates = {name: torch.tensor(rate, device=device)    # tensors: a CUDA graph reads them
                      for name, rate in self.base_rates.items()}
        betas = tuple(map(float, values["betas"]))
        self.adam = {name: torch.optim.Adam(network.parameters(), self.rates[name], betas,
                                            fused=True, capturable=True)
                     for name, network in networks.items()}
        self.sums = {name: torch.zeros((), device=device) for name in LOSSES}
        self.step, self.seconds, self.best, self.baselines = 0, 0.0, {}, {}
        self.followed = srgan.float_state(self.average), srgan.float_state(networks["generator"])

    def set_rates(self, factor):
        for name, rate in self.rates.items():
            rate.fill_(self.base_rates[name] * factor)

    def record(self, losses, decay):
        """After an update: add up its losses, count it, let the average follow."""
        torch._foreach_add_([self.sums[name] for name in losses],
                            [loss.detach().float() for loss in losses.values()])
        self.step += 1
        srgan.ema_(*self.followed, min(decay, (1 + self.step) / (10 + self.step)))

    def mean_losses(self, n):
        """{name: mean over n updates}; the sums begin anew."""
        means = {name: total.item() / n for name, total in self.sums.items()}
        torch._foreach_zero_([*self.sums.values()])
        return means

    def is_finite(self):
        tensors = [*self.sums.values()]
        for network in self.networks.values():
            tensors += srgan.float_state(network)
        return bool(torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all())

    def training(self):
        """What only a resumed run needs: {name: state}."""
        return {"sums": self.sums,
                **{name: network.state_dict() for name, network in self.networks.items()},
                **{f"{name}_adam": adam.state_dict()["state"] for name, adam in self.adam.items()}}

    @torch.no_grad()
    def restore(self, saved):
        """Take over a checkpoint. Raises InputError where it has another structure than this."""
        training, like = dict(saved["training"]), self.training()
        for name, network in self.networks.items():
            if f"{name}_optimizer" in training:                  # of an older version
                training[f"{name}_adam"] = training.pop(f"{name}_optimizer")["state"]
                training["sums"] = self.sums
            if saved["step"]:
                like[f"{name}_adam"] = {i: {"step": self.rates[name], "exp_avg": p, "exp_avg_sq": p}
                                        for i, p in enumerate(network.parameters())}
        srgan.check_like(training, like, "training")
        srgan.check_like(saved["generator"], self.average.state_dict(), "generator")
        for name, best in saved["best"].items():                 # PSNR may be infinite
            self.best[name] = {"mean": float(best["mean"]), "std": float(best["std"]),
                               "epoch": int(best["epoch"])}
        self.step, self.seconds = saved["step"], float(saved["seconds"])
        self.average.load_state_dict(saved["generator"])
        for name, network in self.networks.items():
            network.load_state_dict(training[name])
            adam = self.adam[name]
            moments = {i: {key: torch.empty_like(fresh).copy_(training[f"{name}_adam"][i][key])
                           for key, fresh in entry.items()}      # fused Adam reads memory flat
                       for i, entry in like[f"{name}_adam"].items()}
            adam.load_state_dict({**adam.state_dict(), "state": moments})
            adam.param_groups[0]["lr"] = self.rates[name]        # the tensor, not a copy of it
        for name, total in self.sums.items():
            total.copy_(training["sums"][name])


class RunFolder:
    """config.json, metrics.csv, summary.json, curves.png, samples/ and the checkpoints of a run."""

    def __init__(self, path, args, config, state, pairs, device):
        self.path, self.stage, self.config, self.state = path, args.stage, config, state
        self.pairs, self.tracker = pairs, None
        self.about = {"data": args.data, "val": args.val or "", "device": str(device),
                      "precision": config["precision"], "torch": torch.__version__}
        self.metrics = srgan.usable_metrics(config["lpips"], device)
        (path / "samples").mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read_rows(path / "metrics.csv")
                     if int(row["update"]) <= state.step]        # what came later is done again
        srgan.write_json(path / "config.json", config)
        if not is_installed("matplotlib"):
            srgan.say("matplotlib is not installed; going on without curves.png")
        if args.wandb:
            import wandb
            self.tracker = wandb.init(project="srgan", name=path.name, dir=path, config=config)

    def measure_baselines(self, start, saved):
        """Bicubic upscaling, and the network that the stage started from."""
        baselines = self.state.baselines
        baselines["bicubic"] = validate(None, self.pairs, self.config, self.metrics)
        if start:
            baselines["start"] = validate(start, self.pairs, self.config, self.metrics)
        with contextlib.suppress(InputError, KeyError, TypeError):  # of a run that was resumed
            srgan.check_like(saved["baselines"]["start"], baselines["bicubic"], "start")
            baselines["start"] = saved["baselines"]["start"]

    def save(self, name, **more):
        """Write a checkpoint of the average."""
        state = self.state
        srgan.save_checkpoint(self.path / name, state.average, stage=self.stage, step=state.step,
                              best=state.best, seconds=state.seconds, config=self.config,
                              baselines=state.baselines, val=self.about["val"], **more)

    def save_latest(self):
        self.save("checkpoint_latest.pth", training=self.state.training())

    def end_epoch(self, row, bar, last):
        """Validate, log and save."""
        epoch, every = row["epoch"], self.config["checkpoint_every"]
        if last or epoch % self.config["validate_every"] == 0:
            metrics = validate(self.state.average, self.pairs, self.config, self.metrics,
                               self.path / f"samples/epoch_{epoch:04d}.png")
            bar.write(f"epoch {epoch}  loss {row['loss']:.4f}  {srgan.describe(metrics)}  "
                      f"{row['updates_per_s']:.1f} updates/s")
            for name in self.metrics:
                row |= {name: metrics[name]["mean"], f"{name}_std": metrics[name]["std"]}
                self.keep_best(name, {**metrics[name], "epoch": epoch})
        self.log(row)
        if every and epoch % every == 0:
            self.save(f"checkpoint_epoch_{epoch:04d}.pth")
        self.save_latest()

    def keep_best(self, name, value):
        """Save checkpoint_best_<metric>.pth where this metric is the best so far."""
        best = self.state.best.get(name)
        sign = 1 if srgan.METRICS[name].higher_is_better else -1
        if best is None or sign * value["mean"] > sign * best["mean"]:
            self.state.best[name] = value
            self.save(f"checkpoint_best_{name}.pth")

    def log(self, row):
        """metrics.csv, summary.json, curves.png and Weights & Biases."""
        self.rows.append(row)
        with srgan.replacing(self.path / "metrics.csv") as temporary, \
                open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        state = self.state
        srgan.write_json(self.path / "summary.json", {
            "stage": self.stage, "epoch": row["epoch"], "update": state.step, "best": state.best,
            **state.baselines, "seconds": state.seconds, "memory_mb": row["memory_mb"],
            "generator_parameters": sum(p.numel() for p in state.average.parameters()),
            **self.about})
        if is_installed("matplotlib"):
            draw_curves(self.rows, state.baselines, self.path / "curves.png")
        if self.tracker:
            self.tracker.log(row, step=state.step)

    def close(self, total):
        """After the last update, or a signal."""
        if self.state.step < total:
            self.save_latest()
            print(f"stopped after update {self.state.step} of {total}; go on with --resume")
        else:
            print(f"done; the results are in {self.path}")
        if self.tracker:
            self.tracker.finish()


def read_rows(path):
    """The rows of a metrics.csv, none where there is no file. Raises InputError."""
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            int(row["update"]), [float(row[name]) for name in row if row[name]]
        return rows
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not as train.py writes it ({srgan.one_line(error)}); move it "
                         "away to start a new one") from None


def is_installed(package):
    return importlib.util.find_spec(package) is not None


def draw_curves(rows, baselines, path):
    """Losses and metrics over the updates; baselines ("bicubic", "start") as dashed lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    panels = {"what G minimises": ("loss", *srgan.CONTENT_LOSSES),
              "the game": ("adversarial", "discriminator"), "D's mean logits": ("d_real", "d_fake"),
              **{metric.title: (name,) for name, metric in srgan.METRICS.items()}}
    panels = {title: names for title, names in panels.items()
              if any(float(row.get(name) or 0) for row in rows for name in names)}
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for i, (title, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), i, title=title, xlabel="update")
        for name in names:
            points = [(int(row["update"]), float(row[name])) for row in rows if row.get(name)]
            if any(value for _, value in points):
                axes.plot(*zip(*points), marker=".", label=name)
            for style, (baseline, metrics) in zip((":", "--"), baselines.items()):
                if metrics.get(name):
                    axes.axhline(metrics[name]["mean"], linestyle=style, label=baseline)
        axes.legend()
    with srgan.replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


# Setting up: processes, images, networks, losses.

def set_up_process(name):
    """(device, rank, number of processes, processes on this machine); torchrun starts several."""
    try:
        world, rank, local, on_machine = (int(os.environ.get(key, default)) for key, default in (
            ("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    except ValueError as error:
        raise InputError(f"what torchrun sets, WORLD_SIZE and so on: {error}") from None
    gpus = torch.cuda.device_count() if name in ("auto", "cuda") or name.startswith("cuda:") else 0
    if world > 1 and (name.startswith("cuda:") or gpus and local >= gpus):
        raise InputError(f"torchrun gives each process its own GPU, of {gpus}; write --device cuda "
                         f"and at most --nproc-per-node {gpus}")
    if gpus and not name.startswith("cuda:"):
        name = f"cuda:{local}"
    if gpus:
        with contextlib.suppress(RuntimeError):                  # pick_device says what is wrong
            torch.cuda.set_device(name)                          # so that no other GPU is opened
    device = srgan.pick_device(name)
    if world > 1:                                                # hours: rank 0 validates
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=12))
    return device, rank, world, on_machine


def set_up_arithmetic(device, config):
    """Settle the precision, say TF32 or not, and let glibc keep freed memory (CPU: 1.1x)."""
    config["precision"] = srgan.pick_precision(device, config["precision"])
    srgan.allow_tf32(config["precision"] != "fp32")
    torch.backends.cudnn.benchmark = True
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2 ** 31 - 1)                            # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2 ** 25)                                # M_MMAP_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass                                                     # another C library


def open_run(args):
    """(run folder, checkpoint to resume or None). Raises InputError where they do not fit."""
    out = Path(args.out or f"runs/{args.stage}")
    latest = out / "checkpoint_latest.pth"
    if not args.resume:
        if latest.exists():
            raise InputError(f"{out} holds a run; go on with --resume, or name another --out")
        return out, None
    if args.init:
        raise InputError("--resume goes on with the run's own generator; leave --init out")
    path = latest if args.resume is True else Path(args.resume)
    saved = srgan.load_checkpoint(path)
    if not {"stage", "training", "step", "seconds", "best", "generator", "config"} <= saved.keys():
        raise InputError(f"{path}: only a checkpoint_latest.pth can be resumed; the others hold "
                         "the generator alone, start from one with --init")
    if latest.exists() and not os.path.samefile(path, latest):
        raise InputError(f"{out} holds another run; name another folder with --out")
    if saved["stage"] != args.stage or type(saved["step"]) is not int or saved["step"] < 0:
        raise InputError(f"{path}: no checkpoint of stage {args.stage}")
    return out, saved


def find_data(args, config):
    """[(name, HR path, LR path or None)] to train on, and to validate on."""
    scale, kernel = config["scale"], config["kernel"]
    if args.lr_data:
        pairs = srgan.find_pairs(args.data[0], args.lr_data, scale, kernel)
    else:
        paths = {path for folder in args.data for path in srgan.find_hr(folder)}
        pairs = [(path.stem, path, None) for path in sorted(paths)]
    if args.val:
        return pairs, srgan.find_pairs(args.val, scale=scale, kernel=kernel)
    parts = srgan.split([hr for _, hr, _ in pairs], config["split"], config["validate_on"])
    if not parts["train"]:
        raise InputError("one image is too few to train on and to hold one out; give more, or "
                         "--val")
    return [[pair for pair in pairs if pair[1] in set(parts[part])] for part in ("train", "val")]


def find_start(args, config):
    """(path, generator) of --init or, in stage 2, of stage 1; (None, None) where G starts anew."""
    stage_1 = Path("runs/srresnet/checkpoint_best_psnr.pth"), ROOT / "weights/srresnet.pth"
    paths = [args.init] if args.init else [p for p in stage_1 if p.exists()] * (args.stage == "gan")
    if not paths and args.stage == "gan":
        raise InputError("stage gan starts from an SRResNet: train one, or name one with --init")
    if not paths:
        return None, None
    generator = srgan.load_generator(paths[0])
    for key, value in generator.arch.items():
        if config[key] != value:
            raise InputError(f"{paths[0]} holds a generator with {key} {value}, the settings say "
                             f"{config[key]}; name one that fits with --init")
    return paths[0], generator


def make_networks(args, config, start, device):
    """{"generator": G, "discriminator": D in stage 2}, in training mode on the device."""
    torch.manual_seed(config["seed"])
    generator = srgan.make_generator(config["block"], scale=config["scale"], tanh=config["tanh"],
                                     channels=config["channels"], n_blocks=config["n_blocks"],
                                     init=config["init"])
    if start:
        generator.load_state_dict(start.state_dict())
    networks = {"generator": generator}
    if args.stage == "gan":
        networks["discriminator"] = srgan.Discriminator(config["patch_size"],
                                                        **config["discriminator"])
    for network in networks.values():
        network.to(device, memory_format=torch.channels_last).train()
    if config[args.stage].get("freeze_batch_norm"):
        for module in generator.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    return networks


def make_update(config, stage, state, device, world=1):
    """srgan.Update with the networks in their fast form, and the losses that the settings name."""
    values, precision = config[stage], config["precision"]
    compiled = config["compile"] == "yes" or (
        config["compile"] == "auto" and device.type == "cuda" and is_installed("triton"))

    def fast(network):
        network = srgan.Fast(network, precision)
        return torch.compile(network) if compiled else network

    use = SimpleNamespace(pixel_loss=values["pixel_loss"], scale=config["scale"], phi=None)
    if values["content_weight"]:
        name, _, layer = config["content_network"].partition(":")
        phi = srgan.CONTENT_NETWORKS[name](layer, config["content_weights"],
                                           config["content_divisor"])
        use.phi = fast(phi.to(device, memory_format=torch.channels_last))
    losses = {name: (values[f"{name}_weight"], functools.partial(loss, use=use))
              for name, loss in srgan.CONTENT_LOSSES.items() if values.get(f"{name}_weight")}
    networks, adam = state.networks, state.adam
    if world > 1:
        for optimizer in adam.values():
            optimizer.register_step_pre_hook(average_gradients)
    if stage == "srresnet":
        return srgan.Update(fast(networks["generator"]), adam["generator"], losses)
    plain = srgan.Fast(networks["discriminator"], precision)     # penalties differentiate twice
    penalties = {name: (values[name], functools.partial(penalty, plain))
                 for name, penalty in srgan.PENALTIES.items() if values[name]}
    update = srgan.Update(fast(networks["generator"]), adam["generator"], losses,
                          fast(networks["discriminator"]), adam["discriminator"],
                          values["adversarial_weight"],
                          *srgan.ADVERSARIAL_LOSSES[values["adversarial_loss"]], penalties)
    if values["discriminator_steps"] > 1:
        update = srgan.CriticSteps(update)
    if device.type == "cuda" and world == 1 and config["compile"] != "no" and not penalties:
        update = srgan.Graphed(update, device)
    return update


def make_patches(args, config, images, device, rank, per_machine):
    """srgan.Patches of the training images."""
    hr, lr = (srgan.Store(paths, args.cache, config["store"]) if paths[0] else None
              for paths in list(zip(*images))[1:])
    return srgan.Patches(hr, config["patch_size"], config["scale"], config["kernel"],
                         config["augment"], config["crop_margin"], lr, device, config["seed"], rank,
                         max(1, os.cpu_count() // per_machine))


def average_gradients(optimizer, *_):
    """Before a step: the mean of the gradients of all processes, as of one large batch."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.div_(dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


# Training.

def learning_rate(stage, step, steps_per_epoch):
    """The rate of update `step`, counted from 0, as a part of the base rate."""
    factor = min(1, (step + 1) / stage["warmup"]) if stage["warmup"] else 1
    if stage["schedule"] == "step":
        factor *= 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in stage["milestones"])
    elif stage["schedule"] == "cosine":
        factor *= 0.5 + 0.5 * math.cos(math.pi * step / (stage["epochs"] * steps_per_epoch))
    return factor


def batches(patches, config, stage, first, last):
    """(LR, HR), once for each step of D, for updates first to last - 1; patches grow with time."""
    steps, values = config["steps_per_epoch"], config[stage]
    d_steps = values.get("discriminator_steps", 1)
    sizes = [(0, config["patch_size"])] + [((epoch - 1) * steps, size)
                                           for epoch, size in values["grow"]]
    for (begin, size), (end, _) in zip(sizes, [*sizes[1:], (last, None)]):
        begin, end = max(begin, first), min(end, last)
        if begin < end:
            patches.resize(size)
            pairs = patches.batches(config["batch_size"], begin * d_steps, end * d_steps)
            yield from (sum(several, ()) for several in zip(*[pairs] * d_steps))


def validate(generator, pairs, config, metrics, sheet=None):
    """Mean and standard deviation of the metrics; generator None measures bicubic.

    An image that cannot be measured is taken out of `pairs`, with a line on stderr. sheet: a file
    for bicubic, SR and HR of the first three images' centres. Raises InputError.
    """
    scale, scores, strips = config["scale"], [], []
    for pair in list(pairs):
        name, hr_path, lr_path = pair
        try:
            lr, hr = srgan.open_pair(hr_path, lr_path, scale, config["kernel"])
            bicubic = srgan.upsample(lr, scale)
            sr = srgan.upscale(generator, lr) if generator else bicubic
            scores.append(srgan.measure(sr, hr, metrics, scale))
        except InputError as error:
            srgan.say(f"left out of the validation, {name}: {error}")
            pairs.remove(pair)
            continue
        if sheet and len(strips) < 3:
            side = min(240, *hr.shape[:2])
            top, left = ((n - side) // 2 for n in hr.shape[:2])
            views = [image[top:top + side, left:left + side] for image in (bicubic, sr, hr)]
            strips.append(srgan.side_by_side(
                views, ["bicubic", f"SR, {scores[-1]['psnr']:.2f} dB", "HR"]))
    if not scores:
        raise InputError("no image is left to validate on")
    if sheet:
        width, tops = max(s.width for s in strips), np.cumsum([0, *(s.height for s in strips)])
        whole = Image.new("RGB", (width, int(tops[-1])), "white")
        for strip, top in zip(strips, tops):
            whole.paste(strip, (0, int(top)))
        with srgan.replacing(sheet) as temporary:
            whole.save(temporary)
    return srgan.aggregate(scores)


def memory_mb(device):
    """Peak of the GPU memory that tensors took, or of this process's resident memory, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:                                          # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def note_signals():
    """A list that SIGINT, SIGTERM and SIGHUP add to; a second one ends the program at once."""
    seen = []

    def note(number, _):
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, *srgan.STOP_SIGNALS):
        signal.signal(number, note)
    return seen


def agree(flag, world, device):
    """Whether the flag is set in any process."""
    if world == 1:
        return flag
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return total.item() > 0


def train(state, update, data, run, config, stage, world, device):
    """The loop. Ends after the last update, or after the one in which a signal came."""
    values, steps = config[stage], config["steps_per_epoch"]
    total, signals, stop = values["epochs"] * steps, note_signals(), False
    began, epoch_began, first = time.monotonic() - state.seconds, time.monotonic(), state.step
    bar = tqdm(total=total, initial=state.step, unit="update", smoothing=0.1, disable=run is None,
               mininterval=0.5 if sys.stderr.isatty() else 30)
    while state.step < total and not stop:
        rate = learning_rate(values, state.step, steps)
        state.set_rates(rate)
        torch.manual_seed(config["seed"] + state.step)           # gradient_penalty draws numbers
        losses = update(*next(data))
        state.record(losses, config["ema"])
        state.seconds = time.monotonic() - began
        bar.update()
        end_of_epoch = state.step % steps == 0
        if end_of_epoch or state.step % 10 == 0 or world == 1 and signals:  # waits for the GPU
            bar.set_postfix(loss=f"{losses['loss'].item():.4f}", refresh=False)
            if agree(not state.is_finite(), world, device):
                raise InputError(f"a loss or a weight is not finite at update {state.step}; the "
                                 "last good state is kept: --resume with a lower --lr")
            stop = agree(bool(signals), world, device)
        if end_of_epoch:
            row = {"epoch": state.step // steps, "update": state.step, "lr": values["lr"] * rate,
                   **state.mean_losses(steps), "memory_mb": memory_mb(device),
                   "updates_per_s": (state.step - first) / (time.monotonic() - epoch_began)}
            if run:
                run.end_epoch(row, bar, last=state.step == total)
            first, epoch_began = state.step, time.monotonic()
    bar.close()


def main():
    args = parse_args()
    if args.list_settings:
        return list_settings()
    if args.wandb and not is_installed("wandb"):
        raise InputError("--wandb needs a package that is not installed: pip install wandb")
    out, saved = open_run(args)
    config, stage = resolve_config(args, saved and saved["config"]), args.stage
    total = config[stage]["epochs"] * config["steps_per_epoch"]
    if saved and saved["step"] >= total:
        raise InputError(f"the run is complete at update {saved['step']}; more with --epochs")
    images, pairs = find_data(args, config)
    start_path, start = (None, None) if saved else find_start(args, config)
    device, rank, world, on_machine = set_up_process(args.device)
    set_up_arithmetic(device, config)
    state = State(make_networks(args, config, start, device), config[stage], device)
    if saved:
        try:
            state.restore(saved)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            raise InputError(f"this checkpoint cannot be resumed: {srgan.one_line(e)}") from None
    update = make_update(config, stage, state, device, world)
    patches = make_patches(args, config, images, device, rank, on_machine)
    run = None
    if rank == 0:                                                # it validates, logs and saves
        run = RunFolder(out, args, config, state, pairs, device)
        run.measure_baselines(start, saved)
        if start:
            print(f"starting from {start_path}")
        bicubic = srgan.describe(state.baselines["bicubic"])
        print(f"{stage} on {device}, {config['precision']}: {len(images)} images, {len(pairs)} to "
              f"validate on (bicubic {bicubic}), updates {state.step} to {total}, into {out}",
              flush=True)
        run.save_latest()                                        # there is always one to resume
    data = batches(patches, config, stage, state.step, total)
    train(state, update, data, run, config, stage, world, device)
    if run:
        run.close(total)
    if world > 1:
        dist.barrier()                                           # until rank 0 has saved
        dist.destroy_process_group()


if __name__ == "__main__":
    srgan.run(main)
