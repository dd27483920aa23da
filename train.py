"""Train SRResNet (stage 1) and SRGAN (stage 2).

    python train.py --data DIV2K_train_HR --val DIV2K_valid_HR --stage srresnet
    python train.py --data DIV2K_train_HR --val DIV2K_valid_HR --stage gan

Stage 2 starts from stage 1's best checkpoint. Ctrl-C or SIGTERM finishes the update, saves and
exits; --resume goes on from there, on the CPU bit for bit. Any setting of config.json:

    python train.py ... --preset quick --set gan.lr=5e-5 --set content_network=vgg19:2_2

Four GPUs, and two machines with eight each and the run folder in common (--batch-size counts for each GPU):

    torchrun --nproc-per-node 4 train.py --data ...
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 train.py --data ...
"""
import argparse
import copy
import csv
import ctypes
import difflib
import importlib.util
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import srgan
from srgan import InputError

HERE = Path(__file__).parent
LOSSES = ("loss", "pixel", "content", "adversarial", "discriminator", "d_real", "d_fake", "grid", "spectrum",
          "stationarity")  # d_: D's mean logit or score
R1_EVERY = 8  # updates from one R1 penalty to the next, which counts so many times: Karras et al. 2020, arXiv:1912.04958, Sec. 3.1
METRICS = ("psnr", "ssim", "lpips")
COLUMNS = ("epoch", "update", "lr", *LOSSES, *(name + end for name in METRICS for end in ("", "_std")),
           "updates_per_s", "memory_mb")

# What each setting of config.json may be, by its full name or, in the groups of both stages, by its last part.
fraction = (lambda v: 0 <= v < 1, "from 0 to below 1")


def between(low, high):
    return lambda v: low <= v <= high, f"from {low:g} to {high:g}"


def one_of(*choices):
    return lambda v: v in choices, "one of " + ", ".join(map(str, choices))


def are_epochs(values):
    return all(type(v) is int and 0 < v <= 1e9 for v in values) and values == sorted(set(values))


def is_layer(value):
    name, colon, layer = value.partition(":")
    return layer in srgan.CONTENT_NETWORKS[name].layers if colon and name in srgan.CONTENT_NETWORKS else name in srgan.CONTENT_NETWORKS


RULES = {
    "scale": one_of(*srgan.SCALES), "channels": between(3, 1024), "n_blocks": between(1, 256), "block": one_of(*srgan.BLOCKS),
    "discriminator.channels": (lambda v: 0 < len(v) <= 16 and all(type(n) is int and 0 < n <= 4096 for n in v),
                               "1 to 16 whole numbers from 1 to 4096"),
    "first_kernel": one_of(1, 3, 5, 7, 9, 11), "norm": one_of(*srgan.NORMS), "pool": between(0, 64),
    "content_network": (is_layer, "vgg19 or squeezenet1_1, with one of its layers after a colon: vgg19:5_4, squeezenet1_1:12"),
    "content_weights": (lambda v: v != "", "imagenet, random or a path"), "content_divisor": between(1e-6, 1e6),
    "patch_size": between(8, 4096), "batch_size": between(1, 65536), "kernel": one_of("bicubic", "gaussian"),
    "augment": one_of(*srgan.SYMMETRIES), "crop_margin": (lambda v: 0 <= v < 0.5, "from 0 to below 0.5"),
    "store": one_of("auto", "always", "never"),
    "split": (lambda v: len(v) == 3 and all(type(n) is int and n >= 0 for n in v) and sum(v) == 100 and v[0] * v[1] > 0,
              "percentages for training, validation and test that make 100, the first two above 0"),
    "validate_on": between(0, 1e9), "validate_every": between(1, 1e9), "checkpoint_every": between(0, 1e9), "keep": between(0, 1e9),
    "recoveries": between(0, 1000), "steps_per_epoch": between(1, 1e9), "ema": fraction, "lpips": one_of(True, False),
    "precision": one_of("auto", "bf16", "fp32"), "compile": one_of("auto", "yes", "no"), "seed": between(0, 2 ** 63 - 1),
    "epochs": between(1, 1e9), "lr": between(1e-12, 10), "warmup": between(0, 1e9), "schedule": one_of("constant", "step", "cosine"),
    "betas": (lambda v: len(v) == 2 and all(type(b) in (int, float) and 0 <= b < 1 for b in v), "two numbers from 0 to below 1"),
    "milestones": (are_epochs, "epochs in ascending order"),
    "grow": (lambda v: all(isinstance(g, list) and len(g) == 2 and type(g[1]) is int and 8 <= g[1] <= 4096 for g in v)
             and are_epochs([g[0] for g in v]), "a list of [first epoch, patch size from 8 to 4096] in ascending order"),
    "pixel_loss": one_of(*srgan.PIXEL_LOSSES), "adversarial_loss": one_of(*srgan.ADVERSARIAL_LOSSES),
    "pixel_weight": between(0, 1e6), "content_weight": between(0, 1e6), "grid_weight": between(0, 1e6),
    "spectrum_weight": between(0, 1e6), "stationarity_weight": between(0, 1e6), "adversarial_weight": between(1e-12, 1e6),
    "gradient_penalty": between(0, 1e6), "r1_penalty": between(0, 1e6), "discriminator_steps": between(1, 100),
    "shift": between(0, 64), "freeze_batch_norm": one_of(True, False),
}


