"""Does it run elsewhere, and how fast? A program, not a test:

    pip install onnx onnxscript onnxruntime openvino pnnx ncnn litert-torch
    python tests/runtimes.py [--ckpt weights/srgan.pth] [--rounds 9]

It converts a generator for each runtime, in two forms: as drawn in Fig. 4, and the fast form that
srgan.optimize_for_inference makes. For each it prints how far its 8-bit images are from those of
srgan.upscale: the largest difference in levels, and as a PSNR. The time is CPU time with one thread
each, divided by that of srgan.upscale in fp32, as the median of alternating runs on
samples/astronaut.png (128x128). Differences are also taken on samples/raccoon.png (256x192), which
shows that the converted network takes any size. A runtime that is not installed is left out with a
message.

docs/MEASURED.md shows the table.
"""
import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import srgan  # noqa: E402

EXAMPLE = torch.rand(1, 3, 128, 128)                             # LR in [0, 1]


def export_onnx(network):
    """Write network.onnx, which takes any size, into the current folder."""
    size = {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    program = torch.export.export(network, (EXAMPLE,), dynamic_shapes=(size,))
    torch.onnx.export(program, (), "network.onnx", dynamo=True, verbose=False)


def load_onnxruntime(network, file="network.onnx"):
    import onnxruntime
    if file == "network.onnx":
        export_onnx(network)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda lr: session.run(None, {name: lr})[0]


def load_onnxruntime_int8(network):
    """With weights and activations in 8 bits, whose range is found at each call."""
    from onnxruntime.quantization import quantize_dynamic
    export_onnx(network)
    quantize_dynamic("network.onnx", "int8.onnx")
    return load_onnxruntime(network, "int8.onnx")


def load_openvino(network, precision="bf16"):
    import openvino
    export_onnx(network)
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision}
    model = openvino.Core().compile_model("network.onnx", "CPU", options)
    return lambda lr: model(lr)[0]


def load_openvino_fp32(network):
    return load_openvino(network, "f32")


def load_ncnn(network):
    """By pnnx, from a trace. Two example sizes tell it which sides may vary."""
    import ncnn
    import pnnx
    with torch.no_grad():
        pnnx.export(network, "network.pt", (EXAMPLE,), (EXAMPLE[..., :64],), fp16=False)
    model = ncnn.Net()
    model.opt.num_threads = 1
    model.opt.use_sgemm_convolution = False                      # writes out all 9x9 windows
    model.load_param("network.ncnn.param")
    model.load_model("network.ncnn.bin")

    def run(lr):
        extractor = model.create_extractor()
        extractor.input("in0", ncnn.Mat(lr[0]).clone())          # ignores strides
        return np.array(extractor.extract("out0")[1])[None]
    return run


def load_litert(network):
    """Of one size."""
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter
    litert_torch.convert(network, (EXAMPLE,)).export("network.tflite")
    model = Interpreter("network.tflite", num_threads=1)
    model.allocate_tensors()
    source = model.get_input_details()[0]["index"]
    target = model.get_output_details()[0]["index"]

    def run(lr):
        model.set_tensor(source, lr)
        model.invoke()
        return model.get_tensor(target)
    return run


FORMS = ("as drawn", "fast")
RUNTIMES = {  # name: (its loader, the forms to convert, whether the result takes any size)
    "ONNX Runtime": (load_onnxruntime, FORMS, True),
    "ONNX Runtime, int8": (load_onnxruntime_int8, ("as drawn",), True),
    "OpenVINO, f32": (load_openvino_fp32, FORMS, True),
    "OpenVINO, bf16": (load_openvino, FORMS, True),
    "ncnn": (load_ncnn, FORMS, True),
    "LiteRT": (load_litert, FORMS, False),
}


def make_upscale(run):
    """A function like srgan.upscale, uint8 [h, w, 3] -> uint8 [4h, 4w, 3], of a runtime's `run`."""
    def upscale(image):
        lr = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32) / 255
        sr = torch.from_numpy(run(lr))                           # in [-1, 1]
        return srgan.to_pixels(sr)[0].numpy()
    return upscale


def cpu_seconds(function, image):
    began = time.process_time()
    function(image)
    return time.process_time() - began


def report(name, upscale, reference, images, rounds):
    """Print a row: the difference from `reference` and the ratio of the times."""
    largest = 0
    psnrs = []
    for image in images:
        sr = upscale(image)
        expected = reference(image)
        largest = max(largest, np.abs(sr.astype(int) - expected).max())
        psnrs.append(srgan.psnr(sr, expected, shave=0, luma=False))
    ratios = []
    for _ in range(rounds):
        ours = cpu_seconds(reference, images[0])
        ratios.append(cpu_seconds(upscale, images[0]) / ours)
    print(f"{name:40s} {largest:4d} levels {min(psnrs):6.1f} dB {median(ratios):6.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=str(ROOT / "weights/srgan.pth"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = []
    for name in ("astronaut", "raccoon"):
        images.append(srgan.open_rgb(ROOT / f"samples/{name}.png"))

    # Ours, and the two forms, whose weights are laid out as converters expect them.
    drawn = srgan.load_generator(args.ckpt)
    generator = srgan.optimize_for_inference(drawn)
    drawn = drawn.to(memory_format=torch.contiguous_format)
    fast = copy.deepcopy(generator).to(memory_format=torch.contiguous_format)
    networks = {"as drawn": drawn, "fast": fast}

    def reference(image):
        return srgan.upscale(generator, image)

    def reference_bf16(image):
        return srgan.upscale(generator, image, precision="bf16")

    report("srgan.upscale, bf16", reference_bf16, reference, images, args.rounds)
    for name in args.only:
        load, forms, any_size = RUNTIMES[name]
        tested = images if any_size else images[:1]
        for form in forms:
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)                                 # converters write files
                try:
                    run = load(networks[form])
                    report(f"{name}: {form}", make_upscale(run), reference, tested, args.rounds)
                except ImportError as error:
                    srgan.say(f"{name}: not measured ({srgan.one_line(error)})")
                os.chdir(ROOT)


if __name__ == "__main__":
    srgan.run(main)
