import numpy as np
import pytest
import torch
from conftest import photo
from torch import nn

import srgan


@pytest.fixture(scope="module")
def generator():
    """A generator of random weights whose batch norms have seen some pictures."""
    torch.manual_seed(0)
    g = srgan.Generator(channels=8, n_blocks=3)
    for p in g.parameters():
        nn.init.normal_(p, std=0.15) if p.dim() > 1 else nn.init.uniform_(p, 0.1, 0.5)
    for _ in range(3):
        g.train()(torch.rand(4, 3, 24, 24))
    return g.eval()


@pytest.mark.parametrize("tile", [1, 5, 16, 31])
def test_no_tiling_shows_in_the_result(generator, tile):
    image = photo(37, 45)[:18 if tile == 1 else 37]
    whole = srgan.upscale(generator, image, tile=0)
    assert whole.std() > 5
    difference = np.abs(srgan.upscale(generator, image, tile=tile).astype(int) - whole)
    # Sums of another order end on the other side of a rounding here and there; a seam would be longer.
    assert difference.max() <= 1 and np.count_nonzero(difference) <= 8


def test_tiles_are_equal_in_floating_point(generator, monkeypatch):
    image, parts = photo(37, 45), []
    monkeypatch.setattr(srgan, "PART", 7)
    monkeypatch.setattr(srgan, "to_pixels", lambda sr, real=srgan.to_pixels: (parts.append(sr.clone()), real(sr))[1])
    srgan.upscale(generator, image, tile=12)
    tiles = srgan._tiles(0, 37, 0, 45, 12)
    assert len(tiles) == len(parts) == 16
    with torch.no_grad():
        whole = generator(srgan.to_tensor(image)[None])
    for (t, b, l, r), part in zip(tiles, parts):
        assert (part - whole[:, :, 4 * t:4 * b, 4 * l:4 * r]).abs().max() <= 1e-5


def test_where_memory_is_short_tiles_are_halved_until_they_fit(generator):
    class Small(srgan.Generator):
        def features(self, lr):
            if lr.shape[2] * lr.shape[3] > 60 * 60:
                raise torch.OutOfMemoryError("CUDA out of memory")
            calls.append(lr.shape)
            return super().features(lr)
    small, calls, image = Small(**generator.arch), [], photo(90, 70)
    small.load_state_dict(generator.state_dict())
    difference = np.abs(srgan.upscale(small.eval(), image).astype(int) - srgan.upscale(generator, image))
    assert len(calls) > 1 and difference.max() <= 1
    with pytest.raises(torch.OutOfMemoryError):
        monkey = Small(**generator.arch)
        monkey.features = lambda lr: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
        srgan.upscale(monkey, image)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory"),
                                   RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("could not create a memory object")])
def test_short_memory_is_recognised_in_every_wording(error):
    assert srgan.is_out_of_memory(error)
    assert not srgan.is_out_of_memory(RuntimeError("shapes do not match")) and not srgan.is_out_of_memory(ValueError("out of memory"))


def test_several_pictures_of_one_size_go_together(generator):
    pictures = np.stack([photo(20, 28, seed) for seed in range(3)])
    together = srgan.upscale(generator, pictures, tile=16)
    assert together.shape == (3, 80, 112, 3)
    for one, picture in zip(together, pictures):
        assert np.abs(one.astype(int) - srgan.upscale(generator, picture)).max() <= 1


@pytest.mark.parametrize("scale", srgan.SCALES)
@pytest.mark.parametrize("n_blocks", [1, 5])
def test_the_radius_is_how_far_the_generator_sees(scale, n_blocks):
    g = srgan.Generator(scale, channels=4, n_blocks=n_blocks).double().eval()
    for p in g.parameters():
        nn.init.uniform_(p, 0.02, 0.1)  # all positive: no influence cancels
    n = 2 * g.radius + 9
    x = torch.zeros(1, 3, n, n, dtype=torch.double, requires_grad=True)
    y = g.tail(g.upsample((h := g.head(x)) + g.fuse(g.blocks(h))))
    centre = n // 2
    y[..., centre * scale:(centre + 1) * scale, centre * scale:(centre + 1) * scale].sum().backward()
    seen = x.grad[0, 0].any(0).nonzero()
    assert centre - seen.min() <= g.radius and seen.max() - centre <= g.radius
    assert max(centre - seen.min(), seen.max() - centre) == g.radius  # and no smaller radius would do


def test_optimizing_for_inference_changes_nothing(generator):
    folded = srgan.optimize_for_inference(generator)
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.PReLU)) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in generator.modules())
    x = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        assert torch.allclose(folded(x), generator(x), atol=1e-5)
        assert (generator(x) - generator.train()(x)).abs().max() > 1e-2  # the norms do something
    generator.eval()


def test_the_ensemble_does_not_depend_on_how_the_picture_is_held(generator):
    image = photo(20, 28)
    one = srgan.upscale(generator, image, ensemble=True)
    other = srgan.upscale(generator, np.rot90(image[:, ::-1]), ensemble=True)
    assert np.abs(one.astype(int) - np.rot90(other, -1)[:, ::-1]).max() <= 1
    assert not np.array_equal(one, srgan.upscale(generator, image))


def test_bf16_stays_near_fp32(generator):
    image = photo(20, 28)
    one, other = (srgan.upscale(generator, image, precision=p).astype(int) for p in ("fp32", "bf16"))
    assert 0 < np.abs(one - other).mean() < 2


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2)])
def test_the_smallest_pictures_are_upscaled_too(generator, size):
    assert srgan.upscale(generator, photo(*size)).shape == (size[0] * 4, size[1] * 4, 3)


def test_checkpoints_come_back_as_they_were(generator, tmp_path):
    srgan.save_checkpoint(tmp_path / "g.pth", generator, stage="srresnet")
    loaded = srgan.load_generator(tmp_path / "g.pth")
    assert not loaded.training and loaded.arch == generator.arch
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), generator.state_dict().values()))
    assert [p.name for p in tmp_path.iterdir()] == ["g.pth"]


def test_what_is_no_checkpoint_is_named_and_not_run(generator, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    good = {"generator": generator.state_dict(), "arch": generator.arch}
    for name, content in {"pickled.pth": Evil(), "model.pth": generator, "list.pth": [1], "other.pth": {"state_dict": {}},
                          "wider.pth": {**good, "arch": {**generator.arch, "channels": 16}},
                          "unknown.pth": {**good, "arch": {"depth": 3}}, "none.pth": {**good, "arch": None}}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(srgan.InputError, match=name):
            srgan.load_generator(tmp_path / name)
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").touch()
    for name in ("text.pth", "empty.pth", "missing.pth"):
        with pytest.raises(srgan.InputError, match=name):
            srgan.load_generator(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    srgan.replacing_text(path, "old")
    with pytest.raises(RuntimeError), srgan.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_average_follows_the_network():
    a, b = srgan.Generator(channels=4, n_blocks=1), srgan.Generator(channels=4, n_blocks=1)
    b.train()(torch.rand(2, 3, 8, 8))
    before = {key: value.clone() for key, value in a.state_dict().items()}
    srgan.ema_(srgan.float_state(a), srgan.float_state(b), 0.75)
    for key, value in a.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, 0.75 * before[key] + 0.25 * b.state_dict()[key], atol=1e-6), key


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_gives_the_cpus_picture(generator):
    image = photo(40, 50)
    gpu = srgan.upscale(srgan.copy.deepcopy(generator).cuda(), image, tile=20)
    assert np.abs(gpu.astype(int) - srgan.upscale(generator, image)).max() <= 2
