"""What eight of the papers' patches promise beyond test_papers.py: losses of their own, identities, what reaches the step."""

import itertools
import json
import math
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import TINY, launch, metrics
from step_worker import rollouts, tiny, train
from test_algorithm import LENGTHS, batch, ragged
from test_papers import REWARDS, Mover, Table, float64, folder, loss_and_gradient, paper, paper_folder, standardised  # noqa: F401
from test_run import quick, run_here
from test_step import distance

import grpo

def mean(values):
    return sum(values) / len(values)


def step(script, args, new, old, monkeypatch, reference=None, policy=None, **more):
    """train_step on tables of log-probabilities, moved from old to new after the first update: (metrics, gradients)."""
    completions = [script.Completion([g, *[0] * (length - 1)], "stop", old[p, g, :length].tolist())
                   for p, group in enumerate(LENGTHS) for g, length in enumerate(group)]
    policy = policy or Table(old.flatten(0, 1).clone())
    mover = Mover(policy, new.flatten(0, 1))
    norm = types.SimpleNamespace(full_tensor=lambda: torch.ones(()))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: norm)
    reference = None if reference is None else Table(reference.flatten(0, 1))
    prompts = [[p] for p in range(len(LENGTHS))]
    found, _ = script.train_step(policy, reference, mover, args, prompts, completions, torch.tensor(REWARDS), **more)
    return found, [gradient.view(new.shape) for gradient in mover.gradients]


def gradient_of(loss, leaves, mask):
    """The gradient of a loss by nested lists of leaves, as a padded tensor."""
    loss.backward()
    wanted = torch.zeros(mask.shape)
    for (p, g, t) in mask.nonzero().tolist():
        wanted[p, g, t] = 0.0 if leaves[p][g][t].grad is None else leaves[p][g][t].grad
    return wanted


def arguments(script, budget=10**6, **flags):
    return script.Args(prompts_per_step=len(LENGTHS), micro_batch_tokens=budget, **flags)


# RePO and α-DPO: pairs ------------------------------------------------------------------------------------------------


def pairs_of(rewards):
    return [(i, j) for i, j in itertools.permutations(range(len(rewards)), 2) if rewards[i] > rewards[j]]


@pytest.mark.parametrize("gamma", [0.2, 0.5, 100])
def test_repo_is_the_pairwise_loss(paper, alone, float64, gamma, monkeypatch):
    """Its first update has the gradient of eq. 6, a mean over the pairs of a group, at π_old."""
    new, old, _, mask = batch(LENGTHS, seed=0, drift=0.5)
    leaves, loss = ragged(old, LENGTHS, grad=True), 0
    for group, rewards in zip(leaves, REWARDS):
        terms = [torch.relu(gamma - (mean(group[i]) - mean(group[j]))) for i, j in pairs_of(rewards)]
        loss = loss + (mean(terms) if terms else 0) / len(LENGTHS)
    _, gradients = step(paper("repo"), arguments(paper("repo"), gamma=gamma), new, old, monkeypatch)
    torch.testing.assert_close(gradients[0], gradient_of(loss, leaves, mask), rtol=1e-9, atol=1e-14)
    assert gradients[0].abs().max() > 1e-4


def test_repo_without_a_margin_is_grpo_over_the_variance(paper, float64):
    """γ → ∞ with rewards 0 and 1: (R - mean) / variance. γ → -∞, and equal rewards: nothing."""
    rewards, means = (torch.rand(40, 6) < 0.5).double(), torch.randn(40, 6)
    wanted = (rewards - rewards.mean(-1, keepdim=True)) / rewards.var(-1, correction=0, keepdim=True)
    found = paper("repo").group_advantages(rewards, means, 1e9)
    torch.testing.assert_close(found, torch.where(wanted.isfinite(), wanted, 0.0))
    assert paper("repo").group_advantages(rewards, means, -1e9).eq(0).all()
    assert paper("repo").group_advantages(torch.tensor([[1.0, 0, 0]]), torch.tensor([[-1.0, -1, -2]])).tolist() == [[1.5, -1.5, 0]]


