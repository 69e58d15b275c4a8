"""The objective against a float64 version written with loops, as the papers write it."""

import math

import pytest
import torch

import grpo


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def objective(logp, old, ref, rewards, loss, clip_low, clip_high, beta, max_new_tokens):
    """J of one batch, to be maximised. logp, old, ref: [P][G][|o|] nested lists of scalars, rewards [P][G]."""
    total = 0
    for group, group_old, group_ref, group_rewards in zip(logp, old, ref, rewards):
        size, tokens = len(group), sum(len(completion) for completion in group)
        mean = sum(group_rewards) / size
        std = math.sqrt(sum((reward - mean) ** 2 for reward in group_rewards) / (size - 1))
        for completion, completion_old, completion_ref, reward in zip(group, group_old, group_ref, group_rewards):
            advantage = reward - mean
            if loss != "dr_grpo":
                advantage = advantage / (std + 1e-4)
            if max(group_rewards) - min(group_rewards) < 1e-6:
                advantage = 0.0
            weight = {"grpo": 1 / (size * len(completion)), "dapo": 1 / tokens, "dr_grpo": 1 / (size * max_new_tokens)}[loss]
            for new, before, reference in zip(completion, completion_old, completion_ref):
                ratio = torch.exp(new - before)
                bounded = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
                kl = torch.exp(reference - new) - (reference - new) - 1
                total = total + weight * (torch.min(ratio * advantage, bounded * advantage) - beta * kl)
    return total / len(logp)


