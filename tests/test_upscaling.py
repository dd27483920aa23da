"""Section 6: whole images, in tiles that leave no trace."""
import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import memory, photo

import srgan


def super_resolve(generator, image):
    """G as drawn in Fig. 4, of the whole image: float64 [H, W, 3] in [0, 255]."""
    with torch.no_grad():
        sr = generator(torch.from_numpy(image / 255).permute(2, 0, 1)[None])
    return (sr[0].permute(1, 2, 0).numpy() + 1) * 127.5


def check(result, expected):
    """The result is what was expected, rounded to 8 bits."""
    assert result.dtype == np.uint8 and np.abs(result - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("tile, size", [
    (0, (37, 45)), (1, (4, 45)), (16, (37, 45)), (None, (37, 45)), (None, (1, 1)), (5, (1, 50))])
def test_no_tiling_shows_in_the_result_and_arrays_may_be_views(double, generator, tile, size):
    image = photo(*size)[::-1]
    image.flags.writeable = False
    expected = super_resolve(generator, image.copy())
    assert expected.std() > 5
    check(srgan.upscale(generator, image, tile=tile), expected)


def one_sided(block, scale, corner):
    """A network that sees as far to one side as it can: each kernel has one weight, in a corner."""
    blocks = 1 if block == "rrdb" else 2
    g = srgan.make_generator(block, scale=scale, channels=4, tanh=False, n_blocks=blocks).eval()
    for name, p in g.named_parameters():
        if p.dim() == 4:
            torch.nn.init.zeros_(p)
            p.data[:, -1, corner, corner] = 1
        elif name.endswith("bias"):
            torch.nn.init.constant_(p, 0.1)
    if block == "residual":
        torch.nn.init.ones_(g.fuse[-1].weight)
    return g


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("corner", [0, -1])
@pytest.mark.parametrize("block, scale", [("residual", 2), ("residual", 4), ("residual", 8),
                                          ("rrdb", 4)])
def test_tiles_are_exact_and_no_smaller_overlap_would_be(double, block, scale, corner, optimize,
                                                         monkeypatch):
    """srgan.radii, before SR is rounded to 8 bits."""
    g = one_sided(block, scale, corner)
    image = photo(41, 50)
    with torch.no_grad():
        whole = g(srgan.to_tensor(image)[None])
    if optimize:
        g = srgan.optimize_for_inference(g)
    real = srgan.radii(g)
    monkeypatch.setattr(srgan, "PART", 16)
    monkeypatch.setattr(srgan, "to_pixels", lambda sr: sr.movedim(-3, -1))   # stays in floats
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype: empty(*shape))

    def error(radius, part_radius):
        monkeypatch.setattr(srgan, "radii", lambda g: (radius, part_radius))
        sr = torch.from_numpy(srgan.upscale(g, image, tile=17)).movedim(-1, 0)
        return (sr - whole[0]).abs().max()
    assert error(real[0], real[1]) < 1e-9
    assert error(real[0] - 1, real[1]) > 1e-4
    assert error(real[0], real[1] - 1) > 1e-4


def test_tiles_bound_the_memory():
    g, image = srgan.Generator(2, channels=8, n_blocks=1).eval(), photo(500, 500)   # SR: 3 MB
    whole, tiled = (memory(lambda: srgan.upscale(g, image, tile=tile)) for tile in (0, 50))
    assert tiled < 20 and whole > 3 * tiled


def test_if_memory_runs_out_the_message_says_what_to_do(generator, monkeypatch):
    def compute_maps(generator, lr):
        raise RuntimeError(message)
    monkeypatch.setattr(srgan, "compute_maps", compute_maps)
    for message, error in (("CUDA out of memory", MemoryError), ("something else", RuntimeError),
                           ("DefaultCPUAllocator: can't allocate memory", MemoryError)):
        with pytest.raises(error, match="something|use smaller tiles"):
            srgan.upscale(generator, photo(8, 8))


def test_the_ensemble_is_the_mean_over_eight_views(double, generator):
    image, sums = photo(20, 28), 0
    result = srgan.upscale(generator, image, ensemble=True, tile=9)
    for turns in range(4):
        for mirror in (slice(None), slice(None, None, -1)):
            view = np.ascontiguousarray(np.rot90(image[:, mirror], turns))
            sums = sums + np.rot90(super_resolve(generator, view), -turns)[:, mirror]
    check(result, sums / 8)
    assert np.abs(result - super_resolve(generator, image)).max() > 5


def test_anything_but_a_uint8_rgb_image_is_a_type_error(generator):
    for wrong in (photo(8, 8)[..., 0], photo(8, 8) / 255, photo(8, 8)[:0], "a.png"):
        with pytest.raises(TypeError, match=r"uint8 array \[h, w, 3\]"):
            srgan.upscale(generator, wrong)


@pytest.mark.parametrize("setting", ["torch.backends.fp32_precision = 'ieee'",
                                     "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
                                     "torch.backends.cudnn.allow_tf32 = False"])
def test_arithmetic_bears_with_the_programs_settings_and_leaves_them(setting):
    """srgan.arithmetic: since torch 2.9, the old way to set TF32 must not be mixed with the new."""
    if "fp32_precision" in setting and not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has only the old way")
    state = setting.split(" = ")[0]
    program = f"""if True:
        import srgan, torch
        {setting}
        before = {state}
        for device in ("cpu", "cuda"):
            for precision in ("fp32", "bf16"):
                with srgan.arithmetic(torch.device(device), precision):
                    pass
                assert {state} == before
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(srgan.__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_gives_the_cpus_image(generator):
    image = photo(40, 50)
    gpu = srgan.upscale(copy.deepcopy(generator).cuda(), image, tile=20)
    assert np.abs(gpu.astype(int) - srgan.upscale(generator, image)).max() <= 1
