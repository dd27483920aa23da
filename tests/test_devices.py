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
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
no_advice = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
STAGES = ("srresnet", "gan")
PRESETS = list(json.loads((ROOT / "config.json").read_text())["presets"])

# What the tests change in every preset, and where the number of feature maps does not matter.
SIZES = {"n_blocks": 1, "patch_size": 32, "batch_size": 2, "content_weights": "random",
         "precision": "fp32", "compile": "no"}
NARROW = {"channels": 8, "discriminator.channels": [4, 4, 8], "content_network": "vgg19:1_2"}

# Every loss and penalty at once.
EVERYTHING = {"gan.r1_penalty": 1.0, "gan.gradient_penalty": 1.0, "gan.shift": 3,
              "gan.adversarial_loss": "relativistic"}
for content_loss in srgan.CONTENT_LOSSES:
    EVERYTHING[f"srresnet.{content_loss}_weight"] = 1.0
    EVERYTHING[f"gan.{content_loss}_weight"] = 1.0
CASES = [(preset, {}) for preset in PRESETS]
CASES.append(("paper", EVERYTHING))


def settings_of(preset, stage, *changes):
    """The settings of a preset, with SIZES and other changes."""
    args = train.parse_args(["--data", "x", "--stage", stage, "--preset", preset])
    settings = train.resolve_settings(args)
    train.change(settings, SIZES)
    for change in changes:
        train.change(settings, change)
    return settings


def prepare(settings, stage, device):
    """(State, Tools) of new networks on the device."""
    networks = train.make_networks(settings, stage, None, device)
    state = train.State(networks, train.stage_settings(settings, stage), device)
    tools = train.make_tools(settings, stage, state, device)
    return state, tools


def draw(settings, stage, device):
    """The pairs of one update, made on the device from windows of noise."""
    store = types.SimpleNamespace(paths=["a"], pixels=None)
    patches = srgan.Patches(store, settings["patch_size"], settings["scale"], settings["kernel"])
    shape = (settings["batch_size"], patches.window, patches.window, 3)
    pairs = []
    for _ in range(settings.get(f"{stage}.discriminator_steps", 1)):
        windows = [torch.randint(256, shape, dtype=torch.uint8)]
        pairs.append(srgan.to_pair(patches, windows, device))
    return pairs


# Everything is on one device

@pytest.fixture
def meta(monkeypatch):
    """The device "meta". It has neither autocast nor a fused Adam."""
    def no_autocast(*args, **options):
        return contextlib.nullcontext()
    monkeypatch.setattr(torch, "autocast", no_autocast)
    plain_adam = functools.partial(torch.optim.Adam, fused=False)
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused: plain_adam(*args))
    return META


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset, changes", CASES)
def test_an_update_has_all_of_its_tensors_on_the_device(meta, preset, changes, stage):
    """to_pair, update and State.record, forwards and backwards."""
    settings = settings_of(preset, stage, changes)
    state, tools = prepare(settings, stage, meta)
    losses = train.update(tools, draw(settings, stage, meta))
    state.record(losses, settings["ema"])
    assert "loss" in losses
    for loss in losses.values():
        assert loss.device == meta
    for p in state.networks["generator"].parameters():
        assert p.grad.device == meta


def test_a_constant_on_the_cpu_is_noticed(meta, monkeypatch):
    """By the test above."""
    def loss(sr, hr):
        return ((hr - sr) * torch.ones(32)).square().mean()
    monkeypatch.setitem(srgan.PIXEL_LOSSES, "mse", loss)
    settings = settings_of("paper", "srresnet")
    _, tools = prepare(settings, "srresnet", meta)
    with pytest.raises(RuntimeError, match="device"):
        train.update(tools, draw(settings, "srresnet", meta))


