r"""Train SRResNet (stage 1), then SRGAN (stage 2).

    python train.py --data DIV2K_train_HR --val DIV2K_valid_HR --stage srresnet
    python train.py --data DIV2K_train_HR --val DIV2K_valid_HR --stage gan

Stage 2 starts from stage 1's best checkpoint. Ctrl-C or SIGTERM ends a run after the current
update (with several processes, after at most ten more) and saves it; --resume continues it, on the
CPU bit for bit. To list or change settings, and to train on four GPUs, or on two machines with
eight each:

    python train.py --list-settings
    python train.py --data photos --stage gan --preset srgan-vgg22 --set gan.lr=5e-5
    torchrun --nproc-per-node 4 train.py --data ...
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        train.py --data ...

--batch-size is per GPU; all machines must see one run folder. The update itself is srgan.Update.
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import functools
import json
import math
import os
import signal
import time
from datetime import timedelta
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":                                       # Ctrl-C while torch loads
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import torch
import torch.distributed as dist
from tqdm import tqdm

import evaluate
import srgan
from srgan import InputError

ROOT = Path(__file__).parent
LOSSES = ("loss", *srgan.CONTENT_LOSSES, "adversarial", "discriminator", "d_real", "d_fake")
SCORES = [name + end for name in srgan.METRICS for end in ("", "_std")]
COLUMNS = ("epoch", "update", "lr", *LOSSES, *SCORES, "updates_per_s", "memory_mb")


# Settings. Their defaults and presets are in config.json, their allowed values and meanings here.

# A kind of setting: (check, allowed values).

def between(low, high):
    return (lambda value: low <= value <= high), f"{low:g} to {high:g}"


def one_of(*choices):
    return (lambda value: value in choices), ", ".join(map(str, choices))


def ints(values, low=1, high=1e9):
    return all(type(n) is int and low <= n <= high for n in values)


PHI = [f"{name}:{i}" for name, network in srgan.CONTENT_NETWORKS.items() for i in network.layers]
WEIGHT, COUNT, YES_NO = between(0, 1e6), between(0, 1e9), (lambda value: True, "true or false")
SETTINGS = {  # full name of a setting, or its last part: ((check, allowed values), meaning)
    "scale": (one_of(*srgan.SCALES), "how many times larger SR is than LR"),
    "channels": (between(3, 1024), "feature maps of the generator"),
    "n_blocks": (between(0, 256), "residual blocks of the generator"),
    "block": (one_of(*srgan.GENERATORS), "kind of residual block"),
    "tanh": (YES_NO, "Tanh after the generator's last convolution"),
    "init": (one_of(*srgan.INITS), "G starts as nearest-neighbour upsampling, or at random"),
    "discriminator.channels": ((lambda v: v and ints(v, 1, 4096), "a list of numbers"),
                               "feature maps of each convolution of the discriminator"),
    "first_kernel": (one_of(1, 3, 5, 7, 9, 11), "kernel size of D's first convolution"),
    "norm": (one_of(*srgan.NORMS), "the discriminator's normalisation"),
    "pool": (between(0, 64), "average D's feature maps to this size, for any patch size; 0: off"),
    "content_network": ((lambda v: v in PHI, "vgg19:1_1 to 5_4, squeezenet1_1:0 to 12"),
                        "phi of Eq. 5: network and layer"),
    "content_weights": ((bool, "imagenet, random or a file"), "the weights of phi"),
    "content_divisor": (between(1e-6, 1e6), "divides phi's feature maps (Sec. 3.2)"),
    "patch_size": (between(32, 4096), "side of the HR patches, a multiple of scale"),
    "batch_size": (between(1, 65536), "patches per update and GPU"),
    "kernel": (one_of(*srgan.KERNELS), "how LR is made: bicubic (Sec. 3.2) or gaussian (Sec. 2)"),
    "augment": (one_of(*srgan.SYMMETRIES), "nothing, mirror images, or all flips and rotations"),
    "crop_margin": (between(0, 0.49), "border without patches, as a share of each side"),
    "store": (one_of("auto", "always", "never"), "whether decoded images are stored on disk"),
    "split": ((lambda v: len(v) == 3 and ints(v, 0) and sum(v) == 100 and v[0] * v[1] > 0,
               "percentages, in total 100"), "training, validation and test, if there is no --val"),
    "validate_on": (COUNT, "limits validation; the rest is trained on; 0: no limit"),
    "steps_per_epoch": (between(1, 1e9), "updates per epoch"),
    "epochs": (between(1, 1e9), "epochs of the stage"),
    "lr": (between(1e-12, 10), "learning rate"),
    "discriminator_lr": (between(0, 10), "the discriminator's learning rate; 0: G's"),
    "betas": ((lambda v: len(v) == 2 and all(type(b) in (int, float) and 0 <= b < 1 for b in v),
               "two numbers from 0 to below 1"), "Adam's beta1 and beta2"),
    "schedule": (one_of("constant", "step", "cosine"), "how the learning rate changes"),
    "milestones": ((ints, "a list of epochs"), "step: divide the rate by 10 after each"),
    "warmup": (COUNT, "updates during which the rate rises from 0"),
    "grow": ((lambda v: all(type(g) is list and len(g) == 2 and ints(g) and g[1] > 31 for g in v)
              and v == sorted(v), "[[epoch, size], ...]"), "larger patches from these epochs on"),
    "pixel_loss": (one_of(*srgan.PIXEL_LOSSES), "the MSE of Eq. 4, or L1"),
    **{f"{name}_weight": (WEIGHT, f"weight of the {name} loss") for name in srgan.CONTENT_LOSSES},
    "adversarial_loss": (one_of(*srgan.ADVERSARIAL_LOSSES), "bce (Eq. 2 and 6), or a later one"),
    "adversarial_weight": (between(1e-12, 1e6), "weight of the adversarial loss in Eq. 3"),
    **{name: (WEIGHT, "weight of this penalty in D's loss") for name in srgan.PENALTIES},
    "discriminator_steps": (between(1, 100), "steps of D for each step of G"),
    "shift": (between(0, 64), "largest random shift, in pixels, of SR and HR before the losses"),
    "freeze_batch_norm": (YES_NO, "keep stage 1's batch-norm statistics in G"),
    "ema": (between(0, 0.999999), "decay of the moving average of G, which is the result; 0: none"),
    "validate_every": (between(1, 1e9), "epochs from one validation to the next"),
    "checkpoint_every": (COUNT, "epochs between two checkpoint_epoch_XXXX.pth; 0: none"),
    "lpips": (YES_NO, "also measure LPIPS, which downloads AlexNet"),
    "precision": (one_of("auto", "bf16", "fp32"), "auto: whichever is faster on this machine"),
    "compile": (one_of("auto", "yes", "no"), "torch.compile; auto: on CUDA"),
    "seed": (between(0, 2 ** 62), "random seed of the initialisation and the patches"),
}
RETIRED = {"recoveries", "keep", "spectrum_weight", "stationarity_weight"}  # of older versions


def change(config, changes):
    """Change settings of `config` in place. Raises InputError, which names the wrong setting."""
    known = settings(config)
    for name, value in settings(changes).items():
        *group, key = name.split(".")
        if key in RETIRED:
            srgan.say(f"{name} is no longer a setting; ignored")
            continue
        if name not in known:
            near = [other for other in known if other.split(".")[-1] == key]
            near = " or ".join(near or get_close_matches(name, known, 1))
            raise InputError(f"unknown setting {name}" + f"; did you mean {near}?" * bool(near))
        (check, allowed), _ = SETTINGS.get(name) or SETTINGS[key]
        kind = type(known[name])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or not check(value):          # NaN passes no check
            raise InputError(f"{name} must be {allowed}, not {value!r:.60}")
        (config[group[0]] if group else config)[key] = value


def settings(config, prefix=""):
    """A configuration as {full name: value}; full names also pass through."""
    flat = {}
    for key, value in config.items():
        name = prefix + key
        flat |= settings(value, f"{name}.") if value and type(value) is dict else {name: value}
    return flat


def read_json(path):
    """The settings in a JSON file. Raises InputError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if type(content) is not dict:
        raise InputError(f"{path}: not a group of settings")
    return content


