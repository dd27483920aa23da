"""Section 1, Fig. 4; content networks; RRDB; the grid loss and the Fourier loss."""
import hashlib
import os
import shutil

import pytest
import torch
from conftest import randomised
from torch import nn

import srgan


def notation(network):
    """Convolutions in the notation of Fig. 4, the other layers by name, in order."""
    names = {nn.BatchNorm2d: "BN", nn.PReLU: "PReLU", nn.LeakyReLU: "LReLU", nn.Tanh: "Tanh",
             nn.PixelShuffle: "PixelShuffle", nn.InstanceNorm2d: "IN"}
    return [f"k{m.kernel_size[0]}n{m.out_channels}s{m.stride[0]}" if isinstance(m, nn.Conv2d)
            else f"dense {m.out_features}" if isinstance(m, nn.Linear) else names[type(m)]
            for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear, *names))]


def test_the_generator_is_that_of_figure_4():
    g = srgan.Generator()
    block = ["k3n64s1", "BN", "PReLU", "k3n64s1", "BN"]
    assert notation(g) == (["k9n64s1", "PReLU"] + 16 * block + ["k3n64s1", "BN"]
                           + 2 * ["k3n256s1", "PixelShuffle", "PReLU"] + ["k9n3s1", "Tanh"])
    assert sum(p.numel() for p in g.parameters()) == 1_547_350
    assert all(m.weight.numel() == 1 for m in g.modules() if isinstance(m, nn.PReLU))


def test_the_generator_adds_its_skip_connections_where_figure_4_does():
    g = randomised(srgan.Generator(channels=8, n_blocks=2)).eval()
    x = torch.rand(1, 3, 5, 7)
    first = g.head(x)
    one = first + g.blocks[0].body(first)
    two = one + g.blocks[1].body(one)
    expected = torch.tanh(g.tail(g.upsample(first + g.fuse(two))))
    assert torch.allclose(g(x), expected, atol=1e-5)


def test_the_discriminator_is_that_of_figure_4():
    d = srgan.Discriminator()
    layers = ["n64s2", "n128s1", "n128s2", "n256s1", "n256s2", "n512s1", "n512s2"]
    assert notation(d) == (["k3n64s1", "LReLU"]
                           + [x for layer in layers for x in ("k3" + layer, "BN", "LReLU")]
                           + ["dense 1024", "LReLU", "dense 1"])
    assert all(m.negative_slope == 0.2 for m in d.modules() if isinstance(m, nn.LeakyReLU))
    assert d.features(torch.zeros(1, 3, 96, 96)).shape == (1, 512, 6, 6)
    logits = d(100 * torch.randn(2, 3, 96, 96))
    assert logits.shape == (2,) and not ((0 <= logits) & (logits <= 1)).all()  # no sigmoid


def test_the_discriminator_takes_other_channels_kernels_norms_and_sizes():
    d = srgan.Discriminator(30, (8, 16, 16), first_kernel=9, norm="instance", pool=6)
    assert notation(d)[:6] == ["k9n8s1", "LReLU", "k3n16s2", "IN", "LReLU", "k3n16s1"]
    assert all(d(torch.zeros(2, 3, size, size)).shape == (2,) for size in (30, 96))
    odd = srgan.Discriminator(30, (4, 4, 8, 8))                  # of the size of its feature maps
    assert odd(torch.zeros(2, 3, 30, 30)).shape == (2,)


@pytest.mark.parametrize("block", srgan.GENERATORS)
@pytest.mark.parametrize("scale", srgan.SCALES)
def test_generators_can_start_as_nearest_neighbour_upsampling(block, scale):
    x = torch.rand(1, 3, 12, 10)
    g = srgan.make_generator(block, scale=scale, channels=8, n_blocks=1).eval()
    srgan.INITS["nearest"](g)
    expected = torch.tanh(2.5 * x - 1.25).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    assert torch.allclose(g(x), expected, atol=1e-5)


def test_the_strict_generator_starts_with_torchs_weights_and_has_no_tanh():
    torch.manual_seed(7)
    g = srgan.Generator(channels=8, n_blocks=1, tanh=False)
    srgan.INITS["torch"](g)
    torch.manual_seed(7)
    assert torch.equal(g.head[0].weight, nn.Conv2d(3, 8, 9).weight)   # the first that is drawn
    assert "Tanh" not in notation(g) and g.arch["tanh"] is False and "init" not in g.arch


def test_rrdbs_take_the_place_of_residual_blocks():
    g = randomised(srgan.make_generator("rrdb", channels=16, n_blocks=2), 0.05)
    one, two, three = g.blocks[0].body
    assert len(g.blocks) == 2 and g.arch["block"] == "rrdb" and "BN" not in notation(g)
    assert notation(one) == ["k3n32s1"] * 4 + ["k3n16s1"]
    maps = [x := torch.rand(1, 16, 6, 6)]
    for conv in one.convs[:-1]:
        maps.append(nn.functional.leaky_relu(conv(torch.cat(maps, 1)), 0.2))
    assert torch.allclose(one(x), x + 0.2 * one.convs[-1](torch.cat(maps, 1)), atol=1e-5)
    assert torch.allclose(g.blocks[0](x), x + 0.2 * three(two(one(x))), atol=1e-5)


