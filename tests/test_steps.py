"""Sections 2, 3 and 8: losses and steps, compared with plain torch in float64 to 1e-9."""
import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import randomised
from torch.nn.functional import softplus

import srgan
import train

RATE = 1e-3


@pytest.fixture
def game():
    """Small networks in float64, an Adam for each, and a batch of LR and HR."""
    torch.manual_seed(0)
    G = randomised(srgan.Generator(channels=4, n_blocks=1)).double()
    D = srgan.VariantDiscriminator(16, (4, 4, 8, 8)).double()
    lr = torch.rand(4, 3, 4, 4, dtype=torch.float64)
    hr = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
    return SimpleNamespace(G=G, D=D, adam_G=adam_of(G), adam_D=adam_of(D), lr=lr, hr=hr)


def adam_of(network):
    return torch.optim.Adam(network.parameters(), RATE)


def twin(game):
    """The same game, with networks and Adams of its own."""
    G = copy.deepcopy(game.G)
    D = copy.deepcopy(game.D)
    return SimpleNamespace(G=G, D=D, adam_G=adam_of(G), adam_D=adam_of(D), lr=game.lr, hr=game.hr)


def draw(game):
    """Another batch of LR and HR."""
    return torch.rand_like(game.lr), torch.rand_like(game.hr) * 2 - 1


def step(adam, loss):
    adam.zero_grad()
    loss.backward()
    adam.step()


def check_networks(one, other):
    """The weights and the batch-norm statistics of both games agree."""
    for network in ("G", "D"):
        expected = getattr(other, network).state_dict()
        for name, tensor in getattr(one, network).state_dict().items():
            difference = (tensor - expected[name]).abs().max().item()
            assert difference <= 1e-9, f"{network}.{name}: {difference}"


def check_losses(losses, expected):
    found = {name: loss.item() for name, loss in losses.items()}
    expected = {name: loss.item() for name, loss in expected.items()}
    assert found == pytest.approx(expected, rel=1e-9)


# Section 2: the losses

def test_mse_loss_is_the_mean_of_squares(game):
    """mse_loss, Eq. 4."""
    sr, hr = draw(game)[1], game.hr
    total = sum(x ** 2 for x in (hr - sr).flatten().tolist())
    assert srgan.mse_loss(sr, hr).item() == pytest.approx(total / hr.numel(), rel=1e-9)


