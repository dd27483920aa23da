"""How fast training and upscaling are. A program, not a test:

    python tests/benchmark.py [--device cuda] [--rounds 9] [--only update ...]

Updates and upscaling are timed in turn with a baseline: the same srgan.Update and networks without
section 9, that is fp32, channels-first, eager, Fig. 4 as drawn, in a process of its own. The ratio
is the median over neighbouring pairs, with the range of the middle half of them.

    update       SRResNet and SRGAN-VGG54 updates of 16 patches of 96x96
    upscale      images of 128x128 and 256x256
    precision    what --precision auto takes, beside the faster of fp32 and bf16
    memory       upscaling images of 0.06 to 24 megapixels, on Linux; only if it is asked for

Measured on 2 cores of an AMD EPYC with AVX512-BF16, torch 2.15, before the code was put into the
order of the paper. The share is of the 1,029 GFLOP/s that matrix products and convolutions reached
in bf16, for the operations of the plain form. No GPU has been measured.

                                             plain        here   ratio (middle half)  share
    SRResNet update, 16 patches of 96x96     1.42 / s   5.28 / s  3.68 (3.61 to 3.82)  63 %
    SRGAN update with VGG54                  0.39 / s   1.01 / s  2.60 (2.59 to 2.60)  68 %
    128x128 upscaled to 512x512              2.45 / s   9.35 / s  3.82 (3.74 to 3.89)  66 %
    256x256 upscaled to 1024x1024            0.57 / s   2.59 / s  4.56 (4.39 to 4.69)  73 %
    train.py, SRResNet / SRGAN-VGG54, whole               5.19 / 1.02 per second

Upscaling made 2.2 megapixels per second for a result of 0.1 megapixels, 1.9 for one of 100; it took
0.07 GB for 1 megapixel, 1.4 GB for 33, 1.2 GB for 100, and for 400, beside the result, 1.1 GB in
bf16 and 1.8 GB in fp32. An SRResNet update is 126 GFLOP, an SRGAN update 690.

Where it comes from: bf16 and channels-last; the last 9x9 convolution before the last shuffle; a
cheaper gradient of PReLU; memory that is kept, not returned; at inference, folded batch norm.
"""
import argparse
import multiprocessing
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import srgan  # noqa: E402
import train  # noqa: E402
from conftest import memory, photo  # noqa: E402


def seconds(function, device):
    """The time that function() takes, in seconds, until the device has done it."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def report(title, ours, baseline, what):
    """Print one row from the times of the rounds."""
    ratios = sorted(b / o for b, o in zip(baseline, ours))
    quarter = len(ratios) // 4
    print(f"{title:44s} {1 / median(ours):8.3f} / s {median(ratios):6.2f}x ({ratios[quarter]:.2f} "
          f"to {ratios[-1 - quarter]:.2f}) of {what}'s {1 / median(baseline):.3f}", flush=True)


def plain_update(stage, networks, device):
    """srgan.Update without anything of section 9: fp32, eager, channels-first, torch's Adam."""
    G, D = (networks[name].to(memory_format=torch.contiguous_format)
            if name in networks else None for name in ("generator", "discriminator"))
    adam_G = torch.optim.Adam(G.parameters(), 1e-4)
    if stage == "srresnet":
        return srgan.Update(G, adam_G, {"pixel": (1.0, srgan.mse_loss)})
    phi = srgan.TruncatedVGG19("5_4", "random").to(device)
    content = {"content": (1.0, lambda sr, hr: srgan.content_loss(phi, sr, hr))}
    return srgan.Update(G, adam_G, content, D, torch.optim.Adam(D.parameters(), 1e-4))


def make_update(device, plain, stage, precision="auto"):
    """A function that makes one update of 16 patches of 96x96: train.py's, or the plain one."""
    args = train.parse_args(["--data", "x", "--stage", stage, "--feature-weights", "random",
                             "--precision", "fp32" if plain else precision])
    config = train.resolve_config(args)
    train.set_up_arithmetic(device, config)
    networks = train.make_networks(args, config, None, device)
    state = train.State(networks, config[stage], device)
    update = plain_update(stage, state.networks, device) if plain else \
        train.make_update(config, stage, state, device)
    lr = torch.rand(16, 3, 24, 24, device=device)
    hr = torch.rand(16, 3, 96, 96, device=device) * 2 - 1
    if not plain:
        lr, hr = (x.contiguous(memory_format=torch.channels_last) for x in (lr, hr))
    return lambda: update(lr, hr)


def make_upscale(device, plain, side, precision="auto"):
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


def worker(pipe, make, device, what):
    """Time the plain form whenever asked, in a process of its own and so with its own memory."""
    function = make(device, True, what)
    while pipe.recv():
        pipe.send(seconds(function, device))


def against_plain(title, make, what, device, rounds):
    """Time what `make` gives in turn with its plain form."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    process = spawn.Process(target=worker, args=(theirs, make, device, what), daemon=True)
    process.start()
    theirs.close()
    ours, times = make(device, False, what), []
    for i in range(rounds + 5):                  # the first ones warm up, compile and capture
        mine.send(True)
        plain = mine.recv()
        times += [(seconds(ours, device), plain)] * (i >= 5)
    mine.send(False)
    process.join()
    report(title, *zip(*times), "plain fp32")


def precisions(title, make, what, device, rounds):
    """What `auto` takes, beside the faster of fp32 and bf16: timed in turn."""
    functions = {name: make(device, False, what, name) for name in ("fp32", "bf16", "auto")}
    times = {name: [] for name in functions}
    for i in range(rounds + 3):
        for name, function in functions.items():
            times[name] += [seconds(function, device)] * (i >= 3)
    best = min(("fp32", "bf16"), key=lambda name: median(times[name]))
    report(f"{title}, auto: {srgan.pick_precision(device)}", times["auto"], times[best], best)


def large_images(device):
    """Time, and main memory beside the input: the result is 1.2 GB for 24 megapixels."""
    for side in (250, 1440, 4900):
        upscale, times = make_upscale(device, False, side), []
        mb = memory(lambda: times.append(seconds(upscale, device)))
        print(f"{side}x{side}: {mb:.0f} MB, {mb - 48 * side ** 2 / 2 ** 20:.0f} of them beside the "
              f"result, in {times[0]:.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    modes = ["update", "upscale", "precision", "memory"]
    parser.add_argument("--only", nargs="+", default=modes[:3], choices=modes)
    args = parser.parse_args()
    device, rounds = srgan.pick_device(args.device), args.rounds
    name = torch.cuda.get_device_name(device) if device.type == "cuda" \
        else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, {srgan.pick_precision(device)}")
    work = {"srresnet update": ("update", make_update, "srresnet", rounds),
            "gan update": ("update", make_update, "gan", max(3, rounds // 2)),
            "128x128": ("upscale", make_upscale, 128, rounds),
            "256x256": ("upscale", make_upscale, 256, rounds)}
    for title, (mode, make, what, n) in work.items():
        if mode in args.only:
            against_plain(title, make, what, device, n)
    if "precision" in args.only:
        precisions("srresnet update", make_update, "srresnet", device, rounds)
        precisions("128x128", make_upscale, 128, device, rounds)
    if "memory" in args.only:
        large_images(device)


if __name__ == "__main__":
    main()
