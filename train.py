r"""Train SRResNet (stage 1), then SRGAN (stage 2).

    python train.py --data DIV2K_train_HR --val DIV2K_valid_HR --stage srresnet
    python train.py --data DIV2K_train_HR --val DIV2K_valid_HR --stage gan

Stage 2 starts from stage 1's best checkpoint. Ctrl-C or SIGTERM ends a run after the current
update (with several processes, after at most ten more) and saves it; --resume continues it, on the
CPU bit for bit.

    python train.py --list-settings                               what can be set
    python train.py --data photos --stage gan --preset srgan-vgg22 --set gan.lr=5e-5
    torchrun --nproc-per-node 4 train.py --data ...               four GPUs
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        train.py --data ...                                       two machines, eight GPUs each

--batch-size is per GPU; all machines must see one run folder. One update is srgan.srresnet_step or
srgan.srgan_step.
"""
import argparse
import copy
import csv
import functools
import json
import math
import os
import signal
import time
from collections import namedtuple
from datetime import timedelta
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm import tqdm

import srgan
from srgan import InputError

ROOT = Path(__file__).parent
LOSSES = ("loss", *srgan.CONTENT_LOSSES, "adversarial", "discriminator", "d_real", "d_fake")


def main():
    args = parse_args()
    if args.list_settings:
        print(list_settings())
        return 0

    # The run folder, its settings, and the images.
    stage = args.stage
    out, saved = open_run(args)
    settings = resolve_settings(args, saved)
    train_pairs, val_pairs = find_data(args, settings)
    start_path, start = find_start(args, settings)

    # The device, the networks, and where a resumed run stopped.
    device, rank, world = set_up_process(args.device)
    settings["precision"] = set_up_arithmetic(device, settings["precision"], world)
    networks = make_networks(settings, stage, start, device)
    state = State(networks, stage_settings(settings, stage), device)
    if saved:
        before = saved.get("val") or saved.get("data")
        state.resume(saved, same_images=before == (args.val or args.data))
        del saved                                                # frees the memory of its tensors
    total = settings[f"{stage}.epochs"] * settings["steps_per_epoch"]
    if state.step >= total:
        raise InputError(f"the run is complete at update {state.step}; --epochs makes it longer")

    # The update, whose gradients are averaged over all processes, and the patches it learns from.
    tools = make_tools(settings, stage, state, device)
    if world > 1:
        for adam in state.adam.values():
            adam.register_step_pre_hook(average_gradients)
    patches = make_patches(args, settings, train_pairs)
    batches = make_batches(patches, settings, stage, device, rank, state.step, total)

    # The run folder, in which only the first process writes.
    folder = None
    if rank == 0:
        folder = RunFolder(out, args, settings, state, val_pairs, device, started=bool(start))
        folder.save()                                            # it can be resumed from now on
        origin = f", starting from {start_path}" if start else ""
        print(f"{stage} on {device}, {settings['precision']}: {len(train_pairs)} images, "
              f"{len(folder.pairs)} to validate on (bicubic "
              f"{srgan.describe(state.baselines['bicubic'])}), updates {state.step} to {total}, "
              f"into {out}{origin}", flush=True)

    # Training.
    train(tools, state, batches, folder, settings, stage, device, world)
    if folder:
        folder.close(total)
    if world > 1:
        dist.barrier()                                           # until the first process has saved
        dist.destroy_process_group()
    return 0


