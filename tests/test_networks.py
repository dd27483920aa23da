"""Section 1, Fig. 4; content networks; RRDB; how far a generator sees."""
import os

import numpy as np
import pytest
import torch
from torch import nn

import srgan


def notation(network):
    """Convolutions in the notation of Fig. 4, the other layers by name, in order."""
    names = {nn.BatchNorm2d: "BN", nn.PReLU: "PReLU", nn.LeakyReLU: "LReLU", nn.Tanh: "Tanh",
             nn.PixelShuffle: "PixelShuffle"}
    return [f"k{m.kernel_size[0]}n{m.out_channels}s{m.stride[0]}" if isinstance(m, nn.Conv2d)
            else f"dense {m.out_features}" if isinstance(m, nn.Linear) else names[type(m)]
            for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear, *names))]


def randomised(network, std=0.2):
    for p in network.parameters():
        nn.init.normal_(p, std=std)
    return network.eval()


def test_the_generator_is_that_of_figure_4():
    g = srgan.Generator()
    block = ["k3n64s1", "BN", "PReLU", "k3n64s1", "BN"]
    assert notation(g) == (["k9n64s1", "PReLU"] + 16 * block + ["k3n64s1", "BN"]
                           + 2 * ["k3n256s1", "PixelShuffle", "PReLU"] + ["k9n3s1", "Tanh"])
    assert sum(p.numel() for p in g.parameters()) == 1_547_350
    assert all(m.weight.numel() == 1 for m in g.modules() if isinstance(m, nn.PReLU))


def test_the_generator_sums_where_figure_4_sums():
    g = randomised(srgan.Generator(channels=8, n_blocks=2))
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


def test_the_variants_of_the_discriminator_are_what_they_say():
    d = srgan.Discriminator(channels=(8, 16, 16, 32, 32, 64, 64, 64), first_kernel=9,
                            norm="instance", pool=6)
    convs = [m for m in d.features if isinstance(m, nn.Conv2d)]
    assert convs[0].kernel_size == (9, 9) and [m.stride[0] for m in convs] == [1, 2] * 4
    norms = [type(m) for m in d.modules() if "Norm" in type(m).__name__]
    assert norms == 7 * [nn.InstanceNorm2d] and d.classifier[1].in_features == 64 * 36
    for size in (96, 128):
        assert d(torch.zeros(1, 3, size, size)).shape == (1,)
    for size in (16, 30):                                        # built for one size, any will do
        d = srgan.Discriminator(size, channels=(4, 4, 8, 8))
        assert d(torch.zeros(2, 3, size, size)).shape == (2,)


@pytest.mark.parametrize("block", srgan.GENERATORS)
@pytest.mark.parametrize("scale", srgan.SCALES)
def test_generators_start_as_nearest_neighbour_upsampling(block, scale):
    x = torch.rand(1, 3, 12, 10)
    g = srgan.make_generator(block, scale=scale, channels=8, n_blocks=1).eval()
    expected = torch.tanh(2.5 * x - 1.25).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    assert torch.allclose(g(x), expected, atol=1e-5)


def test_the_strict_generator_starts_with_torchs_weights_and_has_no_tanh():
    torch.manual_seed(7)
    g = srgan.Generator(channels=8, n_blocks=1, tanh=False, init="torch")
    torch.manual_seed(7)
    head = nn.Conv2d(3, 8, 9, padding=4)                         # the first that is drawn
    assert torch.equal(g.head[0].weight, head.weight) and "Tanh" not in notation(g)
    assert g.arch["tanh"] is False and "init" not in g.arch
    nn.init.constant_(g.tail.bias, 7)
    assert g(torch.rand(1, 3, 8, 8)).max() > 2


