"""How fast training, data and upscaling are. A program, not a test:

    python tests/benchmark.py [--device cuda] [--rounds 9] [--only update ...] [--json FILE]

Updates and upscaling stand beside a baseline that is timed in turn with them: the plain form of the
same networks, fp32, channels-first, eager, Fig. 4 as drawn, in a process of its own; making the
patch store stands beside Pillow alone. The ratio is the median over pairs that follow each other,
the spread the range of its middle half. The share counts the operations of the plain form, against
the fastest arithmetic that the device showed in this run, in matrix products or convolutions.

    update       SRResNet and SRGAN-VGG54 updates of 16 patches of 96x96
    upscale      pictures of 128x128 and 256x256
    data         making the store, and batches from it
    train        train.py as a whole, data, EMA and log included
    grow         updates for other batches and patches; upscaling time and peak memory up to 100 megapixels
"""
import argparse
import csv
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import srgan  # noqa: E402
import train  # noqa: E402
from conftest import photo  # noqa: E402

ROWS = []


def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def report(title, unit, amount, ours, baseline=(), what="", flops=0, rate=0):
    """One row of the table from the times of the rounds; `amount` of `unit` were done in each."""
    row = {"title": title, "unit": unit, "median": amount / statistics.median(ours)}
    text = f"{title:58s} {row['median']:10.3f} {unit:12s}"
    if baseline:
        ratios = sorted(b / o for b, o in zip(baseline, ours))
        quarter = len(ratios) // 4
        row |= {"baseline": amount / statistics.median(baseline), "baseline_is": what, "ratio": statistics.median(ratios),
                "spread": [ratios[quarter], ratios[-1 - quarter]]}
        text += f" {row['ratio']:5.2f}x ({row['spread'][0]:.2f} to {row['spread'][1]:.2f}) of {what}'s {row['baseline']:.3f}"
    if flops and rate:
        row["share"] = flops / statistics.median(ours) / rate
        text += f"  {row['share']:.0%} of {rate / 1e9:.0f} GFLOP/s"
    ROWS.append(row)
    print(text, flush=True)


def arithmetic(device):
    """{precision: FLOP/s}: the faster of matrix products and 3x3 convolutions."""
    rates = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        n = 2048 if device.type == "cpu" else 8192
        a, x, w = (torch.randn(shape, device=device).to(dtype) for shape in ((n, n), (4, 256, 64, 64), (256, 256, 3, 3)))
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        products = ((lambda: a @ a, 2 * n ** 3), (lambda: torch.nn.functional.conv2d(x, w, padding=1), 2 * x.numel() * 2304))
        with torch.inference_mode():
            rates[precision] = max(flops / statistics.median([seconds(f, device) for _ in range(7)][2:]) for f, flops in products)
        print(f"fastest arithmetic in {precision}: {rates[precision] / 1e9:.0f} GFLOP/s")
    return rates


def as_drawn(generator):
    """The generator with Fig. 4's own order of layers and torch's PReLU."""
    generator.enlarge = generator.enlarge_as_drawn
    for module in [m for m in generator.modules() if isinstance(m, srgan.PReLU)]:
        module.__class__ = torch.nn.PReLU
    return generator


