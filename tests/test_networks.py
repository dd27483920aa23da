"""Sections 1 and 8: Fig. 4, other networks, content networks, the grid loss, the Fourier loss."""
import hashlib
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import randomised
from torch import nn

import srgan

NAMES = {nn.BatchNorm2d: "BN", nn.PReLU: "PReLU", nn.LeakyReLU: "LReLU", nn.Tanh: "Tanh",
         nn.PixelShuffle: "PixelShuffle", nn.InstanceNorm2d: "IN"}


def notation(network):
    """Convolutions in the notation of Fig. 4, the other layers by name, in order."""
    layers = []
    for m in network.modules():
        if isinstance(m, nn.Conv2d):
            layers.append(f"k{m.kernel_size[0]}n{m.out_channels}s{m.stride[0]}")
        elif isinstance(m, nn.Linear):
            layers.append(f"dense {m.out_features}")
        elif type(m) in NAMES:
            layers.append(NAMES[type(m)])
    return layers


def check(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


# Fig. 4

def test_the_generator_is_that_of_figure_4():
    """Generator, ResidualBlock."""
    g = srgan.Generator()
    block = ["k3n64s1", "BN", "PReLU", "k3n64s1", "BN"]
    assert notation(g) == (["k9n64s1", "PReLU"] + 16 * block + ["k3n64s1", "BN"]
                           + 2 * ["k3n256s1", "PixelShuffle", "PReLU"] + ["k9n3s1"])
    assert sum(p.numel() for p in g.parameters()) == 1_547_350
    assert all(m.weight.numel() == 1 for m in g.modules() if isinstance(m, nn.PReLU))


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_the_generator_enlarges_by_its_scale(scale):
    """Generator."""
    g = srgan.Generator(scale, channels=4, n_blocks=1)
    assert g(torch.rand(2, 3, 5, 6)).shape == (2, 3, 5 * scale, 6 * scale)
    assert notation(g).count("PixelShuffle") == math.log2(scale)


def test_the_generator_adds_its_skip_connections_where_figure_4_does():
    """Generator.forward."""
    g = randomised(srgan.Generator(channels=8, n_blocks=2)).eval().double()
    x = torch.rand(1, 3, 5, 7, dtype=torch.float64)
    first = g.head(x)
    one = first + g.blocks[0].body(first)
    two = one + g.blocks[1].body(one)
    check(g(x), g.tail(g.upsample(first + g.fuse(two))))


def test_a_tanh_is_the_last_layer_if_it_is_wanted():
    """Generator's tanh, which is beyond the paper."""
    plain = randomised(srgan.Generator(channels=4, n_blocks=1)).double()
    bounded = srgan.Generator(channels=4, n_blocks=1, tanh=True).double()
    bounded.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 5, 7, dtype=torch.float64)
    check(bounded(x), torch.tanh(plain(x)))
    assert plain(x).abs().max() > 1


def test_the_discriminator_is_that_of_figure_4():
    """Discriminator, discriminator_block."""
    d = srgan.Discriminator()
    layers = ["n64s2", "n128s1", "n128s2", "n256s1", "n256s2", "n512s1", "n512s2"]
    expected = ["k3n64s1", "LReLU"]
    for layer in layers:
        expected += ["k3" + layer, "BN", "LReLU"]
    assert notation(d) == expected + ["dense 1024", "LReLU", "dense 1"]
    assert all(m.negative_slope == 0.2 for m in d.modules() if isinstance(m, nn.LeakyReLU))
    assert d.features(torch.zeros(1, 3, 96, 96)).shape == (1, 512, 6, 6)


def test_the_discriminator_returns_logits():
    """Discriminator: its sigmoid is part of the losses."""
    logits = srgan.Discriminator(32)(100 * torch.randn(8, 3, 32, 32))
    assert logits.shape == (8,)
    assert logits.min() < 0


# Beyond the paper

