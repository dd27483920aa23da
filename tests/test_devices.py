"""What training on a GPU needs: everything on one device, no waiting for it, whole graphs.

Most of it shows without a GPU. Tensors of torch's device "meta" have shapes but no values: an
operation on one of them and on a tensor of the CPU raises, and so does a look at a value.
"""
import contextlib
import functools
import json
import types

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import srgan
import train

CPU = torch.device("cpu")
META = torch.device("meta")
CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
STAGES = ("srresnet", "gan")
PRESETS = {name: {} for name in json.loads((ROOT / "config.json").read_text())["presets"]}
SIZES = {"n_blocks": 1, "patch_size": 32, "batch_size": 2, "content_weights": "random",
         "precision": "fp32", "compile": "no"}                   # what the tests change in presets
NARROW = {"channels": 8, "discriminator.channels": [4, 4, 8, 8], "content_network": "vgg19:1_2"}
COMPILED = {**NARROW, "discriminator.channels": [4, 4, 8], "compile": "yes"}

# Every loss and penalty at once.
EVERYTHING = {"gan.r1_penalty": 1.0, "gan.gradient_penalty": 1.0, "gan.shift": 3,
              "gan.adversarial_loss": "relativistic"}
for stage in STAGES:
    for name in srgan.CONTENT_LOSSES:
        EVERYTHING[f"{stage}.{name}_weight"] = 1.0


def settings_of(preset, stage, *changes):
    """The settings of a preset, with SIZES and other changes."""
    settings = train.resolve_settings(train.parse_args(
        ["--data", "x", "--stage", stage, "--preset", preset]))
    for change in (SIZES, *changes):
        train.change(settings, change)
    return settings


def prepare(settings, stage, device):
    """(State, Tools) of new networks on the device."""
    networks = train.make_networks(settings, stage, None, device)
    state = train.State(networks, train.stage_settings(settings, stage), device)
    return state, train.make_tools(settings, stage, state, device)


def draw(settings, stage, device, lr=None):
    """The pairs of one update, made on the device from windows of noise."""
    store = types.SimpleNamespace(paths=["a"], pixels=None)
    patches = srgan.Patches(store, settings["patch_size"], settings["scale"], settings["kernel"],
                            lr=lr)
    pairs = []
    for _ in range(settings.get(f"{stage}.discriminator_steps", 1)):
        shape = settings["batch_size"], patches.window, patches.window, 3
        windows = [torch.randint(256, shape, dtype=torch.uint8)]
        windows.append(windows[0][:, ::settings["scale"], ::settings["scale"]])
        pairs.append(srgan.to_pair(patches, windows, device))
    return pairs


@pytest.fixture
def meta(monkeypatch):
    """The device "meta". It has no autocast, so there is none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return META


@pytest.fixture
def fake(monkeypatch):
    """A mode in which there are tensors of the device "cuda", without values and without a GPU.

    Unlike "meta", it also notices a convolution whose weights are elsewhere, but it has no
    backward pass. Networks get such tensors when they are moved to the device.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    real = torch.nn.Module.to

    def to(network, *args, **options):
        with mode:
            return real(network, *args, **options)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    return mode


# Everything is on one device

@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset, changes", [*PRESETS.items(), ("paper", EVERYTHING)])
def test_an_update_has_all_of_its_tensors_on_the_device(meta, preset, changes, stage):
    """to_pair, update and State.record, forwards and backwards."""
    settings = settings_of(preset, stage, changes)
    state, tools = prepare(settings, stage, meta)
    losses = train.update(tools, draw(settings, stage, meta))
    state.record(losses, settings["ema"])
    assert "loss" in losses
    assert all(loss.device == meta for loss in losses.values())
    assert all(p.grad.device == meta for p in state.networks["generator"].parameters())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset, changes", [*PRESETS.items(), ("paper", EVERYTHING)])
def test_networks_and_losses_have_all_of_their_tensors_on_the_gpu(fake, preset, changes, stage):
    """make_networks, make_tools, downsample and all losses, forwards only."""
    settings = settings_of(preset, stage, changes)
    look(fake, settings, stage)