def make_update(stage, device, plain, batch=16, patch=96):
    """A function that makes one update as train.py does, or plainly."""
    torch.manual_seed(0)
    precision = "fp32" if plain else srgan.pick_precision(device)
    layout = torch.contiguous_format if plain else torch.channels_last
    networks = [srgan.Generator(), srgan.Discriminator(patch), srgan.TruncatedVGG19("5_4", "random")][:3 if stage == "gan" else 1]
    networks = [network.to(device, memory_format=layout) for network in networks]
    if precision == "bf16" and stage == "gan":
        networks[2].features.bfloat16()
    generator, discriminator = networks[0], networks[1] if stage == "gan" else None
    if plain:
        as_drawn(generator)
    fast = not plain and device.type == "cuda"
    G, D, phi = [*(torch.compile(network) if fast else network for network in networks), None, None][:3]
    optimizers = [torch.optim.Adam(network.parameters(), 1e-4, fused=not plain, capturable=fast) for network in networks[:2]]
    lr = torch.rand(batch, 3, patch // 4, patch // 4).to(device, memory_format=layout)
    hr = torch.rand(batch, 3, patch, patch).mul(2).sub(1).to(device, memory_format=layout)

    def optimize(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update(lr, hr):
        with srgan.autocast(device, precision):
            sr = G(lr)
            if D is not None:
                discriminator.requires_grad_(True)
                loss = srgan.discriminator_loss(D(sr.detach()), D(hr))
        if D is not None:
            optimize(optimizers[1], loss)
            discriminator.requires_grad_(False)
        with srgan.autocast(device, precision):
            loss = srgan.PIXEL_LOSSES["mse"](sr, hr) if D is None else \
                srgan.content_loss(phi, sr, hr) + 1e-3 * srgan.adversarial_loss(D(sr))
        optimize(optimizers[0], loss)
        return loss.detach()
    update = train.Graphed(update, device) if fast else update
    return lambda: update(lr, hr)


def make_upscale(device, plain, side=128):
    """A function that upscales one picture as upscale.py does, or plainly."""
    picture = photo(side, side)
    if plain:
        generator = as_drawn(srgan.Generator().to(device).eval())

        @torch.inference_mode()
        def upscale():
            x = torch.from_numpy(picture).permute(2, 0, 1)[None].float().div(255).to(device)
            sr = generator(x)
            return sr.add(1).mul(127.5).round().clamp(0, 255).byte()[0].permute(1, 2, 0).cpu().numpy()
        return upscale
    generator = srgan.optimize_for_inference(srgan.Generator().to(device, memory_format=torch.channels_last))
    return lambda: srgan.upscale(generator, picture, precision=srgan.pick_precision(device))


def _worker(pipe, make, device, args):
    torch.backends.cudnn.benchmark = True
    function = make(device=torch.device(device), plain=True, **args)
    while pipe.recv():
        pipe.send(seconds(function, torch.device(device)))


def against_plain(title, unit, make, device, rounds, rates, **args):
    """Time what `make` gives, in turn with its plain form, which has its own process and so its own memory."""
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_worker, args=(theirs, make, str(device), args), daemon=True)
    process.start()
    theirs.close()

    def plain():
        mine.send(True)
        return mine.recv()
    ours = make(device=device, plain=False, **args)
    if args.get("stage"):
        train.keep_freed_memory()
    times = []
    for i in range(rounds + 5):  # the first ones warm up, compile and capture
        pair = (seconds(ours, device), plain())
        times += [pair] * (i >= 5)
    mine.send(False)
    process.join()
    cpu = {"device": torch.device("cpu"), "plain": True, **args}
    with FlopCounterMode(display=False) as counter:  # the plain form's operations: an exact count of what is to be computed
        make(**cpu)()
    report(title, unit, 1, *map(list, zip(*times)), "plain fp32", counter.get_total_flops(), rates[srgan.pick_precision(device)])


def data(device, rounds, folder):
    """Making the store against decoding by Pillow alone on as many threads, and batches from it."""
    picture = photo(1356, 2040)
    (folder / "hr").mkdir()
    for i in range(24):
        Image.fromarray(np.roll(picture, 97 * i, 1)).save(folder / "hr" / f"{i}.png", compress_level=1)
    paths = srgan.find_images(folder / "hr")

    def pillow():
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda path: np.asarray(Image.open(path).convert("RGB")).shape, paths))
    times = []
    for i in range(3):
        times.append((seconds(lambda: srgan.Patches(paths, cache=folder / f"cache{i}"), device), seconds(pillow, device)))
        ((folder / f"cache{i}").rename(folder / "kept") if i == 2 else [p.unlink() for p in (folder / f"cache{i}").iterdir()])
    report("store of 2040x1356 PNGs", "pictures/s", len(paths), *map(list, zip(*times)), "Pillow alone")
    patches = srgan.Patches(paths, cache=folder / "kept", device=device)
    for n, size in ((16, 96), (16, 192)):
        patches.resize(size)

        def batches():
            for _ in patches.batches(n, 0, 20):
                pass
        report(f"batches of {n} patches of {size}x{size} with their LR", "patches/s", 20 * n, [seconds(batches, device) for _ in range(rounds)])