def test_the_variant_discriminator_is_figure_4s_by_default():
    """VariantDiscriminator and Discriminator: the same state, the same logits."""
    torch.manual_seed(1)
    d = srgan.Discriminator(48)
    torch.manual_seed(1)
    variant = srgan.VariantDiscriminator(48)
    assert list(variant.state_dict()) == list(d.state_dict())
    for name, tensor in variant.state_dict().items():
        assert torch.equal(tensor, d.state_dict()[name]), name
    x = torch.rand(2, 3, 48, 48)
    assert torch.equal(variant(x), d(x))


def test_the_variant_discriminator_takes_other_channels_kernels_and_norms():
    """VariantDiscriminator, NORMS."""
    d = srgan.VariantDiscriminator(30, (8, 16, 16, 4), first_kernel=9, norm="instance")
    assert notation(d)[:8] == ["k9n8s1", "LReLU", "k3n16s2", "IN", "LReLU", "k3n16s1", "IN",
                               "LReLU"]
    assert notation(d)[8] == "k3n4s2"
    assert d(torch.zeros(2, 3, 30, 30)).shape == (2,)


def test_a_pooling_discriminator_takes_any_patch_size():
    """VariantDiscriminator's pool."""
    d = srgan.VariantDiscriminator(30, (8, 16, 16), pool=6)
    for size in (30, 96):
        assert d(torch.zeros(2, 3, size, size)).shape == (2,)


@pytest.mark.parametrize("block", srgan.GENERATORS)
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("scale", srgan.SCALES)
def test_generators_can_start_as_nearest_neighbour_upsampling(block, scale, tanh):
    """start_as_nearest, INITS."""
    g = srgan.make_generator(block, scale, channels=8, n_blocks=1, tanh=tanh).eval()
    srgan.INITS["nearest"](g)
    x = torch.rand(1, 3, 12, 10, dtype=torch.float64)
    nearest = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    expected = torch.tanh(2.5 * nearest - 1.25) if tanh else 2 * nearest - 1
    check(g.double()(x), expected)


def test_the_random_start_is_torchs():
    """start_at_random, INITS."""
    torch.manual_seed(7)
    g = srgan.Generator(channels=8, n_blocks=1)
    srgan.INITS["torch"](g)
    torch.manual_seed(7)
    assert torch.equal(g.head[0].weight, nn.Conv2d(3, 8, 9).weight)   # the first that is drawn


def test_rrdbs_take_the_place_of_residual_blocks():
    """RRDBGenerator, RRDB, DenseBlock; make_generator."""
    g = srgan.make_generator("rrdb", channels=16, n_blocks=2)
    assert g.arch == {"scale": 4, "channels": 16, "n_blocks": 2, "tanh": False, "block": "rrdb"}
    assert len(g.blocks) == 2
    assert "BN" not in notation(g)
    assert notation(g.blocks[0].body[0]) == ["k3n32s1"] * 4 + ["k3n16s1"]


def test_an_rrdb_is_wired_as_in_esrgan():
    """RRDB, DenseBlock: Wang et al. 2018, Fig. 4."""
    block = randomised(srgan.RRDB(16), 0.05).double()
    one, two, three = block.body
    x = torch.rand(1, 16, 6, 6, dtype=torch.float64)
    maps = [x]
    for conv in one.convs[:-1]:
        maps.append(nn.functional.leaky_relu(conv(torch.cat(maps, 1)), 0.2))
    check(one(x), x + 0.2 * one.convs[-1](torch.cat(maps, 1)))
    check(block(x), x + 0.2 * three(two(one(x))))


# Content networks

def torchvisions(name):
    """The layers of torchvision's network, with random weights."""
    models = pytest.importorskip("torchvision").models
    if name == "squeezenet1_1":
        return models.squeezenet1_1().features
    return models.vgg.make_layers(models.vgg.cfgs["E"])


@pytest.mark.parametrize("name, layer, n_layers", [
    ("vgg19", "1_1", 2), ("vgg19", "2_2", 9), ("vgg19", "5_4", 36), ("squeezenet1_1", "3", 4)])
