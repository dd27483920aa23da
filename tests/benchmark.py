"""How fast training and upscaling are. A program, not a test:

    python tests/benchmark.py [--device cuda] [--rounds 9] [--only update ...]

Each form is timed in turn with a baseline in a process of its own. The ratio is the median over
neighbouring pairs, with the range of the middle half of them.

    update       SRResNet and SRGAN-VGG54 updates of 16 patches of 96x96
    upscale      images of 128x128 and 256x256
    precision    --precision auto against fp32 and against bf16: neither should be faster
    runtimes     upscaling in fp32 against OpenVINO on the same rearranged graph, if it is installed

The baseline of the first two is "plain": the same steps and networks without section 9, that
is fp32, channels-first, eager, Fig. 4 as drawn. Measured on 2 cores of an AMD EPYC with
AVX512-BF16, in bf16, shared with other work (commit e58db2e); no GPU has been measured:

                                             plain        here   ratio (middle half)
    SRResNet update, 16 patches of 96x96     1.63 / s   5.28 / s  3.24 (3.13 to 3.30)
    SRGAN update with VGG54                  0.47 / s   0.98 / s  2.10 (2.02 to 2.18)
    128x128 upscaled to 512x512              2.61 / s  10.28 / s  3.98 (3.91 to 3.99)
    256x256 upscaled to 1024x1024            0.52 / s   2.74 / s  5.25 (5.18 to 5.29)

The same on 2 cores of an older one, with AVX2 only, in fp32, otherwise idle (commit 3f11913). Over
90 % of these times are convolutions by oneDNN. OpenVINO 2026.4.1 computes the rearranged graph 1.14
and 1.18 times as fast:

    SRResNet update, 16 patches of 96x96     0.42 / s   0.57 / s  1.40 (1.38 to 1.48)
    SRGAN update with VGG54                  0.12 / s   0.13 / s  1.13 (0.97 to 1.17)
    128x128 upscaled to 512x512              0.58 / s   1.42 / s  2.44 (2.36 to 2.51)
    256x256 upscaled to 1024x1024            0.09 / s   0.33 / s  3.77 (3.33 to 3.90)
"""
import argparse
import functools
import importlib.util
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


def make_update(device, stage, form):
    """A function that makes one update of 16 patches of 96x96; form: "plain" or a precision."""
    plain = form == "plain"
    precision = "fp32" if plain else form
    args = train.parse_args(["--data", "x", "--stage", stage, "--feature-weights", "random",
                             "--precision", precision])
    settings = train.resolve_settings(args)
    settings["precision"] = train.set_up_arithmetic(device, settings["precision"])
    networks = train.make_networks(settings, stage, None, device)
    layout = torch.contiguous_format if plain else torch.channels_last
    lr = torch.rand(16, 3, 24, 24, device=device).contiguous(memory_format=layout)
    hr = (torch.rand(16, 3, 96, 96, device=device) * 2 - 1).contiguous(memory_format=layout)
    if not plain:
        values = train.stage_settings(settings, stage)
        tools = train.make_tools(settings, stage, train.State(networks, values, device), device)
        return functools.partial(train.update, tools, [(lr, hr)])

    G = networks["generator"].to(memory_format=layout)
    adam_G = torch.optim.Adam(G.parameters(), 1e-4)
    if stage == "srresnet":
        return functools.partial(srgan.srresnet_step, G, adam_G, srgan.mse_loss, lr, hr)
    D = networks["discriminator"].to(memory_format=layout)
    adam_D = torch.optim.Adam(D.parameters(), 1e-4)
    phi = srgan.TruncatedVGG19("5_4", "random").to(device)
    content = functools.partial(srgan.content_loss, phi)
    return functools.partial(srgan.srgan_step, G, D, adam_G, adam_D, content, lr, hr)


def make_upscale(device, side, form):
    """A function that upscales one image of side x side.

    form: "plain", "openvino" or a precision.
    """
    image = photo(side, side)
    generator = srgan.Generator().to(device).eval()
    if form == "openvino":
        return make_openvino(generator, image)
    if form != "plain":
        generator = srgan.optimize_for_inference(generator)
        precision = srgan.pick_precision(device, form)
        return lambda: srgan.upscale(generator, image, precision=precision)

    @torch.inference_mode()
    def upscale():
        lr = srgan.to_tensor(image)[None].to(device)
        return srgan.to_pixels(generator(lr)).cpu()
    return upscale


def make_openvino(generator, image):
    """A function that upscales an image in fp32 by OpenVINO, from the graph of our fast form."""
    import openvino
    lr = srgan.to_tensor(image)[None].contiguous()
    model = openvino.convert_model(srgan.optimize_for_inference(generator), example_input=lr,
                                   input=list(lr.shape))
    options = {"INFERENCE_PRECISION_HINT": "f32",
               "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(model, "CPU", options)

    def upscale():
        lr = srgan.to_tensor(image)[None].contiguous()
        return srgan.to_pixels(torch.from_numpy(compiled(lr.numpy())[0]))
    return upscale


def worker(pipe, make, device, *what):
    """Time one form whenever asked, in a process and so with memory of its own."""
    function = make(device, *what)
    while pipe.recv():
        pipe.send(seconds(function, device))


def compare(title, make, what, device, rounds, baseline="plain", form="auto"):
    """Time a form, by default --precision auto, in turn with the baseline, and print a row."""
    spawn = multiprocessing.get_context("spawn")
    parent, child = spawn.Pipe()
    process = spawn.Process(target=worker, args=(child, make, device, what, baseline), daemon=True)
    process.start()
    child.close()
    function = make(device, what, form)
    pairs = []
    for _ in range(rounds + 5):                  # the first ones warm up and compile
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
    modes = ["update", "upscale", "precision", "runtimes"]
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
    if "runtimes" in args.only and not importlib.util.find_spec("openvino"):
        print("runtimes: skipped, because openvino is not installed (pip install openvino)")
    elif "runtimes" in args.only:
        for side in (128, 256):
            compare(f"fp32 {side}", make_upscale, side, torch.device("cpu"), args.rounds,
                    "openvino", "fp32")


if __name__ == "__main__":
    main()
