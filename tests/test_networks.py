import http.server
import threading

import pytest
import torch
from torch import nn

import srgan


def notation(layers):
    """Convolutions in the notation of Fig. 4 and the other layers by name."""
    names = {nn.BatchNorm2d: "BN", srgan.PReLU: "PReLU", nn.LeakyReLU: "LReLU", nn.PixelShuffle: "PixelShuffle"}
    return [f"k{m.kernel_size[0]}n{m.out_channels}s{m.stride[0]}" if isinstance(m, nn.Conv2d)
            else f"dense {m.out_features}" if isinstance(m, nn.Linear) else names.get(type(m))
            for m in layers if isinstance(m, (nn.Conv2d, nn.Linear, *names))]


def test_the_generator_is_that_of_figure_4():
    g = srgan.Generator()
    block = ["k3n64s1", "BN", "PReLU", "k3n64s1", "BN"]
    assert notation(g.modules()) == (["k9n64s1", "PReLU"] + 16 * block + ["k3n64s1", "BN"]
                                     + 2 * ["k3n256s1", "PixelShuffle", "PReLU"] + ["k9n3s1"])
    assert sum(p.numel() for p in g.parameters()) == 1_547_350
    biases_before_bn = sum(layer.out_channels for layer in g.modules() if isinstance(layer, nn.Conv2d) and layer.bias is None)
    assert 1_547_350 + biases_before_bn == 1_549_462


def test_the_generator_sums_where_figure_4_sums():
    g = srgan.Generator(channels=8, n_blocks=2).eval()
    for p in g.parameters():
        nn.init.normal_(p, std=0.2)
    x = torch.rand(1, 3, 5, 7)
    first = g.head(x)
    one = first + g.blocks[0].body(first)
    two = one + g.blocks[1].body(one)
    expected = torch.tanh(g.tail(g.upsample(first + g.fuse(two))))
    assert torch.allclose(g(x), expected, atol=1e-5)


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_the_faster_enlargement_is_the_one_drawn_in_value_and_gradient(scale):
    torch.manual_seed(scale)
    g = srgan.Generator(scale, channels=8, n_blocks=1)
    for p in g.parameters():
        nn.init.normal_(p, std=0.2)
    gradients = []
    for enlarge in (g.enlarge, g.enlarge_as_drawn):
        x = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = enlarge(x)
        inputs = [x, *g.upsample.parameters(), *g.tail.parameters()]
        gradients.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), inputs)])
    assert y.std() > 0.1
    for fast, drawn in zip(*gradients):
        assert torch.allclose(fast, drawn, rtol=1e-4, atol=1e-5 * drawn.abs().max().item())


