"""How fast training and upscaling are. A program, not a test:

    python tests/benchmark.py [--device cuda] [--rounds 9] [--only update ...]

Each form is timed in turn with a baseline in a process of its own. The ratio is the median over
neighbouring pairs, with the range of the middle half of them.

    update       SRResNet and SRGAN-VGG54 updates of 16 patches of 96x96
    upscale      images of 128x128 and 256x256
    precision    --precision auto against fp32 and against bf16: neither should be faster

The baseline of the first two is "plain": the same srgan.Update and networks without section 9, that
is fp32, channels-first, eager, Fig. 4 as drawn.

Measured on 2 cores of an AMD EPYC with AVX512-BF16, torch 2.15, shared with other work. An SRResNet
update is 126 GFLOP in its plain form, an SRGAN update 690. No GPU has been measured.

                                             plain        here   ratio (middle half)
    SRResNet update, 16 patches of 96x96     1.17 / s   4.01 / s  3.58 (3.30 to 3.93)
    SRGAN update with VGG54                  0.35 / s   0.82 / s  2.34 (2.26 to 2.42)
    128x128 upscaled to 512x512              2.32 / s   8.93 / s  3.88 (3.79 to 4.00)
    256x256 upscaled to 1024x1024            0.35 / s   2.31 / s  6.31 (6.00 to 6.70)

Upscaling to 33 megapixels takes 1.4 GB; to 400, beside the result, 1.1 GB in bf16, 1.8 in fp32.

The gain comes from bf16 and channels-last; the last 9x9 convolution before the last shuffle; a
cheaper gradient of PReLU; freed memory that is kept; and, at inference, folded batch norm.
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
from conftest import photo  # noqa: E402


def seconds(function, device):
    """How long function() takes on the device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def plain_update(stage, networks, device):
    """srgan.Update without section 9: fp32, eager, channels-first, torch's Adam."""
    G, D = (networks[name].to(memory_format=torch.contiguous_format)
            if name in networks else None for name in ("generator", "discriminator"))
    adam_G = torch.optim.Adam(G.parameters(), 1e-4)
    if stage == "srresnet":
        return srgan.Update(G, adam_G, {"pixel": (1.0, srgan.mse_loss)})
    phi = srgan.TruncatedVGG19("5_4", "random").to(device)
    content = {"content": (1.0, lambda sr, hr: srgan.content_loss(phi, sr, hr))}
    return srgan.Update(G, adam_G, content, D, torch.optim.Adam(D.parameters(), 1e-4))


def make_update(device, stage, form):
    """A function that makes one update of 16 patches of 96x96; form: "plain" or a precision."""
    plain = form == "plain"
    args = train.parse_args(["--data", "x", "--stage", stage, "--feature-weights", "random",
                             "--precision", "fp32" if plain else form])
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


def make_upscale(device, side, form):
    """A function that upscales one image of side x side; form: "plain" or a precision."""
    image, generator = photo(side, side), srgan.Generator().to(device).eval()
    if form != "plain":
        generator = srgan.optimize_for_inference(generator.to(memory_format=torch.channels_last))
        precision = srgan.pick_precision(device, form)
        return lambda: srgan.upscale(generator, image, precision=precision)

    @torch.inference_mode()
    def upscale():
        return srgan.to_pixels(generator(srgan.to_tensor(image)[None].to(device))).cpu()
    return upscale


def worker(pipe, make, device, *what):
    """Time one form whenever asked, in a process and so with memory of its own."""
    function = make(device, *what)
    while pipe.recv():
        pipe.send(seconds(function, device))


def compare(title, make, what, device, rounds, baseline="plain"):
    """Time --precision auto in turn with the baseline, and print a row."""
    spawn = multiprocessing.get_context("spawn")
    parent, child = spawn.Pipe()
    process = spawn.Process(target=worker, args=(child, make, device, what, baseline), daemon=True)
    process.start()
    child.close()
    function, pairs = make(device, what, "auto"), []
    for _ in range(rounds + 5):                  # the first ones warm up, compile and capture
        parent.send(True)
        pairs.append((parent.recv(), seconds(function, device)))
    parent.send(False)
    process.join()
    pairs = pairs[5:]
    ratios, quarter = sorted(b / o for b, o in pairs), rounds // 4
    theirs, ours = map(median, zip(*pairs))
    print(f"{title:26s} {1 / ours:8.3f} / s {median(ratios):6.2f}x ({ratios[quarter]:.2f} to "
          f"{ratios[-1 - quarter]:.2f}) of {baseline}'s {1 / theirs:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    modes = ["update", "upscale", "precision"]
    parser.add_argument("--only", nargs="+", default=modes, choices=modes)
    args = parser.parse_args()
    device = srgan.pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" \
        else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, {srgan.pick_precision(device)}")
    updates, images = (make_update, ("srresnet", "gan")), (make_upscale, (128, 256))
    for mode, (make, cases) in {"update": updates, "upscale": images}.items():
        for what in cases:
            rounds = max(3, args.rounds // 2) if what == "gan" else args.rounds
            if mode in args.only:
                compare(f"{mode} {what}", make, what, device, rounds)
        for baseline in ("fp32", "bf16"):
            if "precision" in args.only:
                compare(f"{mode} {cases[0]}", make, cases[0], device, args.rounds, baseline)


if __name__ == "__main__":
    main()