def test_rrdbs_take_the_place_of_residual_blocks():
    g = randomised(srgan.make_generator("rrdb", channels=16, n_blocks=2), 0.05)
    assert g.arch["n_blocks"] == 2 and g.arch["block"] == "rrdb" and "BN" not in notation(g)
    dense = g.blocks[0].body[0]
    assert notation(dense) == ["k3n32s1"] * 4 + ["k3n16s1"]
    maps = [x := torch.rand(1, 16, 6, 6)]
    for conv in dense.convs[:-1]:
        maps.append(nn.functional.leaky_relu(conv(torch.cat(maps, 1)), 0.2))
    assert torch.allclose(dense(x), x + 0.2 * dense.convs[-1](torch.cat(maps, 1)), atol=1e-5)
    one, two, three = g.blocks[0].body
    assert torch.allclose(g.blocks[0](x), x + 0.2 * three(two(one(x))), atol=1e-5)
    first = g.head(lr := torch.rand(1, 3, 6, 6))
    sr = torch.tanh(g.tail(g.upsample(first + g.fuse(g.blocks(first)))))
    assert torch.allclose(g(lr), sr, atol=1e-5)


@pytest.mark.parametrize("block, n_blocks", [("residual", 1), ("residual", 5), ("rrdb", 1)])
@pytest.mark.parametrize("scale", srgan.SCALES)
def test_the_radii_are_how_far_an_sr_pixel_sees(scale, block, n_blocks):
    g = srgan.make_generator(block, scale=scale, channels=4, n_blocks=n_blocks, tanh=False)
    for p in g.double().eval().parameters():
        nn.init.uniform_(p, 0.02, 0.1)                           # positive: no influence cancels

    def reach(function, channels, radius):
        side = 2 * radius + 5
        centre = side // 2
        x = torch.zeros(1, channels, side, side, dtype=torch.double, requires_grad=True)
        sr_pixels = slice(centre * scale, (centre + 1) * scale)  # of one LR pixel
        function(x)[..., sr_pixels, sr_pixels].sum().backward()
        seen = x.grad[0].sum(0).any(0).nonzero()
        return max(centre - seen.min().item(), seen.max().item() - centre)
    whole, enlarging = srgan.radii(g)
    assert reach(g, 3, whole) == whole
    assert reach(lambda x: g.tail(g.upsample(x)), 4, enlarging) == enlarging


# Content networks