@pytest.mark.parametrize("budget", [10**6, 40])
@pytest.mark.parametrize("sharpness, gamma, alpha", [(2.5, 0.6, 0.2), (10, 0.4, 0.05), (2.5, 0.15, 0.0)])
def test_alpha_dpo_is_the_pairwise_loss(paper, alone, float64, sharpness, gamma, alpha, budget, monkeypatch):
    """-log σ(β (Δ - γ - α z)), z a number over all pairs of all groups. With α = 0, which is SimPO, no reference is asked."""
    script = paper("alpha_dpo")
    new, old, ref, mask = batch(LENGTHS, seed=0, drift=0.5)
    before, frozen = ragged(old, LENGTHS), ragged(ref, LENGTHS)
    gaps = {(p, i, j): sum(sign * (mean(before[p][k]) - mean(frozen[p][k])).item() for sign, k in ((1, i), (-1, j)))
            for p, rewards in enumerate(REWARDS) for i, j in pairs_of(rewards)}
    center = mean([*gaps.values()])
    std = (sum((gap - center) ** 2 for gap in gaps.values()) / (len(gaps) - 1)) ** 0.5
    leaves, loss = ragged(old, LENGTHS, grad=True), 0
    for p, (group, rewards) in enumerate(zip(leaves, REWARDS)):
        terms = []
        for i, j in pairs_of(rewards):
            margin = gamma + alpha * (gaps[p, i, j] - center) / std
            terms.append(-torch.nn.functional.logsigmoid(sharpness * (mean(group[i]) - mean(group[j]) - margin)))
        loss = loss + (mean(terms) if terms else 0) / len(LENGTHS)
    args = arguments(script, budget, sharpness=sharpness, gamma=gamma, alpha=alpha)
    _, gradients = step(script, args, new, old, monkeypatch, reference=ref if alpha else None)
    torch.testing.assert_close(gradients[0], gradient_of(loss, leaves, mask), rtol=1e-7, atol=1e-13)


def test_alpha_dpo_and_repo(paper, alone, float64):
    """Very sharp and with α = 0 it is RePO; where π is π_ref there is no z; equal rewards everywhere: nothing."""
    script, (means, ref) = paper("alpha_dpo"), torch.randn(2, 20, 5)
    rewards = (torch.rand(20, 5) * 3).floor()
    sharp = script.group_advantages(rewards, means, ref, 1e7, 0.5, 0.0) / 1e7
    torch.testing.assert_close(sharp, paper("repo").group_advantages(rewards, means, 0.5))
    plain = script.group_advantages(rewards, means, means, alpha=0.0)
    assert torch.equal(script.group_advantages(rewards, means, means, alpha=0.2), plain)
    assert not torch.allclose(script.group_advantages(rewards, means, ref, alpha=0.2), plain)
    assert script.group_advantages(torch.ones(3, 4), means[:3, :4], ref[:3, :4]).eq(0).all()
    assert script.group_advantages(torch.tensor([[1.0, 0]]), torch.ones(1, 2), torch.ones(1, 2), gamma=0).tolist() == [[2.5, -2.5]]


def test_alpha_dpo_compares_gaps_over_all_ranks(paper, alone, float64, monkeypatch):
    """Two ranks, each with half of the groups and other rewards, have the advantages of one rank with all."""
    script, (means, ref) = paper("alpha_dpo"), torch.randn(2, 20, 5)
    rewards = torch.cat([(torch.rand(10, 5) * 2).floor(), (torch.rand(10, 5) * 4).floor()])
    whole, halves, sums = script.group_advantages(rewards, means, ref), (slice(10), slice(10, 20)), []
    monkeypatch.setattr(script, "sum_over_ranks", lambda values, _: sums.append(values) or values)
    for rows in halves:
        script.group_advantages(rewards[rows], means[rows], ref[rows])
    totals = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    monkeypatch.setattr(script, "sum_over_ranks", lambda *_: totals)
    parts = [script.group_advantages(rewards[rows], means[rows], ref[rows]) for rows in halves]
    torch.testing.assert_close(torch.cat(parts), whole)


# FlowRL ---------------------------------------------------------------------------------------------------------------


class Flow(Table):
    """With log Z of each prompt."""

    def __init__(self, logp):
        super().__init__(logp)
        self.log_z = torch.nn.Parameter(torch.tensor([0.3, -0.7, 1.1]))

    def forward(self, input_ids, starts, mask):
        return *super().forward(input_ids, starts, mask), self.log_z[input_ids[:, 0]]


