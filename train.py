"""Train SRResNet (stage 1) and SRGAN (stage 2).

    python train.py --data DIV2K_train_HR --val DIV2K_valid_HR --stage srresnet
    python train.py --data DIV2K_train_HR --val DIV2K_valid_HR --stage gan

Stage 2 starts from stage 1's best checkpoint. Ctrl-C or SIGTERM finishes the update, saves and
exits; --resume goes on from there, bit for bit on the same machine. Any setting of config.json:

    python train.py ... --preset quick --set gan.lr=5e-5 --set content_network=vgg19:2_2

Four GPUs, and two machines with eight each (--batch-size counts for each GPU):

    torchrun --nproc-per-node 4 train.py --data ...
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 train.py --data ...
"""
import argparse
import copy
import csv
import difflib
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import srgan
from srgan import InputError

HERE = Path(__file__).parent
COLUMNS = ("epoch", "update", "lr", "loss", "pixel", "content", "adversarial", "discriminator", "d_real", "d_fake",
           "psnr", "ssim", "lpips", "updates_per_s")
LOSSES = COLUMNS[3:10]  # means over the epoch; d_real, d_fake: D's mean probability that HR and SR are real

# What each setting of config.json may be. A stage's settings are named as gan.lr.
positive = (lambda v: v > 0, "above 0")
not_negative = (lambda v: v >= 0, "0 or above")
fraction = (lambda v: 0 <= v < 1, "from 0 to below 1")


def one_of(*choices):
    return lambda v: v in choices, "one of " + ", ".join(map(str, choices))


RULES = {
    "scale": one_of(*srgan.SCALES), "channels": (lambda v: v >= 3, "3 or above"), "n_blocks": positive,
    "patch_size": positive, "batch_size": positive,
    "kernel": one_of("bicubic", "gaussian"), "augment": one_of(*srgan.SYMMETRIES), "store": one_of("auto", "always", "never"),
    "content_network": (lambda v: v.partition(":")[0] in srgan.CONTENT_NETWORKS,
                        "vgg19 or squeezenet1_1, with a layer after a colon: vgg19:5_4"),
    "content_weights": (lambda v: v != "", "imagenet, random or a path"),
    "steps_per_epoch": positive,
    "betas": (lambda v: len(v) == 2 and all(isinstance(b, float) and 0 <= b < 1 for b in v), "two numbers from 0.0 to below 1"),
    "ema": fraction, "validate_every": positive, "checkpoint_every": not_negative,
    "lpips": one_of(True, False), "precision": one_of("auto", "bf16", "fp32"), "compile": one_of("auto", "yes", "no"),
    "seed": not_negative, "epochs": positive, "lr": positive,
    "milestones": (lambda v: all(type(e) is int and e > 0 for e in v) and v == sorted(v), "epochs in ascending order"),
    "pixel_loss": one_of(*srgan.PIXEL_LOSSES),
    "pixel_weight": not_negative, "content_weight": not_negative, "adversarial_weight": not_negative,
}


def lay_over(config, changes, prefix=""):
    """Change settings of `config` in place. Raises InputError, by name, for unknown settings, wrong types and impossible values."""
    if not isinstance(changes, dict):
        raise InputError(f"{prefix.rstrip('.') or 'the configuration'} must be a group of settings, not {changes!r}")
    for key, value in changes.items():
        name = prefix + key
        if key not in config:
            near = difflib.get_close_matches(key, config, 1)
            raise InputError(f"unknown setting {name}" + (f"; did you mean {prefix}{near[0]}?" if near else ""))
        if isinstance(config[key], dict):
            lay_over(config[key], value, name + ".")
            continue
        kind = type(config[key])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"{name} must be of type {kind.__name__}, not {value!r}")
        holds, text = RULES[key]
        if not holds(value) or kind is float and not math.isfinite(value):
            raise InputError(f"{name} must be {text}, not {value!r}")
        config[key] = value


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def resolve_config(args, saved=None):
    """The base of config.json, or a resumed run's configuration, under preset, --config, --set and the flags, in this order."""
    file = read_json(HERE / "config.json")
    if args.preset not in (None, *file["presets"]):
        raise InputError(f"no preset {args.preset!r}; there are {', '.join(file['presets'])}")
    config = copy.deepcopy(file["base"])
    lay_over(config, saved or {})
    if args.preset:
        lay_over(config, {key: value for key, value in file["presets"][args.preset].items() if key != "about"})
    if args.config:
        lay_over(config, read_json(args.config))
    for item in args.set:
        name, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"--set {item}: write key=value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text  # a word needs no quotes
        for part in reversed(name.split(".")):
            value = {part: value}
        lay_over(config, value)
    flags = {key: getattr(args, key) for key in ("steps_per_epoch", "batch_size", "precision", "seed")}
    lay_over(config, {key: value for key, value in flags.items() if value is not None})
    flags = {key: getattr(args, key) for key in ("epochs", "lr")}
    lay_over(config[args.stage], {key: value for key, value in flags.items() if value is not None}, args.stage + ".")
    if config["patch_size"] % config["scale"]:
        raise InputError(f"patch_size {config['patch_size']} is no multiple of scale {config['scale']}")
    return config


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", metavar="DIR", help="folders of HR training pictures")
    parser.add_argument("--val", metavar="DIR", help="folder of HR pictures, or with HR/ and LR_bicubic_x4/ (default: 5 %% of the data, at most 20)")
    parser.add_argument("--stage", choices=("srresnet", "gan"))
    parser.add_argument("--preset", metavar="NAME", help="one of config.json's; see --list-presets")
    parser.add_argument("--list-presets", action="store_true", help="show the presets and exit")
    parser.add_argument("--config", metavar="FILE", help="JSON file of settings that differ from config.json's base")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting, such as gan.lr=5e-5")
    parser.add_argument("--epochs", type=int, help="of steps_per_epoch updates each")
    parser.add_argument("--steps-per-epoch", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, metavar="N", help="patches per update and GPU")
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--init", metavar="CKPT", help="generator to start from (stage gan: default, the first there is of "
                        "runs/srresnet/checkpoint_best_psnr.pth and weights/srresnet.pth)")
    parser.add_argument("--resume", nargs="?", const=True, metavar="CKPT", help="go on from the --out folder's checkpoint_latest.pth, or from CKPT")
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/STAGE)")
    parser.add_argument("--cache", default="cache", metavar="DIR", help="where decoded pictures are kept (default: cache)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--seed", type=int)
    args = parser.parse_args(argv)
    if not args.list_presets and not (args.data and args.stage):
        parser.error("--data and --stage are required")
    return args


