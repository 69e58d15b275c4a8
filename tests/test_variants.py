"""The three λ methods against float64 brute force written as the papers write them, their identities and theorems."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

import grpo
import grpo_lambda_traces as traces
import lambda_grpo_learnable as learnable
import lambda_grpo_prm as prm

LENGTHS, DECAYS, STYLES = (1, 2, 5, 33, 120), (0.0, 0.5, 0.99, 1.0), ("recent", "both")
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # noqa: E731


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(prompts=3, group=4, longest=33, drift=0.3, seed=0):
    """Random old and new log-probabilities [P·G, T], lengths [P, G], mask [P, G, T], rewards [P, G]."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (prompts, group), generator=generator)
    lengths[0, 0], lengths[-1, -1] = longest, 1
    mask = torch.arange(longest) < lengths[..., None]
    old = -3 * torch.rand(prompts * group, longest, generator=generator)
    new = old + drift * torch.randn(prompts * group, longest, generator=generator)
    rewards = torch.randint(0, 3, (prompts, group), generator=generator) / 2
    rewards[:, 0], rewards[:, 1] = 0.0, 1.0
    return old, new, lengths, mask, rewards


def gradient(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


# ------------------------------------------------------------------------------------- GRPO-λ: eligibility traces


def tr(t, l, decay, style):  # noqa: E741
    """The paper's trace weight of the token l places before t."""
    return decay**l if style == "recent" else max(decay**l, decay ** (t - l))


def trace_matrix(length, decay, style):
    """[T, T]: row t holds what each token counts in the trace at t."""
    rows = [[tr(t, t - k, decay, style) if k <= t else 0.0 for k in range(length)] for t in range(length)]
    return torch.tensor(rows)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("style", STYLES)
def test_trace_is_the_double_sum(length, decay, style):
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(length)).requires_grad_()
    upstream = torch.randn(3, length, generator=torch.Generator().manual_seed(1))
    matrix = trace_matrix(length, decay, style)
    y = traces.trace(x, decay, style)
    close(y, x @ matrix.T)
    close(gradient((y * upstream).sum(), x)[0], upstream @ matrix)
    mask = torch.arange(length) < torch.tensor([[length], [max(1, length // 2)], [1]])
    expected = torch.stack([F.pad(trace_matrix(n, decay, style).sum(0), (0, length - n)) for n in mask.sum(-1).tolist()])
    close(traces.trace_weights(mask, decay, style), expected)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("decay", DECAYS)
def test_trace_weights_of_a_mask_with_holes(style, decay):
    """Also where tokens within a completion do not count: the transpose of the trace, applied to the mask."""
    mask = (torch.rand(6, 23, generator=torch.Generator().manual_seed(0)) < 0.6).to(torch.get_default_dtype())
    close(traces.trace_weights(mask, decay, style), (mask @ trace_matrix(23, decay, style)) * mask)


def test_trace_of_a_long_completion():
    """A matrix [T, T] would take 69 GB. Far from the start the trace of ones has reached its limit, 1 / (1 - decay)."""
    for style in ("recent", "both"):
        x = torch.ones(1, 2**17, requires_grad=True)
        y = traces.trace(x, 0.9, style)
        y.sum().backward()
        assert y[0, -1].item() == pytest.approx(10 if style == "recent" else 20, rel=1e-4) and x.grad[0, -1] == 1


def test_trace_examples():
    x = torch.ones(1, 3)
    close(traces.trace(x, 0.5, "recent"), torch.tensor([[1, 1.5, 1.75]]))
    close(traces.trace(x, 0.5, "both"), torch.tensor([[1, 2, 2.5]]))
    close(traces.trace_weights(x, 0.5, "recent"), torch.tensor([[1.75, 1.5, 1]]))
    close(traces.trace_weights(x, 0.5, "both"), torch.tensor([[3, 1.5, 1]]))
    for style, expected in (("recent", [92.4, 72.4, 1]), ("both", [256, 72.4, 1])):
        weights = traces.trace_weights(torch.ones(1, 256), 0.99, style)[0, [0, 128, 255]]
        assert [round(x, 1) for x in weights.tolist()] == expected
    k = torch.arange(256)
    close(traces.trace_weights(torch.ones(1, 256), 0.99, "recent")[0], (1 - 0.99 ** (256 - k)) / (1 - 0.99))


@pytest.mark.parametrize("style", STYLES)
def test_trace_in_bfloat16_is_computed_in_float32(style):
    x = torch.randn(2, 500).to(torch.bfloat16)
    y = traces.trace(x, 0.99, style)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, (x.double() @ trace_matrix(500, 0.99, style).T).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["trace", "weight"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_traced_loss_is_the_papers(variant, style, decay, beta):
    old, new, lengths, mask, rewards = batch(drift=0.05)
    ref = old + 0.1
    advantages = grpo.group_advantages(rewards).clamp(min=-0.1).flatten()
    weights = traces.token_weights(mask).flatten(0, 1)
    logp = new.clone().requires_grad_()
    value, stats = traces.policy_loss(
        logp, old, advantages, weights, 0.2, 0.3, ref, beta, decay=decay, style=style, variant=variant
    )
    leaf, expected, clipped = new.clone().requires_grad_(), 0, 0
    for i, length in enumerate(lengths.flatten().tolist()):
        for t in range(length):
            change = leaf[i] - old[i]
            if variant == "trace":
                ratio = torch.exp(sum(tr(t, l, decay, style) * change[t - l] for l in range(t + 1)))  # noqa: E741
                credit = 1.0
            else:
                ratio = torch.exp(change[t])
                credit = sum(tr(s, s - t, decay, style) for s in range(t, length))
            bounded = ratio.clamp(0.8, 1.3) * advantages[i]
            clipped += int(bounded < ratio * advantages[i])
            kl = torch.exp(ref[i, t] - leaf[i, t]) - (ref[i, t] - leaf[i, t]) - 1
            term = credit * torch.min(ratio * advantages[i], bounded) - beta * kl
            expected = expected - term / (length * lengths.numel())
    close(value, expected)
    close(gradient(value, logp)[0], gradient(expected, leaf)[0])
    assert stats["clip_fraction"] == clipped
    total = sum(trace_matrix(length, decay, style).sum() for length in lengths.flatten().tolist())
    close(stats["trace_weight"], total)


@pytest.mark.parametrize("style", STYLES)
def test_both_variants_agree_on_policy_and_only_there(style):
    old, new, _, mask, rewards = batch(drift=0.02)
    advantages = grpo.group_advantages(rewards).flatten()
    weights = traces.token_weights(mask).flatten(0, 1)

    def grad(logp, variant):
        leaf = logp.clone().requires_grad_()
        return gradient(traces.policy_loss(leaf, old, advantages, weights, 0.2, 0.2, style=style, variant=variant)[0], leaf)[0]

    close(grad(old, "trace"), grad(old, "weight"))
    assert not torch.allclose(grad(old, "trace"), -weights * advantages[:, None], rtol=1e-3)  # and they are not GRPO's
    assert not torch.allclose(grad(new, "trace"), grad(new, "weight"), rtol=1e-3)


def test_no_decay_is_grpo_bit_for_bit():
    torch.set_default_dtype(torch.float32)
    old, new, _, mask, rewards = (x.float() if x.is_floating_point() else x for x in batch())
    advantages, weights = grpo.group_advantages(rewards).flatten(), grpo.token_weights(mask).flatten(0, 1)
    leaf = new.clone().requires_grad_()
    expected = grpo.policy_loss(leaf, old, advantages, weights)[0]
    slope = gradient(expected, leaf)[0]
    for variant in ("trace", "weight"):
        value = traces.policy_loss(leaf, old, advantages, weights, decay=0.0, style="recent", variant=variant)[0]
        assert torch.equal(value, expected) and torch.equal(gradient(value, leaf)[0], slope)
        both = traces.policy_loss(leaf, old, advantages, weights, decay=0.0, style="both", variant=variant)[0]
        assert not torch.equal(both, expected)  # the first token stays in every trace


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.99), (0.9, 0.8), (1.0, 0.0), (1.0, 1.0)])
def test_theorem_1_of_grpo_lambda(gamma, lam):
    """Σ_t A_t^GAE ∇logπ_t = Σ_t δ_t Σ_l (γλ)^l ∇logπ_{t-l}, whatever the critic says."""
    length, parameters = 40, torch.randn(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    logp = torch.tanh(torch.randn(length, 7, generator=generator) @ parameters)  # [T], any differentiable policy
    rewards, values = torch.randn(length, generator=generator), torch.randn(length + 1, generator=generator)
    delta = rewards + gamma * values[1:] - values[:-1]  # [T]
    gae = [sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]
    left = gradient(sum(a * p for a, p in zip(gae, logp)), parameters)[0]
    logp = torch.tanh(torch.randn(length, 7, generator=torch.Generator().manual_seed(1)) @ parameters)
    right = gradient((delta * traces.trace(logp[None], gamma * lam, "recent")[0]).sum(), parameters)[0]
    close(left, right)


# ------------------------------------------------------------------------------ λ-GRPO: learnable token preference


def preference_by_hand(lengths, lam, r):
    """f of one group, from plain numbers."""
    mean = sum(lengths) / len(lengths)
    sigma = math.sqrt(sum((n - mean) ** 2 for n in lengths) / len(lengths))
    h = [1 + r * (n - mean) / sigma if sigma else 1.0 for n in lengths]
    exponents = [max(x, 1e-3) ** lam for x in h]
    powers = [math.exp(x - max(exponents)) for x in exponents]
    return [len(lengths) * p / sum(powers) for p in powers]


@pytest.mark.parametrize("group", [2, 3, 8, 16])
@pytest.mark.parametrize("lam", [-2.0, 0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("r", [1 / 9, 0.5])
def test_length_preference_is_the_papers(group, lam, r):
    lengths = torch.randint(1, 121, (5, group), generator=torch.Generator().manual_seed(group))
    lengths[0] = 33  # no spread: no preference
    f = learnable.length_preference(lengths, torch.tensor(lam), r)
    expected = torch.tensor([preference_by_hand(row, lam, r) for row in lengths.tolist()])
    torch.testing.assert_close(f, expected, rtol=1e-7, atol=1e-7)  # the code divides by σ + 1e-8
    close(f.mean(-1), torch.ones(5))
    assert torch.equal(f[0], torch.ones(group)) or (f[0] - 1).abs().max() < 1e-15
    assert lam != 0 or (f - 1).abs().max() < 1e-15


@pytest.mark.parametrize("lam", [-10.0, 10.0])
def test_length_preference_stays_finite(lam):
    """At the ends of what --lam_init allows, with an h at its lower bound: f, and its gradient."""
    torch.set_default_dtype(torch.float32)
    lam = torch.tensor(lam, requires_grad=True)
    f = learnable.length_preference(torch.tensor([[1] + 7 * [30]]), lam, r=0.5)
    f.square().sum().backward()
    assert f.isfinite().all() and lam.grad.isfinite()


def learnable_loss(preference, old, new, mask, rewards):
    """As the training step does it: f goes with the advantage."""
    weights = learnable.token_weights(mask, "dapo").flatten(0, 1)
    leaf = new.clone().requires_grad_()
    loss = learnable.policy_loss(leaf, old, (grpo.group_advantages(rewards) * preference).flatten(), weights)[0]
    return loss, gradient(loss, leaf)[0]


def test_no_lambda_is_dapo_bit_for_bit():
    torch.set_default_dtype(torch.float32)
    old, new, lengths, mask, rewards = (x.float() if x.is_floating_point() else x for x in batch())
    preference = learnable.length_preference(lengths, torch.tensor(0.0))
    assert preference.eq(1).all()
    loss, grads = learnable_loss(preference, old, new, mask, rewards)
    leaf = new.clone().requires_grad_()
    expected = grpo.policy_loss(
        leaf, old, grpo.group_advantages(rewards).flatten(), grpo.token_weights(mask, "dapo").flatten(0, 1)
    )[0]
    assert torch.equal(loss, expected) and torch.equal(grads, gradient(expected, leaf)[0])


def test_the_other_aggregations_are_special_cases():
    """f = μ/|o| is GRPO. f = μ is Dr. GRPO up to its constant 1/L_max and its advantage without std."""
    old, new, lengths, mask, rewards = batch()
    mean = lengths.to(torch.float64).mean(-1, keepdim=True)
    advantages = grpo.group_advantages(rewards).flatten()
    for f, name, factor in ((mean / lengths, "grpo", 1), (mean.expand(lengths.shape), "dr_grpo", 150)):
        loss, grads = learnable_loss(f, old, new, mask, rewards)
        leaf = new.clone().requires_grad_()
        expected = grpo.policy_loss(leaf, old, advantages, grpo.token_weights(mask, name, 150).flatten(0, 1))[0] * factor
        close(loss, expected)
        close(grads, gradient(expected, leaf)[0])


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_learnable_loss_is_the_papers(beta):
    """f·min(...), written as a weight; the KL term is weighted without it."""
    old, new, lengths, mask, rewards = batch()
    ref, f = old + 0.1, learnable.length_preference(lengths, torch.tensor(2.0))
    advantages = grpo.group_advantages(rewards)
    weights = learnable.token_weights(mask, "dapo").flatten(0, 1)
    leaf = new.clone().requires_grad_()
    value = learnable.policy_loss(leaf, old, (advantages * f).flatten(), weights, 0.2, 0.2, ref, beta)[0]
    other, expected = new.clone().requires_grad_(), 0
    for p, group in enumerate(lengths.tolist()):
        own = preference_by_hand(group, 2.0, 1 / 9)
        for i, length in enumerate(group):
            row = p * len(group) + i
            for t in range(length):
                ratio = torch.exp(other[row, t] - old[row, t])
                bounded = ratio.clamp(0.8, 1.2)
                kl = torch.exp(ref[row, t] - other[row, t]) - (ref[row, t] - other[row, t]) - 1
                term = own[i] * torch.min(ratio * advantages[p, i], bounded * advantages[p, i]) - beta * kl
                expected = expected - term / sum(group) / len(lengths)
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient(value, leaf)[0], gradient(expected, other)[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("lam", [-1.0, 0.0, 0.7])
def test_gradient_of_lambda_is_the_closed_form(lam):
    """∂J/∂λ = 1/Σ|o| Σ_i f_i (g'_i - mean g') S_i with g' = h^λ ln h, and autograd through the whole objective."""
    old, new, lengths, mask, rewards = batch()
    lam = torch.tensor(lam, requires_grad=True)
    f = learnable.length_preference(lengths, lam)
    weights = learnable.token_weights(mask, "dapo").flatten(0, 1)
    advantages = grpo.group_advantages(rewards).flatten()
    loss = learnable.policy_loss(new, old, advantages * f.flatten(), weights)[0]
    (whole,) = gradient(loss, lam)
    expected = 0.0
    for p in range(len(lengths)):
        own = lengths[p].double()
        h = 1 + (own - own.mean()) / own.std(correction=0) / 9
        slope = h**lam.item() * h.log()
        for i in range(len(own)):
            row = p * len(own) + i
            ratio = (new[row] - old[row])[: lengths[p, i]].exp()
            terms = torch.min(ratio * advantages[row], ratio.clamp(0.8, 1.2) * advantages[row]).sum()
            expected += f[p, i].item() * (slope[i] - (f[p] * slope).sum() / len(own)) * terms / own.sum() / len(lengths)
    torch.testing.assert_close(-whole, torch.as_tensor(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("longer_is_better", [True, False])
def test_lambda_follows_the_advantage_of_length(longer_is_better):
    """On-policy, the gradient on λ raises it when long completions win, lowers it when short ones do."""
    lengths = torch.tensor([[5, 10, 20, 40]])
    mask = torch.arange(40) < lengths[..., None]
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0]]) if longer_is_better else torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    lam = torch.tensor(0.0, requires_grad=True)
    logp = -torch.ones(4, 40)
    f = learnable.length_preference(lengths, lam).flatten()
    weights = learnable.token_weights(mask, "dapo").flatten(0, 1)
    loss = learnable.policy_loss(logp, logp, grpo.group_advantages(rewards).flatten() * f, weights)[0]
    (grad,) = gradient(loss, lam)
    assert (grad < 0) == longer_is_better and grad != 0  # λ steps against the gradient of the loss


# ----------------------------------------------------------------------------------- λ-GRPO: process reward model


def trees(seed, group, identical=True):
    """A group of completions with shared prefixes, duplicates and strict prefixes: lists of ids."""
    generator = random.Random(seed)
    completions = [[generator.randint(1, 9) for _ in range(generator.choice(LENGTHS))]]
    while len(completions) < group:
        parent = generator.choice(completions)
        kept = generator.randint(0, len(parent))
        tail = [generator.randint(1, 3) for _ in range(generator.choice((0, 0, 1, 5, 33)))]
        child = parent[:kept] + tail
        completions.append(child if child else [generator.randint(1, 9)])
    return completions


def padded(groups):
    longest = max(len(c) for group in groups for c in group)
    ids = torch.tensor([[c + [0] * (longest - len(c)) for c in group] for group in groups])
    lengths = torch.tensor([[len(c) for c in group] for group in groups])
    return ids, torch.arange(longest) < lengths[..., None]


def process_set(group, i, t):
    """λ(i,t): the completions that have i's first t + 1 tokens."""
    return [j for j, other in enumerate(group) if other[: t + 1] == group[i][: t + 1]]


@pytest.mark.parametrize("group", [2, 3, 6, 16])
def test_process_sets_are_the_papers(group):
    groups = [trees(seed, group) for seed in range(8)] + [[[1, 2, 3]] * group]
    ids, mask = padded(groups)
    ids[~mask] = 7  # padding may hold anything, also an end-of-sequence token
    sizes = prm.process_set_sizes(ids, mask)
    assert sizes[~mask].eq(1).all()
    for p, completions in enumerate(groups):
        for i, completion in enumerate(completions):
            expected = [len(process_set(completions, i, t)) for t in range(len(completion))]
            assert sizes[p, i, : len(completion)].tolist() == expected
    assert sizes.max() == group  # duplicates: every token has as many as there are copies


def prm_case(seed=0, group=6, prompts=3):
    groups = [trees(seed + p, group) for p in range(prompts)]
    ids, mask = padded(groups)
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (prompts, group), generator=generator) / 2
    rewards[:, 0], rewards[:, 1] = 0.0, 1.0
    # log-probabilities of a shared prefix are shared: they hang on the prefix, as in a real policy
    table, index = {}, torch.zeros(mask.shape, dtype=torch.long)
    for p, completions in enumerate(groups):
        for i, completion in enumerate(completions):
            for t in range(len(completion)):
                index[p, i, t] = table.setdefault((p, *completion[: t + 1]), len(table))
    values = -3 * torch.rand(len(table), generator=generator)
    return groups, ids, mask, rewards, index, values


def process_advantages(groups, rewards):
    """A[i,t] = (mean reward of λ(i,t) - mean) / (std + 1e-4), as nested lists."""
    result = []
    for completions, group_rewards in zip(groups, rewards):
        mean, std = group_rewards.mean(), group_rewards.std()
        result.append([[(group_rewards[process_set(completions, i, t)].mean() - mean) / (std + 1e-4)
                        for t in range(len(completions[i]))] for i in range(len(completions))])
    return result


@pytest.mark.parametrize("loss, several_updates, equal", [("dapo", False, True), ("grpo", False, False), ("dapo", True, False)])
def test_theorem_1_of_the_prm_paper(loss, several_updates, equal):
    """GRPO's token-level loss is the loss with process rewards, on-policy; not with a mean per sequence, nor off-policy."""
    agreed = []
    for seed in range(5):
        groups, ids, mask, rewards, index, values = prm_case(seed)
        leaf = values.clone().requires_grad_()
        noise = 0.5 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)) * several_updates
        old = (values - noise)[index].flatten(0, 1)
        weights = grpo.token_weights(mask, loss).flatten(0, 1)
        value = grpo.policy_loss(leaf[index].flatten(0, 1), old, grpo.group_advantages(rewards).flatten(), weights)[0]
        expected, new = 0, leaf[index].flatten(0, 1)
        for p, group in enumerate(process_advantages(groups, rewards)):
            for i, advantages in enumerate(group):
                row = p * len(group) + i
                for t, advantage in enumerate(advantages):
                    ratio = torch.exp(new[row, t] - old[row, t])
                    expected = expected - weights[row, t] * torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        same = torch.allclose(value, expected, rtol=1e-9, atol=1e-12)
        same &= torch.allclose(gradient(value, leaf)[0], gradient(expected, leaf)[0], rtol=1e-9, atol=1e-12)
        agreed.append(same)
    assert all(agreed) if equal else not any(agreed)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_prm_loss_is_the_papers(beta):
    groups, ids, mask, rewards, index, values = prm_case(3)
    old = values[index].flatten(0, 1)
    new = (old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    ref = old - 0.1
    weights = (prm.token_weights(mask, "dapo") / prm.process_set_sizes(ids, mask)).flatten(0, 1)
    value = prm.policy_loss(new, old, grpo.group_advantages(rewards).flatten(), weights, 0.2, 0.2, ref, beta)[0]
    expected = 0
    for p, completions in enumerate(groups):
        total = sum(len(completion) for completion in completions)
        for i, completion in enumerate(completions):
            row = p * len(completions) + i
            advantage = (rewards[p, i] - rewards[p].mean()) / (rewards[p].std() + 1e-4)
            for t in range(len(completion)):
                ratio = torch.exp(new[row, t] - old[row, t])
                kl = torch.exp(ref[row, t] - new[row, t]) - (ref[row, t] - new[row, t]) - 1
                term = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) - beta * kl
                expected = expected - term / len(process_set(completions, i, t)) / total / len(groups)
    close(value, expected)
    close(gradient(value, new)[0], gradient(expected, new)[0])


def test_without_shared_prefixes_prm_is_dapo_bit_for_bit():
    ids, mask = padded([[[i] * (3 + i) for i in range(1, 5)]] * 2)
    sizes = prm.process_set_sizes(ids, mask)
    assert sizes.eq(1).all()
    assert torch.equal(prm.token_weights(mask, "dapo") / sizes, grpo.token_weights(mask, "dapo"))


def test_the_papers_worked_example():
    """Six completions: GRPO adds the shared step JKL's advantage three times, λ-GRPO once."""
    group = [[ord(letter) for letter in word] for word in ("ABCD", "ABEFHI", "JKLM", "JKLNQST", "JKLNQU", "VWYZ")]
    rewards = torch.tensor([[0.5, 0.5, 1.0, 0.0, 0.0, 0.5]])
    ids, mask = padded([group])
    advantages = grpo.group_advantages(rewards)[0]
    assert [round(x, 2) for x in advantages.tolist()] == [0.22, 0.22, 1.55, -1.11, -1.11, 0.22]
    sizes = prm.process_set_sizes(ids, mask)
    close(torch.stack(process_advantages([group], rewards)[0][2][:3]), advantages[2:5].mean().expand(3))
    # the gradient at one of the tokens J, K, L, its normaliser taken out
    for weights, expected in ((grpo.token_weights(mask, "dapo"), -0.664), (prm.token_weights(mask, "dapo") / sizes, -0.221)):
        logp = torch.zeros(mask.shape[1:]).requires_grad_()
        loss = prm.policy_loss(logp, logp.detach(), advantages, weights[0])[0]
        (grad,) = gradient(loss, logp)
        for token in range(3):
            assert round(-(grad[2:5, token].sum() * mask.sum()).item(), 3) == expected
    statistics = prm.tree_statistics(sizes, mask)
    assert statistics["path_depth"].item() == pytest.approx((1 + 1 + 1 + 2 + 2 + 0) / 6)  # AB; AB; JKL; JKL, NQ; JKL, NQ
    assert statistics["intermediate_proportion"].item() == pytest.approx((2 / 4 + 2 / 6 + 3 / 4 + 5 / 7 + 5 / 6 + 0) / 6)
    assert statistics["nontrivial_trees"] == 1


def test_trees_that_are_trivial():
    """No shared token; or one shared by all (the root); or identical completions: no inner node."""
    for group in ([[1, 2], [3, 4], [5]], [[1, 2], [1, 3], [1, 4]], [[1, 2], [1, 2], [1, 2]], [[1, 2], [1, 2], [3]]):
        ids, mask = padded([group])
        statistics = prm.tree_statistics(prm.process_set_sizes(ids, mask), mask)
        assert statistics["nontrivial_trees"] == statistics["path_depth"] == statistics["intermediate_proportion"] == 0


def test_a_traced_ratio_that_would_overflow():
    """A thousand tokens that all became likelier: the clip holds, and neither loss nor gradient is NaN."""
    for advantage in (1.0, 0.0, -0.1):
        new = torch.full((1, 1000), 0.6, dtype=torch.float32).requires_grad_()
        weights = torch.full((1, 1000), 1e-3, dtype=torch.float32)
        loss, _ = traces.policy_loss(new, torch.zeros(1, 1000), torch.tensor([advantage]), weights)
        loss.backward()
        assert loss.isfinite() and new.grad.isfinite().all()