def test_phi_is_torchvisions_network_up_to_a_layer(double, name, layer, n_layers):
    """TruncatedVGG19, TruncatedSqueezeNet; ContentNetwork.forward."""
    phi = srgan.CONTENT_NETWORKS[name](layer, "random")
    cut = torchvisions(name)[:n_layers]
    cut.load_state_dict(phi.features.state_dict())
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = cut(((x + 1) / 2 - mean) / std)
    assert expected.any()
    check(phi(x), expected / 12.75)


@pytest.mark.parametrize("name, layer", [("vgg19", "1_2"), ("squeezenet1_1", "1")])
def test_phi_is_frozen_and_its_random_weights_are_the_same_every_time(name, layer):
    """ContentNetwork, load_features, CONTENT_NETWORKS."""
    phi = srgan.CONTENT_NETWORKS[name](layer, "random")
    other = srgan.CONTENT_NETWORKS[name](layer, "random")
    for p, q in zip(phi.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not p.requires_grad


def test_the_divisor_divides_the_feature_maps():
    """ContentNetwork."""
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    maps = srgan.TruncatedVGG19("1_1", "random", divisor=1)(x)
    assert torch.equal(srgan.TruncatedVGG19("1_1", "random", divisor=4)(x), maps / 4)


@pytest.fixture
def weights_files(tmp_path):
    """(its name's hash is right, it is wrong, without "features."): files with 1_1's weights."""
    state = srgan.TruncatedVGG19("1_1", "random").features.state_dict()
    wrong = tmp_path / "vgg19-01234567.pth"
    bare = tmp_path / "features.pth"
    torch.save({f"features.{key}": value.half() + 1 for key, value in state.items()}, wrong)
    torch.save({key: value + 1 for key, value in state.items()}, bare)
    digest = hashlib.sha256(wrong.read_bytes()).hexdigest()
    good = tmp_path / f"vgg19-{digest[:8]}.pth"
    shutil.copy(wrong, good)
    return good, wrong, bare


def check_first_layer(phi):
    expected = srgan.TruncatedVGG19("1_1", "random").features[0].weight + 1
    check(phi.features[0].weight, expected, tolerance=2e-3)      # saved in float16


def test_imagenet_weights_are_downloaded_once(weights_files, monkeypatch):
    """TruncatedVGG19, download_features."""
    good, *_ = weights_files
    monkeypatch.setattr(srgan, "VGG19_URL", good.as_uri())
    check_first_layer(srgan.TruncatedVGG19("1_1"))
    good.unlink()
    check_first_layer(srgan.TruncatedVGG19("1_1"))


def test_content_weights_may_come_from_a_file_of_the_network_or_of_its_features(weights_files):
    """load_features."""
    _, whole, bare = weights_files
    check_first_layer(srgan.TruncatedVGG19("1_1", whole))
    check_first_layer(srgan.TruncatedVGG19("1_1", bare))
    with pytest.raises(srgan.InputError, match="vgg19-01234567.pth.*2.weight"):
        srgan.TruncatedVGG19("1_2", whole)


def test_a_download_that_fails_says_what_to_do(weights_files, tmp_path, monkeypatch):
    """download_features: cut off in the cache, of the wrong hash, missing."""
    good, wrong, _ = weights_files
    monkeypatch.setattr(srgan, "VGG19_URL", good.as_uri())
    srgan.TruncatedVGG19("1_1")
    good.unlink()
    os.truncate(tmp_path / "torch-home/hub/checkpoints" / good.name, 1000)
    for path in (good, wrong, tmp_path / "vgg19-76543210.pth"):
        monkeypatch.setattr(srgan, "VGG19_URL", path.as_uri())
        with pytest.raises(srgan.InputError, match="cannot download .* --feature-weights FILE"):
            srgan.TruncatedVGG19("1_1")


# The grid loss and the Fourier loss

@pytest.mark.parametrize("scale", srgan.SCALES)
def test_the_grid_loss_sees_a_grid_with_the_period_of_an_lr_pixel_and_no_texture(scale):
    """grid_loss, its first term: the same differences, but of a sign that alternates, vanish."""
    grid = 0.1 * torch.randn(1, 3, scale, scale, dtype=torch.float64).repeat(1, 1, 16, 24)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 12)   # of neighbouring LR pixels
    signs = signs.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    seen = srgan.grid_loss(grid, grid - grid, scale)
    unseen = srgan.grid_loss(grid, grid - grid * signs, scale)
    assert (seen - unseen).item() == pytest.approx(grid.abs().mean().item(), rel=1e-9)


