"""What the README exports computes the same in other runtimes, where they are installed."""
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

import srgan


@pytest.fixture(scope="session")
def recipe():
    """The README's lines that export a network."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"## As a library\n```python\n(.*?)```", readme, re.S)[1]
    example, lines = code.split("\n\n")
    return example.splitlines()[0] + "\n" + lines                # with the line that imports


@pytest.fixture(scope="session")
def small_generator():
    """A small generator as the README's `generator`: ready for inference, in channels_last."""
    torch.manual_seed(0)
    generator = srgan.Generator(channels=8, n_blocks=1).to(memory_format=torch.channels_last)
    return srgan.optimize_for_inference(generator)


@pytest.fixture(scope="session")
def onnx_file(recipe, small_generator, tmp_path_factory):
    """srgan.onnx, written by the README's lines."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(recipe, {"generator": small_generator})
    return str(folder / "srgan.onnx")


def assert_same(run, generator):
    """run: LR -> SR as arrays. It is tried on a size that the export has not seen."""
    lr = torch.rand(1, 3, 9, 17)
    with torch.inference_mode():
        expected = generator(lr).numpy()
    assert np.abs(run(lr.numpy()) - expected).max() < 1e-4


def test_onnx_runtime_computes_the_same(onnx_file, small_generator):
    """srgan.optimize_for_inference, by the README's lines, in ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    assert_same(lambda lr: session.run(None, {name: lr})[0], small_generator)


def test_openvino_computes_the_same(onnx_file, small_generator):
    """srgan.optimize_for_inference, by the README's lines, in OpenVINO in fp32."""
    openvino = pytest.importorskip("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(onnx_file, "CPU", options)
    assert_same(lambda lr: model(lr)[0], small_generator)


def test_the_exported_weights_are_contiguous_and_the_generator_stays_as_it_is(recipe,
                                                                             small_generator):
    """The README's copy for converters, some of which mix up weights in channels_last."""
    first_lines = recipe.split("size = ")[0]
    names = {"generator": small_generator}
    exec(first_lines, names)
    for weight in names["network"].parameters():
        assert weight.is_contiguous()
    original = list(small_generator.parameters())
    assert not all(weight.is_contiguous() for weight in original)