KINDS = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", list: "a list"}


def lay_over(config, changes, prefix=""):
    """Change settings of `config` in place. Raises InputError, by name, for unknown settings, wrong types and impossible values."""
    if not isinstance(changes, dict):
        raise InputError(f"{prefix.rstrip('.') or 'the configuration'} must be a group of settings, not {changes!r}")
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if key not in config:
            near = difflib.get_close_matches(str(key), config, 1)
            raise InputError(f"unknown setting {name}" + (f"; did you mean {prefix}{near[0]}?" if near else ""))
        if isinstance(config[key], dict):
            lay_over(config[key], value, name + ".")
            continue
        kind = type(config[key])
        if kind is float and type(value) is int and abs(value) < 2 ** 63:
            value = float(value)
        holds, text = RULES.get(name) or RULES[key]
        if type(value) is not kind or not holds(value):  # nothing holds for NaN
            raise InputError(f"{name} must be {text} ({KINDS[kind]}), not {srgan.one_line(repr(value))}")
        config[key] = value


def parse_json(text):
    """Raises ValueError for what is no JSON, is nested too deeply, or says a thing twice."""
    def group(pairs):
        keys = [key for key, _ in pairs]
        if len({*keys}) < len(keys):
            raise InputError(f"{next(key for key in keys if keys.count(key) > 1)} stands there twice")
        return dict(pairs)
    try:
        return json.loads(text, object_pairs_hook=group)
    except RecursionError:
        raise InputError("nested too deeply") from None


def read_json(path):
    """A JSON file's content. Raises InputError."""
    srgan.check_file(path)
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({srgan.one_line(error)})") from None


def resolve_config(args, saved=None):
    """The base of config.json, or a resumed run's configuration, under preset, --config, --set and the flags, in this order."""
    file = read_json(HERE / "config.json")
    if args.preset not in (None, *file["presets"]):
        raise InputError(f"no preset {args.preset!r}; there are {', '.join(file['presets'])}")
    config = copy.deepcopy(file["base"])
    lay_over(config, {} if saved is None else saved)
    if args.preset:
        lay_over(config, {key: value for key, value in file["presets"][args.preset].items() if key != "about"})
    if args.config:
        lay_over(config, read_json(args.config))
    for item in args.set:
        name, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"--set {item}: write key=value")
        try:
            value = parse_json(text)
        except InputError as error:
            raise InputError(f"--set {name}: {error}") from None
        except ValueError:
            value = text  # a word needs no quotes
        for part in reversed(name.split(".")):
            value = {part: value}
        lay_over(config, value)
    flags = {key: getattr(args, key) for key in ("steps_per_epoch", "batch_size", "content_weights", "precision", "seed")}
    lay_over(config, {key: value for key, value in flags.items() if value is not None})
    flags = {key: getattr(args, key) for key in ("epochs", "lr")}
    lay_over(config[args.stage], {key: value for key, value in flags.items() if value is not None}, args.stage + ".")
    for size in (config["patch_size"], *(size for _, size in config[args.stage]["grow"])):
        if size % config["scale"]:
            raise InputError(f"patch_size {size} is no multiple of scale {config['scale']}")
    if args.stage == "gan" and config["gan"]["grow"] and not config["discriminator"]["pool"]:
        raise InputError("gan.grow needs discriminator.pool above 0, since D's dense layer fits one patch size only")
    if not any(config[args.stage][term] for term in ("pixel_weight", "content_weight")):
        raise InputError(f"{args.stage}.pixel_weight and {args.stage}.content_weight are both 0: nothing ties SR to HR")
    return config


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", metavar="DIR[=W]", help="folders of HR training pictures; W: how often each "
                        "picture of the folder is drawn, relative to the others (default: 1)")
    parser.add_argument("--val", metavar="DIR", help="folder of HR pictures, or with HR/ and LR_bicubic_x4/ (default: held out of the data)")
    parser.add_argument("--stage", choices=("srresnet", "gan"))
    parser.add_argument("--preset", metavar="NAME", help="one of config.json's; see --list-presets")
    parser.add_argument("--list-presets", action="store_true", help="show the presets and exit")
    parser.add_argument("--config", metavar="FILE", help="JSON file of settings that differ from config.json's base")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting, such as gan.lr=5e-5")
    parser.add_argument("--epochs", type=int, help="of steps_per_epoch updates each")
    parser.add_argument("--steps-per-epoch", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, metavar="N", help="patches per update and GPU")
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--vgg-weights", dest="content_weights", metavar="PATH", help="weights of the content network: imagenet (downloaded on "
                        "first use, the default), a file in torchvision's layout, or random (to try things out)")
    parser.add_argument("--init", metavar="CKPT", help="generator to start from (stage gan: default, the first there is of "
                        "runs/srresnet/checkpoint_best_psnr.pth and weights/srresnet.pth)")
    parser.add_argument("--resume", nargs="?", const=True, metavar="CKPT", help="go on from the --out folder's checkpoint_latest.pth, or from CKPT")
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/STAGE)")
    parser.add_argument("--cache", default="cache", metavar="DIR", help="where decoded pictures are kept (default: cache)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--wandb", action="store_true", help="log figures and samples to Weights & Biases, too (pip install wandb)")
    args = parser.parse_args(argv)
    if not args.list_presets and not (args.data and args.stage):
        parser.error("--data and --stage are required")
    return args