@pytest.mark.parametrize("k, r", [(3, 2), (5, 2), (7, 2), (9, 2), (5, 3), (3, 4), (1, 2)])
def test_a_convolution_of_a_shuffled_picture_needs_no_shuffled_picture(k, r):
    layer, x = srgan.conv(3, 2, k), torch.randn(2, 3 * r * r, 6, 5)
    assert torch.allclose(srgan.conv_of_shuffled(x, layer, r), layer(nn.functional.pixel_shuffle(x, r)), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prelu_is_torchs(dtype):
    ours, torchs, x = srgan.PReLU(init=0.3), nn.PReLU(init=0.3), torch.randn(4, 3, 8, 8).to(dtype)
    results = []
    for layer in (ours, torchs):
        layer = layer if layer is ours else layer.to(dtype)
        x = x.detach().requires_grad_()
        y = layer(x)
        results.append([y, *torch.autograd.grad((y * torch.arange(8, dtype=dtype)).sum(), (x, layer.weight))])
    for mine, its in zip(*results):
        assert torch.allclose(mine.float(), its.float(), **({"rtol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}))
    with torch.no_grad(), srgan.autocast(x.device, "bf16"):
        assert torch.equal(ours(x), torchs(x))


def test_the_discriminator_is_that_of_figure_4():
    d = srgan.Discriminator()
    rest = ["n64s2", "n128s1", "n128s2", "n256s1", "n256s2", "n512s1", "n512s2"]
    assert notation(d.modules()) == (["k3n64s1", "LReLU"] + [x for layer in rest for x in ("k3" + layer, "BN", "LReLU")]
                                     + ["dense 1024", "LReLU", "dense 1"])
    assert all(m.negative_slope == 0.2 for m in d.modules() if isinstance(m, nn.LeakyReLU))
    assert d.features(torch.zeros(1, 3, 96, 96)).flatten(1).shape == (1, 18432)
    assert d(torch.zeros(2, 3, 96, 96)).shape == (2,)


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_the_generator_starts_as_nearest_neighbour_upsampling(scale):
    x = torch.rand(1, 3, 12, 10)
    y = srgan.Generator(scale, channels=8, n_blocks=1).eval()(x)
    assert y.shape == (1, 3, 12 * scale, 10 * scale) and y.abs().max() <= 1
    expected = torch.tanh(2.5 * x - 1.25).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    assert torch.allclose(y, expected, atol=1e-5)


def test_icnr_leaves_no_checkerboard():
    layer = nn.Conv2d(6, 12, 3, padding=1)
    srgan.icnr_(layer)
    y = nn.functional.pixel_shuffle(layer(torch.rand(1, 6, 5, 5)), 2)
    assert torch.equal(y, y[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("layer", srgan.TruncatedVGG19.layers)
def test_vgg19_is_torchvisions_up_to_the_activation_of_phi(layer):
    vgg19 = pytest.importorskip("torchvision").models.vgg.make_layers
    i, j = map(int, layer.split("_"))
    phi = srgan.TruncatedVGG19(layer, "random")
    whole = vgg19([64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512, "M"])
    pools = [k for k, m in enumerate(whole) if isinstance(m, nn.MaxPool2d)]
    cut = whole[:([-1] + pools)[i - 1] + 1 + 2 * j]
    cut.load_state_dict(phi.features.state_dict())
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = cut(normalised) / 12.75
    assert expected.any() and torch.allclose(phi(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in phi.parameters())


def test_content_weights_load_from_a_whole_network_or_from_features_alone(tmp_path):
    phi = srgan.TruncatedVGG19("2_2", "random")
    features = {key: value + 1 for key, value in phi.features.state_dict().items()}
    torch.save({f"features.{key}": value.half() for key, value in features.items()} | {"classifier.0.weight": torch.zeros(3)}, tmp_path / "whole.pth")
    torch.save(features, tmp_path / "features.pth")
    for name in ("whole.pth", "features.pth"):
        loaded = srgan.TruncatedVGG19("2_2", str(tmp_path / name)).features.state_dict()
        assert all(torch.allclose(loaded[key], features[key], atol=2e-3) for key in features)
    with pytest.raises(srgan.InputError, match="features.10.weight"):
        srgan.TruncatedVGG19("3_1", str(tmp_path / "whole.pth"))
    with pytest.raises(srgan.InputError, match="no such file"):
        srgan.TruncatedVGG19("2_2", str(tmp_path / "missing.pth"))
    with pytest.raises(srgan.InputError, match="5_5"):
        srgan.TruncatedVGG19("5_5", "random")


@pytest.fixture
def server(tmp_path):
    """A web server on 127.0.0.1 over the folder tmp_path / "www": its address."""
    (tmp_path / "www").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "www")

        def log_message(self, *args):
            pass

        def copyfile(self, source, target):
            content = source.read()
            target.write(content[:len(content) // 2] if "cut-" in self.path else content)  # the connection breaks off
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def test_imagenet_weights_are_downloaded_once_and_checked(server, tmp_path, monkeypatch):
    import hashlib
    state = {f"features.{key}": value for key, value in srgan.TruncatedVGG19("2_2", "random").features.state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    content = (tmp_path / "vgg.pth").read_bytes()
    good, bad = f"vgg19-{hashlib.sha256(content).hexdigest()[:8]}.pth", "vgg19-01234567.pth"
    for name in (good, bad):
        (tmp_path / "www" / name).write_bytes(content)
    monkeypatch.setattr(srgan, "VGG19_URL", f"{server}/{good}")
    first = srgan.TruncatedVGG19("2_2")
    assert torch.equal(first.features[0].weight, state["features.0.weight"])
    (tmp_path / "www" / good).unlink()
    srgan.TruncatedVGG19("2_2")  # from the cache
    (tmp_path / "www" / f"cut-{good}").write_bytes(content)
    for url in (f"{server}/{bad}", f"{server}/cut-{good}", f"{server}/missing-01234567.pth", "http://127.0.0.1:9/vgg19-01234567.pth"):
        monkeypatch.setattr(srgan, "VGG19_URL", url)
        with pytest.raises(srgan.InputError, match="cannot download .*--vgg-weights PATH.* random") as error:
            srgan.TruncatedVGG19("2_2")
        assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "torch-home/hub/checkpoints").iterdir()] == [good]  # nothing half-written stays
    (tmp_path / "torch-home/hub/checkpoints" / good).write_bytes(content[:1000])
    monkeypatch.setattr(srgan, "VGG19_URL", f"{server}/{good}")
    with pytest.raises(srgan.InputError, match="cannot download"):
        srgan.TruncatedVGG19("2_2")


def test_lpips_backbone_is_downloaded_or_said_to_be_missing_in_one_line(server, tmp_path, monkeypatch):
    import hashlib
    pytest.importorskip("lpips")
    from torchvision.models import _api, alexnet
    torch.save({key: value.half() for key, value in alexnet().state_dict().items()}, tmp_path / "alexnet.pth")
    content = (tmp_path / "alexnet.pth").read_bytes()
    good = f"alexnet-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "www" / good).write_bytes(content)
    (tmp_path / "www" / f"cut-{good}").write_bytes(content)
    (tmp_path / "www" / "alexnet-01234567.pth").write_bytes(content[:1000])
    asked, real = [], _api.load_state_dict_from_url

    def redirect(url, *args, **options):
        asked.append(url)
        return real(address, *args, **options)
    monkeypatch.setattr(_api, "load_state_dict_from_url", redirect)
    for address in (f"{server}/alexnet-01234567.pth", f"{server}/cut-{good}", f"{server}/missing-01234567.pth", "http://127.0.0.1:9/a-01234567.pth"):
        with pytest.raises(srgan.InputError, match="LPIPS is not available .* leave LPIPS out") as error:
            srgan.load_lpips()
        assert "\n" not in str(error.value)
    address = f"{server}/{good}"
    distance = srgan.load_lpips()
    a, b = (torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy() for _ in range(2))
    assert distance(a, b) > 0 and distance(a, a) == pytest.approx(0, abs=1e-6)
    assert set(asked) == {srgan.ALEXNET}


def test_squeezenet_is_cut_after_the_layer_that_is_named():
    pytest.importorskip("torchvision")
    assert srgan.TruncatedSqueezeNet(weights="random")(torch.zeros(1, 3, 96, 96)).shape == (1, 512, 5, 5)
    assert srgan.TruncatedSqueezeNet("3", "random")(torch.zeros(1, 3, 96, 96)).shape[1] == 128
    with pytest.raises(srgan.InputError, match="13"):
        srgan.TruncatedSqueezeNet("13", "random")


def test_pixel_losses_are_the_means_of_equation_4_and_of_its_l1_form():
    sr, hr = (torch.rand(2, 3, 8, 12) * 2 - 1 for _ in range(2))
    total = {"mse": 0.0, "l1": 0.0}
    for n in range(2):
        for c in range(3):
            for y in range(8):
                for x in range(12):
                    difference = hr[n, c, y, x].item() - sr[n, c, y, x].item()
                    total["mse"] += difference ** 2
                    total["l1"] += abs(difference)
    for name, loss in srgan.PIXEL_LOSSES.items():
        assert loss(sr, hr).item() == pytest.approx(total[name] / (2 * 3 * 8 * 12), rel=1e-5)


def test_losses_are_the_papers_equations():
    real, fake = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([-3.0, 0.1, 40.0])
    p_real, p_fake = torch.sigmoid(real.double()), torch.sigmoid(fake.double())
    assert torch.isclose(srgan.adversarial_loss(fake).double(), -p_fake.log().mean())
    one_minus = torch.sigmoid(-fake.double())  # 1 - D, without cancellation
    assert torch.isclose(srgan.discriminator_loss(fake, real).double(), -p_real.log().mean() - one_minus.log().mean())
    phi = srgan.TruncatedVGG19("1_2", "random")
    sr, hr = (torch.rand(2, 3, 16, 16) * 2 - 1 for _ in range(2))
    sr.requires_grad_(), hr.requires_grad_()
    loss = srgan.content_loss(phi, sr, hr)
    unscaled = (phi(hr) * 12.75 - phi(sr) * 12.75).square().mean()
    assert torch.isclose(loss, unscaled * 0.00615, rtol=1e-3)  # "a factor of approximately 0.006"
    loss.backward()
    assert sr.grad.any() and hr.grad is None


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_the_grid_loss_sees_what_repeats_in_every_lr_pixel_and_nothing_else(scale):
    hr = torch.rand(2, 3, 16 * scale, 24 * scale) * 2 - 1
    pattern = torch.randn(3, scale, scale)
    grid = pattern.repeat(1, 16, 24)
    assert srgan.grid_loss(hr + grid, hr, scale).item() == pytest.approx(pattern.abs().mean().item(), rel=1e-4)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 12)  # as strong, and another in the next LR pixel
    texture = grid * signs.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    assert srgan.grid_loss(hr + texture, hr, scale).item() < 1e-5
    moved = [x.roll((3, 5), (2, 3)) for x in (hr + grid, hr)]  # as gan.shift moves them
    assert srgan.grid_loss(*moved, scale).item() == pytest.approx(pattern.abs().mean().item(), rel=1e-4)
    for side in (1, 7, 12, 13):  # LR pixels of a patch: all that whole windows reach counts
        part = hr[:, :, :scale, :scale].repeat(1, 1, side, side)
        assert srgan.grid_loss(part, part + 1, scale).item() == pytest.approx(1, rel=1e-5)
    last = torch.zeros(1, 3, 12 * scale, 12 * scale)
    last[..., 11 * scale:] = 1  # the last column of a patch that is no multiple of the window
    assert srgan.grid_loss(last, torch.zeros_like(last), scale) > 0


def test_the_spectrum_loss_lets_texture_lie_anywhere_but_wants_its_strength_and_grain():
    """All of these differ from HR by about the same in every pixel."""
    torch.manual_seed(0)
    x = torch.arange(96) * 2 * torch.pi / 4
    wave = 0.3 * torch.sin(x).expand(1, 3, 96, 96)
    moved = 0.3 * torch.cos(x).expand(1, 3, 96, 96)
    assert srgan.spectrum_loss(moved, wave) < 0.01 * srgan.spectrum_loss(torch.zeros_like(wave), wave)
    hr, other, colourful = (0.2 * torch.randn(4, n, 96, 96).expand(4, 3, 96, 96) for n in (1, 1, 3))
    other.requires_grad_()
    texture, blur = srgan.spectrum_loss(other, hr), srgan.spectrum_loss(torch.zeros_like(hr), hr)
    regular = srgan.spectrum_loss(0.2 * 2 ** 0.5 * torch.sin(x).expand(4, 3, 96, 96), hr)
    assert texture < 0.7 * blur and texture < 0.7 * regular and texture < 0.7 * srgan.spectrum_loss(colourful, hr)
    texture.backward()
    assert other.grad.isfinite().all() and other.grad.any() and srgan.spectrum_loss(hr, hr) == 0
    assert srgan.spectrum_loss(hr[..., :8, :8], hr[..., :8, :8] + 1) > 0  # patches smaller than a window


@pytest.mark.parametrize("scale", srgan.SCALES)
def test_the_stationarity_loss_sees_dots_that_prefer_a_place_in_the_lr_pixel(scale):
    torch.manual_seed(0)
    hr, texture = (0.2 * torch.randn(8, 1, 24 * scale, 24 * scale).expand(-1, 3, -1, -1) for _ in range(2))
    place = torch.zeros(scale, scale)
    place[1, -1] = scale                       # all of the energy at one place, with either sign: no grid to grid_loss
    dots = texture * place.repeat(24, 24)
    same = srgan.stationarity_loss(texture, hr, scale)
    assert srgan.stationarity_loss(dots, hr, scale) > 3 * same and srgan.grid_loss(dots, texture, scale) < srgan.grid_loss(texture, hr, scale)
    # texture without a favourite place costs what the sample leaves to chance, a blur nothing
    coarse = torch.nn.functional.avg_pool2d(texture, 3, 1, 1)
    assert all(srgan.stationarity_loss(x, hr, scale) < 1.3 * same for x in (hr, coarse)) and srgan.stationarity_loss(0 * hr, hr, scale) == 0
    assert torch.isclose(srgan.stationarity_loss(2 * texture, hr, scale), 4 * same)
    if scale > 2:                              # with 2, only pairs within an LR pixel lie as they do
        pairs = 0.2 * torch.randn(8, 1, 24 * scale, 12 * scale).repeat_interleave(2, 3).expand(-1, 3, -1, -1)  # of equal pixels
        anywhere = torch.cat([pairs[:4], pairs[4:].roll(1, 3)])
        assert srgan.stationarity_loss(pairs, hr, scale) > 2 * srgan.stationarity_loss(anywhere, hr, scale)
        assert srgan.stationarity_loss(texture[:1], hr[:1], scale) > 1.5 * same  # chance: the root of the number of pictures
    moved = [x.roll((3, 5), (2, 3)) for x in (dots, hr)]  # as gan.shift moves them
    assert srgan.stationarity_loss(*moved, scale) > 3 * same


def test_the_stationarity_loss_is_finite_where_nothing_is_and_the_same_in_bf16():
    torch.manual_seed(0)
    flat, noise = torch.zeros(2, 3, 8, 8), 0.01 * torch.randn(2, 3, 8, 8)
    noise.requires_grad_()
    assert srgan.stationarity_loss(flat, flat) == 0
    loss = srgan.stationarity_loss(noise, flat)
    loss.backward()
    assert 0 < loss < 3 and noise.grad.isfinite().all() and noise.grad.any()
    assert srgan.stationarity_loss(noise[..., :4, :4], flat[..., :4, :4]).isfinite()  # one LR pixel
    with srgan.autocast(torch.device("cpu"), "bf16"):
        assert torch.equal(srgan.stationarity_loss(noise, flat), loss)


def test_the_variants_of_the_discriminator_are_what_they_say():
    d = srgan.Discriminator(channels=(64, 128, 128, 256, 256, 512, 512, 512), first_kernel=9, norm="instance", pool=6)
    first, *rest = [m for m in d.features if isinstance(m, nn.Conv2d)]
    assert first.kernel_size == (9, 9) and [m.stride[0] for m in (first, *rest)] == [1, 2] * 4
    assert sum(isinstance(m, nn.InstanceNorm2d) for m in d.modules()) == 7 and not any(isinstance(m, nn.BatchNorm2d) for m in d.modules())
    for size in (96, 128):
        assert d(torch.zeros(1, 3, size, size)).shape == (1,) and d.classifier[1].in_features == 18432


def test_rrdb_blocks_take_the_place_of_residual_blocks():
    g = srgan.Generator(channels=16, n_blocks=2, block="rrdb")
    assert notation(g.blocks[0].body[0].modules()) == ["k3n32s1"] * 4 + ["k3n16s1"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in g.modules()) and g.radius == 4 + 30 + 1 + 3
    x = torch.rand(1, 3, 6, 6)
    block = g.blocks[0].body[0]
    f = torch.rand(1, 16, 6, 6)
    maps = [f]
    for layer in block.convs[:-1]:
        maps.append(nn.functional.leaky_relu(layer(torch.cat(maps, 1)), 0.2))
    assert torch.allclose(block(f), f + 0.2 * block.convs[-1](torch.cat(maps, 1)))
    assert torch.allclose(srgan.optimize_for_inference(g)(x), g(x))


def test_the_gradient_penalty_is_zero_for_slope_one_and_reaches_the_critic():
    w = torch.randn(3 * 8 * 8)
    sr, hr, mix = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.rand(4)
    for slope in (1.0, 3.0):
        weight = (slope * w / w.norm()).requires_grad_()
        penalty = srgan.gradient_penalty(lambda x: x.flatten(1) @ weight, sr, hr, mix)
        assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-5)
        penalty.backward()
        assert torch.allclose(weight.grad, 2 * (slope - 1) * w / w.norm(), atol=1e-4)
    points = []
    srgan.gradient_penalty(lambda x: (points.append(x), x.sum((1, 2, 3)))[1], sr, hr, torch.tensor([0.0, 1.0, 0.5, 0.25]))
    assert torch.equal(points[0][0], hr[0]) and torch.equal(points[0][1], sr[1])
    assert torch.allclose(points[0][3], 0.25 * sr[3] + 0.75 * hr[3])


def test_r1_is_the_squared_slope_at_each_hr_picture_and_flattens_the_discriminator():
    weight, hr = torch.randn(3 * 8 * 8, requires_grad=True), torch.rand(4, 3, 8, 8)
    penalty = srgan.r1_penalty(lambda x: x.flatten(1).square() @ weight, hr)  # gradient 2 x w
    assert torch.isclose(penalty, (2 * hr.flatten(1) * weight).square().sum(1).mean())
    penalty.backward()
    assert torch.allclose(weight.grad, (8 * hr.flatten(1).square() * weight.detach()).mean(0))
    assert hr.grad is None and not hr.requires_grad


@pytest.mark.parametrize("norm, of", [("instance", srgan.gradient_penalty), ("batch", lambda d, sr, hr, mix: srgan.r1_penalty(d, hr))], ids=["gradient", "r1"])
def test_penalties_work_in_bf16_as_in_fp32(norm, of):
    torch.manual_seed(0)
    d = srgan.Discriminator(32, channels=(8, 16, 16, 32), norm=norm).to(memory_format=torch.channels_last)
    sr, hr, mix = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32), torch.rand(4)
    gradients = []
    for precision in ("fp32", "bf16"):
        d.zero_grad()
        with srgan.autocast(torch.device("cpu"), precision):
            penalty = of(d, sr, hr, mix)
        penalty.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in d.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


def test_relativistic_losses_are_esrgans_equations():
    real, fake = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([-3.0, 0.1, 1.0])
    real_more = torch.sigmoid(real - fake.mean())  # D_Ra(x_r, x_f)
    fake_more = torch.sigmoid(fake - real.mean())
    assert torch.isclose(srgan.relativistic_discriminator_loss(fake, real), -real_more.log().mean() - (1 - fake_more).log().mean())
    assert torch.isclose(srgan.relativistic_adversarial_loss(fake, real), -(1 - real_more).log().mean() - fake_more.log().mean())