@pytest.fixture
def fake(monkeypatch):
    """A mode in which there are tensors of the device "cuda", without values and without a GPU.

    Unlike "meta", it also notices a convolution whose weights are elsewhere, but it has no
    backward pass. A network gets such tensors when it is moved to the device.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    real = torch.nn.Module.to

    def to(network, *args, **options):
        with mode:
            return real(network, *args, **options)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    return mode


def pass_forwards(fake, settings, stage):
    """All that an update computes except for its gradients, on a GPU that is not there."""
    networks = train.make_networks(settings, stage, None, CUDA)
    with fake:
        state = train.State(networks, train.stage_settings(settings, stage), CUDA)
    tools = train.make_tools(settings, stage, state, CUDA)
    with fake, torch.no_grad():
        lr, hr = draw(settings, stage, CUDA)[0]
        sr = tools.G(lr)
        results = [lr, hr, sr, tools.content(sr, hr)]
        if tools.D is not None:
            results.append(tools.game.d_loss(tools.D(hr), tools.D(sr)))
            g_loss = tools.game.g_loss
            if tools.game.g_sees_hr:
                g_loss = functools.partial(g_loss, hr=hr)
            results.append(g_loss(tools.D, sr))
    return results


@no_advice
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset, changes", CASES)
def test_networks_and_losses_have_all_of_their_tensors_on_a_gpu(fake, preset, changes, stage):
    """make_networks, make_tools, to_pair and all losses, forwards."""
    for result in pass_forwards(fake, settings_of(preset, stage, changes), stage):
        assert result.device.type == "cuda"


@no_advice
def test_weights_on_the_cpu_are_noticed(fake, monkeypatch):
    """By the test above."""
    def make_phi(settings, device):
        return srgan.TruncatedVGG19("2_2", "random")
    monkeypatch.setattr(train, "make_phi", make_phi)
    with pytest.raises(RuntimeError, match="device"):
        pass_forwards(fake, settings_of("paper", "gan"), "gan")


# Nothing waits for the device

class Waits(TorchDispatchMode):
    """Notes at which update something waits for the device, and goes on with True or 0 from it.

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

        # From the device to the host, which has no values here.
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.updates.append(self.state.step)
            return args[0].dtype == torch.bool
        if name == "_to_copy" and args[0].is_meta and options.get("device", META) != META:
            self.updates.append(self.state.step)
            return torch.zeros(args[0].shape, dtype=options.get("dtype", args[0].dtype))

        # From the host to the device.
        result = function(*args, **options)
        source = {"_to_copy": 0, "copy_": 1}.get(name)
        if source is not None and result.is_meta and not args[source].is_meta:
            if not options.get("non_blocking"):
                self.updates.append(self.state.step)
        return result

    def tensor(self, data, make=torch.tensor, **options):
        """torch.tensor, which a TorchDispatchMode does not see."""
        if options.get("device") == META:
            self.updates.append(self.state.step)
        return make(data, **options)


def updates_that_wait(settings, stage, n_updates, monkeypatch):
    """Train for an epoch of some updates on "meta". The numbers of updates before each wait."""
    train.change(settings, {f"{stage}.epochs": 1, "steps_per_epoch": n_updates})
    monkeypatch.setattr(train, "record_signals", lambda world: [])  # leave pytest's handlers
    state, tools = prepare(settings, stage, META)
    batches = (draw(settings, stage, META) for _ in range(n_updates))
    waits = Waits(state)
    monkeypatch.setattr(torch, "tensor", waits.tensor)
    with waits:
        train.train(tools, state, batches, None, settings, stage, META, world=1)
    assert state.step == n_updates
    return set(waits.updates)


@pytest.mark.parametrize("preset, stage, changes", [
    ("paper", "srresnet", {}), ("gaussian", "srresnet", {}), ("nogrid", "gan", {}),
    ("wgan-gp", "gan", {"gan.discriminator_steps": 2, "gan.r1_penalty": 1.0})])
def test_training_waits_for_the_device_only_after_each_tenth_update_and_each_epoch(
        meta, monkeypatch, capsys, preset, stage, changes):
    """train.train, which then looks whether all is finite. In between, it prints nothing."""
    settings = settings_of(preset, stage, NARROW, changes)
    assert updates_that_wait(settings, stage, 12, monkeypatch) == {10, 12}
    assert capsys.readouterr().out == ""


def copy_to(x):
    torch.ones(2).to(x)


def make_there(x):
    torch.tensor(1.0, device=x.device)


@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, bool,
                                  float, copy_to, make_there])