def split(paths):
    """(training, validation) paths: the 5 % with the smallest hash of their file name, 1 to 20 of them, are held out."""
    ranked = sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest())
    n = min(max(len(paths) // 20, 1), 20)
    if len(paths) <= n:
        raise InputError("one picture cannot be both training and validation set; give more, or --val")
    held_out = set(ranked[:n])
    return [p for p in paths if p not in held_out], held_out


def start_generator(args, config):
    """The stage-1 generator that stage 2 begins with, or --init's, or None: stage 1 begins at random."""
    candidates = [args.init] if args.init else []
    if args.stage == "gan" and not args.init:
        candidates = [p for p in (Path("runs/srresnet/checkpoint_best_psnr.pth"), HERE / "weights/srresnet.pth") if p.exists()]
        if not candidates:
            raise InputError("stage gan starts from an SRResNet; train one with --stage srresnet, or name one with --init")
    if not candidates:
        return None
    print(f"starting from {candidates[0]}")
    generator = srgan.load_generator(candidates[0])
    wanted = {key: config[key] for key in ("scale", "channels", "n_blocks")}
    if generator.arch != wanted:
        raise InputError(f"{candidates[0]} holds a generator of {generator.arch}, but the configuration asks for {wanted}; name another with --init")
    return generator


def validate(generator, pairs, config, lpips, sheet=None):
    """Mean and standard deviation of each metric over the validation set; generator None measures bicubic.

    sheet: a file to save bicubic, SR and HR of the first three pictures' centres to.
    """
    from PIL import Image
    scale, scores, strips = config["scale"], [], []
    for stem, hr_path, lr_path in pairs:
        lr, hr = srgan.open_pair(hr_path, lr_path, scale, config["kernel"])
        sr = srgan.bicubic(lr, scale) if generator is None else srgan.upscale(generator, lr)
        scores.append(srgan.measure(sr, hr, scale, lpips=lpips))
        if sheet and len(strips) < 3:
            side = min(240, *hr.shape[:2])
            top, left = ((n - side) // 2 for n in hr.shape[:2])
            views = [p[top:top + side, left:left + side] for p in (srgan.bicubic(lr, scale), sr, hr)]
            strips.append(srgan.strip(views, ["bicubic", f"SR {scores[-1]['psnr']:.2f} dB", stem]))
    if sheet:
        whole = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
        for i, s in enumerate(strips):
            whole.paste(s, (0, sum(above.height for above in strips[:i])))
        with srgan.replacing(sheet) as temporary:
            whole.save(temporary)
    return srgan.aggregate(scores)


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
    device = srgan.pick_device(f"cuda:{local}" if world > 1 and args.device == "auto" and torch.cuda.is_available() else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # Configuration and run folder.
    out = Path(args.out or f"runs/{args.stage}")
    latest, state = out / "checkpoint_latest.pth", None
    if args.resume:
        state = srgan.load_checkpoint(latest if args.resume is True else args.resume, device)
        if "training" not in state:
            raise InputError("only a checkpoint_latest.pth can be resumed: the others hold the generator alone; start from one with --init")
        if state["stage"] != args.stage:
            raise InputError(f"the checkpoint is of stage {state['stage']}, not {args.stage}")
    elif latest.exists():
        raise InputError(f"{out} holds a run already; go on with --resume, or name another folder with --out")
    config = resolve_config(args, state and state["config"])
    stage = config[args.stage]
    steps_per_epoch, total = config["steps_per_epoch"], stage["epochs"] * config["steps_per_epoch"]
    precision = srgan.pick_precision(device, config["precision"])
    torch.manual_seed(config["seed"])

    # Data. The first process of each machine makes the store, the others find it.
    paths = sorted({path for folder in args.data for path in srgan.find_images(folder)})
    if args.val:
        pairs = srgan.find_pairs(args.val, scale=config["scale"])
    else:
        paths, held_out = split(paths)
        pairs = [(path.stem, path, None) for path in sorted(held_out)]
    if world > 1 and local > 0:
        dist.barrier()
    patches = srgan.Patches(paths, config["patch_size"], config["scale"], config["kernel"], config["augment"], device,
                            args.cache, config["store"], seed=config["seed"], rank=rank)
    if world > 1 and local == 0:
        dist.barrier()

    # Networks and optimisers. D exists where the adversarial loss counts, phi where the content loss does.
    generator = srgan.Generator(config["scale"], config["channels"], config["n_blocks"])
    start = None if state else start_generator(args, config)
    if start:
        generator.load_state_dict(start.state_dict())
    generator = generator.to(device, memory_format=torch.channels_last).train()
    average = copy.deepcopy(generator).eval().requires_grad_(False)  # the exponential moving average, the result
    networks = {"generator": generator}
    if stage["adversarial_weight"]:
        networks["discriminator"] = srgan.Discriminator(config["patch_size"]).to(device, memory_format=torch.channels_last)
    optimizers = {name: torch.optim.Adam(network.parameters(), stage["lr"], tuple(config["betas"]), fused=True)
                  for name, network in networks.items()}
    phi = None
    if stage["content_weight"]:
        name, _, layer = config["content_network"].partition(":")
        phi = srgan.CONTENT_NETWORKS[name](*[layer] * bool(layer), weights=config["content_weights"])
        phi = phi.to(device, memory_format=torch.channels_last)
    lpips = None
    if config["lpips"] and rank == 0:
        try:
            lpips = srgan.load_lpips(device)
        except InputError as error:
            print(f"{error}; going on without it", file=sys.stderr)

    step, sums, best, seconds = 0, torch.zeros(len(LOSSES), device=device), {}, 0.0
    if state:
        step, sums, best, seconds = state["step"], state["training"]["sums"], state["best"], state["seconds"]
        average.load_state_dict(state["generator"])
        for name in networks:
            networks[name].load_state_dict(state["training"][name])
            optimizers[name].load_state_dict(state["training"][name + "_optimizer"])
        if step >= total:
            raise InputError(f"the run is complete at update {step}; ask for more with --epochs")

    # G and D as they are called: compiled on CUDA, gradients averaged over the processes.
    G, D = generator, networks.get("discriminator")
    if config["compile"] == "yes" or config["compile"] == "auto" and device.type == "cuda":
        G, D, phi = (network and torch.compile(network) for network in (G, D, phi))
    judge = D  # D in the generator's step: none of its own gradients, so no averaging either
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        G = DistributedDataParallel(G, device_ids=ids, broadcast_buffers=False)
        D = D and DistributedDataParallel(D, device_ids=ids, broadcast_buffers=False)

    def update(lr, hr):
        """One update of D and G (k = 1, Sec. 3.2) on a batch; the LOSSES as one tensor, left on the device."""
        value = dict.fromkeys(LOSSES, torch.zeros((), device=device))
        with srgan.autocast(device, precision):
            sr = G(lr)
        if D:
            discriminator.requires_grad_(True)
            with srgan.autocast(device, precision):
                real, fake = D(hr), D(sr.detach())
            value["d_real"], value["d_fake"] = torch.sigmoid(real).mean(), torch.sigmoid(fake).mean()
            value["discriminator"] = srgan.discriminator_loss(real, fake)
            optimizers["discriminator"].zero_grad()
            value["discriminator"].backward()
            optimizers["discriminator"].step()
            discriminator.requires_grad_(False)
        with srgan.autocast(device, precision):
            if stage["pixel_weight"]:
                value["pixel"] = srgan.PIXEL_LOSSES[stage["pixel_loss"]](sr, hr)
            if phi:
                value["content"] = srgan.content_loss(phi, sr, hr)
            if D:
                value["adversarial"] = srgan.adversarial_loss(judge(sr))
        value["loss"] = sum(stage[f"{term}_weight"] * value[term] for term in ("pixel", "content", "adversarial"))
        optimizers["generator"].zero_grad()
        value["loss"].backward()
        optimizers["generator"].step()
        return torch.stack([value[name].detach() for name in LOSSES])

    def save(name, **training):
        srgan.save_checkpoint(out / name, average, stage=args.stage, step=step, best=best, seconds=seconds, config=config, **training)

    def save_latest():
        training = {"sums": sums}
        for name in networks:
            training |= {name: networks[name].state_dict(), name + "_optimizer": optimizers[name].state_dict()}
        save(latest.name, training=training)

    discriminator = networks.get("discriminator")
    if rank == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        srgan.replacing_text(out / "config.json", json.dumps(config, indent=2) + "\n")
        rows = []
        if state and (out / "metrics.csv").exists():
            with open(out / "metrics.csv", newline="") as file:  # what was logged after the checkpoint is done again
                rows = [row for row in csv.DictReader(file) if int(row["update"]) <= step]
        baseline = validate(None, pairs, config, lpips)
        print(f"{args.stage} on {device}, {precision}: {len(paths)} pictures, {len(pairs)} to "
              f"validate on (bicubic {describe(baseline)}), updates {step} to {total}, into {out}")
        if step == 0:
            save_latest()

    # The loop. A signal is noted, the update finished, the state saved; a second signal ends at once.
    stopped = []

    def note_signal(number, _):
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)

    bar = tqdm(total=total, initial=step, unit="update", smoothing=0.1, disable=rank > 0, mininterval=0.5 if sys.stderr.isatty() else 30)
    began, epoch_began, epoch_first, shown = time.monotonic() - seconds, time.monotonic(), step, 0.0
    for lr, hr in patches.batches(config["batch_size"], step, total):
        epoch = step // steps_per_epoch + 1
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = stage["lr"] * 0.1 ** sum(epoch > milestone for milestone in stage["milestones"])
        values = update(lr, hr)
        sums += values
        step += 1
        srgan.ema_(average, generator, min(config["ema"], (1 + step) / (10 + step)))
        bar.update()
        if rank == 0 and time.monotonic() - shown > 1:  # reading a loss waits for the GPU: once a second
            shown = time.monotonic()
            bar.set_postfix(loss=f"{values[0].item():.4f}", refresh=False)
        if world > 1 and step % 10 == 0 or world == 1:
            stop = bool(stopped)
            if world > 1:  # all processes stop after the same update
                flag = torch.tensor(float(stop), device=device)
                dist.all_reduce(flag)
                stop = flag.item() > 0
        if step % steps_per_epoch == 0:
            mean = dict(zip(LOSSES, (sums / steps_per_epoch).tolist()))
            if not math.isfinite(mean["loss"] + mean["discriminator"]):
                raise InputError(f"the loss is not finite in epoch {epoch}; go back with --resume and a lower --lr, or --precision fp32")
            sums.zero_()
        if rank == 0 and step % steps_per_epoch == 0:
            rate = (step - epoch_first) / (time.monotonic() - epoch_began)
            row = {"epoch": epoch, "update": step, "lr": optimizers["generator"].param_groups[0]["lr"], **mean, "updates_per_s": rate}
            if epoch % config["validate_every"] == 0 or step == total:
                metrics = validate(average, pairs, config, lpips, out / "samples" / f"epoch_{epoch:04d}.png")
                bar.write(f"epoch {epoch}  loss {mean['loss']:.4f}  {describe(metrics)}  {rate:.1f} updates/s")
                for name, value in metrics.items():
                    if value is None:
                        continue
                    row[name] = value["mean"]
                    better = (lambda a, b: a < b) if name == "lpips" else (lambda a, b: a > b)
                    if name not in best or better(value["mean"], best[name]["value"]):
                        best[name] = {"value": value["mean"], "std": value["std"], "epoch": epoch}
                        save(f"checkpoint_best_{name}.pth")
            rows.append(row)
            with srgan.replacing(out / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            if config["checkpoint_every"] and epoch % config["checkpoint_every"] == 0:
                save(f"checkpoint_epoch_{epoch:04d}.pth")
            seconds = time.monotonic() - began
            save_latest()
            summary = {"stage": args.stage, "epoch": epoch, "update": step, "best": best, "bicubic": baseline, "seconds": seconds,
                       "generator_parameters": sum(p.numel() for p in generator.parameters()), "device": str(device),
                       "torch": torch.__version__, "data": args.data, "val": args.val}
            srgan.replacing_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        if step % steps_per_epoch == 0:
            epoch_began, epoch_first = time.monotonic(), step
        if stop:
            break
    bar.close()
    if rank == 0 and step < total:
        seconds = time.monotonic() - began
        save_latest()
        print(f"stopped after update {step} of {total}; go on with --resume")
    if world > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    srgan.run(main)
