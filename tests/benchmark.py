"""How fast training, data and upscaling are. A program, not a test:

    python tests/benchmark.py [--device cuda] [--rounds 9] [--only update ...] [--json FILE]

Updates and upscaling are timed in turn with a baseline: the same srgan.Update and networks without
section 9, that is fp32, channels-first, eager, Fig. 4 as drawn, in a process of its own. The ratio
is the median over neighbouring pairs, with the range of the middle half of them. The share counts
the operations of the plain form against the fastest arithmetic that this run saw on the device.

    update       SRResNet and SRGAN-VGG54 updates of 16 patches of 96x96
    upscale      images of 128x128 and 256x256
    precision    what --precision auto takes, beside the faster of fp32 and bf16
    data         making the store, and batches from it
    train        train.py as a whole, data, EMA and log included
    grow         other batches and patches; upscaling time and peak memory up to 384 megapixels

Measured on 2 cores of an AMD EPYC with AVX512-BF16, torch 2.15, before the code was put into the
order of the paper; 1,029 GFLOP/s in bf16 and 511 in fp32. No GPU has been measured.

                                             plain        here   ratio (middle half)  share
    SRResNet update, 16 patches of 96x96     1.42 / s   5.28 / s  3.68 (3.61 to 3.82)  63 %
    SRGAN update with VGG54                  0.39 / s   1.01 / s  2.60 (2.59 to 2.60)  68 %
    128x128 upscaled to 512x512              2.45 / s   9.35 / s  3.82 (3.74 to 3.89)  66 %
    256x256 upscaled to 1024x1024            0.57 / s   2.59 / s  4.56 (4.39 to 4.69)  73 %
    train.py, SRResNet / SRGAN-VGG54, whole               5.19 / 1.02 per second
    patches of 96x96 with their LR                        8,900 / s
    store from 2K PNGs, against Pillow       22.4 / s   18.7 / s  0.84 (0.82 to 0.86)

Upscaling made 2.2 megapixels per second for a result of 0.1 megapixels, 1.9 for one of 100; it took
0.07 GB for 1 megapixel, 1.4 GB for 33, 1.2 GB for 100, and for 400, beside the result, 1.1 GB in
bf16 and 1.8 GB in fp32. An SRResNet update is 126 GFLOP, an SRGAN update 690.

Where it comes from: bf16 and channels-last; the last 9x9 convolution before the last shuffle; a
cheaper gradient of PReLU; memory that is kept, not returned; at inference, folded batch norm.
"""
import argparse
import csv
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
    """The time that function() takes, in seconds, until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def report(title, unit, amount, ours, baseline=(), what="", flops=0, rate=0):
    """One row of the table from the times of the rounds; each did `amount` of `unit`."""
    row = {"title": title, "unit": unit, "median": amount / statistics.median(ours)}
    text = f"{title:52s} {row['median']:10.3f} {unit:12s}"
    if baseline:
        ratios = sorted(b / o for b, o in zip(baseline, ours))
        quarter = len(ratios) // 4
        row |= {"baseline": amount / statistics.median(baseline), "baseline_is": what,
                "ratio": statistics.median(ratios),
                "spread": [ratios[quarter], ratios[-1 - quarter]]}
        text += (f" {row['ratio']:5.2f}x ({row['spread'][0]:.2f} to {row['spread'][1]:.2f}) of "
                 f"{what}'s {row['baseline']:.3f}")
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
        a, x, w = (torch.randn(shape, device=device).to(dtype)
                   for shape in ((n, n), (4, 256, 64, 64), (256, 256, 3, 3)))
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        work = ((lambda: a @ a, 2 * n ** 3),
                (lambda: torch.nn.functional.conv2d(x, w, padding=1), 2 * x.numel() * 2304))
        with torch.inference_mode():
            rates[precision] = max(
                flops / statistics.median([seconds(f, device) for _ in range(7)][2:])
                for f, flops in work)
        print(f"fastest arithmetic in {precision}: {rates[precision] / 1e9:.0f} GFLOP/s")
    return rates


def configuration(stage, precision):
    """The base configuration, as train.py resolves it."""
    args = train.parse_args(["--data", "x", "--stage", stage, "--precision", precision,
                             "--feature-weights", "random"])
    return train.resolve_config(args)


def plain_update(config, stage, state):
    """srgan.Update without anything of section 9: fp32, eager, channels-first, torch's Adam."""
    networks = {name: network.to(memory_format=torch.contiguous_format)
                for name, network in state.networks.items()}
    adam = {name: torch.optim.Adam(network.parameters(), 1e-4)
            for name, network in networks.items()}
    if stage == "srresnet":
        return srgan.Update(networks["generator"], adam["generator"],
                            {"pixel": (1.0, srgan.mse_loss)})
    phi = srgan.TruncatedVGG19("5_4", "random").to(next(networks["generator"].parameters()).device)
    return srgan.Update(networks["generator"], adam["generator"],
                        {"content": (1.0, lambda sr, hr: srgan.content_loss(phi, sr, hr))},
                        networks["discriminator"], adam["discriminator"])