def resolve_config(args, saved=None):
    """config.json's base or a resumed run's settings, changed by preset, --config and --set."""
    file, stage = read_json(ROOT / "config.json"), args.stage
    config, preset = file["base"], file["presets"][args.preset]
    preset.pop("about")
    for changes in (saved or {}, preset, read_json(args.config) if args.config else {}):
        change(config, changes)
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set {item}: write key=value")
        with contextlib.suppress(ValueError):                    # a word needs no quotes
            value = json.loads(value)
        change(config, {name.replace("STAGE", stage): value})
    grow = config[stage]["grow"]
    if any(size % config["scale"] for size in (config["patch_size"], *(size for _, size in grow))):
        raise InputError(f"patch_size must be a multiple of scale, {config['scale']}")
    if stage == "gan" and grow and not config["discriminator"]["pool"]:
        raise InputError("gan.grow needs discriminator.pool: D without it fits one patch size only")
    if not any(config[stage][f"{name}_weight"] for name in srgan.CONTENT_LOSSES if name != "tv"):
        raise InputError(f"{stage}: the weights of all losses that compare SR with HR are 0")
    return config


def list_settings():
    """A text: the presets, then each setting's default, meaning and allowed values."""
    file = read_json(ROOT / "config.json")
    lines = [f"--preset {name:20s} {preset['about']}" for name, preset in file["presets"].items()]
    for name, default in settings(file["base"]).items():
        (_, allowed), meaning = SETTINGS.get(name) or SETTINGS[name.split(".")[-1]]
        lines.append(f"{name:28s} {json.dumps(default):30s} {meaning}  [{allowed}]")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", metavar="DIR", help="folders of HR images to train on", required=True)
    add("--lr-data", metavar="DIR", help="LR images of --data (default: made from HR)")
    add("--val", metavar="DIR", help="HR images to validate on (default: a part of --data)")
    add("--stage", choices=("srresnet", "gan"), required=True)
    add("--list-settings", action="version", version=list_settings(),
        help="print all presets and settings, and exit")
    add("--preset", default="paper", choices=read_json(ROOT / "config.json")["presets"],
        metavar="NAME", help="one of config.json's presets")
    add("--config", metavar="FILE", help="JSON file of settings, laid out like config.json's base")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    for flag, name in {"--epochs": "STAGE.epochs", "--steps-per-epoch": "steps_per_epoch",
                       "--batch-size": "batch_size", "--lr": "STAGE.lr", "--seed": "seed",
                       "--precision": "precision", "--feature-weights": "content_weights",
                       "--vgg-weights": "content_weights"}.items():
        add(flag, dest="set", action="append", type=(name + "={}").format, metavar="VALUE",
            help=f"--set {name}=VALUE")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--init", metavar="CKPT", help="generator to start from (stage gan: by "
        "default runs/srresnet/checkpoint_best_psnr.pth, else weights/srresnet.pth)")
    start.add_argument("--resume", nargs="?", const=True, metavar="CKPT",
        help="continue from the run folder's checkpoint_latest.pth, or from CKPT")
    add("--out", metavar="DIR", help="run folder (default: runs/STAGE)")
    add("--cache", default="cache", metavar="DIR", help="folder of decoded images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--wandb", action="store_true", help="also log to Weights & Biases (pip install wandb)")
    args = parser.parse_args(argv)
    if args.lr_data and len(args.data) > 1:
        parser.error("--lr-data needs exactly one --data folder")
    if "" in [*vars(args).values(), *args.data, *args.set]:
        parser.error("an argument is empty")
    if args.wandb and not find_spec("wandb"):
        parser.error("--wandb needs a package that is not installed: pip install wandb")
    return args


