#!/usr/bin/env bash
# litert-torch 0.10.0 (torch 2.14.1, Python 3.11, Linux, CPU): a network of four convolutions is
# converted correctly; the same network after net.to(memory_format=torch.channels_last), which
# changes only how the weights lie in memory, becomes a model in which layers have the weights of
# other layers. There is no error and no warning. Output on 28 November 2026:
#
#     contiguous: 4 different weights in the file, error 0.0000
#     channels_last: 2 different weights in the file, error 1.6933
#
# The error is the largest difference from torch, divided by the largest value. The second line
# varies from run to run, as if it depended on where copies of the weights happen to lie in memory.
# With one or two such layers the result is right, so that a small test of the conversion passes.
# Why it surprises: channels_last is torch's own advice for speed on the CPU, and torch,
# torch.export and torch.onnx treat both forms alike. What helps: convert a copy after
# .to(memory_format=torch.contiguous_format).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q litert-torch==0.10.0 torch==2.14.1
cat > "$folder/convert.py" <<'PYTHON'
import litert_torch
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter

torch.manual_seed(0)
convolutions = [torch.nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4)]
net = torch.nn.Sequential(*convolutions).eval()
x = torch.randn(1, 8, 16, 16)
with torch.no_grad():
    expected = net(x).numpy()


def convert(name):
    """The number of different weights in the converted file, and its error."""
    model = litert_torch.convert(net, (x,))
    model.export("net.tflite")
    interpreter = Interpreter("net.tflite")
    interpreter.allocate_tensors()
    weights = set()
    for tensor in interpreter.get_tensor_details():
        if list(tensor["shape"]) == [8, 3, 3, 8]:
            weights.add(interpreter.get_tensor(tensor["index"]).tobytes())
    error = np.abs(model(x) - expected).max() / np.abs(expected).max()
    return f"{name}: {len(weights)} different weights in the file, error {error:.4f}", error


text, error = convert("contiguous")
print("RESULT", text)
net.to(memory_format=torch.channels_last)
text, error_channels_last = convert("channels_last")
print("RESULT", text)
assert error < 1e-4 and error_channels_last > 0.1, "this version behaves differently"
PYTHON
cd "$folder"
venv/bin/python convert.py > log 2> errors || { tail -n 3 errors; exit 1; }
sed -n 's/^RESULT //p' log
