"""Section 9: the fast forms compute what Fig. 4 and torch compute."""
import copy

import pytest
import torch
from conftest import randomised, same
from torch import nn

import srgan


def gradients(network, x):
    """Its output, and the gradients, by all parameters, of a weighted sum of the output."""
    y = network(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [*network.parameters()])]


@pytest.mark.parametrize("block, scale", [("residual", 2), ("residual", 4), ("residual", 8),
                                          ("rrdb", 4)])
def test_the_fast_generator_has_the_values_and_gradients_of_figure_4(double, block, scale):
    drawn = randomised(srgan.make_generator(block, scale=scale, channels=8, n_blocks=2))
    fast, x = srgan.Fast(copy.deepcopy(drawn)), torch.rand(2, 3, 6, 5)
    expected = gradients(drawn, x)
    for ours, theirs in zip(gradients(fast, x), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    assert expected[0].std() > 0.1
    assert list(fast.network.state_dict()) == list(drawn.state_dict())
    for ours, theirs in zip(fast.network.buffers(), drawn.buffers()):    # batch norm's statistics
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=0)


def test_fast_networks_share_their_parameters_and_give_float32_in_bf16():
    x, hr = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
    for network, images in ((randomised(srgan.Generator(channels=8, n_blocks=1)).eval(), x),
                            (srgan.TruncatedVGG19("2_1", "random"), hr),
                            (srgan.VariantDiscriminator(16, (4, 4, 8, 8)).eval(), hr)):
        expected, fast = network(images), srgan.Fast(network, "bf16")
        result = fast(images)
        assert result.dtype == torch.float32 and not torch.equal(result, expected)
        assert (result - expected).abs().mean() < 0.1 * expected.abs().mean()
        assert {id(p) for p in fast.parameters()} == {id(p) for p in network.parameters()}
        assert all(p.dtype == torch.float32 for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("block", srgan.GENERATORS)
def test_optimizing_for_inference_changes_the_layers_but_not_the_function(double, block):
    g, x = srgan.make_generator(block, channels=8, n_blocks=2), torch.rand(2, 3, 20, 20)
    randomised(g)(x)                                             # updates batch norm's statistics
    state = copy.deepcopy(g.eval().state_dict())
    folded = srgan.optimize_for_inference(g)
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.PReLU)) for m in folded.modules())
    assert same({**state}, {**g.state_dict()})
    with torch.no_grad():
        assert (folded(x) - g(x)).abs().max() <= 1e-9 * g(x).abs().max()


def test_an_optimised_generator_has_gradients_with_respect_to_lr(double):
    """Its activations overwrite what autograd does not need."""
    g = randomised(srgan.Generator(channels=8, n_blocks=2)).eval()
    lr = torch.rand(1, 3, 20, 20, requires_grad=True)
    expected, = torch.autograd.grad(g(lr).square().sum(), lr)
    found, = torch.autograd.grad(srgan.optimize_for_inference(g)(lr).square().sum(), lr)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_an_optimised_generator_computes_in_the_type_of_autocast():
    """In bf16 up to SR itself, on any CPU."""
    g = randomised(srgan.Generator(channels=8, n_blocks=2)).eval()
    lr = torch.rand(1, 3, 20, 20)
    fast = srgan.optimize_for_inference(g)
    with torch.no_grad():
        expected = g(lr)
        with torch.autocast("cpu", torch.bfloat16):
            maps = srgan.compute_maps(fast, lr)
            sr = srgan.enlarge(fast, maps)
    assert maps.dtype == torch.bfloat16
    assert sr.dtype == torch.float32
    error = (sr - expected).abs().mean() / expected.abs().mean()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("fp32, bf16, faster", [(1, 3, "fp32"), (3, 1, "bf16"), (1, None, "fp32")])
def test_auto_takes_the_precision_in_which_a_convolution_is_faster(monkeypatch, fp32, bf16, faster):
    """With a clock of our own, which no other load disturbs; None: the machine has no bf16."""
    clock = [0.0]

    def forward(self, x):
        if x.dtype == torch.bfloat16 and not bf16:
            raise RuntimeError("not implemented")
        clock[0] += bf16 if x.dtype == torch.bfloat16 else fp32
        return x
    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    monkeypatch.setattr(srgan.time, "perf_counter", lambda: clock[0])
    assert srgan.pick_precision.__wrapped__(torch.device("cpu")) == faster   # without its cache