@pytest.mark.parametrize("budget", [10**6, 40])
@pytest.mark.parametrize("drift, bound", [(0.3, 0.2), (0.01, 0.05)])
def test_flowrl_is_eq_6(paper, alone, float64, drift, bound, budget, monkeypatch):
    """Loss, gradient of every token's log π, gradient of log Z, on-policy and off."""
    script = paper("flowrl")
    new, old, ref, mask = batch(LENGTHS, seed=0, drift=drift)
    policy, losses, wanted, slopes, clips = Flow(old.flatten(0, 1).clone()), [], [], [], 0
    for logp in (old, new):
        leaves, log_z, loss = ragged(logp, LENGTHS, grad=True), policy.log_z.detach().clone().requires_grad_(), 0
        for p, (group, before, frozen) in enumerate(zip(leaves, ragged(old, LENGTHS), ragged(ref, LENGTHS))):
            for i, advantage in enumerate(standardised(REWARDS[p])):
                ratio = math.exp(sum((a - b).item() for a, b in zip(group[i], before[i])))
                weight = min(max(ratio, 1 - bound), 1 + bound)
                clips += ratio != weight
                error = log_z[p] + mean(group[i]) - 15 * advantage - mean(frozen[i])
                loss = loss + weight * error**2 / len(group) / len(LENGTHS)
        losses.append(loss.item())
        wanted.append(gradient_of(loss, leaves, mask))
        slopes.append(log_z.grad)
    args = arguments(script, budget, updates_per_batch=1, clip_low=bound, clip_high=bound)
    found, _ = step(script, args, new, old, monkeypatch, reference=ref, policy=Flow(old.flatten(0, 1).clone()))
    assert found["loss"] == pytest.approx(losses[0], rel=1e-9)  # the metrics are those of the last update
    args.updates_per_batch = 2
    given, found_slopes = policy.log_z, []
    given.register_post_accumulate_grad_hook(lambda parameter: None)
    monkeypatch.setattr(Mover, "zero_grad", lambda self: (found_slopes.append(given.grad.clone()), policy.zero_grad()))
    found, gradients = step(script, args, new, old, monkeypatch, reference=ref, policy=policy)
    assert found["loss"] == pytest.approx(losses[-1], rel=1e-9) and clips > 1
    assert found["clip_fraction"] > 0
    for gradient, slope, expected, expected_slope in zip(gradients, found_slopes, wanted, slopes):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(slope, expected_slope, rtol=1e-8, atol=1e-12)


def test_flowrl_begins_as_grpo(paper, float64):
    """π = π_old = π_ref and log Z = 0: the gradient is 2β times GRPO's."""
    new, _, _, mask = batch(LENGTHS, seed=1)
    _, gradient, _ = loss_and_gradient(paper("flowrl"), new, new, mask, ref_logp=new.flatten(0, 1), beta=15.0)
    _, expected, _ = loss_and_gradient(grpo, new, new, mask)
    torch.testing.assert_close(gradient, 30 * expected, rtol=1e-10, atol=0)