def look(fake, settings, stage):
    """All that an update computes but its gradients, on a GPU that is not there."""
    networks = train.make_networks(settings, stage, None, CUDA)
    with fake:
        state = train.State(networks, train.stage_settings(settings, stage), CUDA)
    tools = train.make_tools(settings, stage, state, CUDA)
    with fake, torch.no_grad():
        (lr, hr), *_ = draw(settings, stage, CUDA)
        sr = tools.G(lr)
        results = [lr, hr, sr, tools.content(sr, hr)]
        if tools.D:
            results.append(tools.game.d_loss(tools.D(hr), tools.D(sr)))
            more = {"hr": hr} if tools.game.g_sees_hr else {}
            results.append(tools.game.g_loss(tools.D, sr, **more))
        assert {result.device.type for result in results} == {"cuda"}


def test_a_constant_on_the_cpu_is_noticed(meta, monkeypatch):
    """By the first of the two tests above."""
    monkeypatch.setitem(srgan.PIXEL_LOSSES, "mse",
                        lambda sr, hr: ((sr - hr) * torch.ones(32)).square().mean())
    settings = settings_of("paper", "srresnet")
    _, tools = prepare(settings, "srresnet", meta)
    with pytest.raises(RuntimeError, match="device"):
        train.update(tools, draw(settings, "srresnet", meta))


def test_weights_on_the_cpu_are_noticed(fake, monkeypatch):
    """By the second of the two tests above."""
    monkeypatch.setattr(train, "make_phi",
                        lambda settings, device: srgan.TruncatedVGG19("2_2", "random"))
    with pytest.raises(RuntimeError, match="device"):
        look(fake, settings_of("paper", "gan"), "gan")


# Nothing waits for the device

class Waits(TorchDispatchMode):
    """Notes at which update something waits for the device, and goes on with True or 0 as its value.

    The host waits when it asks for a value, and when it copies to or from the device and does not
    say non_blocking. torch.tensor is such a copy, too.
    """

    def __init__(self, state):
        super().__init__()
        self.state = state
        self.updates = []

    def __torch_dispatch__(self, function, types, args=(), options=None):
        options = options or {}
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.updates.append(self.state.step)
            return args[0].dtype == torch.bool
        if name == "_to_copy" and args[0].is_meta and options.get("device", META) != META:
            self.updates.append(self.state.step)
            return torch.zeros(args[0].shape, dtype=options.get("dtype", args[0].dtype))

        result = function(*args, **options)
        copied = name in ("_to_copy", "copy_") and not options.get("non_blocking")
        if copied and result.is_meta and not all(x.is_meta for x in args[:2] if torch.is_tensor(x)):
            self.updates.append(self.state.step)
        return result

    def tensor(self, *args, make=torch.tensor, **options):
        """torch.tensor, which no such mode can see."""
        if options.get("device") == META:
            self.updates.append(self.state.step)
        return make(*args, **options)


def train_for(n_updates, meta, monkeypatch, preset, stage, *changes):
    """Train for some updates, one epoch: the updates (counted from 0) that waited."""
    settings = settings_of(preset, stage, {f"{stage}.epochs": 1, "steps_per_epoch": n_updates},
                           NARROW, *changes)
    monkeypatch.setattr(train, "record_signals", lambda: [])
    state, tools = prepare(settings, stage, meta)
    batches = (draw(settings, stage, meta) for _ in range(n_updates))
    waits = Waits(state)
    monkeypatch.setattr(torch, "tensor", waits.tensor)
    with waits:
        train.train(tools, state, batches, None, settings, stage, meta, world=1)
    assert state.step == n_updates
    return waits.updates


@pytest.mark.parametrize("preset, stage, changes", [
    ("paper", "srresnet", {}), ("gaussian", "srresnet", {}), ("paper", "gan", {}),
    ("nogrid", "gan", {}), ("paper", "gan", {**EVERYTHING, "gan.discriminator_steps": 2})])
def test_training_waits_for_the_device_only_after_each_tenth_update_and_epoch(
        meta, monkeypatch, capsys, preset, stage, changes):
    """train.train, which then looks whether all is finite; and it prints nothing in between."""
    waited = train_for(12, meta, monkeypatch, preset, stage, changes)
    assert {*waited} == {10, 12}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("look", [
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, bool, float,
    lambda x: torch.ones(2).to(x), lambda x: torch.tensor(1.0, device=x.device)],
    ids=["item", "tolist", "cpu", "bool", "float", "to", "tensor"])
