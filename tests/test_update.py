"""Section 3, srgan.Update: what one update does, beside the same computation written out here."""
import copy
import functools
import types

import pytest
import torch
from conftest import same
from torch import nn
from torch.nn.functional import softplus

import srgan

RATE = 1e-3


class Game:
    """Small networks in float64, Adams, two batches, and the Update object of them."""

    def __init__(self, content_losses=None, penalties={}, **options):
        torch.manual_seed(0)
        self.G = srgan.Generator(channels=4, n_blocks=1).double().train()
        for p in self.G.parameters():
            nn.init.normal_(p, std=0.2)
        self.D = srgan.Discriminator(16, (4, 4, 8, 8), norm="instance").double().train()
        self.adam_G, self.adam_D = (torch.optim.Adam(network.parameters(), RATE, (0.9, 0.999))
                                    for network in (self.G, self.D))
        self.lr = torch.rand(4, 3, 4, 4, dtype=torch.float64)
        self.hr = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
        options["penalties"] = {name: (weight, functools.partial(srgan.PENALTIES[name], self.D))
                                for name, weight in penalties.items()}
        self.update = srgan.Update(self.G, self.adam_G,
                                   content_losses or {"pixel": (1.0, srgan.mse_loss)},
                                   self.D, self.adam_D, **options)


def clone(network):
    """A copy and a plain Adam for it."""
    network = copy.deepcopy(network).requires_grad_(True)
    return network, torch.optim.Adam(network.parameters(), RATE, (0.9, 0.999))


def step(adam, loss):
    adam.zero_grad()
    loss.backward()
    adam.step()


def alike(one, other, tolerance=1e-9):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all((a.double() - b.double()).abs().max() <= tolerance for a, b in pairs)


def test_srresnet_minimises_equation_4_alone():
    game = Game()
    G, adam = clone(game.G)
    update = srgan.Update(game.G, game.adam_G, {"pixel": (1.0, srgan.mse_loss)})
    for _ in range(3):
        result = update(game.lr, game.hr)
        loss = (game.hr - G(game.lr)).pow(2).mean()
        step(adam, loss)
        assert {name: value.item() for name, value in result.items()} == \
            pytest.approx({"pixel": loss.item(), "loss": loss.item()})
    assert alike(game.G, G)


@pytest.mark.parametrize("name, of_d, of_g", [
    ("bce", lambda fake, real: (softplus(-real) + softplus(fake)).mean(),     # Eq. 2
     lambda fake, real: softplus(-fake).mean()),                              # Eq. 6
    ("wasserstein", lambda fake, real: fake.mean() - real.mean(), lambda fake, real: -fake.mean()),
    ("relativistic",
     lambda fake, real: (softplus(fake.mean() - real) + softplus(fake - real.mean())).mean(),
     lambda fake, real: (softplus(real - fake.mean()) + softplus(real.mean() - fake)).mean())],
    ids=srgan.ADVERSARIAL_LOSSES)
def test_an_update_is_ds_step_and_then_gs_against_the_new_d(name, of_d, of_g):
    """Three of them, beside the same in plain torch; Eq. 3 with its weight of 1e-3."""
    generators, discriminators = srgan.ADVERSARIAL_LOSSES[name]
    game = Game() if name == "bce" else Game(adversarial_loss=generators,    # the default
                                             discriminator_loss=discriminators)
    (G, adam_G), (D, adam_D) = clone(game.G), clone(game.D)
    for _ in range(3):
        result = game.update(game.lr, game.hr)
        sr = G(game.lr)
        real, fake = D(game.hr), D(sr.detach())
        d_loss = of_d(fake, real)
        step(adam_D, d_loss)
        content, adversarial = (game.hr - sr).pow(2).mean(), of_g(D(sr), D(game.hr))
        loss = content + 1e-3 * adversarial
        step(adam_G, loss)
        expected = {"pixel": content, "adversarial": adversarial, "loss": loss,
                    "discriminator": d_loss, "d_real": real.mean(), "d_fake": fake.mean()}
        assert {name: value.item() for name, value in result.items()} == \
            pytest.approx({name: value.item() for name, value in expected.items()})
    assert alike(game.G, G) and alike(game.D, D)