@pytest.mark.long
def test_flowrl_keeps_log_z(paper, tmp_path, monkeypatch):
    """It is trained, and in checkpoints: a resumed run is the same bit for bit. It is not in the final model."""
    script = paper("flowrl")
    assert run_here(script, quick("flowrl", tmp_path / "run", 3), monkeypatch) == 0
    rows, names = metrics(tmp_path / "run"), (tmp_path / "run" / "checkpoints" / "step_000002" / ".metadata").read_bytes()
    assert b"model.log_z.0.weight" in names and b"log_z" not in (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000003")
    assert run_here(script, ["flowrl.py", "--resume", tmp_path / "run"], monkeypatch) == 0
    assert metrics(tmp_path / "run") == rows


def test_equal_rewards_do_teach(paper, alone):
    """Where grpo.py leaves the rows out: FlowRL leads back to π_ref, A*-PO compares with V*, KRPO with a level of 0."""
    start = {key: tensor.clone() for key, tensor in tiny().named_parameters()}
    for name, flags in (("flowrl", {}), ("astar_po", {"beta": 0.1}), ("krpo", {})):
        found, parameters = train(paper(name), equal=6, **flags)
        assert found["zero_variance"] == 1 and found["grad_norm"] > 0, name
        assert any(not torch.equal(start[key], parameters[key]) for key in start), name


# A*-PO ----------------------------------------------------------------------------------------------------------------


def test_optimal_values(paper, float64):
    """By the formula; β → 0 is the largest reward, β → ∞ the mean."""
    values, rewards = paper("astar_po").optimal_values, torch.rand(30, 8)
    wanted = [0.5 * math.log(mean([math.exp(reward / 0.5) for reward in row])) for row in rewards.tolist()]
    torch.testing.assert_close(values(rewards, 0.5), torch.tensor(wanted))
    torch.testing.assert_close(values(rewards, 1e-4), rewards.amax(-1), atol=1e-3, rtol=0)
    torch.testing.assert_close(values(rewards, 1e6), rewards.mean(-1), atol=1e-5, rtol=0)
    assert values(torch.tensor([[1.0, 0]])).item() == pytest.approx(0.717, abs=1e-3)
    torch.testing.assert_close(values(torch.tensor([[0.0] * 8, [1.0] * 8])), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("budget", [10**6, 40])
def test_astar_po_is_the_regression(paper, alone, float64, budget, monkeypatch):
    """Loss and gradient, on-policy and off, with errors of both signs."""
    script, values, beta = paper("astar_po"), [0.4, 0.2, 0.7], 0.3
    new, old, ref, mask = batch(LENGTHS, seed=0, drift=0.5)
    losses, wanted = [], []
    for logp in (old, new):
        leaves, loss = ragged(logp, LENGTHS, grad=True), 0
        for group, frozen, rewards, value in zip(leaves, ragged(ref, LENGTHS), REWARDS, values):
            for completion, reference, reward in zip(group, frozen, rewards):
                shift = sum(a - b for a, b in zip(completion, reference))
                loss = loss + (beta * shift - (reward - value)) ** 2 / len(group) / len(LENGTHS)
        losses.append(loss.item())
        wanted.append(gradient_of(loss, leaves, mask))
    args, given = arguments(script, budget, updates_per_batch=1, beta=beta), {"values": torch.tensor(values)[:, None]}
    found, _ = step(script, args, new, old, monkeypatch, reference=ref, **given)
    assert found["loss"] == pytest.approx(losses[0], rel=1e-9)  # the metrics are those of the last update
    args.updates_per_batch = 2
    found, gradients = step(script, args, new, old, monkeypatch, reference=ref, **given)
    assert found["loss"] == pytest.approx(losses[-1], rel=1e-9)
    for gradient, expected in zip(gradients, wanted):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-13)
        assert gradient.max() > 1e-4 and gradient.min() < -1e-4


def test_astar_po_begins_as_the_policy_gradient(paper, float64):
    """π = π_ref: 2β·L_max times the gradient of Dr. GRPO's weights with A = R - V*."""
    new, _, _, mask = batch(LENGTHS, seed=1)
    logp, plain = (new.flatten(0, 1).clone().requires_grad_() for _ in range(2))
    advantages, old = (torch.tensor(REWARDS) - 0.4).flatten(), new.flatten(0, 1)
    weights = grpo.token_weights(mask).flatten(0, 1)
    paper("astar_po").policy_loss(logp, old, advantages, weights, ref_logp=old, beta=0.1)[0].backward()
    weights = grpo.token_weights(mask, "dr_grpo", 150).flatten(0, 1)
    grpo.policy_loss(plain, old, advantages, weights)[0].backward()
    torch.testing.assert_close(logp.grad, 0.2 * 150 * plain.grad)


@pytest.mark.long
def test_astar_po_estimates_what_it_needs_once(paper, tmp_path, monkeypatch):
    """V* of the prompts that the steps use, from the reference; a resumed run with more steps adds the new ones."""
    script, asked = paper("astar_po"), []
    honest = script.HFSampler.__call__
    monkeypatch.setattr(script.HFSampler, "__call__", lambda self, prompts, n, *how: asked.append((prompts, n)) or honest(self, prompts, n, *how))
    assert run_here(script, quick("astar_po", tmp_path / "run", 2, "--group_size", 1), monkeypatch) == 0
    values = np.load(tmp_path / "run" / "values.npy")
    prompts = [ids for ids, n in asked if n == 8]
    trained = [ids for ids, n in asked if n == 1]
    assert sorted(sum(prompts, [])) == sorted(sum(trained, [])) and np.isfinite(values).sum() == len(sum(trained, []))
    assert all(value == 0 or 0 < value <= 1 for value in values[np.isfinite(values)])
    del asked[:]
    assert run_here(script, ["astar_po.py", "--resume", tmp_path / "run", "--steps", 3], monkeypatch) == 0
    again = np.load(tmp_path / "run" / "values.npy")
    assert [n for _, n in asked] == [8, 1] and asked[0][0] == asked[1][0]  # no old one is estimated again
    assert np.array_equal(again[np.isfinite(values)], values[np.isfinite(values)])
    assert run_here(script, quick("astar_po", tmp_path / "whole", 3, "--group_size", 1), monkeypatch) == 0
    whole = np.load(tmp_path / "whole" / "values.npy")
    assert np.array_equal(whole, again, equal_nan=True) and metrics(tmp_path / "whole") == metrics(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("name", ["astar_po"])
def test_runs_with_two_ranks(paper_folder, tmp_path, name):
    """The same samples, and the metrics of one rank to rounding."""
    for ranks in (None, 2):
        done = launch(quick(name, tmp_path / str(ranks), 3), ranks=ranks, cwd=paper_folder)
        assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(metrics(tmp_path / "None"), metrics(tmp_path / "2"), strict=True):
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), (key, one["step"])


# TW-GRPO --------------------------------------------------------------------------------------------------------------


def test_tw_grpo_divergence(paper, alone):
    """Against four loops over the full logits of a group; at the first place all have the same distribution."""
    script = paper("tw_grpo")
    prompts, completions, _ = rollouts(script)
    policy = script.load_policy(script.Args(model=str(TINY), temperature=0.8), torch.device("cpu"))
    for p in (0, 4):
        ids = [completion.ids for completion in completions[4 * p : 4 * p + 4]]
        longest, logps = max(map(len, ids)), []
        for row in ids:
            with torch.no_grad():
                logits = tiny()(input_ids=torch.tensor([prompts[p] + row])).logits[0, len(prompts[p]) - 1 : -1]
            logps.append((logits / 0.8).log_softmax(-1).tolist())
        size, expected = len(logps[0][0]), []
        for t in range(longest):
            total = 0
            for i in range(4):
                for v in range(size):
                    values = [logps[k][t][v] if t < len(ids[k]) else -math.log(size) for k in range(4)]
                    g = min(max(mean(values) - values[i], -11), 11)
                    total += math.exp(g) - g - 1
            expected.append(total / 4)
        rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompts[p] + row) for row in ids], batch_first=True)
        mask = torch.arange(longest) < torch.tensor([*map(len, ids)])[:, None]
        found = policy.divergence(rows, len(prompts[p]), mask)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
        assert found[0] < 1e-5 and found.max() > 0.01


