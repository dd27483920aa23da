"""Section 2, Eq. 2 to 6, and the losses and penalties of section 8, each computed a second way."""
import math

import numpy as np
import pytest
import torch
from torch import nn

import srgan

REAL, FAKE = [2.0, -1.0, 0.5], [-3.0, 0.1, 1.0]                  # logits of D


def images(*shape, seed=0):
    """Float64 images in [-1, 1]."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(-1, 1, shape or (2, 3, 16, 16)))


def minus_log_sigmoid(x):
    return math.log(1 + math.exp(-x))


def mean(function, logits):
    return sum(map(function, logits)) / len(logits)


def test_pixel_losses_are_the_means_of_equation_4_and_of_its_l1_form():
    sr, hr = images(2, 3, 4, 5), images(2, 3, 4, 5, seed=1)
    differences = [y - x for x, y in zip(sr.flatten().tolist(), hr.flatten().tolist())]
    expected = {"mse": sum(d * d for d in differences) / 120,
                "l1": sum(map(abs, differences)) / 120}
    assert {name: loss(sr, hr).item() for name, loss in srgan.PIXEL_LOSSES.items()} == \
        pytest.approx(expected)


def test_the_content_loss_is_the_mean_of_equation_5_and_leaves_hr_alone():
    phi = srgan.TruncatedVGG19("1_2", "random").double()
    sr, hr = images().requires_grad_(), images(seed=1).requires_grad_()
    loss = srgan.content_loss(phi, sr, hr)
    with torch.no_grad():                                        # 1 / 12.75^2, "approx. 0.006"
        unscaled = (phi(hr) * 12.75 - phi(sr) * 12.75).square()
    expected = unscaled.sum().item() / (2 * 64 * 16 * 16) * 0.00615
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    loss.backward()
    assert sr.grad.any() and hr.grad is None


def test_total_variation_sums_the_steps_between_neighbours_of_each_image():
    sr, total = images(2, 3, 4, 5), 0
    for n, c, y, x in np.ndindex(2, 3, 4, 5):
        if y:
            total += abs(sr[n, c, y, x] - sr[n, c, y - 1, x]).item()
        if x:
            total += abs(sr[n, c, y, x] - sr[n, c, y, x - 1]).item()
    assert srgan.total_variation(sr).item() == pytest.approx(total / 2)
    assert srgan.total_variation(torch.ones(1, 3, 4, 4)) == 0


def test_a_discriminator_that_is_always_right_still_gives_a_gradient():
    """Eq. 6 does not saturate: where D(SR) goes to 0, its slope by the logit goes to -1."""
    fake = torch.full((4,), -1e4, requires_grad=True)
    srgan.adversarial_loss(lambda x: x, fake).backward()
    assert torch.allclose(fake.grad, torch.full((4,), -0.25))
    assert srgan.discriminator_loss(fake.detach(), -fake.detach()) == 0   # no log of 0


LOW, HIGH = minus_log_sigmoid, lambda x: minus_log_sigmoid(-x)   # -log D and -log(1 - D)
TO_MEAN_FAKE = [x - sum(FAKE) / 3 for x in REAL]                 # sigmoid: D_Ra(x_r, x_f)
TO_MEAN_REAL = [x - sum(REAL) / 3 for x in FAKE]                 # D_Ra(x_f, x_r)


@pytest.mark.parametrize("name, of_g, of_d", [
    ("bce", mean(LOW, FAKE), mean(LOW, REAL) + mean(HIGH, FAKE)),             # Eq. 6 and 2
    ("wasserstein", -sum(FAKE) / 3, sum(FAKE) / 3 - sum(REAL) / 3),
    ("relativistic", mean(HIGH, TO_MEAN_FAKE) + mean(LOW, TO_MEAN_REAL),
     mean(LOW, TO_MEAN_FAKE) + mean(HIGH, TO_MEAN_REAL))], ids=srgan.ADVERSARIAL_LOSSES)
def test_adversarial_losses_are_their_papers_equations(name, of_g, of_d):
    generators, discriminators = srgan.ADVERSARIAL_LOSSES[name]
    sr, hr = images(), images(seed=1)
    logits = {id(sr): torch.tensor(FAKE).double(), id(hr): torch.tensor(REAL).double()}
    assert generators(lambda x: logits[id(x)], sr, hr).item() == pytest.approx(of_g)
    assert discriminators(logits[id(sr)], logits[id(hr)]).item() == pytest.approx(of_d)


def test_the_gradient_penalty_is_zero_for_slope_1_and_reaches_the_critic():
    direction = nn.functional.normalize(images(192), dim=0)
    for slope in (1, 3):
        weight = (slope * direction).requires_grad_()
        penalty = srgan.gradient_penalty(lambda x: x.flatten(1) @ weight,
                                         images(4, 3, 8, 8), images(4, 3, 8, 8, seed=1))
        assert penalty.item() == pytest.approx((slope - 1) ** 2)
        penalty.backward()
        assert torch.allclose(weight.grad, 2 * (slope - 1) * direction)


def test_the_gradient_penalty_looks_anywhere_between_sr_and_hr():
    sr, hr, seen = images(64, 3, 4, 4), images(64, 3, 4, 4, seed=1), []
    srgan.gradient_penalty(lambda x: (seen.append(x.detach()), x.sum((1, 2, 3)))[1], sr, hr)
    share = (seen[0] - hr) / (sr - hr)                           # of SR, one for each image
    assert torch.allclose(share, share[:, :1, :1, :1].expand_as(share), atol=1e-6)
    assert 0 <= share.min() < 0.1 and 0.9 < share.max() <= 1


def test_r1_is_half_the_squared_slope_at_hr():
    weight, hr = images(192).requires_grad_(), images(4, 3, 8, 8, seed=1)
    penalty = srgan.r1_penalty(lambda x: x.flatten(1).square() @ weight, images(4, 3, 8, 8), hr)
    slopes = 2 * hr.flatten(1).numpy() * weight.detach().numpy()
    assert penalty.item() == pytest.approx((slopes ** 2).sum() / 4 / 2)
    penalty.backward()
    assert torch.allclose(weight.grad, (4 * hr.flatten(1).square() * weight.detach()).mean(0))
    assert not hr.requires_grad


@pytest.mark.parametrize("name, norm", [("gradient_penalty", "instance"), ("r1_penalty", "batch")])
def test_penalties_work_in_bf16_as_in_fp32(name, norm):
    d = srgan.Discriminator(32, channels=(8, 16, 16, 32), norm=norm)
    sr, hr = images(4, 3, 32, 32).float(), images(4, 3, 32, 32, seed=1).float()
    gradients = []
    for precision in ("fp32", "bf16"):
        d.zero_grad()
        torch.manual_seed(0)                                     # of the points between SR and HR
        srgan.PENALTIES[name](srgan.Fast(d, precision), sr, hr).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in d.parameters()
                                    if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.95