def make_update(stage, device, plain, batch=16, patch=96, precision="auto"):
    """A function that makes one update: train.py's, or the plain one."""
    config = configuration(stage, "fp32" if plain else precision)
    config["patch_size"] = patch
    train.set_up_arithmetic(device, config)
    args = argparse.Namespace(stage=stage)
    networks = train.make_networks(args, config, None, device)
    state = train.State(networks, config[stage], device)
    update = plain_update(config, stage, state) if plain else \
        train.make_update(config, stage, state, device)
    lr = torch.rand(batch, 3, patch // 4, patch // 4, device=device)
    hr = torch.rand(batch, 3, patch, patch, device=device) * 2 - 1
    if not plain:
        lr, hr = (x.contiguous(memory_format=torch.channels_last) for x in (lr, hr))
    return lambda: update(lr, hr)


def make_upscale(device, plain, side=128, precision="auto"):
    """A function that upscales one image: as upscale.py does, or plainly."""
    image, generator = photo(side, side), srgan.Generator().to(device).eval()
    if not plain:
        generator = srgan.optimize_for_inference(generator.to(memory_format=torch.channels_last))
        precision = srgan.pick_precision(device, precision)
        return lambda: srgan.upscale(generator, image, precision=precision)

    @torch.inference_mode()
    def upscale():
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float().div(255).to(device)
        sr = generator(x).add(1).mul(127.5).round().clamp(0, 255).byte()
        return sr[0].permute(1, 2, 0).cpu().numpy()
    return upscale


def worker(pipe, make, device, args):
    """Time the plain form whenever asked, in a process of its own and so with its own memory."""
    function = make(device=torch.device(device), plain=True, **args)
    while pipe.recv():
        pipe.send(seconds(function, torch.device(device)))


def against_plain(title, unit, make, device, rounds, rates, **args):
    """Time what `make` gives in turn with its plain form."""
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=worker, args=(theirs, make, str(device), args), daemon=True)
    process.start()
    theirs.close()
    ours, times = make(device=device, plain=False, **args), []
    for i in range(rounds + 5):                  # the first ones warm up, compile and capture
        mine.send(True)
        plain = mine.recv()
        pair = (seconds(ours, device), plain)
        times += [pair] * (i >= 5)
    mine.send(False)
    process.join()
    with FlopCounterMode(display=False) as counter:  # the operations of the plain form, exactly
        make(**{"device": torch.device("cpu"), "plain": True, **args})()
    report(title, unit, 1, *map(list, zip(*times)), "plain fp32", counter.get_total_flops(),
           rates[srgan.pick_precision(device)])


def precisions(device, rounds):
    """What `auto` takes, beside the faster of fp32 and bf16: timed in turn."""
    for title, make, args in (("srresnet update", make_update, {"stage": "srresnet"}),
                              ("upscale 128x128", make_upscale, {})):
        functions = {name: make(device=device, plain=False, precision=name, **args)
                     for name in ("fp32", "bf16", "auto")}
        times = {name: [] for name in functions}
        for i in range(rounds + 3):
            for name, function in functions.items():
                times[name] += [seconds(function, device)] * (i >= 3)
        best = min(("fp32", "bf16"), key=lambda name: statistics.median(times[name]))
        report(f"{title}, auto ({srgan.pick_precision(device)})", "per second", 1, times["auto"],
               times[best], best)


def data(device, rounds, folder):
    """Making the store against Pillow alone on as many threads; batches from it and streamed."""
    image = photo(1356, 2040)
    (folder / "hr").mkdir()
    for i in range(24):
        Image.fromarray(np.roll(image, 97 * i, 1)).save(folder / f"hr/{i}.png", compress_level=1)
    paths = srgan.find_images(folder / "hr")

    def pillow():
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda path: np.asarray(Image.open(path).convert("RGB")).shape, paths))
    times = []
    for i in range(3):
        store = seconds(lambda: srgan.Store(paths, folder / f"cache{i}"), device)
        times.append((store, seconds(pillow, device)))
    report("store of 2040x1356 PNGs", "images/s", len(paths), *map(list, zip(*times)),
           "Pillow alone")
    for mode, n, steps in (("always", 16, 20), ("always", 64, 10), ("never", 16, 3)):
        patches = srgan.Patches(srgan.Store(paths, folder / "cache0", mode), device=device)

        def draw():
            for _ in patches.batches(n, 0, steps):
                pass
        report(f"batches of {n}, store {mode}", "patches/s", steps * n,
               [seconds(draw, device) for _ in range(rounds if mode == "always" else 2)])