def test_a_loss_that_waits_for_the_device_is_noticed(meta, monkeypatch, look):
    """By the test above."""
    def loss(sr, hr):
        look(srgan.mse_loss(sr, hr))
        return srgan.mse_loss(sr, hr)
    monkeypatch.setitem(srgan.PIXEL_LOSSES, "mse", loss)
    assert {*train_for(5, meta, monkeypatch, "paper", "srresnet")} == {0, 1, 2, 3, 4, 5}


# Networks compile into whole graphs

@pytest.mark.parametrize("preset, changes", [
    ("paper", {"precision": "bf16"}), ("quick", {"gan.r1_penalty": 1.0}), ("esrgan", {}),
    ("wgan-gp", {"gan.discriminator_steps": 2})])
def test_networks_compile_without_breaks_and_not_again_after_the_second_update(
        monkeypatch, preset, changes):
    """make_tools with compile=yes, stage 2; "aot_eager" does all but generate code."""
    whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)                 # raises where a graph breaks
    graphs = count_graphs(settings_of(preset, "gan", COMPILED, changes), "gan")
    assert 0 < graphs[1] == graphs[3]


def count_graphs(settings, stage):
    """How many graphs there are after each of four updates, on the CPU."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    state, tools = prepare(settings, stage, CPU)
    graphs = []
    for _ in range(4):
        losses = train.update(tools, draw(settings, stage, CPU))
        state.record(losses, settings["ema"])
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def test_broken_graphs_and_new_ones_are_noticed(monkeypatch):
    """By the test above: a number that changes at each call is a constant of the graph."""
    def forward(network, x):
        network.calls = getattr(network, "calls", 0) + 1
        if breaks:
            torch._dynamo.graph_break()
        return srgan.enlarge(network.network, srgan.features(network.network, x)) * network.calls
    monkeypatch.setattr(srgan.Fast, "forward", forward)
    whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    settings = settings_of("paper", "srresnet", COMPILED)
    breaks = False
    assert count_graphs(settings, "srresnet")[3] > 2
    breaks = True
    with pytest.raises(torch._dynamo.exc.Unsupported):
        count_graphs(settings, "srresnet")


# With a GPU

@needs_gpu
@pytest.mark.parametrize("kernel", srgan.KERNELS)
@pytest.mark.parametrize("scale", srgan.SCALES)
def test_a_gpu_makes_the_same_lr(scale, kernel):
    """downsample: the same 8-bit levels. Dividing by 255, a GPU may round differently."""
    hr = torch.randint(256, (4, 3, 12 * scale, 10 * scale)) / 255
    expected = srgan.downsample(hr, scale, kernel).mul(255).round()
    found = srgan.downsample(hr.to(CUDA), scale, kernel).mul(255).round().cpu()
    if kernel == "bicubic":                                      # float32 holds its sums exactly
        assert torch.equal(found, expected)
    assert (found - expected).abs().max() <= 1


@needs_gpu
@pytest.mark.parametrize("preset, stage, changes", [
    ("paper", "srresnet", {}), ("paper", "gan", {}), ("wgan-gp", "gan", {"gan.gradient_penalty": 0.0}),
    ("paper", "gan", {**EVERYTHING, "gan.gradient_penalty": 0.0})])
def test_an_update_on_a_gpu_is_that_of_the_cpu(double, preset, stage, changes):
    """to_pair, update and State.record in float64. The gradient penalty draws random points."""
    settings = settings_of(preset, stage, NARROW, changes)
    results = []
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        pairs = draw(settings, stage, device)
        state, tools = prepare(settings, stage, device)
        torch.manual_seed(0)                                     # the shift
        losses = train.update(tools, pairs)
        state.record(losses, settings["ema"])
        tensors = [*losses.values(), *state.averaged]
        for network in state.networks.values():
            tensors.extend(p.grad for p in network.parameters() if p.grad is not None)
        results.append([tensor.detach().cpu() for tensor in tensors])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max() <= 1e-9 * max(1, expected.abs().max())