def test_tw_grpo_without_weights_is_dapo_bit_for_bit(paper, alone):
    same = {"updates_per_batch": 2, "lr": 1e-5}
    found, parameters = train(paper("tw_grpo"), alpha=1.0, **same)
    expected, wanted = train(grpo, loss="dapo", clip_high=0.28, **same)
    assert found == expected and all(torch.equal(parameters[key], wanted[key]) for key in wanted)


def test_tw_grpo_soft_rewards(paper):
    script, golds = paper("tw_grpo"), ("A,B,C", "42", "x", "a,b", "$A$ and $B$")
    table = zip(golds, ({"A,C": 2 / 3, "C, A": 2 / 3, r"\text{A}": 1 / 3, "A and C": 2 / 3, "(A,C)": 2 / 3, "A,D": 0, "A,B,C": 1, "": 0},
                        {"4,2": 0, "42": 1, "4": 0}, {"X": 0}, {"a": 0}, {"A": 1 / 2}))
    rows = [(rf"\boxed{{{answer}}}", {"answer": gold}, reward) for gold, answers in table for answer, reward in answers.items()]
    texts, problems, expected = zip(*rows)
    assert script.rewards_of(texts, problems) == pytest.approx(expected)
    assert script.rewards_of(["I do not know."], [{"answer": "N,O"}]) == [0]


# G²RPO-A, iGRPO, RC-GRPO: what is sampled -----------------------------------------------------------------------------