def find_data(folders):
    """{path: weight} of the pictures in folders named DIR or DIR=WEIGHT, sorted by path."""
    weights = {}
    for name in folders:
        folder, equals, weight = name.rpartition("=")
        if not equals or Path(name).exists():
            folder, weight = name, "1"
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not 0 < number < 1e9:
            raise InputError(f"--data {name}: the weight must be a number above 0 and below 1e9")
        weights |= dict.fromkeys(srgan.find_images(folder), number)
    return dict(sorted(weights.items()))


def start_generator(args, arch):
    """(path, generator) that --init names, or that stage 2 begins with; (None, None) where stage 1 begins anew."""
    candidates = [args.init] if args.init else []
    if args.stage == "gan" and not args.init:
        candidates = [p for p in (Path("runs/srresnet/checkpoint_best_psnr.pth"), HERE / "weights/srresnet.pth") if p.exists()]
        if not candidates:
            raise InputError("stage gan starts from an SRResNet; train one with --stage srresnet, or name one with --init")
    if not candidates:
        return None, None
    generator = srgan.load_generator(candidates[0])
    if generator.arch != arch:
        raise InputError(f"{candidates[0]} holds a generator of {generator.arch}, but the configuration asks for {arch}; "
                         "name another with --init")
    return candidates[0], generator


def learning_rate(stage, step, steps_per_epoch):
    """Of update `step`, counted from 0: a tenth after each milestone, or half a cosine to 0; warmup is linear, over updates."""
    factor = min(1, (step + 1) / stage["warmup"]) if stage["warmup"] else 1
    if stage["schedule"] == "step":
        factor *= 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in stage["milestones"])
    elif stage["schedule"] == "cosine":
        factor *= 0.5 + 0.5 * math.cos(math.pi * step / (stage["epochs"] * steps_per_epoch))
    return stage["lr"] * factor


def keep_freed_memory():
    """Let glibc keep large blocks that are freed, instead of having the kernel clear fresh ones: CPU training 1.1 times as fast."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2 ** 25)      # M_MMAP_THRESHOLD, at its highest
    except (OSError, AttributeError, TypeError):
        pass  # another C library


class Graphed:
    """function(*tensors) -> tensor as one CUDA graph: a single launch for all kernels of an update.

    The first calls for a set of shapes run as they are, which is the warm-up that capturing
    needs; then the graph is replayed on copies of the inputs. Everything else that the function
    reads or writes must stay where it is in memory.
    """
    warmup = 3

    def __init__(self, function, device):
        self.function, self.calls, self.shapes, self.stream = function, 0, None, torch.cuda.Stream(device)

    def __call__(self, *tensors):
        shapes = [tensor.shape for tensor in tensors]
        if shapes != self.shapes:
            self.shapes, self.calls, self.graph = shapes, 0, None
        self.calls += 1
        if self.calls <= self.warmup:  # on a stream of its own, as capturing will be
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.function(*tensors)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.calls == self.warmup + 1:
            self.inputs, graph = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loader threads go on meanwhile
                    self.result = self.function(*self.inputs)
                self.graph = graph
            except RuntimeError as error:
                srgan.say(f"no CUDA graph ({srgan.one_line(error)}); going on without, more slowly")
        if self.graph is None:
            return self.function(*tensors)
        for mine, given in zip(self.inputs, tensors):
            mine.copy_(given)
        self.graph.replay()
        return self.result


def parallel(network, device):
    """The network as its gradients become the mean over all processes. Batch norm counts each process's batch alone."""
    network = DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    network.broadcast_buffers = False  # D is called twice before it goes backward; rank 0's statistics are saved
    return network


