"""Section 6: whole images, in tiles that leave no trace."""
import copy

import numpy as np
import pytest
import torch
from conftest import memory, photo

import srgan


def super_resolve(generator, image):
    """G as drawn in Fig. 4, of the whole image: float [H, W, 3] in [0, 255]."""
    with torch.no_grad():
        sr = generator(torch.from_numpy(image / 255).float().permute(2, 0, 1)[None])
    return (sr[0].permute(1, 2, 0).numpy() + 1) * 127.5


def check(result, expected):
    """The result is what was expected, rounded to 8 bits."""
    assert result.dtype == np.uint8 and np.abs(result - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("tile, size", [
    (0, (37, 45)), (1, (4, 45)), (16, (37, 45)), (None, (37, 45)), (None, (1, 1)), (5, (1, 50))])
def test_no_tiling_shows_in_the_result_and_arrays_may_be_views(generator, tile, size):
    image = photo(*size)[::-1]
    image.flags.writeable = False
    expected = super_resolve(generator, image.copy())
    assert expected.std() > 5
    check(srgan.upscale(generator, image, tile=tile), expected)


@pytest.mark.parametrize("corner", [0, -1])
@pytest.mark.parametrize("block, scale", [("residual", 2), ("residual", 4), ("residual", 8),
                                          ("rrdb", 4)])
def test_tiles_are_exact_and_no_smaller_overlap_would_be(block, scale, corner, monkeypatch):
    """In floating point, for a network that sees as far to one side as it can."""
    g = srgan.make_generator(block, scale=scale, channels=4, tanh=False,
                             n_blocks=1 if block == "rrdb" else 2).eval()
    for name, p in g.named_parameters():
        if p.dim() == 4:
            torch.nn.init.zeros_(p).data[:, -1, corner, corner] = 1
        elif name.endswith("bias"):
            torch.nn.init.constant_(p, 0.1)
    torch.nn.init.ones_(g.fuse[-1].weight) if block == "residual" else None
    image, real, to_pixels, tiles = photo(41, 50), srgan.radii(g), srgan.to_pixels, []
    monkeypatch.setattr(srgan, "PART", 16)
    monkeypatch.setattr(srgan, "to_pixels", lambda sr: (tiles.append(sr), to_pixels(sr))[1])
    lr = srgan.to_tensor(image)[None]
    with torch.no_grad():
        whole = g(lr)

    def error(less):
        radii = tuple(np.subtract(real, less).tolist())
        monkeypatch.setattr(srgan, "radii", lambda g: radii)
        srgan.upscale(g, image, tile=17)
        sr = srgan.fill_in_tiles(torch.empty_like(whole), lambda lr: tiles.pop(0), lr, 17, radii[0])
        return (sr - whole).abs().max()
    assert error((0, 0)) < 1e-5 < 1e-4 < min(error((1, 0)), error((0, 1)))


def test_tiles_bound_the_memory():
    g, image = srgan.Generator(2, channels=8, n_blocks=1).eval(), photo(500, 500)   # SR: 3 MB
    whole, tiled = (memory(lambda: srgan.upscale(g, image, tile=tile)) for tile in (0, 50))
    assert tiled < 20 and whole > 3 * tiled


def test_if_memory_runs_out_the_message_says_what_to_do(generator, monkeypatch):
    def features(generator, lr):
        raise RuntimeError(message)
    monkeypatch.setattr(srgan, "features", features)
    for message, error in (("CUDA out of memory", MemoryError), ("something else", RuntimeError),
                           ("DefaultCPUAllocator: can't allocate memory", MemoryError)):
        with pytest.raises(error, match="something|use smaller tiles"):
            srgan.upscale(generator, photo(8, 8))


def test_the_ensemble_is_the_mean_over_eight_views(generator):
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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_gives_the_cpus_image(generator):
    image = photo(40, 50)
    gpu = srgan.upscale(copy.deepcopy(generator).cuda(), image, tile=20)
    assert np.abs(gpu.astype(int) - srgan.upscale(generator, image)).max() <= 2