def watch(script, monkeypatch):
    """What reaches train_step, and what the sampler was asked, in lists."""
    seen, asked, train_step, sample = [], [], script.train_step, script.HFSampler.__call__

    def observed(policy, reference, optimizer, args, prompts, completions, rewards):
        seen.append((prompts, completions, rewards.clone()))
        return train_step(policy, reference, optimizer, args, prompts, completions, rewards)

    def sampled(self, prompts, n, seed, temperature):
        drawn = sample(self, prompts, n, seed, temperature)
        asked.append((prompts, n, seed, drawn))
        return drawn

    monkeypatch.setattr(script, "train_step", observed)
    monkeypatch.setattr(script.HFSampler, "__call__", sampled)
    return seen, asked


@pytest.mark.long
def test_g2rpo_a_without_guidance_is_grpo_bit_for_bit(paper, tmp_path, monkeypatch):
    assert run_here(paper("g2rpo_a"), quick("g2rpo_a", tmp_path / "own", 2, "--guided", 0), monkeypatch) == 0
    assert run_here(grpo, quick("grpo", tmp_path / "grpo", 2), monkeypatch) == 0
    for own, plain in zip(metrics(tmp_path / "own"), metrics(tmp_path / "grpo"), strict=True):
        assert own.pop("unguided_reward") == pytest.approx(own["reward"]) and own.pop("guidance") and own == plain


@pytest.mark.long
def test_g2rpo_a_begins_with_the_solution(paper, tmp_path, monkeypatch):
    """The first of each group begin with it, with NaN for its log-probabilities; the others are grpo.py's. ℓ by the rule."""
    script = paper("g2rpo_a")
    seen, _ = watch(script, monkeypatch)
    assert run_here(script, quick("g2rpo_a", tmp_path / "run", 4, "--guidance", 12), monkeypatch) == 0
    plain, _ = watch(grpo, monkeypatch)
    assert run_here(grpo, quick("grpo", tmp_path / "grpo", 1), monkeypatch) == 0
    rows, tokenizer = metrics(tmp_path / "run"), script.load_tokenizer(str(TINY))
    for row, (prompts, completions, rewards) in zip(rows, seen, strict=True):
        for p, prompt in enumerate(prompts):
            problem = {"problem": tokenizer.decode(prompt), "answer": "7"}
            hint = tokenizer.encode(script.solution_of(problem))[: int(row["guidance"])]
            for i, c in enumerate(completions[4 * p : 4 * p + 4]):
                assert (c.ids[: len(hint)] == hint) >= (i < 2)
                assert [math.isnan(logp) for logp in c.logps] == [i < 2 and t < len(hint) for t in range(len(c.ids))]
        assert row["unguided_reward"] == pytest.approx(rewards[:, 2:].mean().item())
    for p in range(len(plain[0][0])):
        assert [c.ids for c in seen[0][1][4 * p + 2 : 4 * p + 4]] == [c.ids for c in plain[0][1][4 * p : 4 * p + 2]]
    length = 12.0
    for k, row in enumerate(rows):
        assert row["guidance"] == length
        past = [other["reward"] for other in rows[max(0, k - 2) : k]]
        if past and min(sum(past), row["reward"]) > 0:
            length = min(12, max(1, length * mean(past) / row["reward"]))
    assert rows[0]["guidance"] == rows[1]["guidance"] == 12  # one reward is no change
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    assert run_here(script, ["g2rpo_a.py", "--resume", tmp_path / "run"], monkeypatch) == 0
    assert metrics(tmp_path / "run") == rows


def test_g2rpo_a_length(paper):
    """The rule; the first length is the largest, 1 the least, and a reward of 0 changes nothing."""
    length = paper("g2rpo_a").guidance_length
    assert length(12, []) == length(12, [0.3]) == 12
    assert length(12, [0.2, 0.4]) == pytest.approx(6) and length(12, [0.2, 0.4, 0.6]) == pytest.approx(3)
    assert length(12, [0.2, 0.1]) == 12 and length(12, [0.01, 1.0]) == 1
    assert length(12, [0.2, 0.0]) == length(12, [0.0, 0.2]) == 12
    script = paper("g2rpo_a")
    assert script.solution_of({"problem": "37+5+81+26?", "answer": "149"}) == r"37+5=42;42+81=123;123+26=149;\boxed{149}"
    assert script.solution_of({"problem": "1+1?", "solution": "It is 2.", "answer": "2"}) == "It is 2."