def normalised(x):
    """As torchvision's networks expect images, [N, 3, H, W] in [-1, 1]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


VGG19 = [64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M",
         512, 512, 512, 512, "M"]


@pytest.mark.parametrize("layer", ["1_1", "2_2", "3_4", "4_1", "5_4"])
def test_phi_is_torchvisions_vgg19_up_to_an_activation(layer):
    make_layers = pytest.importorskip("torchvision").models.vgg.make_layers
    i, j = map(int, layer.split("_"))
    phi, whole = srgan.TruncatedVGG19(layer, "random"), make_layers(VGG19)
    pools = [k for k, m in enumerate(whole) if isinstance(m, nn.MaxPool2d)]
    cut = whole[:([-1] + pools)[i - 1] + 1 + 2 * j]
    cut.load_state_dict(phi.features.state_dict())
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = cut(normalised(x)) / 12.75
    assert expected.any() and torch.allclose(phi(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in phi.parameters())
    other = srgan.TruncatedVGG19(layer, "random", divisor=1)     # the same weights every time
    assert torch.allclose(other(x), 12.75 * phi(x), rtol=1e-5)


def test_squeezenet_is_cut_after_the_layer_that_is_named():
    models = pytest.importorskip("torchvision").models
    assert srgan.TruncatedSqueezeNet(weights="random")(torch.zeros(1, 3, 96, 96)).shape == \
        (1, 512, 5, 5)
    phi, whole = srgan.TruncatedSqueezeNet("3", "random"), models.squeezenet1_1().features
    whole[:4].load_state_dict(phi.features.state_dict())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.allclose(phi(x), whole[:4](normalised(x)) / 12.75, rtol=1e-4, atol=1e-5)


def test_content_weights_come_from_a_whole_network_or_from_features_alone(tmp_path):
    phi = srgan.TruncatedVGG19("2_2", "random")
    features = {key: value + 1 for key, value in phi.features.state_dict().items()}
    whole = {f"features.{key}": value.half() for key, value in features.items()}
    whole |= {"classifier.0.weight": torch.zeros(3)}
    torch.save(whole, tmp_path / "whole.pth"), torch.save(features, tmp_path / "features.pth")
    for name in ("whole.pth", "features.pth"):
        loaded = srgan.TruncatedVGG19("2_2", str(tmp_path / name)).features.state_dict()
        assert all(torch.allclose(loaded[key], features[key], atol=2e-3) for key in features)
    with pytest.raises(srgan.InputError, match="whole.pth.*features.10.weight"):
        srgan.TruncatedVGG19("3_1", str(tmp_path / "whole.pth"))
    with pytest.raises(srgan.InputError, match="no such file"):
        srgan.TruncatedVGG19("2_2", str(tmp_path / "missing.pth"))


def test_imagenet_weights_are_downloaded_once_and_checked(offer, tmp_path, monkeypatch):
    state = srgan.TruncatedVGG19("2_2", "random").features.state_dict()
    torch.save({f"features.{key}": value + 1 for key, value in state.items()}, tmp_path / "v.pth")
    good, bad = offer("vgg19", (tmp_path / "v.pth").read_bytes())
    monkeypatch.setattr(srgan, "VGG19_URL", good)
    for _ in range(2):                                           # the second from the cache
        loaded = srgan.TruncatedVGG19("2_2").features[0].weight
        assert torch.equal(loaded, state["0.weight"] + 1)
        (tmp_path / "www" / os.path.basename(good)).unlink(missing_ok=True)
    for url in bad:
        monkeypatch.setattr(srgan, "VGG19_URL", url)
        with pytest.raises(srgan.InputError, match="cannot download .* --feature-weights FILE"):
            srgan.TruncatedVGG19("2_2")
    cache = tmp_path / "torch-home/hub/checkpoints"
    assert [path.name for path in cache.iterdir()] == [os.path.basename(good)]
    os.truncate(cache / os.path.basename(good), 1000)
    monkeypatch.setattr(srgan, "VGG19_URL", good)
    with pytest.raises(srgan.InputError, match="cannot download"):
        srgan.TruncatedVGG19("2_2")


@pytest.mark.filterwarnings("ignore")                           # lpips's of torchvision
def test_lpips_gets_images_in_minus_1_to_1_and_its_network_once(offer, tmp_path, monkeypatch):
    package = pytest.importorskip("lpips")
    from torchvision.models import _api, alexnet
    weights = {key: value.half() for key, value in alexnet().state_dict().items()}
    torch.save(weights, tmp_path / "alexnet.pth")
    good, bad = offer("alexnet", (tmp_path / "alexnet.pth").read_bytes())
    real, asked = _api.load_state_dict_from_url, []
    for address in (*bad, good):
        monkeypatch.setattr(_api, "load_state_dict_from_url", lambda url, *args, **options:
                            asked.append(url) or real(address, *args, **options))
        if address in bad:
            with pytest.raises(srgan.InputError, match="LPIPS is not available .*leave LPIPS out"):
                srgan.load_lpips()
    network = srgan.load_lpips()
    assert {*asked} == {srgan.ALEXNET_URL} and srgan.load_lpips() is network
    a, b = (np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8) for i in range(2))
    x, y = (torch.from_numpy(image / 255).permute(2, 0, 1)[None].float() for image in (a, b))
    reference = package.LPIPS(net="alex", verbose=False)
    with torch.no_grad():
        expected = reference(x, y, normalize=True).item()        # normalize: for images in [0, 1]
        assert abs(reference(x, y).item() - expected) > 0.01 * expected
    assert srgan.lpips(a, b) == pytest.approx(expected, rel=1e-4)
    assert srgan.lpips(a, a) == pytest.approx(0, abs=1e-6)