def test_each_step_moves_its_own_network_and_leaves_no_gradient_with_the_other(monkeypatch):
    game, order = Game(), []

    def weights(name):
        return [p.detach().clone() for p in getattr(game, name).parameters()]

    def gradients(name):
        return [None if p.grad is None else p.grad.clone()
                for p in getattr(game, name).parameters()]

    def watch(loss, adam, minimize=srgan.minimize):
        name, other = ("G", "D") if adam is game.adam_G else ("D", "G")
        order.append(name)
        before, others = weights(name), (weights(other), gradients(other))
        minimize(loss, adam)
        assert any((a - b).abs().max() > RATE / 2 for a, b in zip(before, weights(name)))
        assert all(gradient.any() for gradient in gradients(name))
        assert same(others, (weights(other), gradients(other)))
    monkeypatch.setattr(srgan, "minimize", watch)
    for _ in range(2):
        game.update(game.lr, game.hr)
        assert not any(p.requires_grad for p in game.D.parameters())
    assert order == ["D", "G", "D", "G"]


def test_losses_have_their_weights_and_hr_features_no_gradient():
    phi, grad_enabled = srgan.TruncatedVGG19("1_1", "random").double(), []
    phi.register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    use, weights = types.SimpleNamespace(pixel_loss="l1", phi=phi), (0.5, 3.0, 2e-3)
    losses = {name: (weight, lambda sr, hr, f=f: f(sr, hr, use))
              for (name, f), weight in zip(srgan.CONTENT_LOSSES.items(), weights)}
    game = Game(losses, adversarial_weight=0.25)
    G, adam = clone(game.G)
    result = game.update(game.lr, game.hr)
    assert list(losses) == ["pixel", "content", "tv"] and grad_enabled == [False, True]
    sr, D = G(game.lr), clone(game.D)[0]                         # D after its step
    pixel, content = (game.hr - sr).abs().mean(), (phi(game.hr).detach() - phi(sr)).pow(2).mean()
    tv = (sr.diff(dim=2).abs().sum() + sr.diff(dim=3).abs().sum()) / 4
    loss = 0.5 * pixel + 3 * content + 2e-3 * tv + 0.25 * softplus(-D(sr)).mean()
    step(adam, loss)
    assert [result[name].item() for name in ("pixel", "content", "tv", "loss")] == \
        pytest.approx([value.item() for value in (pixel, content, tv, loss)])   # unweighted
    assert alike(game.G, G)


def test_penalties_join_ds_loss_with_their_weights():
    """Their values, and D after a step of plain Adam down the whole sum."""
    game = Game(penalties={"gradient_penalty": 10, "r1_penalty": 0.3})
    D, adam = clone(game.D)
    with torch.no_grad():
        sr = copy.deepcopy(game.G)(game.lr)
    torch.manual_seed(5)
    result = game.update(game.lr, game.hr)

    def slope(x):                                                # of each image's score
        x = x.clone().requires_grad_()
        return torch.autograd.grad(D(x).sum(), x, create_graph=True)[0].flatten(1)
    torch.manual_seed(5)
    share = torch.rand(4, 1, 1, 1, dtype=torch.float64)
    between = (slope(share * sr + (1 - share) * game.hr).pow(2).sum(1).sqrt() - 1).pow(2).mean()
    at_hr = slope(game.hr).pow(2).sum(1).mean() / 2
    plain = (softplus(-D(game.hr)) + softplus(D(sr))).mean()
    loss = plain + 10 * between + 0.3 * at_hr
    assert between > 1e-3 and at_hr > 1e-5
    step(adam, loss)
    assert result["discriminator"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert alike(game.D, D, 1e-6)


def test_several_critic_steps_take_a_batch_each_and_then_g_steps_once():
    game, alone = (Game(penalties={"r1_penalty": 0.1}) for _ in range(2))
    batches = [(torch.rand_like(game.lr), torch.rand_like(game.hr)) for _ in range(3)]
    result = srgan.CriticSteps(game.update)(*[tensor for pair in batches for tensor in pair])
    for lr, hr in batches[:2]:
        alone.update.update_discriminator(alone.G(lr).detach(), hr)
    expected = alone.update(*batches[2])
    assert result == expected and alike(game.G, alone.G, 0) and alike(game.D, alone.D, 0)
    assert game.adam_D.state_dict()["state"][0]["step"] == 3
    assert game.adam_G.state_dict()["state"][0]["step"] == 1