# The state of a training, and its run folder.

class State:
    """Networks, optimisers and counters: what a checkpoint holds and --resume restores."""

    def __init__(self, networks, values, device):
        self.networks = networks
        self.average = copy.deepcopy(networks["generator"])      # the moving average: the result
        self.average.eval().requires_grad_(False)
        self.base_rates = {"generator": values["lr"],
                           "discriminator": values.get("discriminator_lr") or values["lr"]}
        self.adam = {name: torch.optim.Adam(network.parameters(), self.base_rates[name],
                                            tuple(map(float, values["betas"])), fused=True)
                     for name, network in networks.items()}
        self.sums = {name: torch.zeros((), device=device) for name in LOSSES}
        self.step, self.seconds, self.best, self.baselines = 0, 0.0, {}, {}
        self.ema_pair = srgan.float_state(self.average), srgan.float_state(networks["generator"])

    def set_rates(self, factor):
        for name, adam in self.adam.items():
            adam.param_groups[0]["lr"] = self.base_rates[name] * factor

    def record(self, losses, decay):
        """After an update: add its losses, count it, average G (at first over few updates)."""
        torch._foreach_add_([self.sums[name] for name in losses],
                            [loss.detach().float() for loss in losses.values()])
        self.step += 1
        srgan.ema_(*self.ema_pair, min(decay, (1 + self.step) / (10 + self.step)))

    def mean_losses(self, n):
        """The mean of each loss over the last n updates; resets the sums."""
        means = {name: total.item() / n for name, total in self.sums.items()}
        torch._foreach_zero_([*self.sums.values()])
        return means

    def is_finite(self):
        """Whether all losses and weights are finite."""
        tensors = [*self.sums.values()]
        for network in self.networks.values():
            tensors += srgan.float_state(network)
        return torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all().item()

    def training(self):
        """The part of a checkpoint that only a resumed run needs."""
        return {"sums": self.sums,
                **{name: network.state_dict() for name, network in self.networks.items()},
                **{f"{name}_adam": adam.state_dict()["state"] for name, adam in self.adam.items()}}

    def resume(self, saved):
        """Restore the state of a checkpoint. Raises InputError if it does not fit."""
        try:
            training = saved["training"]
            self.average.load_state_dict(saved["generator"])
            for name, network in self.networks.items():
                network.load_state_dict(training[name])
                adam = self.adam[name]
                if f"{name}_optimizer" in training:              # saved by an older version
                    training |= {f"{name}_adam": training[f"{name}_optimizer"]["state"], "sums": {}}
                adam.load_state_dict(adam.state_dict() | {"state": training[f"{name}_adam"]})
            for name in training["sums"].keys() & self.sums:     # losses come and go by version
                self.sums[name].copy_(training["sums"][name])
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.baselines = saved.get("baselines", {})
            self.best = {name: saved["best"][name] for name in saved["best"].keys() & srgan.METRICS}
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"the checkpoint cannot be resumed: {srgan.one_line(error)}") from None