@pytest.mark.parametrize("name, layer, n_layers", [
    ("vgg19", "1_1", 2), ("vgg19", "2_2", 9), ("vgg19", "5_4", 36), ("squeezenet1_1", "3", 4)])
def test_phi_is_torchvisions_network_up_to_a_layer(name, layer, n_layers):
    models = pytest.importorskip("torchvision").models
    whole = models.squeezenet1_1().features if name == "squeezenet1_1" else \
        models.vgg.make_layers(models.vgg.cfgs["E"])
    network, cut = srgan.CONTENT_NETWORKS[name], whole[:n_layers]
    phi = network(layer, "random")
    cut.load_state_dict(phi.features.state_dict())
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        expected = cut(((x + 1) / 2 - mean) / std) / 12.75
    assert expected.any() and torch.allclose(phi(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in phi.parameters())
    other = network(layer, "random", divisor=1)                  # the same weights every time
    assert torch.allclose(other(x), 12.75 * phi(x), rtol=1e-5)


def test_content_weights_are_downloaded_once_and_checked_or_come_from_a_file(tmp_path, monkeypatch):
    """... that holds the whole network or only its features."""
    state = srgan.TruncatedVGG19("1_1", "random").features.state_dict()
    wrong, bare = tmp_path / "vgg19-01234567.pth", tmp_path / "features.pth"   # another hash
    torch.save({f"features.{key}": value.half() + 1 for key, value in state.items()}, wrong)
    torch.save({key: value + 1 for key, value in state.items()}, bare)
    digest = hashlib.sha256(wrong.read_bytes()).hexdigest()
    good = shutil.copy(wrong, tmp_path / f"vgg19-{digest[:8]}.pth")
    monkeypatch.setattr(srgan, "VGG19_URL", good.as_uri())
    for weights in ("imagenet", wrong, bare, "imagenet"):        # the last from the cache
        loaded = srgan.TruncatedVGG19("1_1", weights).features[0].weight
        assert torch.allclose(loaded, state["0.weight"] + 1, atol=2e-3)
        good.unlink(missing_ok=True)
    with pytest.raises(srgan.InputError, match="vgg19-01234567.pth.*2.weight"):
        srgan.TruncatedVGG19("1_2", wrong)
    os.truncate(tmp_path / "torch-home/hub/checkpoints" / good.name, 1000)
    for path in (good, wrong, tmp_path / "vgg19-76543210.pth"):  # cut off, wrong, missing
        monkeypatch.setattr(srgan, "VGG19_URL", path.as_uri())
        with pytest.raises(srgan.InputError, match="cannot download .* --feature-weights FILE"):
            srgan.TruncatedVGG19("1_1")


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_the_grid_loss_sees_differences_between_the_places_in_an_lr_pixel_and_nothing_else(scale):
    grid = 0.1 * torch.randn(1, 3, scale, scale).repeat(1, 1, 16, 24)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 12)   # of neighbouring LR pixels
    signs = signs.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    seen, unseen = (srgan.grid_loss(grid, grid - sr, scale) for sr in (grid, grid * signs))
    assert (seen - unseen).item() == pytest.approx(grid.abs().mean().item(), rel=1e-4)
    hr, texture = 0.2 * torch.randn(2, 4, 1, 16 * scale, 24 * scale).expand(-1, -1, 3, -1, -1)
    place = torch.zeros(scale, scale)
    place[1, -1] = scale                                         # all of the energy at one place
    same, dots = (srgan.grid_loss(x, hr, scale) for x in (texture, texture * place.repeat(16, 24)))
    assert dots > 2 * same and srgan.grid_loss(hr, hr, scale) < 0.5 * same


def test_the_fourier_loss_compares_how_much_texture_there_is_and_not_where_it_is():
    x = torch.arange(96) * 2 * torch.pi / 4
    wave, moved = (0.3 * f(x).expand(1, 3, 96, 96) for f in (torch.sin, torch.cos))
    assert srgan.fourier_loss(moved, wave) < 0.01 * srgan.fourier_loss(0 * wave, wave)
    hr, other, colourful = (0.2 * torch.randn(4, n, 96, 96).expand(4, 3, 96, 96) for n in (1, 1, 3))
    texture = srgan.fourier_loss(other.requires_grad_(), hr)
    assert texture < 0.7 * min(srgan.fourier_loss(sr, hr) for sr in (
        0 * hr, 0.2 * 2 ** 0.5 * torch.sin(x).expand(4, 3, 96, 96), colourful))
    texture.backward()
    assert other.grad.isfinite().all() and other.grad.any() and srgan.fourier_loss(hr, hr) == 0