def whole(device, folder):
    """train.py itself, as a command: the updates per second that metrics.csv gives for the second epoch."""
    (folder / "photos").mkdir()
    for i in range(20):
        Image.fromarray(photo(400, 500, i)).save(folder / "photos" / f"{i}.png")
    n = 1000 if device.type == "cuda" else 30
    for stage in ("srresnet", "gan"):
        command = [sys.executable, ROOT / "train.py", "--data", folder / "photos", "--val", folder / "photos", "--stage", stage, "--out", folder / stage,
                   "--cache", folder / "cache", "--epochs", "2", "--steps-per-epoch", str(n if stage == "srresnet" else n // 2), "--device", str(device),
                   "--init", ROOT / "weights/srresnet.pth", "--vgg-weights", "random", "--set", "lpips=false", "--set", "validate_every=9"]
        subprocess.run(command, check=True, capture_output=True)
        rows = list(csv.DictReader(open(folder / stage / "metrics.csv")))
        report(f"train.py --stage {stage}, everything included", "updates/s", 1, [1 / float(rows[1]["updates_per_s"])])


def grow(device, rounds):
    for stage in ("srresnet", "gan"):
        sizes = [(b, 96) for b in (4, 8, 16, 32, 64)] + [(16, p) for p in (48, 128, 192)]
        for batch, patch in sizes if stage == "srresnet" else sizes[:-1]:
            ours = make_update(stage, device, False, batch, patch)
            times = [seconds(ours, device) for _ in range(5 + max(3, rounds // 3))][5:]
            report(f"{stage} update, batch {batch} of {patch}x{patch}", "patches/s", batch, times)
    code = ("import sys, time, torch; sys.path[:0] = sys.argv[1:3]\nfrom conftest import photo\nimport numpy as np, srgan, train\n"
            "side, device = int(sys.argv[3]), torch.device(sys.argv[4])\n"
            "g = srgan.optimize_for_inference(srgan.load_generator(sys.argv[1] + '/weights/srresnet.pth', device))\n"
            "p, precision = np.tile(photo(250, 250), (side // 250 + 1, side // 250 + 1, 1))[:side, :side].copy(), srgan.pick_precision(device)\n"
            "def peak():  # Linux; getrusage would count this process's parent\n"
            "    return train.memory_mb(device) if device.type == 'cuda' else int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024\n"
            "srgan.upscale(g, p[:64, :64], precision=precision)\nbefore, began = peak(), time.perf_counter()\n"
            "srgan.upscale(g, p, precision=precision)\nprint(time.perf_counter() - began, peak() - before)")
    for megapixels in (0.1, 1, 10, 33, 100):
        side = round((megapixels * 1e6 / 16) ** 0.5)
        done = subprocess.run([sys.executable, "-c", code, ROOT, ROOT / "tests", str(side), str(device)], check=True, capture_output=True, text=True)
        took, memory = map(float, done.stdout.split())
        report(f"upscale to {megapixels:g} megapixels, {memory:.0f} MB more at its peak", "Mpx/s", megapixels, [took])
        ROWS[-1] |= {"seconds": took, "memory_mb": memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=("update", "upscale", "data", "train", "grow"), default=["update", "upscale", "data", "train"])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device = srgan.pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    print(f"{name}, torch {torch.__version__}, {srgan.pick_precision(device)}")
    rates = arithmetic(device)
    if "update" in args.only:
        for stage, rounds in (("srresnet", args.rounds), ("gan", max(3, args.rounds // 2))):
            against_plain(f"{stage} update, 16 patches of 96x96", "updates/s", make_update, device, rounds, rates, stage=stage)
    if "upscale" in args.only:
        for side in (128, 256):
            against_plain(f"upscale {side}x{side} to {4 * side}x{4 * side}", "pictures/s", make_upscale, device, args.rounds, rates, side=side)
    with tempfile.TemporaryDirectory() as folder:
        if "data" in args.only:
            data(device, args.rounds, Path(folder))
        if "train" in args.only:
            whole(device, Path(folder))
    if "grow" in args.only:
        grow(device, args.rounds)
    if args.json:
        machine = {"device": name, "torch": torch.__version__, "flops": rates}
        srgan.replacing_text(args.json, json.dumps({"machine": machine, "rows": ROWS}, indent=2) + "\n")


if __name__ == "__main__":
    main()