def batch(lengths, seed, drift=0.3):
    """Random log-probabilities for completions of these lengths [P][G]: nested lists of leaves, and padded tensors."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), len(lengths[0]), max(max(group) for group in lengths))
    old = -torch.rand(shape, generator=generator) * 3
    new = old + drift * torch.randn(shape, generator=generator)
    ref = old + drift * torch.randn(shape, generator=generator)
    mask = torch.arange(shape[2]) < torch.tensor(lengths)[..., None]
    return new, old, ref, mask


def ragged(tensor, lengths, grad=False):
    return [[[tensor[p, g, t].clone().requires_grad_(grad) for t in range(length)] for g, length in enumerate(group)]
            for p, group in enumerate(lengths)]


LENGTHS = [[1, 7, 33, 2], [5, 5, 5, 5], [120, 1, 1, 60]]
REWARDS = [[1.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.3]]


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("clip_low, clip_high", [(0.2, 0.2), (0.1, 0.28)])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_and_gradient_are_the_papers(loss, clip_low, clip_high, beta):
    new, old, ref, mask = batch(LENGTHS, seed=0)
    leaves = ragged(new, LENGTHS, grad=True)
    expected = -objective(leaves, ragged(old, LENGTHS), ragged(ref, LENGTHS), REWARDS, loss, clip_low, clip_high, beta, 150)
    expected.backward()

    garbage = torch.where(mask, 0.0, float("nan"))  # whatever stands on padding must not matter
    logp = (new + garbage).flatten(0, 1).requires_grad_()
    advantages = grpo.group_advantages(torch.tensor(REWARDS), normalize_std=loss != "dr_grpo").flatten()
    weights = grpo.token_weights(mask, loss, max_new_tokens=150).flatten(0, 1)
    value, stats = grpo.policy_loss(
        logp, (old + garbage).flatten(0, 1), advantages, weights, clip_low, clip_high, (ref + garbage).flatten(0, 1), beta
    )
    value.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    gradient = logp.grad.view(mask.shape)
    for p, group in enumerate(leaves):
        for g, completion in enumerate(group):
            grads = torch.stack([leaf.grad for leaf in completion])
            torch.testing.assert_close(gradient[p, g, : len(completion)], grads, rtol=1e-10, atol=1e-14)
    assert gradient[~mask].eq(0).all()
    assert stats["tokens"] == mask.sum()
    assert 0 < stats["clip_fraction"] < stats["tokens"]  # the clip was at work
    ratio = (new - old).exp()
    assert stats["kl"].item() == pytest.approx((ratio - 1 - (new - old))[mask].sum().item())


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_equal_rewards_give_exactly_nothing(loss):
    new, old, _, mask = batch(LENGTHS, seed=1)
    for reward in (0.0, 0.1, 1.0):
        rewards = torch.full((3, 4), reward)
        advantages = grpo.group_advantages(rewards, normalize_std=loss != "dr_grpo")
        assert advantages.eq(0).all()
        logp = new.flatten(0, 1).requires_grad_()
        weights = grpo.token_weights(mask, loss, 150).flatten(0, 1)
        value, _ = grpo.policy_loss(logp, old.flatten(0, 1), advantages.flatten(), weights)
        value.backward()
        assert value == 0 and logp.grad.eq(0).all()


@pytest.mark.parametrize("normalize_std", [True, False])
def test_rewards_that_differ_by_rounding_are_equal(normalize_std):
    for size in (3, 6, 7, 16):  # the mean of seven times 0.1 is not 0.1
        for noise in (0.0, 1e-7):
            rewards = torch.full((2, size), 0.1)
            rewards[0, 0] += noise
            assert grpo.group_advantages(rewards, normalize_std).eq(0).all()
            assert grpo.group_advantages(rewards.float(), normalize_std).eq(0).all()
            rewards[0, 0] += 1e-3
            assert grpo.group_advantages(rewards, normalize_std)[0].ne(0).all()


def test_advantages_example():
    advantages = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]]))
    torch.testing.assert_close(advantages[0], torch.tensor([1.0, -1.0, -1.0, 1.0]) * 0.5 / (math.sqrt(1 / 3) + 1e-4))
    assert [round(x, 3) for x in advantages[0].tolist()] == [0.866, -0.866, -0.866, 0.866]
    assert advantages[1].eq(0).all()


def test_weights_example():
    mask = torch.tensor([[[1, 0, 0], [1, 1, 1]]])
    torch.testing.assert_close(grpo.token_weights(mask, "grpo"), torch.tensor([[[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]]]))
    torch.testing.assert_close(grpo.token_weights(mask, "dapo"), mask / 4)
    torch.testing.assert_close(grpo.token_weights(mask, "dr_grpo", max_new_tokens=5), mask / 10)
    torch.testing.assert_close(grpo.token_weights(mask, "dapo", num_prompts=8), mask / 32)


def test_loss_example():
    one = torch.ones(1, 1)
    for advantage, expected, clipped in ((1.0, -1.2, 1), (-1.0, math.exp(0.5), 0)):
        loss, stats = grpo.policy_loss(one * 0.5, one * 0, torch.tensor([advantage]), one)
        assert loss.item() == pytest.approx(expected) and stats["clip_fraction"] == clipped


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_that_would_overflow(script, advantage):
    """e^100 is no float32: the loss and its gradient stay numbers, also where the clip stops the gradient."""
    torch.set_default_dtype(torch.float32)
    logp = torch.tensor([[100.0, 0.0]], requires_grad=True)
    for more in ({}, {"variant": "weight"}) if "traces" in script.__name__ else ({},):
        loss, _ = script.policy_loss(logp, torch.zeros(1, 2), torch.tensor([advantage]), torch.ones(1, 2), **more)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite() and gradient.isfinite().all()


def test_first_update_is_the_policy_gradient():
    """At π = π_old the gradient is -weight · advantage for every token, although the loss is about 0."""
    new, _, _, mask = batch(LENGTHS, seed=2)
    logp = new.flatten(0, 1).requires_grad_()
    advantages = grpo.group_advantages(torch.tensor(REWARDS)).flatten()
    weights = grpo.token_weights(mask).flatten(0, 1)
    loss, _ = grpo.policy_loss(logp, logp.detach(), advantages, weights)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    torch.testing.assert_close(logp.grad, -weights * advantages[:, None])


# The promise above section 2 of the scripts, for those who copy the functions ---------------------------------------------


def test_a_dropped_completion_has_no_weight(script):
    """A row of zeros in the mask: no NaN anywhere, and the other rows keep their weights."""
    mask = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]])
    for loss in ("grpo", "dapo", "dr_grpo"):
        weights = script.token_weights(mask, loss, max_new_tokens=3)
        assert weights.isfinite().all() and weights[0, 0, :2].gt(0).all() and weights.sum() == weights[0, 0].sum()
        zero = torch.zeros(4, 3)
        loss, _ = script.policy_loss(zero, zero, torch.ones(4), weights.flatten(0, 1))
        assert loss.isfinite()


def test_advantages_of_rows_or_of_tokens(script):
    """[B], [B, 1] and [B, T] mean the same; another shape is refused, not broadcast."""
    generator = torch.Generator().manual_seed(0)
    logp, old = torch.rand(2, 4, 5, generator=generator).sub(1)
    advantages, weights = torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.full((4, 5), 0.05)
    losses = [script.policy_loss(logp, old, given, weights)[0] for given in
              (advantages, advantages[:, None], advantages[:, None].expand(4, 5).contiguous())]
    assert losses[0] == losses[1] == losses[2]
    for given in (torch.ones(5), torch.ones(4, 3)):
        with pytest.raises(RuntimeError):
            script.policy_loss(logp, old, given, weights)


def test_types_in_and_out(script):
    """Integers become float32, float64 stays float64; the default dtype of torch does not have to be changed."""
    torch.set_default_dtype(torch.float32)
    rewards, mask = torch.tensor([[1, 0, 0, 1]]), torch.ones(1, 4, 3)
    assert script.group_advantages(rewards).dtype == torch.float32
    assert script.group_advantages(rewards.double()).dtype == torch.float64
    assert script.group_advantages(rewards.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(script.group_advantages(rewards), script.group_advantages(rewards.float()))
    assert script.token_weights(mask.long()).dtype == torch.float32 and script.token_weights(mask.double()).dtype == torch.float64


def test_unknown_names_are_refused(script):
    mask = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match="DAPO"):
        script.token_weights(mask, loss="DAPO", max_new_tokens=3)
    if hasattr(script, "trace"):
        for wrong in ({"style": "Recent"}, {"variant": "Weight"}):
            with pytest.raises(AssertionError, match="unknown"):
                script.policy_loss(mask[0], mask[0], torch.ones(2), mask[0], **wrong)


def test_without_autograd(script):
    with torch.inference_mode():
        ones = torch.ones(2, 3)
        assert script.policy_loss(ones, ones, torch.ones(2), ones)[0].isfinite()


@pytest.mark.parametrize("distance", [50.0, 100.0])
def test_a_reference_far_away(script, distance):
    """The KL term is bounded as the ratio is: e^100 is no float32."""
    torch.set_default_dtype(torch.float32)
    logp = torch.zeros(1, 2, requires_grad=True)
    loss, _ = script.policy_loss(logp, torch.zeros(1, 2), torch.zeros(1), torch.ones(1, 2), ref_logp=torch.full((1, 2), distance), beta=0.1)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert 0 < loss < 1e9 and gradient.isfinite().all()
