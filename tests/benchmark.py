"""Speed of what training and upscaling spend their time on. A program, not a test:

    python tests/benchmark.py [--device cuda] [--patches 8000] [--rounds 10]

Timings of two variants alternate within one run; the ratio is the median over the rounds.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import srgan  # noqa: E402
from conftest import photo  # noqa: E402


def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(title, slow, fast, device, rounds, unit):
    for function in (slow, fast, slow, fast):  # warm up, compile
        function()
    times = [(seconds(slow, device), seconds(fast, device)) for _ in range(rounds)]
    a, b = (statistics.median(column) for column in zip(*times))
    ratio = statistics.median(x / y for x, y in times)
    print(f"{title}: {1 / a:.2f} -> {1 / b:.2f} {unit}, {ratio:.2f} times as fast")


def batches(device, count):
    """Patches per second from a folder of 2K pictures, LR included, and how long the first decoding takes."""
    with tempfile.TemporaryDirectory() as folder:
        picture = photo(1356, 2040)
        for i in range(20):
            Image.fromarray(np.roll(picture, 97 * i, 1)).save(f"{folder}/{i}.jpg", quality=95)
        began = time.perf_counter()
        patches = srgan.Patches(srgan.find_images(folder), device=device, cache=f"{folder}/cache")
        print(f"store of 20 JPEGs of 2040x1356: {time.perf_counter() - began:.1f} s")
        list(patches.batches(16, 0, 20))
        rate = [16 * 50 / seconds(lambda: [None for _ in patches.batches(16, i * 50, (i + 1) * 50)], device) for i in range(max(1, count // 800))]
        print(f"batches of 16 96x96 patches with their LR: {statistics.median(rate):.0f} patches/s")


def updates(device, rounds):
    """SRResNet and SRGAN updates as train.py makes them, against the same networks in plain fp32, channels-first."""
    precision = srgan.pick_precision(device)
    lr, hr = torch.rand(16, 3, 24, 24, device=device), torch.rand(16, 3, 96, 96, device=device) * 2 - 1

    def make(stage, fast):
        torch.manual_seed(0)
        layout = torch.channels_last if fast else torch.contiguous_format
        networks = [network.to(device, memory_format=layout) for network in (srgan.Generator(), srgan.Discriminator(), srgan.TruncatedVGG19("5_4", "random"))]
        G, D, phi = (torch.compile(network) for network in networks) if fast and device.type == "cuda" else networks
        optimizers = [torch.optim.Adam(network.parameters(), 1e-4, fused=fast) for network in networks[:2]]
        x, y = (t.contiguous(memory_format=layout) for t in (lr, hr))

        def optimize(optimizer, loss):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def update():
            with srgan.autocast(device, precision if fast else "fp32"):
                sr = G(x)
                if stage == "gan":
                    networks[1].requires_grad_(True)
                    loss = srgan.discriminator_loss(D(sr.detach()), D(y))
            if stage == "gan":
                optimize(optimizers[1], loss)
                networks[1].requires_grad_(False)
            with srgan.autocast(device, precision if fast else "fp32"):
                loss = srgan.PIXEL_LOSSES["mse"](sr, y) if stage == "srresnet" else \
                    srgan.content_loss(phi, sr, y) + 1e-3 * srgan.adversarial_loss(D(sr))
            optimize(optimizers[0], loss)
        return update
    for stage, n in (("srresnet", rounds), ("gan", max(1, rounds // 3))):
        compare(f"{stage} update (16 of 96x96), fp32 channels-first -> {precision} channels-last", make(stage, False), make(stage, True), device, n, "updates/s")


def upscaling(device, rounds):
    """A picture of 256x256, in fp32 and in the precision of the hardware."""
    generator = srgan.fold_batch_norm(srgan.Generator().to(device, memory_format=torch.channels_last))
    picture, precision = photo(256, 256), srgan.pick_precision(device)
    compare(f"upscaling 256x256 -> 1024x1024, fp32 -> {precision}", lambda: srgan.upscale(generator, picture),
            lambda: srgan.upscale(generator, picture, precision=precision), device, max(1, rounds // 2), "pictures/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--patches", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    device = srgan.pick_device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        print(torch.cuda.get_device_name(device))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    batches(device, args.patches)
    updates(device, args.rounds)
    upscaling(device, args.rounds)


if __name__ == "__main__":
    main()