def test_the_grid_loss_sees_rows_of_dots():
    """grid_loss, its second term: all of the detail at one place in each LR pixel."""
    hr, texture = 0.2 * torch.randn(2, 4, 1, 64, 96).expand(-1, -1, 3, -1, -1)
    place = torch.zeros(4, 4)
    place[1, -1] = 4
    dots = srgan.grid_loss(texture * place.repeat(16, 24), hr)
    assert dots > 2 * srgan.grid_loss(texture, hr)
    assert srgan.grid_loss(hr, hr) < 0.25 * dots


@pytest.mark.parametrize("value", [-0.9, 0.5])
def test_the_grid_loss_sees_nothing_in_a_flat_image(value):
    """grid_loss: what surrounds the image does not count as detail of its border."""
    flat = torch.full((1, 3, 32, 32), value, dtype=torch.float64)
    assert srgan.grid_loss(flat, flat) <= 1e-9


def test_the_fourier_amplitudes_are_those_of_windows_that_overlap_by_half_both_ways(double):
    """fourier_amplitudes, of each window by itself."""
    x = torch.rand(2, 3, 40, 56) * 2 - 1
    found = srgan.fourier_amplitudes(x, 16)
    assert found.shape == (2, 3, 4, 6, 16, 9)
    colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    hann = np.hanning(16) / np.sqrt(np.mean(np.hanning(16) ** 2))
    for row in range(4):
        for column in range(6):
            window = x[1, :, 8 * row:8 * row + 16, 8 * column:8 * column + 16].numpy()
            planes = np.tensordot(colours, window, 1) * np.outer(hann, hann)
            expected = torch.from_numpy(np.abs(np.fft.rfft2(planes)) / 16)
            check(found[1, :, row, column], expected)


def test_the_fourier_loss_is_the_mean_difference_of_amplitudes(double):
    """fourier_loss and fourier_amplitudes."""
    sr, hr = torch.rand(2, 1, 3, 32, 40) * 2 - 1
    differences = srgan.fourier_amplitudes(sr, 16) - srgan.fourier_amplitudes(hr, 16)
    assert srgan.fourier_loss(sr, hr).item() == pytest.approx(
        differences.abs().mean().item(), rel=1e-9)
    assert srgan.fourier_loss(hr, hr) == 0


def test_the_fourier_loss_does_not_compare_where_texture_is():
    """fourier_loss, of a wave and the same wave elsewhere."""
    x = torch.arange(96) * 2 * torch.pi / 4
    wave = 0.3 * torch.sin(x).expand(1, 3, 96, 96)
    moved = 0.3 * torch.cos(x).expand(1, 3, 96, 96)
    assert srgan.fourier_loss(moved, wave) < 0.01 * srgan.fourier_loss(0 * wave, wave)


def test_the_fourier_loss_compares_how_much_texture_there_is():
    """fourier_loss prefers other noise to none, to a wave and to coloured noise."""
    hr = 0.2 * torch.randn(4, 1, 96, 96).expand(4, 3, 96, 96)
    other = 0.2 * torch.randn(4, 1, 96, 96).expand(4, 3, 96, 96)
    colourful = 0.2 * torch.randn(4, 3, 96, 96)
    x = torch.arange(96) * 2 * torch.pi / 4
    wave = 0.2 * 2 ** 0.5 * torch.sin(x).expand(4, 3, 96, 96)
    for worse in (0 * hr, wave, colourful):
        assert srgan.fourier_loss(other, hr) < 0.7 * srgan.fourier_loss(worse, hr)


def test_the_fourier_loss_has_a_gradient_where_amplitudes_are_0():
    """fourier_loss."""
    sr = torch.zeros(1, 3, 32, 32, requires_grad=True)
    srgan.fourier_loss(sr, torch.rand(1, 3, 32, 32)).backward()
    assert sr.grad.isfinite().all()