def train(tools, state, batches, folder, settings, stage, device, world):
    """The training loop. It ends after the last update, or soon after a signal in any process."""
    values = stage_settings(settings, stage)
    steps = settings["steps_per_epoch"]
    total = values["epochs"] * steps
    signals = record_signals(world)
    began = time.monotonic() - state.seconds
    epoch_began = time.monotonic()
    first = state.step
    bar = tqdm(total=total, initial=first, unit="update", disable=None if folder else True)
    stop = False

    while state.step < total and not stop:
        # One update, with the learning rate and the random numbers that belong to it.
        factor = rate_factor(values, state.step, steps)
        state.set_rates(factor)
        pairs = next(batches)                                    # the first call draws numbers, too
        torch.manual_seed(settings["seed"] + state.step)         # the same when resumed
        losses = update(tools, pairs)
        state.record(losses, settings["ema"])
        state.seconds = time.monotonic() - began
        bar.update()

        # Every ten updates, wait for the device, to check the numbers and for signals.
        end_of_epoch = state.step % steps == 0
        if end_of_epoch or state.step % 10 == 0 or (signals and world == 1):
            bar.set_postfix(loss=f"{losses['loss'].item():.4f}", refresh=False)
            not_finite, stop = any_process([not state.is_finite(), bool(signals)], device, world)
            if not_finite:
                raise InputError(f"a loss or a weight is not finite at update {state.step}; the "
                                 "last good checkpoint is kept; --resume it with a lower --lr")

        # At the end of an epoch, validate, log and save.
        if end_of_epoch:
            row = {"epoch": state.step // steps, "update": state.step, "lr": values["lr"] * factor}
            row.update(state.mean_losses())
            row["updates_per_s"] = (state.step - first) / (time.monotonic() - epoch_began)
            row["memory_mb"] = torch.cuda.max_memory_allocated() / 2 ** 20
            if folder:
                folder.end_epoch(row, bar, last=state.step == total)
            first = state.step
            epoch_began = time.monotonic()
    bar.close()


def update(tools, pairs):
    """One update with batches of LR and HR, one pair for each step of D. Returns {name: scalar}.

    The steps themselves are srgan.srresnet_step and srgan.srgan_step. Only what the settings can
    add to them stands here; with the base settings, that is nothing.
    """
    # Move SR and HR together by some random pixels. Otherwise, strides in D and pooling in phi
    # favour some positions, and G learns their pattern.
    G = tools.G
    if tools.shift:
        move = torch.randint(tools.shift + 1, (2,)).tolist()
        G = functools.partial(super_resolve_and_roll, tools.G, move)
        pairs = [(lr, hr.roll(move, (2, 3))) for lr, hr in pairs]

    lr, hr = pairs[-1]
    if tools.D is None:                                          # stage 1
        losses = srgan.srresnet_step(G, tools.adam_G, tools.content, lr, hr)
    else:                                                        # stage 2
        # A critic takes several steps to each step of G (Gulrajani et al. 2017).
        d_loss = tools.game.d_loss
        for early_lr, early_hr in pairs[:-1]:
            with torch.no_grad():
                sr = G(early_lr)
            srgan.discriminator_step(tools.D, tools.adam_D, sr, early_hr, d_loss, tools.penalty)

        # Relativistic losses also show HR to D in G's step.
        g_loss = tools.game.g_loss
        if tools.game.g_sees_hr:
            g_loss = functools.partial(g_loss, hr=hr)
        losses = srgan.srgan_step(G, tools.D, tools.adam_G, tools.adam_D, tools.content, lr, hr,
                                  tools.weight, g_loss, d_loss, tools.penalty)
    losses.update(tools.content.parts)
    return losses


def super_resolve_and_roll(G, move, lr):
    """SR of LR, moved down and right by `move` pixels; what leaves the patch comes in again."""
    return G(lr).roll(move, (2, 3))


# The command line, the run folder and the data.

FLAGS = {  # short for --set
    "--epochs": "STAGE.epochs", "--steps-per-epoch": "steps_per_epoch",
    "--batch-size": "batch_size", "--lr": "STAGE.lr", "--seed": "seed",
    "--precision": "precision", "--feature-weights": "content_weights",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", metavar="DIR", help="folders of HR images to train on")
    add("--lr-data", metavar="DIR", help="LR images of --data (default: made from HR)")
    add("--val", metavar="DIR", help="HR images to validate on (default: a part of --data)")
    add("--stage", choices=("srresnet", "gan"))
    add("--list-settings", action="store_true", help="print all presets and settings, and exit")
    add("--preset", default="paper", choices=read_json(ROOT / "config.json")["presets"],
        metavar="NAME", help="one of config.json's presets")
    add("--config", metavar="FILE", help="JSON file of settings, such as a run's config.json")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting")
    for flag, name in FLAGS.items():
        add(flag, metavar="VALUE", help=f"--set {name}=VALUE")
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
    if args.list_settings:
        return args
    if not args.data:
        parser.error("--data is missing: name a folder of images to train on")
    if not args.stage:
        parser.error("--stage is missing: srresnet, and then gan")
    if args.lr_data and len(args.data) > 1:
        parser.error("--lr-data needs exactly one --data folder")
    if args.wandb and not find_spec("wandb"):
        parser.error("--wandb needs a package that is not installed: pip install wandb")
    return args


def open_run(args):
    """(run folder, checkpoint to resume or None). Raises InputError if they do not fit."""
    out = Path(args.out or f"runs/{args.stage}")
    lock_run(out)

    # A folder that holds a run is only ever continued.
    latest = out / "checkpoint_latest.pth"
    path = latest if args.resume is True else Path(args.resume or "")
    if latest.exists() and not (args.resume and os.path.samefile(path, latest)):
        raise InputError(f"{out} holds another run; continue that one with --resume, or choose "
                         "another folder with --out")
    if not args.resume:
        return out, None

    # The checkpoint must be one of this stage that can be resumed.
    saved = srgan.load_checkpoint(path)
    if "training" not in saved:
        raise InputError(f"{path}: only a checkpoint_latest.pth can be resumed; start from its "
                         "generator with --init")
    if saved.get("stage") != args.stage:
        raise InputError(f"{path}: a checkpoint of stage {saved.get('stage')}, not {args.stage}; "
                         "start from its generator with --init")
    if saved.get("lr_data") and not args.lr_data:
        raise InputError(f"this run was trained with --lr-data {saved['lr_data']}; give it again")
    return out, saved


def lock_run(out):
    """Let no other training write to this folder, until this process ends. Raises InputError."""
    if os.environ.get("RANK", "0") != "0":                       # torchrun's first process does it
        return
    out.mkdir(parents=True, exist_ok=True)
    owner = out / "running.txt"
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{out}: another training is writing to this folder, "
                         f"{owner.read_text().strip()}; choose another one with --out") from None
    owner.write_text(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M')}\n")
    LOCKS.append(lock)


LOCKS = []                                                       # kept until the process ends


def find_data(args, settings):
    """[(name, HR path, LR path or None)] to train on, and to validate on."""
    scale = settings["scale"]
    kernel = settings["kernel"]
    if args.lr_data:
        pairs = srgan.find_pairs(args.data[0], args.lr_data, scale, kernel)
    else:
        paths = set()
        for folder in args.data:
            paths.update(srgan.find_hr(folder))
        pairs = [(str(path), path, None) for path in sorted(paths)]
    if args.val:
        return pairs, srgan.find_pairs(args.val, scale=scale, kernel=kernel)
    parts = srgan.split(pairs, settings["split"], settings["validate_on"])
    if not parts["train"]:
        raise InputError("one image is too few for training and validation; give more, or --val")
    return parts["train"], parts["val"]


def find_start(args, settings):
    """(path, generator) of --init or, in stage 2, of stage 1; else (None, None)."""
    path = args.init
    if not path:
        if args.resume or args.stage == "srresnet":
            return None, None
        path = Path("runs/srresnet/checkpoint_best_psnr.pth")
        if not path.exists():
            path = ROOT / "weights/srresnet.pth"
        if not path.exists():
            raise InputError("stage gan starts from an SRResNet: train one, or name one with "
                             "--init")
    generator = srgan.load_generator(path)
    for key, value in generator.arch.items():
        if settings[key] != value:
            raise InputError(f"{path} has {key} {value}, the settings have {settings[key]}; train "
                             "stage 1 with these settings and give its checkpoint as --init")
    return path, generator


def make_patches(args, settings, pairs):
    """srgan.Patches of the training images."""
    _, hr_paths, lr_paths = zip(*pairs)
    hr_store = srgan.Store(hr_paths, args.cache, settings["store"])
    lr_store = None
    if args.lr_data:                                             # stored if HR is
        mode = "never" if hr_store.pixels is None else "always"
        lr_store = srgan.Store(lr_paths, args.cache, mode)
    return srgan.Patches(hr_store, settings["patch_size"], settings["scale"], settings["kernel"],
                         settings["crop_margin"], lr_store)


def make_batches(patches, settings, stage, device, rank, first, last):
    """Yield [(LR, HR), ...] for updates first to last - 1: one pair for each step of D."""
    d_steps = settings.get(f"{stage}.discriminator_steps", 1)
    sampler = srgan.RandomBatches(patches.usable, settings["batch_size"], settings["augment"],
                                  settings["seed"], rank, first * d_steps, last * d_steps)
    pairs = srgan.batches(patches, sampler, device)
    for _ in range(first, last):
        yield [next(pairs) for _ in range(d_steps)]


# The device, the networks and their state.

def set_up_process(name):
    """(device, rank, number of processes); torchrun starts several."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    if world > 1 and ":" in name:
        raise InputError("torchrun gives each process its own GPU: use --device cuda")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = srgan.pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)                            # opens no other GPU
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:                                                     # the first may validate for hours
            dist.init_process_group(backend, timeout=timedelta(hours=12),
                                    device_id=device if device.type == "cuda" else None)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"torchrun: {srgan.one_line(error)}") from None
    return device, rank, world


def set_up_arithmetic(device, precision, world=1):
    """The precision to use, "fp32" or "bf16", the same in all processes. fp32 excludes TF32."""
    torch.backends.cudnn.allow_tf32 = False                      # for the measurement, too
    torch.backends.cuda.matmul.allow_tf32 = False
    precision = srgan.pick_precision(device, precision)
    if world > 1:
        answer = [precision]
        dist.broadcast_object_list(answer, device=device)        # the first process decides
        precision = answer[0]
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = True
    return precision


def make_networks(settings, stage, start, device):
    """{"generator": G, in stage 2 also "discriminator": D}, in training mode on the device."""
    # G, new or from the start's weights.
    torch.manual_seed(settings["seed"])
    generator = srgan.make_generator(settings["block"], settings["scale"], settings["channels"],
                                     settings["n_blocks"], settings["tanh"])
    srgan.INITS[settings["init"]](generator)
    if start:
        generator.load_state_dict(start.state_dict())
    networks = {"generator": generator}

    # D, always new. With the base settings, it is srgan.Discriminator layer by layer.
    if stage == "gan":
        networks["discriminator"] = srgan.VariantDiscriminator(
            settings["patch_size"], **stage_settings(settings, "discriminator"))
    for network in networks.values():
        network.to(device, memory_format=torch.channels_last).train()

    # Batch norm that is in evaluation mode keeps its statistics.
    if settings.get(f"{stage}.freeze_batch_norm"):
        for module in generator.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    return networks


class State:
    """Networks, optimisers and counters: what a checkpoint holds and --resume restores."""

    def __init__(self, networks, values, device):
        self.networks = networks
        self.average = copy.deepcopy(networks["generator"])      # the moving average: the result
        self.average.eval().requires_grad_(False)
        self.averaged = srgan.float_state(self.average)
        self.current = srgan.float_state(networks["generator"])

        # An Adam for each network, with a learning rate of its own.
        beta1, beta2 = values["betas"]
        self.base_rates = {"generator": values["lr"]}
        if "discriminator" in networks:
            self.base_rates["discriminator"] = values["discriminator_lr"] or values["lr"]
        self.adam = {}
        for name, network in networks.items():
            self.adam[name] = torch.optim.Adam(network.parameters(), self.base_rates[name],
                                               (float(beta1), float(beta2)), fused=True)

        # What has happened so far.
        self.step = 0
        self.seconds = 0.0
        self.best = {}
        self.baselines = {}
        self.n_summed = 0                                        # updates in the sums
        self.sums = {name: torch.zeros((), device=device) for name in LOSSES}

    def set_rates(self, factor):
        for name, adam in self.adam.items():
            adam.param_groups[0]["lr"] = self.base_rates[name] * factor

    def record(self, losses, decay):
        """After an update: add its losses, count it, average G (at first over only a few)."""
        for name, loss in losses.items():
            self.sums[name] += loss.detach()
        self.n_summed += 1
        self.step += 1
        srgan.ema_(self.averaged, self.current, min(decay, (1 + self.step) / (10 + self.step)))

    def mean_losses(self):
        """The mean of each loss since the last call."""
        means = {}
        for name, total in self.sums.items():
            means[name] = total.item() / self.n_summed
            total.zero_()
        self.n_summed = 0
        return means

    def is_finite(self):
        """Whether all losses and weights are finite."""
        tensors = list(self.sums.values())
        for network in self.networks.values():
            tensors.extend(srgan.float_state(network))
        return torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all().item()

    def training(self):
        """The part of a checkpoint that only a resumed run needs."""
        parts = {}
        for name, network in self.networks.items():
            parts[name] = network.state_dict()
            parts[f"{name}_adam"] = self.adam[name].state_dict()["state"]
        return parts

    def resume(self, saved, same_images=True):
        """Restore the state of a checkpoint. Raises InputError if it does not fit.

        same_images: whether validation sees the images that it saw before; if not, the best scores
        start anew.
        """
        try:
            self.average.load_state_dict(saved["generator"])
            for name, network in self.networks.items():
                network.load_state_dict(saved["training"][name])
                restore_adam(self.adam[name], saved["training"][f"{name}_adam"])
            self.step = int(saved["step"])
            self.seconds = float(saved["seconds"])
            if same_images:
                self.best = dict(saved["best"])
                self.baselines = dict(saved["baselines"])
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise InputError(f"the checkpoint cannot be resumed: {srgan.one_line(error)}") from None


def restore_adam(adam, saved):
    """Restore Adam's moments. Raises ValueError where they do not fit, for fused Adam would not."""
    if not saved:                                                # it has not taken a step yet
        return
    for i, p in enumerate(adam.param_groups[0]["params"]):
        adam.state[p]["step"] = torch.tensor(float(saved[i]["step"]), device=p.device)
        for name in ("exp_avg", "exp_avg_sq"):
            if saved[i][name].shape != p.shape:
                raise ValueError(f"Adam's {name} {i} is not of its parameter's shape")
            adam.state[p][name] = torch.zeros_like(p).copy_(saved[i][name])


# What an update consists of.

Tools = namedtuple("Tools", "G adam_G content D adam_D weight game penalty shift",
                   defaults=(None, None, 0, None, None, 0))      # stage 1 needs the first three


def make_tools(settings, stage, state, device):
    """What `update` needs: the networks in their fast form, and the losses of the settings."""
    values = stage_settings(settings, stage)
    compiled = settings["compile"] == "yes"
    if settings["compile"] == "auto" and device.type == "cuda":  # Triton needs a Volta or newer
        compiled = find_spec("triton") and torch.cuda.get_device_capability(device) >= (7, 0)

    # The content loss l_X of Eq. 3, of one or several parts.
    phi = None
    if values["content_weight"]:
        phi = speed_up(make_phi(settings, device), settings, compiled)
    losses = srgan.content_losses(values["pixel_loss"], phi, settings["scale"])
    content = srgan.WeightedSum()
    for name, loss in losses.items():
        if values[f"{name}_weight"]:
            content.terms[name] = (values[f"{name}_weight"], loss)
    G = speed_up(state.networks["generator"], settings, compiled)
    if stage == "srresnet":
        return Tools(G, state.adam["generator"], content)

    # The game of Eq. 2. Penalties differentiate D twice, which torch.compile does not support.
    D = speed_up(state.networks["discriminator"], settings, compiled)
    plain_D = speed_up(state.networks["discriminator"], settings, compiled=False)
    penalty = srgan.WeightedSum()
    for name, function in srgan.PENALTIES.items():
        if values[name]:
            penalty.terms[name] = (values[name], functools.partial(function, plain_D))
    game = srgan.ADVERSARIAL_LOSSES[values["adversarial_loss"]]
    return Tools(G, state.adam["generator"], content, D, state.adam["discriminator"],
                 values["adversarial_weight"], game, penalty, values["shift"])


def make_phi(settings, device):
    """The content network of Eq. 5, on the device."""
    name, _, layer = settings["content_network"].partition(":")
    network = srgan.CONTENT_NETWORKS[name]
    phi = network(layer, settings["content_weights"], settings["content_divisor"])
    return phi.to(device, memory_format=torch.channels_last)


def speed_up(network, settings, compiled):
    """The network in its fast form and precision, see section 9 of srgan.py."""
    network = srgan.Fast(network, settings["precision"])
    if compiled:                                                 # patches have one size
        network = torch.compile(network, dynamic=False)
    return network


def average_gradients(optimizer, *_):
    """Before a step: average the gradients over all processes, as if of one large batch.

    DistributedDataParallel would do it during backward, but it allows neither for D, which is
    frozen in G's step, nor for penalties, which differentiate D twice.
    """
    gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for gradient in gradients:
        end = start + gradient.numel()
        gradient.copy_(flat[start:end].view_as(gradient))
        start = end


def rate_factor(values, step, steps_per_epoch):
    """The factor on the base learning rate at update `step`, counted from 0."""
    factor = 1.0
    if values["warmup"]:
        factor = min(1.0, (step + 1) / values["warmup"])
    if values["schedule"] == "step":
        for epoch in values["milestones"]:
            if step >= epoch * steps_per_epoch:
                factor *= 0.1
    if values["schedule"] == "cosine":
        total = values["epochs"] * steps_per_epoch
        factor *= 0.5 + 0.5 * math.cos(math.pi * step / total)
    return factor


def record_signals(world=1):
    """A list to which SIGINT, SIGTERM and SIGHUP are added. A second one ends the program, but not
    under torchrun, which adds a signal of its own."""
    seen = []

    def record(number, frame):
        seen.append(number)
        if world == 1:
            signal.signal(number, signal.SIG_DFL)
    srgan.handle_signals((signal.SIGINT, *srgan.STOP_SIGNALS), record)
    return seen


def any_process(conditions, device, world):
    """Whether each of these conditions holds in any of the processes."""
    flags = torch.tensor(conditions, dtype=torch.float32, device=device)
    if world > 1:
        dist.all_reduce(flags)
    return [flag > 0 for flag in flags.tolist()]


# The run folder.

class RunFolder:
    """A run's config.json, metrics.csv, summary.json, curves.png, samples/ and checkpoints."""

    def __init__(self, path, args, settings, state, pairs, device, started):
        self.path = path
        self.settings = settings
        self.scale = settings["scale"]
        self.state = state
        self.pairs = pairs
        self.metrics = srgan.usable_metrics(settings["lpips"], device)
        self.about = {"stage": args.stage, "data": args.data, "lr_data": args.lr_data or "",
                      "val": args.val or "", "device": str(device), "torch": str(torch.__version__)}
        (path / "samples").mkdir(parents=True, exist_ok=True)
        srgan.write_json(path / "config.json", settings)
        self.rows = read_rows(path / "metrics.csv", state.step)
        if not find_spec("matplotlib"):
            srgan.say("matplotlib is not installed; going on without curves.png")
        self.tracker = None
        if args.wandb:
            import wandb
            self.tracker = wandb.init(project="srgan", name=path.name, dir=path, config=settings)

        # What the run is compared with. Images that cannot be measured are left out from now on.
        state.baselines["bicubic"] = self.validate(self.bicubic, True)
        if started:
            state.baselines["start"] = self.validate(self.super_resolve)

    def bicubic(self, lr, stem=None):
        return srgan.interpolate(lr, self.scale)

    def super_resolve(self, lr, stem=None):
        return srgan.upscale(self.state.average, lr)

    def validate(self, model, leave_out=False):
        """Mean and standard deviation of the metrics of model(lr, stem), as evaluate.py measures.

        An image that cannot be measured is left out from now on, or else is an InputError: means
        over other images could not be compared with earlier ones.
        """
        torch.backends.cudnn.benchmark = False                   # images differ in size
        results = srgan.measure_all(self.pairs, {"SR": model}, self.scale,
                                    self.settings["kernel"], names=self.metrics, shave=self.scale)
        torch.backends.cudnn.benchmark = True
        if leave_out:
            self.pairs = [pair for pair in self.pairs if pair[0] in results]
        if not results:
            raise InputError("none of the images to validate on can be measured")
        if len(results) < len(self.pairs):
            raise InputError("an image to validate on can no longer be measured; --resume when it "
                             "can")
        return srgan.aggregate([row["SR"] for row in results.values()])

    def end_epoch(self, row, bar, last):
        """Validate, log and save."""
        epoch = row["epoch"]
        if last or epoch % self.settings["validate_every"] == 0:
            scores = self.validate(self.super_resolve)
            self.save_sample(self.path / f"samples/epoch_{epoch:04d}.png")
            bar.write(f"epoch {epoch}  loss {row['loss']:.4f}  {srgan.describe(scores)}  "
                      f"{row['updates_per_s']:.1f} updates/s")
            for name in self.metrics:
                row[name] = scores[name]["mean"]
                row[f"{name}_std"] = scores[name]["std"]
                self.save_if_best(name, scores[name], epoch)
        self.log(row)
        every = self.settings["checkpoint_every"]
        if every and epoch % every == 0:
            self.save(f"epoch_{epoch:04d}")
        self.save()

    def save_if_best(self, name, score, epoch):
        """Save checkpoint_best_<name>.pth if this metric is better than in all earlier epochs."""
        best = self.state.best
        if name in best:
            gain = score["mean"] - best[name]["mean"]
            if not srgan.METRICS[name].higher_is_better:
                gain = -gain
            if not gain > 0:
                return
        best[name] = {"mean": score["mean"], "std": score["std"], "epoch": epoch}
        self.save(f"best_{name}")

    def save(self, name="latest"):
        """Write a checkpoint of the moving average; only "latest" can be resumed."""
        state = self.state
        more = {"step": state.step, "seconds": state.seconds, "best": state.best,
                "baselines": state.baselines, "config": self.settings}
        more.update(self.about)
        if name == "latest":
            more["training"] = state.training()
        srgan.save_checkpoint(self.path / f"checkpoint_{name}.pth", state.average, **more)

    def save_sample(self, path):
        """Save the centre of the first validation image: bicubic, SR and HR, side by side."""
        _, *paths = self.pairs[0]
        lr, hr = srgan.open_pair(*paths, self.scale, self.settings["kernel"])

        # Up to 100x100 LR pixels, and the same place of HR.
        top = max(0, lr.shape[0] - 100) // 2
        left = max(0, lr.shape[1] - 100) // 2
        lr = lr[top:top + 100, left:left + 100]
        h, w = (self.scale * side for side in lr.shape[:2])
        hr = hr[top * self.scale:top * self.scale + h, left * self.scale:left * self.scale + w]

        views = self.bicubic(lr), self.super_resolve(lr), hr
        with srgan.replacing(path) as temporary:
            srgan.side_by_side(views, ["bicubic", "SR", "HR"]).save(temporary)

    def log(self, row):
        """Add a row to metrics.csv, summary.json, curves.png and Weights & Biases."""
        state = self.state
        self.rows.append(row)
        write_rows(self.path / "metrics.csv", self.rows)
        summary = dict(self.about)
        for key in ("epoch", "update", "memory_mb"):
            summary[key] = row[key]
        summary["seconds"] = state.seconds
        summary["best"] = state.best
        summary.update(state.baselines)
        srgan.write_json(self.path / "summary.json", summary)
        if "psnr" in row and find_spec("matplotlib"):            # after a validation
            draw_curves(self.rows, self.path / "curves.png")
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


def read_rows(path, step):
    """The rows of metrics.csv up to update `step`; epochs after it will be trained again."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if int(row["update"]) <= step]


def write_rows(path, rows):
    """Write metrics.csv: a row for each epoch, a column for each loss and metric."""
    scores = [name + end for name in srgan.METRICS for end in ("", "_std")]
    columns = ["epoch", "update", "lr", *LOSSES, *scores, "updates_per_s", "memory_mb"]
    with srgan.replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")    # a resumed run has more
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(rows, path):
    """Draw each loss and metric that was not always 0 over the updates."""
    from matplotlib.figure import Figure
    curves = {}
    for name in (*LOSSES, *srgan.METRICS):
        points = [(int(row["update"]), float(row[name])) for row in rows if row.get(name)]
        if any(value for _, value in points):
            curves[name] = points
    figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (name, points) in zip(panels, curves.items()):
        axes.plot(*zip(*points), marker=".")
        axes.set(title=name, xlabel="update")
        axes.locator_params(axis="x", nbins=5)                   # labels do not overlap
    with srgan.replacing(path) as temporary:
        figure.savefig(temporary)


# Settings. config.json holds each setting's default together with its meaning:
# "lr": [1e-4, "learning rate"]. Here, they are flat: {"gan.lr": 1e-4}.

PHI = [f"{name}:{layer}" for name, network in srgan.CONTENT_NETWORKS.items()
       for layer in network.layers]
CHOICES = {  # settings with a fixed list of values; others may have any of their default's type
    "scale": srgan.SCALES, "block": srgan.GENERATORS, "init": srgan.INITS, "norm": srgan.NORMS,
    "content_network": PHI, "kernel": srgan.KERNELS, "augment": srgan.SYMMETRIES,
    "store": ("auto", "always", "never"), "schedule": ("constant", "step", "cosine"),
    "pixel_loss": srgan.PIXEL_LOSSES, "adversarial_loss": srgan.ADVERSARIAL_LOSSES,
    "precision": ("auto", "bf16", "fp32"), "compile": ("auto", "yes", "no"),
}
# No number may be negative. These must not be 0 either.
POSITIVE = ("channels", "patch_size", "batch_size", "steps_per_epoch", "epochs", "lr",
            "validate_every", "discriminator_steps", "content_divisor")
# These must be below 1: otherwise, the moving average or Adam would never move.
BELOW_1 = ("ema", "betas")


def resolve_settings(args, saved=None):
    """A run's settings: config.json's defaults or those of a resumed run, changed by the preset,
    by --config, by --set and by the flags that are short for it. Raises InputError."""
    file = read_json(ROOT / "config.json")
    settings = {}
    for name, (default, meaning) in flatten(file["settings"]).items():
        settings[name] = default
    if saved:
        change(settings, saved["config"])
    change(settings, file["presets"][args.preset]["changes"])
    if args.config:
        change(settings, read_json(args.config))
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set {item}: write NAME=VALUE")
        change(settings, {name: parse_value(value)})
    for flag, name in FLAGS.items():
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if value is not None:
            change(settings, {name.replace("STAGE", args.stage): parse_value(value)})

    # Mistakes that would show much later, or never.
    if settings["patch_size"] % settings["scale"]:
        raise InputError(f"patch_size must be a multiple of scale, {settings['scale']}")
    if len(settings["split"]) != 3 or sum(settings["split"]) != 100:
        raise InputError("split must be three percentages, in total 100")
    if len(settings[f"{args.stage}.betas"]) != 2:
        raise InputError(f"{args.stage}.betas must be two numbers")
    channels = settings["discriminator.channels"]
    if not channels or set(map(type, channels)) != {int}:
        raise InputError("discriminator.channels must be one or more whole numbers")
    if settings["discriminator.first_kernel"] % 2 == 0:
        raise InputError("discriminator.first_kernel must be an odd number")
    weights = [settings[f"{args.stage}.{name}_weight"] for name in srgan.CONTENT_LOSSES
               if name != "tv"]
    if not any(weights):
        raise InputError(f"{args.stage}: the weights of all losses that compare SR with HR are 0")
    return settings


def parse_value(text):
    """A value of the command line: JSON, or a word, which needs no quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def flatten(config, prefix=""):
    """{"gan": {"lr": 1}} -> {"gan.lr": 1}; names that are already flat stay as they are."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def stage_settings(settings, group):
    """The settings of a group such as "gan", without its name: {"lr": 1e-4, ...}."""
    start = group + "."
    return {name.removeprefix(start): value for name, value in settings.items()
            if name.startswith(start)}


def change(settings, changes):
    """Change flat settings in place. Raises InputError, which names the wrong setting."""
    for name, value in flatten(changes).items():
        if name not in settings:
            near = [other for other in settings if other.endswith(f".{name}")]
            near = near or get_close_matches(name, settings, 1)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"unknown setting {name}{hint}")
        kind = type(settings[name])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"{name} must be of type {kind.__name__}, not {value!r:.60}")
        key = name.split(".")[-1]
        if key in CHOICES and value not in CHOICES[key]:
            choices = ", ".join(map(str, CHOICES[key]))
            raise InputError(f"{name} must be one of {choices}, not {value!r:.60}")
        check_numbers(name, value)
        settings[name] = value


def check_numbers(name, value):
    """Refuse numbers that would destroy or mislead: see POSITIVE and BELOW_1."""
    numbers = [value]
    if type(value) is list:
        numbers = value
        if not all(type(number) in (int, float) for number in numbers):
            raise InputError(f"{name} must be a list of numbers, not {value!r:.60}")
    elif type(value) not in (int, float):
        return
    key = name.split(".")[-1]
    for number in numbers:
        if key in POSITIVE and number == 0:
            raise InputError(f"{name} must be above 0, not 0")
        if not 0 <= number < math.inf:
            raise InputError(f"{name} must be 0 or above, not {number}")
        if number >= 2 ** 63:
            raise InputError(f"{name} must be below 2^63, not {number}")
        if key in BELOW_1 and number >= 1:
            raise InputError(f"{name} must be below 1, not {number}")


def read_json(path):
    """The object in a JSON file. Raises InputError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if type(content) is not dict:
        raise InputError(f"{path}: not a group of settings")
    return content


def list_settings():
    """A text: the presets, then each setting's default and meaning."""
    file = read_json(ROOT / "config.json")
    lines = []
    for name, preset in file["presets"].items():
        lines.append(f"--preset {name:20s} {preset['about']}")
    for name, (default, meaning) in flatten(file["settings"]).items():
        lines.append(f"{name:28s} {json.dumps(default):30s} {meaning}")
    return "\n".join(lines)


if __name__ == "__main__":
    srgan.run(main)
