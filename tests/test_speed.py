"""Section 9: the fast forms compute what Fig. 4 and torch compute."""
import contextlib
import copy
import types

import pytest
import torch
from conftest import randomised
from torch import nn

import srgan


def gradients(y, *inputs):
    """y, and the gradients of a sum in which each of its values has another weight."""
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y, *torch.autograd.grad((y.float() * weights).sum(), inputs)]


def assert_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max() + 1e-12


@pytest.mark.parametrize("block, scale", [("residual", 2), ("residual", 4), ("residual", 8),
                                          ("rrdb", 4)])
def test_the_fast_generator_is_figure_4_as_drawn_in_value_and_gradient(block, scale):
    drawn = randomised(srgan.make_generator(block, scale=scale, channels=8, n_blocks=2))
    fast = srgan.Fast(copy.deepcopy(drawn))
    x = torch.rand(2, 3, 6, 5)
    drawn_results = gradients(drawn(x), *drawn.parameters())
    assert_close(gradients(fast(x), *fast.parameters()), drawn_results, 1e-4)
    assert drawn_results[0].std() > 0.1
    assert list(fast.network.state_dict()) == list(drawn.state_dict())
    for a, b in zip(fast.network.buffers(), drawn.buffers()):    # batch norm's statistics
        assert torch.allclose(a.float(), b.float(), rtol=1e-5)


def test_fast_networks_share_their_parameters_and_give_float32_in_bf16():
    g = randomised(srgan.Generator(channels=8, n_blocks=1)).eval()
    phi = srgan.TruncatedVGG19("2_1", "random")
    x, hr = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
    expected = g(x), phi(hr), (d := srgan.Discriminator(16, (4, 4, 8, 8)))(hr)
    for network, images, y in zip((g, phi, d), (x, hr, hr), expected):
        fast = srgan.Fast(network, "bf16")
        result = fast(images)
        assert result.dtype == torch.float32 and torch.allclose(result, y, atol=0.1, rtol=0.1)
        assert not torch.equal(result, y)
        assert {id(p) for p in fast.parameters()} == {id(p) for p in network.parameters()}
    assert all(p.dtype == torch.float32 for network in (g, d) for p in network.parameters())


@pytest.mark.parametrize("block", srgan.GENERATORS)
def test_optimizing_for_inference_changes_nothing_but_the_layers(block, generator):
    g = generator if block == "residual" else randomised(
        srgan.make_generator(block, channels=8, n_blocks=1)).eval()
    state = copy.deepcopy(g.state_dict())
    folded, x = srgan.optimize_for_inference(g), torch.rand(1, 3, 20, 20)
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.PReLU)) for m in folded.modules())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), g.state_dict().values()))
    with torch.no_grad():
        assert torch.allclose(folded(x), g(x), atol=1e-5)
        if block == "residual":                                  # the norms do something
            assert (g(x) - g.train()(x)).abs().max() > 1e-2


def test_the_device_is_the_one_named_or_an_error_in_one_line():
    assert srgan.pick_device("cpu").type == "cpu"
    assert srgan.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("meta", "gpu", "cuda:77", ""):
        with pytest.raises(srgan.InputError, match="cannot be used.*; take .*cpu") as error:
            srgan.pick_device(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("slow, faster", [(torch.bfloat16, "fp32"), (torch.float32, "bf16")])
def test_auto_takes_the_precision_in_which_a_convolution_is_faster(monkeypatch, slow, faster):
    """A convolution in the other takes longer; the clock is a stand-in, so no load disturbs it."""
    device, clock, real = torch.device("cpu"), [0.0], nn.Conv2d.forward

    def forward(self, x):
        clock[0] += 3 if x.dtype == slow else 1
        return real(self, x)
    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    monkeypatch.setattr(srgan.time, "perf_counter", lambda: clock[0])
    srgan.pick_precision.cache_clear()
    try:
        assert srgan.pick_precision(device) == faster
        elapsed = clock[0]
        assert srgan.pick_precision(device) == faster and clock[0] == elapsed  # once
        assert [srgan.pick_precision(device, name) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
        monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: x / 0 if x.dtype ==
                            torch.float32 else (_ for _ in ()).throw(RuntimeError("no bf16")))
        srgan.pick_precision.cache_clear()
        assert srgan.pick_precision(device) == "fp32"
    finally:
        srgan.pick_precision.cache_clear()


def test_a_graph_is_replayed_on_the_inputs_of_each_call(monkeypatch):
    """With stand-ins for CUDA, which compute on the CPU when a graph is replayed."""
    calls = []

    def double(x):
        calls.append((x, {"twice": 2 * x}))
        return calls[-1][1]

    class Graph:
        def replay(self):
            self.result.copy_(2 * self.input)

    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        yield
        graph.input, graph.result = calls[-1][0], calls[-1][1]["twice"]
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"Stream": lambda device: stream, "current_stream": lambda: stream,
                        "stream": lambda s: contextlib.nullcontext(), "CUDAGraph": Graph,
                        "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    graphed = srgan.Graphed(double, torch.device("cpu"))
    for shape in ((2,), (3,)):
        for i in range(6):
            result = graphed(torch.full(shape, float(i)))["twice"]
            assert torch.equal(result, torch.full(shape, 2.0 * i))
    assert len(calls) == 2 * (srgan.Graphed.warmup + 1)          # the others were replayed