class RunFolder:
    """A run's config.json, metrics.csv, summary.json, curves.png, samples/ and checkpoints."""

    def __init__(self, path, args, config, state, pairs, device, start):
        self.path, self.config, self.state = path, config, state
        self.pairs, self.metrics = pairs, srgan.usable_metrics(config["lpips"], device)
        self.about = {"stage": args.stage, "data": args.data, "lr_data": args.lr_data or "",
                      "val": args.val or "", "device": str(device), "torch": str(torch.__version__)}
        (path / "samples").mkdir(parents=True, exist_ok=True)
        srgan.write_json(path / "config.json", config)
        self.rows = []
        if (path / "metrics.csv").exists():                      # later epochs are repeated
            with open(path / "metrics.csv", newline="") as file:
                self.rows = [row for row in csv.DictReader(file)
                             if int(row["update"]) <= state.step]
        if not find_spec("matplotlib"):
            srgan.say("matplotlib is not installed; going on without curves.png")
        self.tracker = None
        if args.wandb:
            import wandb
            self.tracker = wandb.init(project="srgan", name=path.name, dir=path, config=config)
        state.baselines["bicubic"] = self.validate(lambda lr: srgan.upsample(lr, config["scale"]))
        if start:
            state.baselines["start"] = self.validate(lambda lr: srgan.upscale(start, lr))

    def validate(self, upscale):
        """Mean and standard deviation of the metrics of upscale(lr), measured as by evaluate.py.

        An image that cannot be measured is left out from now on, with a message. Raises InputError
        if no image is left.
        """
        scale = self.config["scale"]
        results = evaluate.measure_all(self.pairs, {"SR": lambda lr, stem: upscale(lr)}, {}, scale,
                                       self.config["kernel"], names=self.metrics, shave=scale)
        self.pairs = [pair for pair in self.pairs if pair[0] in results]
        if not results:
            raise InputError("no image is left to validate on")
        return srgan.aggregate([scores["SR"] for scores in results.values()])

    def save_sample(self, path):
        """Save the centre of the first validation image: bicubic, SR and HR, side by side."""
        _, *paths = self.pairs[0]
        scale = self.config["scale"]
        lr, hr = srgan.open_pair(*paths, scale, self.config["kernel"])
        top, left = (max(0, side - 100) // 2 for side in lr.shape[:2])
        lr = lr[top:top + 100, left:left + 100]
        hr = hr[top * scale:, left * scale:][:len(lr) * scale, :lr.shape[1] * scale]
        views = srgan.upsample(lr, scale), srgan.upscale(self.state.average, lr), hr
        with srgan.replacing(path) as temporary:
            srgan.side_by_side(views, ["bicubic", "SR", "HR"]).save(temporary)

    def save(self, name="latest"):
        """Write a checkpoint of the moving average; only "latest" can be resumed."""
        state = self.state
        more = {"training": state.training()} if name == "latest" else {}
        srgan.save_checkpoint(self.path / f"checkpoint_{name}.pth", state.average, **self.about,
                              step=state.step, seconds=state.seconds, best=state.best,
                              baselines=state.baselines, config=self.config, **more)

    def end_epoch(self, row, bar, last):
        """Validate, log and save."""
        epoch, every, best = row["epoch"], self.config["checkpoint_every"], self.state.best
        if last or epoch % self.config["validate_every"] == 0:
            scores = self.validate(lambda lr: srgan.upscale(self.state.average, lr))
            self.save_sample(self.path / f"samples/epoch_{epoch:04d}.png")
            bar.write(f"epoch {epoch}  loss {row['loss']:.4f}  {srgan.describe(scores)}  "
                      f"{row['updates_per_s']:.1f} updates/s")
            for name in self.metrics:
                mean = scores[name]["mean"]
                sign = 1 if srgan.METRICS[name].higher_is_better else -1
                row |= {name: mean, f"{name}_std": scores[name]["std"]}
                if name not in best or sign * mean > sign * best[name]["mean"]:
                    best[name] = {**scores[name], "epoch": epoch}
                    self.save(f"best_{name}")
        self.log(row)
        if every and epoch % every == 0:
            self.save(f"epoch_{epoch:04d}")
        self.save()

    def log(self, row):
        """Add a row to metrics.csv, summary.json, curves.png and Weights & Biases."""
        self.rows.append(row)
        with srgan.replacing(self.path / "metrics.csv") as temporary, \
                open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        state = self.state
        srgan.write_json(self.path / "summary.json", {
            **self.about, **{key: row[key] for key in ("epoch", "update", "memory_mb")},
            "seconds": state.seconds, "best": state.best, **state.baselines})
        if find_spec("matplotlib"):
            draw_curves(self.rows, state.baselines, self.path / "curves.png")
        if self.tracker:
            self.tracker.log(row, step=state.step)

    def close(self, total):
        """End the log; after a signal, also save the run."""
        if self.state.step < total:
            self.save()
            print(f"stopped after update {self.state.step} of {total}; continue with --resume")
        else:
            print(f"done; the results are in {self.path}")
        if self.tracker:
            self.tracker.finish()


def draw_curves(rows, baselines, path):
    """Draw losses and metrics over the updates, the baselines as horizontal lines."""
    from matplotlib.figure import Figure
    panels = {"what G minimises": ("loss", *srgan.CONTENT_LOSSES),
              "the game": ("adversarial", "discriminator"), "D's mean logits": ("d_real", "d_fake"),
              **{metric.title: (name,) for name, metric in srgan.METRICS.items()}}
    curves = {name: [(int(row["update"]), float(row[name])) for row in rows if row.get(name)]
              for names in panels.values() for name in names}
    panels = {title: drawn for title, names in panels.items()
              if (drawn := [name for name in names if any(y for _, y in curves[name])])}
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                    panels.items()):
        axes.set(title=title, xlabel="update")
        axes.locator_params(axis="x", nbins=5)                   # labels do not overlap
        for name in names:
            axes.plot(*zip(*curves[name]), marker=".", label=name)
            for style, (baseline, scores) in zip((":", "--"), baselines.items()):
                if scores.get(name):
                    axes.axhline(scores[name]["mean"], linestyle=style, label=baseline)
        axes.legend()
    with srgan.replacing(path) as temporary:
        figure.savefig(temporary)