def test_content_loss_compares_feature_maps_and_needs_no_gradient_of_hrs(game):
    """content_loss, Eq. 5."""
    seen = []

    def phi(x):
        seen.append(x)
        return x.square().mean(1, keepdim=True)                  # one feature map of three
    sr = draw(game)[1].requires_grad_()
    loss = srgan.content_loss(phi, sr, game.hr)
    expected = (game.hr.square().mean(1) - sr.square().mean(1)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert [x.requires_grad for x in seen] == [False, True]


def test_total_variation_sums_the_steps_between_neighbours_and_averages_over_the_batch():
    """total_variation, Sec. 3.4; HR plays no part."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    total = 0
    for image in x.tolist():
        for colour in image:
            for i in range(4):
                for j in range(5):
                    if i > 0:
                        total += abs(colour[i][j] - colour[i - 1][j])
                    if j > 0:
                        total += abs(colour[i][j] - colour[i][j - 1])
    assert srgan.total_variation(x, None).item() == pytest.approx(total / 2, rel=1e-9)


def test_a_discriminator_that_is_always_right_still_gives_a_gradient():
    """adversarial_loss, Eq. 6: as D(SR) goes to 0, its derivative by the logit goes to -1."""
    logits = torch.full((4,), -1e4, requires_grad=True)
    srgan.adversarial_loss(lambda sr: sr, logits).backward()
    assert torch.equal(logits.grad, torch.full((4,), -0.25))


def test_no_logarithm_of_0_is_taken():
    """discriminator_loss, Eq. 2: logits of sigmoid 0 and 1."""
    logits = torch.tensor([1e4, 1e4])
    assert srgan.discriminator_loss(logits, -logits).item() == 0
    assert srgan.discriminator_loss(-logits, logits).item() == 2e4


def test_perceptual_loss_weighs_the_adversarial_loss_by_a_thousandth():
    """perceptual_loss, Eq. 3."""
    assert srgan.perceptual_loss(2.0, 30.0) == pytest.approx(2.03, rel=1e-9)
    assert srgan.perceptual_loss(2.0, 30.0, weight=0.5) == pytest.approx(17, rel=1e-9)


def test_several_content_losses_are_added_with_their_weights_and_keep_their_parts(game):
    """WeightedSum of content_losses."""
    def phi(x):
        return x.square()
    functions = srgan.content_losses("l1", phi, scale=4)
    content = srgan.WeightedSum()
    content.terms = {"pixel": (0.5, functions["pixel"]), "content": (3.0, functions["content"]),
                     "tv": (2e-3, functions["tv"])}
    sr = draw(game)[1]
    loss = content(sr, game.hr)
    pixel = (game.hr - sr).abs().mean()
    features = (game.hr.square() - sr.square()).square().mean()
    variation = srgan.total_variation(sr, game.hr)
    check_losses(content.parts, {"pixel": pixel, "content": features, "tv": variation})
    check_losses({"sum": loss}, {"sum": 0.5 * pixel + 3 * features + 2e-3 * variation})


@pytest.mark.parametrize("name, function", [
    ("grid", srgan.grid_loss), ("fourier", srgan.fourier_loss), ("tv", srgan.total_variation)])
def test_content_losses_are_found_under_the_names_of_their_weights(game, name, function):
    """content_losses and CONTENT_LOSSES."""
    sr = draw(game)[1]
    losses = srgan.content_losses("mse", None, scale=4)
    assert losses[name](sr, game.hr).item() == function(sr, game.hr).item()
    assert tuple(losses) == srgan.CONTENT_LOSSES


def test_the_pixel_loss_is_chosen_by_its_name(game):
    """content_losses and PIXEL_LOSSES."""
    sr = draw(game)[1]
    for name, function in srgan.PIXEL_LOSSES.items():
        pixel = srgan.content_losses(name)["pixel"]
        assert pixel(sr, game.hr).item() == function(sr, game.hr).item()


# Section 3: the steps

def test_srresnet_step_is_a_step_of_adam_down_the_content_loss(game):
    """srresnet_step and minimize, three times."""
    other = twin(game)
    for _ in range(3):
        losses = srgan.srresnet_step(game.G, game.adam_G, srgan.mse_loss, game.lr, game.hr)
        loss = (other.hr - other.G(other.lr)).square().mean()
        step(other.adam_G, loss)
        check_losses(losses, {"loss": loss})
    check_networks(game, other)


def bce_d(real, fake):
    return softplus(-real).mean() + softplus(fake).mean()        # Eq. 2


def bce_g(fake, real):
    return softplus(-fake).mean()                                # Eq. 6


def wasserstein_d(real, fake):
    return fake.mean() - real.mean()


def wasserstein_g(fake, real):
    return -fake.mean()


def relativistic_d(real, fake):
    return softplus(fake.mean() - real).mean() + softplus(fake - real.mean()).mean()


def relativistic_g(fake, real):
    return softplus(real - fake.mean()).mean() + softplus(real.mean() - fake).mean()


def plain_srgan_step(game, d_loss, g_loss, weight, g_sees_hr=False):
    """D's step and then G's step against the new D, in plain torch. Returns the losses."""
    sr = game.G(game.lr)
    real = game.D(game.hr)
    fake = game.D(sr.detach())
    loss_of_d = d_loss(real, fake)
    step(game.adam_D, loss_of_d)
    content = (game.hr - sr).square().mean()
    new_fake = game.D(sr)
    new_real = game.D(game.hr) if g_sees_hr else None
    adversarial = g_loss(new_fake, new_real)
    loss = content + weight * adversarial                        # Eq. 3
    step(game.adam_G, loss)
    return {"discriminator": loss_of_d, "d_real": real.mean(), "d_fake": fake.mean(),
            "loss": loss, "adversarial": adversarial}


def test_srgan_step_is_ds_step_and_then_gs_against_the_new_d(game):
    """srgan_step with its defaults (Eq. 2, 3 and 6), three times; D has batch norm."""
    other = twin(game)
    for _ in range(3):
        losses = srgan.srgan_step(game.G, game.D, game.adam_G, game.adam_D, srgan.mse_loss,
                                  game.lr, game.hr)
        check_losses(losses, plain_srgan_step(other, bce_d, bce_g, 1e-3))
    check_networks(game, other)


@pytest.mark.parametrize("name, d_loss, g_loss", [
    ("bce", bce_d, bce_g), ("wasserstein", wasserstein_d, wasserstein_g),
    ("relativistic", relativistic_d, relativistic_g)])
def test_update_plays_the_game_that_the_settings_name(game, name, d_loss, g_loss):
    """train.update with each Game of ADVERSARIAL_LOSSES: wasserstein_g_loss and wasserstein_d_loss,
    relativistic_g_loss and relativistic_d_loss."""
    other = twin(game)
    tools = make_tools(game, game=srgan.ADVERSARIAL_LOSSES[name])
    for _ in range(3):
        losses = train.update(tools, [(game.lr, game.hr)])
        expected = plain_srgan_step(other, d_loss, g_loss, 0.25, name == "relativistic")
        expected["pixel"] = expected["loss"] - 0.25 * expected["adversarial"]
        check_losses(losses, expected)
    check_networks(game, other)


def test_gs_step_leaves_no_gradient_in_d(game):
    """srgan_step: D is fixed while G learns."""
    other = twin(game)
    srgan.srgan_step(game.G, game.D, game.adam_G, game.adam_D, srgan.mse_loss, game.lr, game.hr)
    srgan.discriminator_step(other.D, other.adam_D, other.G(other.lr).detach(), other.hr)
    for p, q in zip(game.D.parameters(), other.D.parameters()):
        assert torch.equal(p.grad, q.grad)


# Section 8: penalties; what the settings add to a step

def make_tools(networks, **changes):
    """train.Tools of stage 2, with a pixel loss and an adversarial weight of 0.25."""
    content = srgan.WeightedSum()
    content.terms["pixel"] = (1.0, srgan.mse_loss)
    tools = train.Tools(networks.G, networks.adam_G, content, networks.D, networks.adam_D,
                        weight=0.25, game=srgan.ADVERSARIAL_LOSSES["bce"])
    return tools._replace(**changes)


def norms(D, x):
    """The norm of the gradient of each image's score."""
    x = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def plain_gradient_penalty(D, sr, hr):
    share = torch.rand(4, 1, 1, 1, dtype=torch.float64)
    return (norms(D, share * sr + (1 - share) * hr) - 1).square().mean()


def plain_r1_penalty(D, sr, hr):
    return norms(D, hr).square().mean() / 2


@pytest.mark.parametrize("name, plain", [("gradient_penalty", plain_gradient_penalty),
                                         ("r1_penalty", plain_r1_penalty)])
def test_penalties_join_ds_loss_with_their_weights(game, name, plain):
    """discriminator_step with gradient_penalty and with r1_penalty (PENALTIES)."""
    other = twin(game)
    sr = game.G(game.lr).detach()

    def penalty(sr, hr):
        return 0.3 * srgan.PENALTIES[name](game.D, sr, hr)
    torch.manual_seed(5)
    losses = srgan.discriminator_step(game.D, game.adam_D, sr, game.hr, penalty=penalty)
    torch.manual_seed(5)
    real = other.D(other.hr)
    fake = other.D(sr)
    expected = plain(other.D, sr, other.hr)
    assert expected > 1e-5
    loss = bce_d(real, fake) + 0.3 * expected
    step(other.adam_D, loss)
    check_losses(losses, {"discriminator": loss, "d_real": real.mean(), "d_fake": fake.mean()})
    check_networks(game, SimpleNamespace(G=game.G, D=other.D))


def test_input_gradient_is_that_of_each_images_own_score():
    """input_gradient, of a D whose gradient is known."""
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    found = srgan.input_gradient(lambda x: x.square().sum((1, 2, 3)), x)
    assert (found - 2 * x.flatten(1)).abs().max() <= 1e-9


def test_each_critic_step_takes_a_batch_of_its_own_and_then_g_steps_once(game):
    """train.update with three pairs, a penalty and the losses of a critic."""
    other = twin(game)
    pairs = [draw(game), draw(game), draw(game)]

    def penalty(sr, hr):
        return 0.1 * srgan.r1_penalty(game.D, sr, hr)
    tools = make_tools(game, penalty=penalty, game=srgan.ADVERSARIAL_LOSSES["wasserstein"])
    train.update(tools, pairs)
    for number, (lr, hr) in enumerate(pairs, 1):
        sr = other.G(lr)
        loss = wasserstein_d(other.D(hr), other.D(sr.detach()))
        step(other.adam_D, loss + 0.1 * plain_r1_penalty(other.D, sr, hr))
        if number == 3:
            loss = (hr - sr).square().mean() + 0.25 * wasserstein_g(other.D(sr), None)
            step(other.adam_G, loss)
    check_networks(game, other)


def test_stage_1_takes_the_step_of_srresnet(game):
    """train.update without a D."""
    other = twin(game)
    losses = train.update(make_tools(game, D=None), [(game.lr, game.hr)])
    loss = (other.hr - other.G(other.lr)).square().mean()
    step(other.adam_G, loss)
    check_losses(losses, {"loss": loss, "pixel": loss})
    check_networks(game, other)


def moves_of(image, moved, most):
    """All (y, x) of 0 to `most` by which an image [N, 3, H, W] was rolled."""
    return [(y, x) for y in range(most + 1) for x in range(most + 1)
            if torch.equal(image.roll((y, x), (2, 3)), moved)]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_shift_moves_sr_and_hr_together_by_up_to_so_many_pixels(game, stage):
    """train.update: the losses see SR and HR rolled by the same random pixels."""
    seen = []

    def content(sr, hr):
        seen.append((sr, hr))
        return srgan.mse_loss(sr, hr)
    content.parts = {}
    tools = make_tools(game, content=content, shift=2)
    if stage == 1:
        tools = tools._replace(D=None)
    moves = set()
    for _ in range(40):
        sr = game.G(game.lr).detach()
        train.update(tools, [(game.lr, game.hr)])
        move, = moves_of(game.hr, seen[-1][1], most=3)
        assert (sr.roll(move, (2, 3)) - seen[-1][0]).abs().max() <= 1e-9
        moves.add(move)
    assert {y for y, _ in moves} == {0, 1, 2}
    assert {x for _, x in moves} == {0, 1, 2}


def test_d_sees_the_shifted_images_too(game):
    """train.update, in the steps of D and in that of G."""
    seen = []
    game.D.register_forward_pre_hook(lambda D, images: seen.append(images[0].detach()))
    torch.manual_seed(3)
    pairs = [draw(game), (game.lr, game.hr)]
    train.update(make_tools(game, shift=2), pairs)
    early_real, early_fake, real, fake, again = seen
    move, = moves_of(game.hr, real, most=2)
    assert moves_of(pairs[0][1], early_real, most=2) == [move]
    assert torch.equal(again, fake)
    assert move != (0, 0)


def test_the_demonstration_takes_a_step_of_each_stage(capsys):
    """demonstrate, count_parameters, describe_losses: python srgan.py."""
    srgan.demonstrate()
    G, D, srresnet, srgan_losses = capsys.readouterr().out.splitlines()
    assert G == "G: 1,547,350 parameters, [2, 3, 24, 24] -> [2, 3, 96, 96]"
    assert D.endswith("[2, 3, 96, 96] -> [2]")
    assert "loss" in srresnet
    for name in ("discriminator", "d_real", "d_fake", "loss", "adversarial"):
        assert f" {name} " in srgan_losses
