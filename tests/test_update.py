"""Sections 2 and 3: one update, compared with the same losses and steps in plain torch."""
import copy
import functools
import types

import pytest
import torch
from conftest import randomised
from torch.nn.functional import softplus

import srgan

RATE = 1e-3


class Game:
    """Small networks in float64 with their Adams, a batch, and an Update of them."""

    def __init__(self, penalties={}, **options):
        torch.manual_seed(0)
        self.G = randomised(srgan.Generator(channels=4, n_blocks=1)).double()
        self.D = srgan.Discriminator(16, (4, 4, 8, 8), norm="instance").double()
        self.adam_G, self.adam_D = (torch.optim.Adam(network.parameters(), RATE)
                                    for network in (self.G, self.D))
        self.lr = torch.rand(4, 3, 4, 4, dtype=torch.float64)
        self.hr = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
        self.update = srgan.Update(self.G, self.adam_G, {"pixel": (1.0, srgan.mse_loss)},
                                   self.D, self.adam_D, **options)
        self.update.penalties = {
            name: (weight, functools.partial(srgan.PENALTIES[name], self.D))
            for name, weight in penalties.items()}


def clone(network):
    """A copy and a plain Adam for it."""
    network = copy.deepcopy(network).requires_grad_(True)
    return network, torch.optim.Adam(network.parameters(), RATE)


def step(adam, loss):
    adam.zero_grad()
    loss.backward()
    adam.step()


def numbers(losses):
    return {name: loss.item() for name, loss in losses.items()}


def alike(one, other, tolerance=1e-9):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all((a.double() - b.double()).abs().max() <= tolerance for a, b in pairs)


def test_srresnet_minimises_the_weighted_sum_of_its_content_losses():
    """... and HR's features carry no gradient."""
    phi, carries = srgan.TruncatedVGG19("1_1", "random").double(), []
    phi.register_forward_hook(lambda phi, images, maps: carries.append(maps.requires_grad))
    use, weights = types.SimpleNamespace(pixel_loss="l1", phi=phi), (0.5, 3.0, 2e-3)
    losses = {name: (weight, functools.partial(srgan.CONTENT_LOSSES[name], use=use))
              for name, weight in zip(("pixel", "content", "tv"), weights)}
    game = Game()
    (G, adam), lr, hr = clone(game.G), game.lr, game.hr
    result = srgan.Update(game.G, game.adam_G, losses)(lr, hr)
    assert carries == [False, True]
    sr = G(lr)
    pixel, content = (hr - sr).abs().mean(), (phi(hr).detach() - phi(sr)).pow(2).mean()
    tv = (sr.diff(dim=2).abs().sum() + sr.diff(dim=3).abs().sum()) / 4
    loss = 0.5 * pixel + 3 * content + 2e-3 * tv
    step(adam, loss)
    assert numbers(result) == pytest.approx(numbers(
        {"pixel": pixel, "content": content, "tv": tv, "loss": loss}))      # unweighted
    assert alike(game.G, G)


@pytest.mark.parametrize("name, weight, of_d, of_g", [
    ("bce", 1e-3, lambda fake, real: (softplus(-real) + softplus(fake)).mean(),      # Eq. 2
     lambda fake, real: softplus(-fake).mean()),                                     # Eq. 6
    ("wasserstein", 0.25, lambda fake, real: fake.mean() - real.mean(),
     lambda fake, real: -fake.mean()),
    ("relativistic", 0.25,
     lambda fake, real: (softplus(fake.mean() - real) + softplus(fake - real.mean())).mean(),
     lambda fake, real: (softplus(real - fake.mean()) + softplus(real.mean() - fake)).mean())],
    ids=srgan.ADVERSARIAL_LOSSES)