# Set-up: processes, images, networks, losses.

def set_up_process(name):
    """(device, rank, number of processes); torchrun starts several."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1 and ":" in name:
        raise InputError("torchrun gives each process its own GPU: use --device cuda")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = srgan.pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)                            # opens no other GPU
    if world > 1:
        try:                                                     # rank 0 may validate for hours
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=timedelta(hours=12))
        except (ValueError, RuntimeError) as error:
            raise InputError(f"torchrun: {srgan.one_line(error)}") from None
    return device, rank, world


def set_up_arithmetic(device, config):
    """Choose precision and TF32; let glibc keep freed memory (1.1 times as fast on the CPU)."""
    config["precision"] = srgan.pick_precision(device, config["precision"])
    tf32 = config["precision"] != "fp32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)               # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2 ** 25)                   # M_MMAP_THRESHOLD


def open_run(args):
    """(run folder, checkpoint to resume or None). Raises InputError if they do not fit."""
    out = Path(args.out or f"runs/{args.stage}")
    latest = out / "checkpoint_latest.pth"
    path = latest if args.resume is True else Path(args.resume or "")
    if latest.exists() and not (args.resume and os.path.samefile(path, latest)):
        raise InputError(f"{out} holds another run; continue that one with --resume, or choose "
                         "another folder with --out")
    if not args.resume:
        return out, None
    saved = srgan.load_checkpoint(path)
    if "training" not in saved or saved.get("stage") != args.stage:
        raise InputError(f"{path}: only a checkpoint_latest.pth of stage {args.stage} can be "
                         "resumed; start from its generator with --init")
    if saved.get("lr_data") and not args.lr_data:
        raise InputError(f"this run was trained with --lr-data {saved['lr_data']}; give it again")
    return out, saved


def find_data(args, config):
    """[(name, HR path, LR path or None)] to train on, and to validate on."""
    scale, kernel = config["scale"], config["kernel"]
    if args.lr_data:
        pairs = srgan.find_pairs(args.data[0], args.lr_data, scale, kernel)
    else:
        paths = {path for folder in args.data for path in srgan.find_hr(folder)}
        pairs = [(str(path), path, None) for path in sorted(paths)]
    if args.val:
        return pairs, srgan.find_pairs(args.val, scale=scale, kernel=kernel)
    parts = srgan.split(pairs, config["split"], config["validate_on"])
    if not parts["train"]:
        raise InputError("one image is too few for training and validation; give more, or --val")
    return parts["train"], parts["val"]


def find_start(args, config):
    """(path, generator) of --init or, in stage 2, of stage 1; else (None, None)."""
    if args.resume or args.stage == "srresnet" and not args.init:
        return None, None
    stage_1 = Path("runs/srresnet/checkpoint_best_psnr.pth"), ROOT / "weights/srresnet.pth"
    path = args.init or next((path for path in stage_1 if path.exists()), None)
    if not path:
        raise InputError("stage gan starts from an SRResNet: train one, or name one with --init")
    generator = srgan.load_generator(path)
    for key, value in generator.arch.items():
        if config[key] != value:
            raise InputError(f"{path} has {key} {value}, the settings have {config[key]}; train "
                             "stage 1 with these settings and give its checkpoint as --init")
    return path, generator


def make_networks(args, config, start, device):
    """{"generator": G, in stage 2 also "discriminator": D}, in training mode on the device."""
    torch.manual_seed(config["seed"])
    arch = "block", "scale", "channels", "n_blocks", "tanh"
    generator = srgan.make_generator(**{key: config[key] for key in arch})
    srgan.INITS[config["init"]](generator)
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
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    return networks


def make_update(config, stage, state, device, world=1):
    """srgan.Update with the networks in their fast form and the losses of the settings."""
    values, precision = config[stage], config["precision"]
    compiled = config["compile"] == "yes" or (
        config["compile"] == "auto" and device.type == "cuda" and find_spec("triton"))

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
              for name, loss in srgan.CONTENT_LOSSES.items() if values[f"{name}_weight"]}
    networks, adam = state.networks, state.adam
    if world > 1:
        for optimizer in adam.values():
            optimizer.register_step_pre_hook(average_gradients)
    generator = fast(networks["generator"])
    if stage == "srresnet":
        return srgan.Update(generator, adam["generator"], losses)
    plain = srgan.Fast(networks["discriminator"], precision)     # compiled has no second gradient
    penalties = {name: (values[name], functools.partial(penalty, plain))
                 for name, penalty in srgan.PENALTIES.items() if values[name]}
    update = srgan.Update(generator, adam["generator"], losses, fast(networks["discriminator"]),
                          adam["discriminator"], values["adversarial_weight"],
                          *srgan.ADVERSARIAL_LOSSES[values["adversarial_loss"]], penalties)
    if shift := values["shift"]:
        update.update_discriminator = srgan.shifted(update.update_discriminator, shift)
        update.update_generator = srgan.shifted(update.update_generator, shift)
    if values["discriminator_steps"] > 1:
        return functools.partial(srgan.critic_steps, update)
    return update


def make_patches(args, config, images, device, rank):
    """srgan.Patches of the training images."""
    _, hr_paths, lr_paths = zip(*images)
    hr_store = srgan.Store(hr_paths, args.cache, config["store"])
    lr_store = srgan.Store(lr_paths, args.cache, config["store"]) if args.lr_data else None
    return srgan.Patches(hr_store, config["patch_size"], config["scale"], config["kernel"],
                         config["augment"], config["crop_margin"], lr_store, device,
                         config["seed"], rank)


def average_gradients(optimizer, *_):
    """Before a step: average the gradients over all processes, as if of one large batch."""
    gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


# Training.

def rate_factor(stage, step, steps_per_epoch):
    """The factor on the base learning rate at update `step`, counted from 0."""
    factor = min(1, (step + 1) / stage["warmup"]) if stage["warmup"] else 1
    if stage["schedule"] == "step":
        factor *= 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in stage["milestones"])
    elif stage["schedule"] == "cosine":
        factor *= 0.5 + 0.5 * math.cos(math.pi * step / (stage["epochs"] * steps_per_epoch))
    return factor


def batches(patches, config, stage, first, last):
    """For updates first to last - 1: LR, HR, LR, HR, ..., one pair for each step of D."""
    steps, values = config["steps_per_epoch"], config[stage]
    d_steps = values.get("discriminator_steps", 1)
    sizes = [[1, config["patch_size"]], *values["grow"], [math.inf, None]]
    for (epoch, size), (next_epoch, _) in zip(sizes, sizes[1:]):
        begin, end = max((epoch - 1) * steps, first), min((next_epoch - 1) * steps, last)
        if begin < end:
            patches.resize(size)
            pairs = patches.batches(config["batch_size"], begin * d_steps, end * d_steps)
            for _ in range(begin, end):
                yield [tensor for _ in range(d_steps) for tensor in next(pairs)]


def record_signals():
    """A list to which SIGINT, SIGTERM and SIGHUP are added; a second one ends the program."""
    seen = []

    def record(number, frame):
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, *srgan.STOP_SIGNALS):
        signal.signal(number, record)
    return seen


def train(state, update, data, run, config, stage, world, device):
    """The training loop. It ends after the last update, or soon after a signal in any process."""
    values, steps = config[stage], config["steps_per_epoch"]
    total, signals, stop = values["epochs"] * steps, record_signals(), False
    began, epoch_began, first = time.monotonic() - state.seconds, time.monotonic(), state.step
    bar = tqdm(total=total, initial=state.step, unit="update", disable=None if run else True)
    while state.step < total and not stop:
        factor = rate_factor(values, state.step, steps)
        state.set_rates(factor)
        torch.manual_seed(config["seed"] + state.step)           # the same when resumed
        losses = update(*next(data))
        state.record(losses, config["ema"])
        state.seconds = time.monotonic() - began
        bar.update()
        end_of_epoch = state.step % steps == 0
        if end_of_epoch or state.step % 10 == 0 or (world == 1 and signals):  # waits for the GPU
            bar.set_postfix(loss=f"{losses['loss'].item():.4f}", refresh=False)
            flags = torch.tensor([float(not state.is_finite()), len(signals)], device=device)
            if world > 1:
                dist.all_reduce(flags)                           # in any process
            not_finite, stop = flags.tolist()
            if not_finite:
                raise InputError(f"a loss or a weight is not finite at update {state.step}; the "
                                 "last good checkpoint is kept; --resume it with a lower --lr")
        if end_of_epoch:
            row = {"epoch": state.step // steps, "update": state.step, "lr": values["lr"] * factor,
                   "updates_per_s": (state.step - first) / (time.monotonic() - epoch_began),
                   "memory_mb": torch.cuda.max_memory_allocated() / 2 ** 20,
                   **state.mean_losses(steps)}
            if run:
                run.end_epoch(row, bar, last=state.step == total)
            first, epoch_began = state.step, time.monotonic()
    bar.close()


def main():
    # The run folder, its settings, and the images.
    args = parse_args()
    out, saved = open_run(args)
    config, stage = resolve_config(args, saved and saved["config"]), args.stage
    train_pairs, val_pairs = find_data(args, config)
    start_path, start = find_start(args, config)

    # The device, the networks, the update, and its patches.
    device, rank, world = set_up_process(args.device)
    set_up_arithmetic(device, config)
    state = State(make_networks(args, config, start, device), config[stage], device)
    if saved:
        state.resume(saved)
    total = config[stage]["epochs"] * config["steps_per_epoch"]
    if state.step >= total:
        raise InputError(f"the run is complete at update {state.step}; --epochs makes it longer")
    update = make_update(config, stage, state, device, world)
    patches = make_patches(args, config, train_pairs, device, rank)

    # Training.
    run = None
    if rank == 0:                                                # only this process writes
        run = RunFolder(out, args, config, state, val_pairs, device, start)
        run.save()                                               # it can be resumed from now on
        bicubic = srgan.describe(state.baselines["bicubic"])
        origin = f", starting from {start_path}" if start else ""
        print(f"{stage} on {device}, {config['precision']}: {len(train_pairs)} images, "
              f"{len(run.pairs)} to validate on (bicubic {bicubic}), updates {state.step} to "
              f"{total}, into {out}{origin}", flush=True)
    data = batches(patches, config, stage, state.step, total)
    train(state, update, data, run, config, stage, world, device)
    if run:
        run.close(total)
    if world > 1:
        dist.barrier()                                           # until rank 0 has saved
        dist.destroy_process_group()


if __name__ == "__main__":
    srgan.run(main)