def whole(device, folder):
    """train.py itself, as a command: the updates per second that its second epoch logs."""
    (folder / "photos").mkdir()
    for i in range(20):
        Image.fromarray(photo(400, 500, i)).save(folder / "photos" / f"{i}.png")
    n = 1000 if device.type == "cuda" else 30
    for stage, steps in (("srresnet", n), ("gan", n // 2)):
        command = [sys.executable, ROOT / "train.py", "--data", folder / "photos", "--val",
                   folder / "photos", "--stage", stage, "--out", folder / stage, "--cache",
                   folder / "cache", "--epochs", "2", "--steps-per-epoch", str(steps), "--init",
                   ROOT / "weights/srresnet.pth", "--feature-weights", "random", "--device",
                   str(device), "--set", "lpips=false", "--set", "validate_every=9"]
        subprocess.run(command, check=True, capture_output=True)
        row = list(csv.DictReader(open(folder / stage / "metrics.csv")))[1]
        report(f"train.py --stage {stage}, everything included", "updates/s", 1,
               [1 / float(row["updates_per_s"])])


UPSCALE = """
import sys, time, torch, numpy as np
sys.path[:0] = sys.argv[1:3]
import srgan
from conftest import photo
side, device = int(sys.argv[3]), torch.device(sys.argv[4])
g = srgan.load_generator(sys.argv[1] + "/weights/srresnet.pth", device)
g, precision = srgan.optimize_for_inference(g), srgan.pick_precision(device)
image = np.tile(photo(250, 250), (side // 250 + 1, side // 250 + 1, 1))[:side, :side].copy()
def peak():  # Linux; getrusage would count the parent of this process
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
srgan.upscale(g, image[:64, :64], precision=precision)
before, began = peak(), time.perf_counter()
srgan.upscale(g, image, precision=precision)
print(time.perf_counter() - began, peak() - before)
"""


def grow(device, rounds):
    """Other batches, patches and images: time, and the peak of the memory."""
    for stage in ("srresnet", "gan"):
        sizes = [(4, 96), (8, 96), (16, 96), (32, 96), (64, 96), (16, 48), (16, 128)]
        for batch, patch in sizes:
            ours = make_update(stage, device, False, batch, patch)
            times = [seconds(ours, device) for _ in range(5 + max(3, rounds // 3))][5:]
            report(f"{stage} update, batch {batch} of {patch}x{patch}", "patches/s", batch, times)
    for megapixels in (0.1, 1, 10, 33, 100, 384):
        side = round((megapixels * 1e6 / 16) ** 0.5)
        command = [sys.executable, "-c", UPSCALE, ROOT, ROOT / "tests", str(side), str(device)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        took, memory = map(float, done.stdout.split())
        report(f"upscale to {megapixels:g} megapixels, {memory:.0f} MB at its peak", "Mpx/s",
               megapixels, [took])
        ROWS[-1] |= {"seconds": took, "memory_mb": memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=["update", "upscale", "precision", "data",
                                                      "train"],
                        choices=("update", "upscale", "precision", "data", "train", "grow"))
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device, rounds = srgan.pick_device(args.device), args.rounds
    name = torch.cuda.get_device_name(device) if device.type == "cuda" \
        else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, {srgan.pick_precision(device)}")
    rates = arithmetic(device)
    if "update" in args.only:
        for stage, n in (("srresnet", rounds), ("gan", max(3, rounds // 2))):
            against_plain(f"{stage} update, 16 patches of 96x96", "updates/s", make_update, device,
                          n, rates, stage=stage)
    if "upscale" in args.only:
        for side in (128, 256):
            against_plain(f"upscale {side}x{side}", "images/s", make_upscale, device, rounds,
                          rates, side=side)
    if "precision" in args.only:
        precisions(device, rounds)
    with tempfile.TemporaryDirectory() as folder:
        if "data" in args.only:
            data(device, rounds, Path(folder))
        if "train" in args.only:
            whole(device, Path(folder))
    if "grow" in args.only:
        grow(device, rounds)
    if args.json:
        machine = {"device": name, "torch": torch.__version__, "flops": rates}
        srgan.write_json(args.json, {"machine": machine, "rows": ROWS})


if __name__ == "__main__":
    main()