def test_a_loss_that_waits_for_the_device_is_noticed(meta, monkeypatch, wait):
    """By the test above."""
    def loss(sr, hr):
        wait(sr.detach().mean())
        return srgan.mse_loss(sr, hr)
    monkeypatch.setitem(srgan.PIXEL_LOSSES, "mse", loss)
    settings = settings_of("paper", "srresnet", NARROW)
    assert updates_that_wait(settings, "srresnet", 3, monkeypatch) == {0, 1, 2, 3}


# Networks compile into whole graphs

def count_graphs(settings, stage, monkeypatch):
    """How many graphs torch.compile has made after each of four updates. Raises if one breaks.

    The backend "aot_eager" does all but generate code.
    """
    compile = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    train.change(settings, {"compile": "yes"})
    state, tools = prepare(settings, stage, CPU)
    graphs = []
    for _ in range(4):
        losses = train.update(tools, draw(settings, stage, CPU))
        state.record(losses, settings["ema"])
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize("preset, changes", [
    ("paper", {"precision": "bf16"}), ("esrgan", {"content_network": "squeezenet1_1:4"}),
    ("wgan-gp", {"gan.discriminator_steps": 2, "gan.content_weight": 0.0})])
def test_networks_compile_into_whole_graphs_and_not_again_after_the_second_update(
        monkeypatch, preset, changes):
    """make_tools with compile=yes: G, D while it learns and while it is fixed, phi."""
    settings = settings_of(preset, "gan", NARROW, changes)
    graphs = count_graphs(settings, "gan", monkeypatch)
    assert graphs[1] >= 3
    assert graphs[3] == graphs[1]


@pytest.mark.parametrize("breaks", [True, False])
def test_a_graph_that_breaks_or_is_made_again_is_noticed(monkeypatch, breaks):
    """By the test above. A number that changes at each call is a constant of the graph."""
    def forward(network, x):
        network.calls = getattr(network, "calls", 0) + 1
        if breaks:
            torch._dynamo.graph_break()
        return network.network(x) * network.calls
    monkeypatch.setattr(srgan.Fast, "forward", forward)
    settings = settings_of("paper", "srresnet", NARROW)
    if breaks:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            count_graphs(settings, "srresnet", monkeypatch)
    else:
        graphs = count_graphs(settings, "srresnet", monkeypatch)
        assert graphs[3] > graphs[1]


# On a GPU

@pytest.mark.cuda
@no_gpu
@pytest.mark.parametrize("kernel", srgan.KERNELS)
@pytest.mark.parametrize("scale", srgan.SCALES)
def test_a_gpu_makes_the_same_lr(scale, kernel):
    """downsample: the same 8-bit levels. (A GPU may round their division by 255 otherwise.)"""
    hr = torch.randint(256, (4, 3, 12 * scale, 10 * scale)) / 255
    expected = srgan.downsample(hr, scale, kernel).mul(255).round()
    found = srgan.downsample(hr.to(CUDA), scale, kernel).mul(255).round().cpu()
    if kernel == "bicubic":                                      # float32 holds its sums exactly
        assert torch.equal(found, expected)
    assert (found - expected).abs().max() <= 1


@pytest.mark.cuda
@no_gpu
@pytest.mark.parametrize("preset, stage, changes", [
    ("paper", "srresnet", {}), ("paper", "gan", {}), ("esrgan", "gan", {}),
    ("nogrid", "gan", {"gan.r1_penalty": 1.0})])
def test_an_update_on_a_gpu_is_that_of_the_cpu(double, preset, stage, changes):
    """to_pair, update and State.record, in float64: losses, gradients and moving average."""
    settings = settings_of(preset, stage, NARROW, {"init": "torch"}, changes)
    results = []
    for device in (CPU, CUDA):
        state, tools = prepare(settings, stage, device)
        torch.manual_seed(0)                                     # the windows and the shift
        losses = train.update(tools, draw(settings, stage, device))
        tensors = list(losses.values())
        for network in state.networks.values():
            tensors.extend(p.grad for p in network.parameters())
        state.record(losses, settings["ema"])
        results.append([tensor.detach().cpu() for tensor in tensors + state.averaged])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max() <= 1e-9 * max(1, expected.abs().max())