def test_an_update_is_ds_step_and_then_gs_against_the_new_d(name, weight, of_d, of_g):
    """Three updates; bce and Eq. 3's 1e-3 are the defaults."""
    game = Game() if name == "bce" else Game(adversarial_weight=weight, **dict(zip(
        ("adversarial_loss", "discriminator_loss"), srgan.ADVERSARIAL_LOSSES[name])))
    (G, adam_G), (D, adam_D) = clone(game.G), clone(game.D)
    for _ in range(3):
        result = game.update(game.lr, game.hr)
        sr = G(game.lr)
        real, fake = D(game.hr), D(sr.detach())
        d_loss = of_d(fake, real)
        step(adam_D, d_loss)
        gradients = [p.grad.clone() for p in D.parameters()]     # G's step adds none to D's
        content, adversarial = (game.hr - sr).pow(2).mean(), of_g(D(sr), D(game.hr))   # Eq. 4
        loss = content + weight * adversarial                                          # Eq. 3
        step(adam_G, loss)
        assert numbers(result) == pytest.approx(numbers({
            "pixel": content, "adversarial": adversarial, "loss": loss, "discriminator": d_loss,
            "d_real": real.mean(), "d_fake": fake.mean()}))
        assert all(torch.allclose(p.grad, gradient)
                   for p, gradient in zip(game.D.parameters(), gradients))
    assert alike(game.G, G) and alike(game.D, D)


def test_penalties_join_ds_loss_with_their_weights():
    game = Game(penalties={"gradient_penalty": 10, "r1_penalty": 0.3})
    D, adam = clone(game.D)
    sr = copy.deepcopy(game.G)(game.lr).detach()
    torch.manual_seed(5)
    result = game.update(game.lr, game.hr)
    torch.manual_seed(5)
    share = torch.rand(4, 1, 1, 1, dtype=torch.float64)

    def slope(x):                                                # of each image's score
        x = x.clone().requires_grad_()
        return torch.autograd.grad(D(x).sum(), x, create_graph=True)[0].flatten(1).norm(dim=1)
    between = (slope(share * sr + (1 - share) * game.hr) - 1).pow(2).mean()
    at_hr = slope(game.hr).pow(2).mean() / 2
    loss = (softplus(-D(game.hr)) + softplus(D(sr))).mean() + 10 * between + 0.3 * at_hr
    assert between > 1e-3 and at_hr > 1e-5
    step(adam, loss)
    assert result["discriminator"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert alike(game.D, D, 1e-6)


def test_each_critic_step_takes_a_batch_of_its_own_and_then_g_steps_once():
    game, other = (Game(penalties={"r1_penalty": 0.1}) for _ in range(2))
    batches = [(torch.rand_like(game.lr), torch.rand_like(game.hr)) for _ in range(3)]
    result = srgan.critic_steps(game.update, *[tensor for pair in batches for tensor in pair])
    for lr, hr in batches[:2]:
        other.update.update_discriminator(other.G(lr).detach(), hr)
    expected = other.update(*batches[2])
    assert result == expected and alike(game.G, other.G, 0) and alike(game.D, other.D, 0)


def test_a_discriminator_that_is_always_right_still_gives_a_gradient():
    """Eq. 6 does not saturate: as D(SR) goes to 0, its derivative by the logit goes to -1."""
    fake = torch.full((4,), -1e4, requires_grad=True)
    srgan.adversarial_loss(lambda x: x, fake).backward()
    assert torch.allclose(fake.grad, torch.full((4,), -0.25))
    assert srgan.discriminator_loss(fake.detach(), -fake.detach()) == 0   # no log of 0


def test_shifted_steps_see_sr_and_hr_moved_together():
    game, seen, moves = Game(), [], set()
    losses = {"pixel": (1.0, lambda sr, hr: seen.append((sr, hr)) or srgan.mse_loss(sr, hr))}
    update = srgan.Update(game.G, game.adam_G, losses)
    update.update_generator = srgan.shifted(update.update_generator, 3)
    for _ in range(20):
        sr = game.G(game.lr)
        update(game.lr, game.hr)
        move, = [(y, x) for y in range(4) for x in range(4)
                 if torch.equal(game.hr.roll((y, x), (2, 3)), seen[-1][1])]
        assert torch.allclose(sr.roll(move, (2, 3)), seen[-1][0])
        moves.add(move)
    assert len(moves) > 5