def memory_mb(device):
    """Peak of the GPU memory that tensors took, or of this process's resident memory, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def validate(generator, pairs, config, lpips, sheet=None):
    """Mean and standard deviation of each metric over the validation set; generator None measures bicubic.

    What cannot be measured is taken out of `pairs`, with a line on stderr. Raises InputError where nothing is left.
    sheet: a file to save bicubic, SR and HR of the first three pictures' centres to.
    """
    scale, scores, strips = config["scale"], [], []
    for pair in list(pairs):
        stem, hr_path, lr_path = pair
        try:
            lr, hr = srgan.open_pair(hr_path, lr_path, scale, config["kernel"])
            sr = srgan.bicubic(lr, scale) if generator is None else srgan.upscale(generator, lr)
            scores.append(srgan.measure(sr, hr, scale, lpips=lpips))
        except InputError as error:  # unreadable, or too small to measure
            srgan.say(f"left out of the validation, {stem}: {error}")
            pairs.remove(pair)
            continue
        if sheet and len(strips) < 3:
            side = min(240, *hr.shape[:2])
            top, left = ((n - side) // 2 for n in hr.shape[:2])
            views = [p[top:top + side, left:left + side] for p in (srgan.bicubic(lr, scale), sr, hr)]
            strips.append(srgan.strip(views, ["bicubic", f"SR {scores[-1]['psnr']:.2f} dB", stem]))
    if not scores:
        raise InputError("no picture is left to validate on")
    if sheet:
        whole = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
        for i, s in enumerate(strips):
            whole.paste(s, (0, sum(above.height for above in strips[:i])))
        with srgan.replacing(sheet) as temporary:
            whole.save(temporary)
    return srgan.aggregate(scores)


def draw_curves(rows, path):
    """Losses and metrics over the updates, as a PNG by matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    names = [name for name in (*LOSSES, *METRICS) if any(float(row.get(name) or 0) for row in rows)]
    figure = Figure(figsize=(4 * min(4, len(names)), 3 * math.ceil(len(names) / 4)), layout="constrained")
    for i, name in enumerate(names, 1):
        axes = figure.add_subplot(math.ceil(len(names) / 4), min(4, len(names)), i, title=name, xlabel="update")
        axes.plot(*zip(*[(int(row["update"]), float(row[name])) for row in rows if row.get(name) not in (None, "")]), marker=".")
    with srgan.replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def optional(package):
    """Whether a package that can be done without is installed."""
    return importlib.util.find_spec(package) is not None


def describe(metrics):
    return "  ".join(f"{name.upper()} {value['mean']:.{4 - 2 * (name == 'psnr')}f}" for name, value in metrics.items() if value)