def test_g2rpo_a_trains_on_guidance_as_on_its_own(paper, alone):
    """Unknown log-probabilities of the sampler count as the trainer's own: a step is that with them filled in."""
    script = paper("g2rpo_a")
    expected, wanted = train(script)

    def forgetful(prompts, completions, rewards):
        return prompts, [c._replace(logps=[math.nan] * (len(c.ids) // 2) + c.logps[len(c.ids) // 2 :]) for c in completions], rewards

    import step_worker
    whole = step_worker.rollouts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_worker, "rollouts", lambda *how: forgetful(*whole(*how)))
        found, parameters = train(script)
    for key in ("loss", "grad_norm", "reward", "tis_mean"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
    assert distance(parameters, wanted) < 1e-5


@pytest.mark.parametrize("name, flags, message", [
    ("g2rpo_a", ["--guided", 8], "--guided must be below --group_size"), ("g2rpo_a", ["--dataset", "DATA"], "no column solution"),
    ("igrpo", ["--drafts", 0], "--drafts must be at least 1"), ("astar_po", ["--value_samples", 0], "must be at least 1"),
    ("flowrl", ["--beta", 0], "--beta must be above 0"), ("astar_po", ["--beta", 0], "--beta and --value_beta must be above 0"),
    ("astar_po", ["--value_beta", 0], "--beta and --value_beta must be above 0"),
])
def test_bad_input(paper, name, flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    flags = [tmp_path / "data.jsonl" if flag == "DATA" else flag for flag in flags]
    assert run_here(paper(name), [f"{name}.py", *flags], monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.long
def test_igrpo_shows_the_best_draft(paper, tmp_path, monkeypatch):
    """A prompt is question, best draft, question; only completions of it are trained on; no seed is used twice."""
    script = paper("igrpo")
    seen, asked = watch(script, monkeypatch)
    assert run_here(script, quick("igrpo", tmp_path / "run", 2, "--drafts", 3), monkeypatch) == 0
    tokenizer = script.load_tokenizer(str(TINY))
    for k, (row, (prompts, completions, _)) in enumerate(zip(metrics(tmp_path / "run"), seen, strict=True)):
        (plain, n, _, drafts), (shown, _, _, drawn) = asked[2 * k : 2 * k + 2]
        assert n == 3 and shown == prompts and drawn is completions
        right = []
        for p, prompt in enumerate(plain):
            answer = sum(map(int, tokenizer.decode(prompt).rstrip("?").split("+")))
            right.append([f"\\boxed{{{answer}}}" in tokenizer.decode(draft.ids) for draft in drafts[3 * p : 3 * p + 3]])
            best = right[-1].index(max(right[-1]))
            assert prompts[p] == prompt + drafts[3 * p + best].ids + prompt
        assert row["draft_reward"] == pytest.approx(mean(sum(right, []))) and row["best_draft"] == mean([max(own) for own in right])
    assert len({seed for _, _, seed, _ in asked}) == 4


def test_igrpo_proposition(paper, tmp_path, monkeypatch):
    """Proposition 3.1, E[R(best)] = 1 - (1 - V)^N, where each pattern of two drafts' rewards comes once: V = 1/2."""
    script, turns = paper("igrpo"), itertools.count()
    monkeypatch.setattr(script, "rewards_of", lambda texts, *_: (
        [0.0, 0, 0, 1, 1, 0, 1, 1] if next(turns) % 2 == 0 else [float(i % 2) for i in range(len(texts))]))
    assert run_here(script, quick("igrpo", tmp_path / "run", 1, "--drafts", 2), monkeypatch) == 0
    (row,) = metrics(tmp_path / "run")
    assert row["draft_reward"] == 0.5 and row["best_draft"] == 0.75


def test_rc_grpo_with_equal_prompts_is_grpo_bit_for_bit(paper, alone, monkeypatch):
    """Whether a step is given P prompts or P·G, of which those of a group are equal."""
    import step_worker
    found, parameters = train(paper("rc_grpo"))
    expected, wanted = train(grpo)
    assert found == expected and all(torch.equal(parameters[key], wanted[key]) for key in wanted)
    prompts, completions, rewards = rollouts(paper("rc_grpo"))
    monkeypatch.setattr(step_worker, "rollouts", lambda *_: ([ids for ids in prompts for _ in range(4)], completions, rewards))
    monkeypatch.setattr(step_worker, "PROMPTS", 24)
    script, step = paper("rc_grpo"), paper("rc_grpo").train_step
    monkeypatch.setattr(script, "train_step", lambda *how: step(*how[:-2], completions, rewards))
    args = script.Args(**{**script.TOY, "prompts_per_step": 6, "model": str(TINY)})
    policy = script.load_policy(args, torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    again, _ = step(policy, None, optimizer, args, [ids for ids in prompts for _ in range(4)], completions, rewards)
    assert again == expected


@pytest.mark.long
def test_rc_grpo_asks_for_its_goals(paper, tmp_path, monkeypatch):
    """Each completion has its own goal, by seed and place alone; evaluation asks for the high one."""
    script = paper("rc_grpo")
    seen, asked = watch(script, monkeypatch)
    flags = ["--goal_low", "?", "--eval_dataset", "arithmetic", "--steps", 2]
    monkeypatch.setattr(script, "evaluate", lambda sampler, tokenizer, problems: asked.append(problems) or {"accuracy": 0.0})
    assert run_here(script, quick("rc_grpo", tmp_path / "run", 2, *flags), monkeypatch) == 0
    tokenizer, highs = script.load_tokenizer(str(TINY)), 0
    assert all(tokenizer.decode(row["prompt_ids"]).count("?") == 1 for row in asked[0])
    for row, (prompts, _, rewards) in zip(metrics(tmp_path / "run"), seen, strict=True):
        texts = tokenizer.batch_decode(prompts)
        assert len(texts) == rewards.numel() and len({text.rstrip("?") for text in texts}) == len(rewards)
        drawn = [np.random.default_rng((0, (row["step"] - 1) * len(rewards) + i, 1)).random(4) < 0.5 for i in range(len(rewards))]
        assert [not text.endswith("??") for text in texts] == np.concatenate(drawn).tolist()
        high = torch.tensor(np.stack(drawn))
        assert row["reward_high"] == pytest.approx(rewards[high].mean().item())
        assert row["reward_low"] == pytest.approx(rewards[~high].mean().item())
        highs += int(high.sum())
    assert 8 < highs < 24


@pytest.mark.long
def test_rc_grpo_all_high(paper, tmp_path, monkeypatch):
    script = paper("rc_grpo")
    seen, _ = watch(script, monkeypatch)
    assert run_here(script, quick("rc_grpo", tmp_path / "run", 1, "--goal_low", "?", "--p_high", 1), monkeypatch) == 0
    tokenizer = script.load_tokenizer(str(TINY))
    assert not any(text.endswith("??") for text in tokenizer.batch_decode(seen[0][0]))
    assert metrics(tmp_path / "run")[0]["reward_low"] == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["max_prompt_tokens"] == 208  # resumed, it is the same


@pytest.mark.long
def test_rc_grpo_proposition(paper, tmp_path, monkeypatch):
    """Proposition 4.3 with reward = goal: the mean variance of a group is (G-1)/G · p(1-p)."""
    script = paper("rc_grpo")
    tokenizer, variances = script.load_tokenizer(str(TINY)), []
    monkeypatch.setattr(script.HFSampler, "__call__", lambda self, prompts, n, *_: [
        script.Completion([1, 0], "stop", [-2.0, -2.0]) if not tokenizer.decode(ids).endswith("??")
        else script.Completion([2, 0], "stop", [-2.0, -2.0]) for ids in prompts])
    monkeypatch.setattr(script, "rewards_of", lambda texts, *_: [float(text == tokenizer.decode([1])) for text in texts])

    def stop(policy, reference, optimizer, args, prompts, completions, rewards):
        variances.extend(rewards.var(-1, correction=0).tolist())
        raise SystemExit(7)

    monkeypatch.setattr(script, "train_step", stop)
    flags = ["--goal_low", "?", "--prompts_per_step", 2000, "--group_size", 5, "--p_high", 0.3]
    assert run_here(script, quick("rc_grpo", tmp_path / "run", 1, *flags), monkeypatch) == 7
    assert mean(variances) == pytest.approx(0.8 * 0.3 * 0.7, abs=0.006)