def main():
    args = parse_args()
    if args.list_presets:
        for name, preset in read_json(HERE / "config.json")["presets"].items():
            print(f"{name:20s} {preset['about']}")
        return 0

    # One process, or one of several that torchrun started. Rank 0 validates, logs and saves.
    world, rank, local = (int(os.environ.get(key, default)) for key, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    device = srgan.pick_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32; convolutions have it by default
    keep_freed_memory()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))  # rank 0 validates

    # Configuration and run folder.
    if args.wandb and not optional("wandb"):
        raise InputError("--wandb needs a package that is not installed: pip install wandb")
    out = Path(args.out or f"runs/{args.stage}")
    latest, state = out / "checkpoint_latest.pth", None
    if args.resume and args.init:
        raise InputError("--resume goes on with the run's own generator; leave --init out")

    def claim():
        """Until this process ends, no other may write into the run folder."""
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            held.append(srgan.lock(out / ".lock", f"{out}: another run is writing into this folder; name another one with --out"))
            for folder in (out, out / "samples"):
                srgan.remove_leftovers(folder)
    held = []
    if args.resume:
        if out.is_dir():
            claim()
        if args.resume is not True and latest.exists() and not os.path.samefile(args.resume, latest):
            raise InputError(f"{out} holds another run; go on with {args.resume} in a folder of its own, by --out")
        state = srgan.load_checkpoint(latest if args.resume is True else args.resume, device)
        if not {"stage", "training", "step", "config"} <= state.keys() or type(state["step"]) is not int:
            raise InputError("only a checkpoint_latest.pth can be resumed: the others hold the generator alone; "
                             "start from one with --init")
        if state["stage"] != args.stage:
            raise InputError(f"the checkpoint is of stage {state['stage']}, not {args.stage}")
    elif latest.exists():
        raise InputError(f"{out} holds a run already; go on with --resume, or name another folder with --out")
    config = resolve_config(args, state and state["config"])
    stage, steps_per_epoch, scale = config[args.stage], config["steps_per_epoch"], config["scale"]
    total, batch_size = stage["epochs"] * steps_per_epoch, config["batch_size"]
    precision = srgan.pick_precision(device, config["precision"])
    step = state["step"] if state else 0
    if step >= total:
        raise InputError(f"the run is complete at update {step}; ask for more with --epochs")

    # Pictures to train on and to validate on.
    data = find_data(args.data)
    if args.val:
        pairs = srgan.find_pairs(args.val, scale=scale, kernel=config["kernel"])
    else:
        parts = srgan.split(data, config["split"], config["validate_on"])
        if not parts["train"]:
            raise InputError(f"{len(data)} pictures are too few to train on and to hold some out; give more, or --val")
        pairs = [(path.stem, path, None) for path in parts["val"]]
        data = {path: data[path] for path in parts["train"]}

    if any(path.startswith(os.path.realpath(out) + os.sep) for path in srgan.real_paths(pairs, *data, args.config, args.init)):
        raise InputError(f"{out} holds inputs; name another run folder with --out")
    if not held:
        claim()

    # Networks and optimisers. D exists in stage 2, phi where the content loss counts.
    torch.manual_seed(config["seed"])
    generator = srgan.Generator(scale, config["channels"], config["n_blocks"], config["block"])
    start_path, start = (None, None) if state else start_generator(args, generator.arch)
    if start:
        generator.load_state_dict(start.state_dict())
    networks = {"generator": generator}
    if args.stage == "gan":
        networks["discriminator"] = srgan.Discriminator(config["patch_size"], **config["discriminator"])
    networks = {name: network.to(device, memory_format=torch.channels_last).train() for name, network in networks.items()}
    discriminator = networks.get("discriminator")
    average = copy.deepcopy(generator).eval().requires_grad_(False)  # the exponential moving average, the result
    if stage.get("freeze_batch_norm"):
        for module in generator.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    rate = torch.tensor(stage["lr"], device=device)  # one tensor, so that a CUDA graph may read it
    optimizers = {name: torch.optim.Adam(network.parameters(), rate, tuple(stage["betas"]), fused=True, capturable=True)
                  for name, network in networks.items()}
    phi = None
    if stage["content_weight"]:
        name, _, layer = config["content_network"].partition(":")
        phi = srgan.CONTENT_NETWORKS[name](*[layer] * bool(layer), weights=config["content_weights"],
                                           divisor=config["content_divisor"])
        phi = phi.to(device, memory_format=torch.channels_last)
        if precision == "bf16":
            phi.features.bfloat16()  # what autocast would do anew for each batch
    with torch.no_grad(), srgan.autocast(device, precision):  # what does not fit together shows now
        probe = torch.zeros(min(batch_size, 2), 3, config["patch_size"], config["patch_size"], device=device)
        for network in filter(None, (copy.deepcopy(discriminator), phi)):
            try:
                network(probe)
            except (RuntimeError, ValueError) as error:
                raise InputError(f"patches of {config['patch_size']}, {batch_size} at a time, are too small for "
                                 f"{type(network).__name__} ({srgan.one_line(error)})") from None
    shift = torch.zeros(2, dtype=torch.int64, device=device)
    sums, best, seconds, recovered = torch.zeros(len(LOSSES), device=device), {}, 0.0, 0

    def restore(state):
        nonlocal step, best, seconds, recovered
        try:
            step, best, seconds = (state[key] for key in ("step", "best", "seconds"))
            recovered = state.get("recovered", 0)
            sums.zero_()
            sums[:len(state["training"]["sums"])] = state["training"]["sums"]  # of an older version, with fewer LOSSES, too
            average.load_state_dict(state["generator"])
            for name in networks:
                networks[name].load_state_dict(state["training"][name])
                optimizers[name].load_state_dict(state["training"][name + "_optimizer"])
                optimizers[name].param_groups[0] |= {"lr": rate, "betas": tuple(stage["betas"]), "capturable": True}
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError("the checkpoint's networks are not those of the configuration "
                             f"({srgan.one_line(error)})") from None
    if state:
        restore(state)
        recovered = 0 if args.lr else recovered  # a rate that is named is meant
    resumed, state = state is not None, None  # its tensors are not needed twice

    # The networks as they are called: compiled on CUDA, and with the gradients of all processes where they are updated.
    compiled = config["compile"] == "yes" or config["compile"] == "auto" and device.type == "cuda" and optional("triton")
    G, D, phi = (torch.compile(network) if compiled and network is not None else network for network in (generator, discriminator, phi))
    G_updated, D_updated = (network and parallel(network, device) if world > 1 else network for network in (G, D))

    # The store of patches. The first process of each machine makes it, the others find it.
    sizes = [(0, config["patch_size"])] + [((epoch - 1) * steps_per_epoch, size) for epoch, size in stage["grow"]]
    if world > 1 and local > 0:
        dist.barrier()
    patches = srgan.Patches(data, max(size for _, size in sizes), scale, config["kernel"], config["augment"], config["crop_margin"],
                            device, args.cache, config["store"], list(data.values()), config["seed"], rank)
    if world > 1 and local == 0:
        dist.barrier()

    def batches():
        """(LR, HR, LR, HR, ...) for all updates to come, a pair for each step of D; patches grow as `grow` says."""
        d_steps = stage.get("discriminator_steps", 1)
        for (first, size), (last, _) in zip(sizes, sizes[1:] + [(total, None)]):
            if step < min(last, total):
                patches.resize(size)
                one = patches.batches(batch_size, max(first, step) * d_steps, min(last, total) * d_steps)
                yield from (sum(several, ()) for several in zip(*[one] * d_steps))

    def shifted(*pictures):
        """Pictures moved alike, cyclically, by up to stage["shift"] pixels: D's and phi's strides then meet G's grid at every offset."""
        for dim in (2, 3) * bool(stage.get("shift")):
            pictures = [x.index_select(dim, (torch.arange(x.shape[dim], device=device) - shift[dim - 2]) % x.shape[dim]) for x in pictures]
        return [x.contiguous(memory_format=torch.channels_last) for x in pictures]

    def update_discriminator(sr, hr, rng):
        """One step of D (Eq. 1); its part of the LOSSES."""
        discriminator.requires_grad_(True)
        with srgan.autocast(device, precision):
            real, fake = D_updated(hr), D_updated(sr)
            loss = srgan.ADVERSARIAL_LOSSES[stage["adversarial_loss"]][1](fake, real)
            if stage["gradient_penalty"]:
                mix = torch.from_numpy(rng.random(len(hr), np.float32)).to(device, non_blocking=True)
                loss = loss + stage["gradient_penalty"] * srgan.gradient_penalty(discriminator, sr, hr, mix)  # not D: a compiled network has no second derivative
            if stage["r1_penalty"] and step % R1_EVERY == 0:
                loss = loss + stage["r1_penalty"] / 2 * R1_EVERY * srgan.r1_penalty(discriminator, hr)
        optimize("discriminator", loss)
        discriminator.requires_grad_(False)
        return {"discriminator": loss, "d_real": real.mean(), "d_fake": fake.mean()}

    def generator_losses(sr, hr):
        """The terms of Eq. 3, those beyond the paper that have a weight, and `loss`, their weighted sum."""
        value = {}
        with srgan.autocast(device, precision):
            if stage["pixel_weight"]:
                value["pixel"] = srgan.PIXEL_LOSSES[stage["pixel_loss"]](sr, hr)
            if phi is not None:
                value["content"] = srgan.content_loss(phi, sr, hr)
            if stage.get("grid_weight"):
                value["grid"] = srgan.grid_loss(sr, hr, scale)
            if stage.get("spectrum_weight"):
                value["spectrum"] = srgan.spectrum_loss(sr, hr)
            if stage.get("stationarity_weight"):
                value["stationarity"] = srgan.stationarity_loss(sr, hr, scale)
            if D is not None:
                with torch.no_grad():
                    real = D(hr) if stage["adversarial_loss"] == "relativistic" else None
                value["adversarial"] = srgan.ADVERSARIAL_LOSSES[stage["adversarial_loss"]][0](D(sr), real)
        return value | {"loss": sum(stage[term + "_weight"] * loss for term, loss in value.items())}

    def optimize(name, loss):
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()

    def update(*batch):
        """One update of G (Eq. 2), and in stage 2 of D before it (Sec. 3.2: alternating, k = 1); the LOSSES, one tensor on the device."""
        value, rng = {}, np.random.default_rng((config["seed"], rank, step, 1))
        *earlier, lr, hr = batch               # [N, 3, 24, 24] and [N, 3, 96, 96]
        for early_lr, early_hr in zip(earlier[::2], earlier[1::2]):  # where D makes several steps
            with torch.no_grad(), srgan.autocast(device, precision):
                sr = G(early_lr)
            update_discriminator(*shifted(sr, early_hr), rng)
        with srgan.autocast(device, precision):
            sr, hr = shifted(G_updated(lr), hr)  # [N, 3, 96, 96]
        if D is not None:
            value = update_discriminator(sr.detach(), hr, rng)
        value |= generator_losses(sr, hr)
        optimize("generator", value["loss"])
        return torch.stack([value[name].detach().float() if name in value else sums.new_zeros(()) for name in LOSSES])

    def save(name, **training):
        srgan.save_checkpoint(out / name, average, stage=args.stage, step=step, best=best, seconds=seconds, recovered=recovered,
                              config=config, val=args.val or "", **training)

    def save_latest():
        training = {"sums": sums}
        for name in networks:
            training |= {name: networks[name].state_dict(), name + "_optimizer": optimizers[name].state_dict()}
        save(latest.name, training=training)

    # A signal is noted, the update finished, the state saved; a second signal ends at once.
    stopped = []

    def note_signal(number, _):
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, *srgan.STOP_SIGNALS):
        signal.signal(number, note_signal)

    if rank == 0:
        tracker, lpips = None, srgan.try_lpips(device) if config["lpips"] else None
        if not optional("matplotlib"):
            print("matplotlib is not installed; going on without curves.png", file=sys.stderr)
        (out / "samples").mkdir(parents=True, exist_ok=True)
        srgan.replacing_text(out / "config.json", json.dumps(config, indent=2) + "\n")
        if args.wandb:
            import wandb
            try:
                tracker = wandb.init(project="srgan", name=out.name, dir=out, config=config)
            except wandb.errors.Error as error:
                raise InputError(f"--wandb: {srgan.one_line(error)}") from None
        rows = []
        if resumed and (out / "metrics.csv").exists():
            with open(out / "metrics.csv", newline="") as file:  # what was logged after the checkpoint is done again
                rows = [row for row in csv.DictReader(file) if int(row["update"]) <= step]
        baseline = validate(None, pairs, config, lpips)
        if start:
            print(f"starting from {start_path}")
        print(f"{args.stage} on {device}, {precision}: {len(data)} pictures, {len(pairs)} to validate on "
              f"(bicubic {describe(baseline)}), updates {step} to {total}, into {out}", flush=True)
        if args.resume is not True:  # there is always a state to go back to
            save_latest()

    # The loop. Reading a tensor waits for the GPU, so the losses are looked at once a second, and at the end of an epoch.
    bar = tqdm(total=total, initial=step, unit="update", smoothing=0.1, disable=rank > 0,
               mininterval=0.5 if sys.stderr.isatty() else 30)
    began, epoch_began, epoch_first, looked, stop = time.monotonic() - seconds, time.monotonic(), step, 0.0, False
    graphed = device.type == "cuda" and world == 1 and config["compile"] != "no" and not (stage.get("gradient_penalty") or stage.get("r1_penalty"))
    take = Graphed(update, device) if graphed else update
    stream, tensors = batches(), (srgan.float_state(average), srgan.float_state(generator))
    while step < total and not stop:
        lr = learning_rate(stage, step, steps_per_epoch) * 0.5 ** recovered  # half the rate after each recovery
        rate.fill_(lr)
        if stage.get("shift"):
            shift.copy_(torch.from_numpy(np.random.default_rng((config["seed"], rank, step, 2)).integers(0, stage["shift"] + 1, 2)), non_blocking=True)
        losses = take(*next(stream))
        sums += losses
        step += 1
        srgan.ema_(*tensors, min(config["ema"], (1 + step) / (10 + step)))
        bar.update()
        epoch, rest = divmod(step, steps_per_epoch)
        alone = world == 1 and (stopped or device.type == "cpu" or time.monotonic() - looked > 1)
        if rest == 0 or alone or world > 1 and (step % 10 == 0 or device.type == "cpu"):
            looked = time.monotonic()
            bar.set_postfix(loss=f"{losses[0].item():.4f}", MB=f"{memory_mb(device):.0f}", refresh=False)
            values = [sums, *(tensor for network in networks.values() for tensor in srgan.float_state(network))] if rest == 0 or stopped else [sums]
            finite = torch.stack(torch._foreach_norm(values, math.inf)).isfinite().all()  # a gradient may break weights after a good loss
            flags = torch.stack([(~finite).float(), sums.new_tensor(float(len(stopped)))])
            if world > 1:  # what one process sees, all act on, after the same update
                dist.all_reduce(flags)
            broken, stop = (flags > 0).tolist()
            if broken:
                names = [name for name, value in zip(LOSSES, sums.tolist()) if not math.isfinite(value)]
                text = f"{', '.join(names) or 'weights, or a loss of another process,'} not finite at update {step}"
                if recovered == config["recoveries"]:
                    raise InputError(f"{text}, after {recovered} recoveries; go on from the last good state with --resume and "
                                     "another --lr, or --precision fp32")
                if stop:
                    raise InputError(f"{text}; the last good state is kept, go on from it with --resume and a lower --lr")
                again = recovered + 1
                restore(srgan.load_checkpoint(latest, device))
                recovered, stream = again, batches()
                if graphed:
                    take = Graphed(update, device)  # the optimisers' state is at another place now
                epoch_began, epoch_first = time.monotonic(), step
                if rank == 0:
                    bar.write(f"{text}; going on from update {step} with the learning rate halved "
                              f"({recovered} of {config['recoveries']})")
                    bar.reset(total)
                    bar.update(step)
                    rows = [row for row in rows if int(row["update"]) <= step]
                continue
        if rest == 0:
            mean = dict(zip(LOSSES, (sums / steps_per_epoch).tolist()))
            sums.zero_()
        if rest == 0 and rank == 0:
            row = {"epoch": epoch, "update": step, "lr": lr, **mean,
                   "updates_per_s": (step - epoch_first) / (time.monotonic() - epoch_began), "memory_mb": memory_mb(device)}
            rows.append(row)
            seconds = time.monotonic() - began
            if epoch % config["validate_every"] == 0 or step == total:
                sheet = out / "samples" / f"epoch_{epoch:04d}.png"
                metrics = validate(average, pairs, config, lpips, sheet)
                bar.write(f"epoch {epoch}  loss {mean['loss']:.4f}  {describe(metrics)}  {row['updates_per_s']:.1f} updates/s")
                for name, value in metrics.items():
                    if value is None:
                        continue
                    row |= {name: value["mean"], name + "_std": value["std"]}
                    sign = -1 if name == "lpips" else 1
                    if name not in best or sign * value["mean"] > sign * best[name]["mean"]:
                        best[name] = {**value, "epoch": epoch}
                        save(f"checkpoint_best_{name}.pth")
                if optional("matplotlib"):
                    draw_curves(rows, out / "curves.png")
                if tracker:
                    tracker.log({"samples": wandb.Image(str(sheet))}, step=step, commit=False)
            if tracker:
                tracker.log(row, step=step)
            with srgan.replacing(out / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            if config["checkpoint_every"] and epoch % config["checkpoint_every"] == 0:
                save(f"checkpoint_epoch_{epoch:04d}.pth")
                milestones = sorted(out.glob("checkpoint_epoch_*.pth"), key=lambda path: int(path.stem.split("_")[-1]))
                for path in milestones[:-config["keep"]] if config["keep"] else ():
                    path.unlink()
            summary = {"stage": args.stage, "epoch": epoch, "update": step, "best": best, "bicubic": baseline, "seconds": seconds,
                       "generator_parameters": sum(p.numel() for p in generator.parameters()), "device": str(device),
                       "precision": precision, "memory_mb": row["memory_mb"], "torch": torch.__version__, "data": args.data,
                       "val": args.val}
            srgan.replacing_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
            save_latest()
        if rest == 0:
            epoch_began, epoch_first = time.monotonic(), step
    bar.close()
    if rank == 0 and step < total:
        seconds = time.monotonic() - began
        save_latest()
        print(f"stopped after update {step} of {total}; go on with --resume")
    if rank == 0 and tracker:
        tracker.finish()
    if world > 1:
        dist.barrier()  # the others wait until rank 0 has saved
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    srgan.run(main)
