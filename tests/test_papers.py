"""The papers of tests/papers: each patch fits grpo.py, is its paper's by a loop written from the equation, and trains.

What only one of them promises is in test_paper_ideas.py.

After a change of grpo.py: python tests/papers/make.py --remake, and look at the difference (its docstring says more).
"""

import ast
import difflib
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, launch, metrics
from papers import make as patches
from papers.make import PAPERS
from step_worker import VARIANTS, run_case, train
from test_algorithm import LENGTHS, batch, ragged
from test_run import quick, run_here
from test_step import SMALL, WHOLE, check_same_step, model, run_with_ranks

import grpo

REWARDS = [[1.0, 0.0, 0.5, 0.2], [1.0, 1.0, 1.0, 1.0], [1.0, 0.3, 0.1, 0.0]]  # long completions are right and wrong
NUMBERS = {"gmpo": "2507.20673", "gspo": "2507.18071", "cispo": "2506.13585", "krpo": "2505.07527", "pods": "2504.13818",
           "dynamic_sampling": "2503.14476", "repo": "2503.07426", "alpha_dpo": "2410.10148", "flowrl": "2509.15207",
           "astar_po": "2505.20686", "tw_grpo": "2505.24718", "g2rpo_a": "2508.13023", "igrpo": "2602.09000",
           "rc_grpo": "2602.03025"}
CHANGED = {  # the functions that a patch changes; its tests below are about these, and grpo.py's tests about the others
    "gmpo": {"Args", "policy_loss"}, "gspo": {"Args", "policy_loss"}, "cispo": {"Args", "policy_loss", "parse_args"},
    "krpo": {"group_advantages"}, "pods": {"Args", "max_variance", "train_step", "parse_args"}, "dynamic_sampling": {"main"},
    "repo": {"Args", "group_advantages", "train_step"},
    "alpha_dpo": {"Args", "group_advantages", "reference_means", "train_step", "main"},
    "flowrl": {"Args", "policy_loss", "train_step", "Policy", "parse_args"},
    "astar_po": {"Args", "optimal_values", "policy_loss", "train_step", "main", "log_step", "parse_args"},
    "tw_grpo": {"Args", "rewards_of", "train_step", "Policy", "load_policy"},
    "g2rpo_a": {"Args", "solution_of", "guidance_length", "train_step", "main", "VLLMSampler", "parse_args"},
    "igrpo": {"Args", "main", "VLLMSampler", "parse_args"}, "rc_grpo": {"Args", "train_step", "main"},
}
LARGER = {"astar_po": 59, "g2rpo_a": 42}  # than 40 changed lines
OWN_STEP = ("alpha_dpo", "flowrl", "astar_po")  # the training step is tested in test_paper_ideas.py


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """As a checkout's root: the patched scripts that were asked for, beside eval.py and tests/tiny."""
    folder = tmp_path_factory.mktemp("papers")
    (folder / "tests").symlink_to(ROOT / "tests")
    shutil.copy(ROOT / "eval.py", folder)
    sys.path.insert(0, str(folder))  # before the root, where someone's older gmpo.py may lie
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def paper(folder):
    """paper(name): the patched script, imported."""
    def load(name):
        if not (folder / f"{name}.py").exists():
            patches.patched(name, folder)
        return importlib.import_module(name)
    return load


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# The patches ----------------------------------------------------------------------------------------------------------


def code(text):
    """Its lines, without docstrings and blank ones."""
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            left_out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [line for number, line in enumerate(text.splitlines(), 1) if number not in left_out and line.strip()]


def functions(text):
    """{name of each function and class at the top level: its code}."""
    tree = ast.parse(text)
    return {node.name: code(ast.get_source_segment(text, node)) for node in tree.body if hasattr(node, "name")}


def test_every_patch_is_tested_here():
    assert set(PAPERS) == set(NUMBERS) == set(CHANGED) == {*OBJECTIVES, *OWN_STEP} == set(TOYS)


@pytest.mark.parametrize("name", PAPERS)
def test_patch_fits(name, tmp_path):
    """Every hunk at its line; at most 40 changed lines, as README says; the docstring names the paper and the change."""
    base, text = (ROOT / "grpo.py").read_text(), patches.patched(name, tmp_path).read_text()
    assert (ROOT / "tests" / "papers" / f"{name}.diff").read_text().startswith(f"--- grpo.py\n+++ {name}.py\n@@ ")
    changed = [line for line in difflib.unified_diff(code(base), code(text), n=0, lineterm="") if line[:1] in "+-"][2:]
    assert 0 < len(changed) <= LARGER.get(name, 40)
    assert f"| {len(changed)} |" in next(row for row in (ROOT / "tests" / "README.md").read_text().splitlines()
                                               if row.startswith("|") and f"`{name}.diff`" in row)
    before, after = functions(base), functions(text)
    assert {key for key in after if after[key] != before.get(key)} == CHANGED[name]
    first, rest = ast.get_docstring(ast.parse(text)).split("\n\n", 2)[:2]
    assert "grpo.py" in first and f"arXiv {NUMBERS[name]}" in rest and 3 <= len(rest.splitlines()) <= 6
    assert max(map(len, text.splitlines())) <= 120


def test_a_patch_that_does_not_fit(tmp_path, monkeypatch):
    """One line that names it; --remake moves it, unless what it changes has changed."""
    base, diffs = (ROOT / "grpo.py").read_text(), tmp_path / "papers"
    shutil.copytree(ROOT / "tests" / "papers", diffs)
    monkeypatch.setattr(patches, "HERE", tmp_path / "papers")
    monkeypatch.setattr(patches, "BASE", tmp_path / "grpo.py")
    patches.BASE.write_text(base.replace("\nimport math\n", "\nimport cmath\nimport math\n"))
    with pytest.raises(SystemExit, match="^error: gspo.diff does not fit .*offset 1 line[^\n]*$"):
        patches.patched("gspo", tmp_path)
    patches.remake("gspo")
    script = patches.patched("gspo", tmp_path).read_text()
    assert "import cmath" in script and "GSPO eq. 7" in script
    patches.BASE.write_text(base.replace("    unclipped = ratio * advantages\n", "    unclipped = advantages * ratio\n"))
    for exact in (True, False):
        with pytest.raises(SystemExit, match="^error: gspo.diff does not fit [^\n]*FAILED[^\n]*$"):
            patches.patched("gspo", tmp_path, exact)
        assert not (tmp_path / "gspo.py").exists()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="^error: [^\n]*needs the program patch[^\n]*$"):
        patches.patched("gspo", tmp_path)


def test_patched_from_the_shell(tmp_path, monkeypatch):
    """All scripts, into this folder; and --remake leaves patches that fit as they are."""
    shutil.copytree(ROOT / "tests" / "papers", tmp_path / "papers")
    monkeypatch.setattr(patches, "HERE", tmp_path / "papers")
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--remake"]):
        monkeypatch.setattr(sys, "argv", ["make.py", *flags])
        patches.main()
    for name in PAPERS:
        assert (tmp_path / f"{name}.py").read_text().startswith('"""')
        diff = f"papers/{name}.diff"
        assert (tmp_path / diff).read_text() == (ROOT / "tests" / diff).read_text()


@pytest.mark.parametrize("name, bounds", [
    ("gmpo", (1 - 2.718281828**-0.4, 2.718281828**0.4 - 1)), ("gspo", (3e-4, 4e-4)), ("cispo", (1.0, 0.28)),
])
def test_defaults_are_the_papers(paper, name, bounds):
    args = paper(name).Args()
    assert (args.clip_low, args.clip_high) == pytest.approx(bounds, abs=1e-4)
    assert args.loss == ("dapo" if name == "cispo" else "grpo") and args.beta == 0


@pytest.mark.parametrize("name, flags, message", [
    ("cispo", ["--clip_low", "1.1"], "--clip_low must be at most 1"), ("gspo", ["--clip_low", "1"], "--clip_low must be below 1"),
    ("pods", ["--keep", "1"], "--keep must be"), ("pods", ["--keep", "9"], "--keep must be"),
])
def test_bad_input(paper, name, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        paper(name).main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


# The objectives, as the papers write them: a group's J, of log-probabilities [G][|o|] (leaves) and rewards [G] ----------


def standardised(rewards):
    """GRPO's advantages: over the sample standard deviation, 0 where all rewards are equal."""
    mean = sum(rewards) / len(rewards)
    std = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5
    return [(reward - mean) / (std + 1e-4) if max(rewards) > min(rewards) else 0.0 for reward in rewards]


def clipped(new, before, advantage, low, high):
    """A token's term of GRPO eq. 3."""
    ratio = torch.exp(new - before)
    return torch.min(ratio * advantage, torch.clamp(ratio, low, high) * advantage)


def gmpo(new, old, rewards, low, high):
    """GMPO eq. 4: the product of a completion's terms, its root, the sign of the advantage."""
    total = 0
    for completion, completion_old, advantage in zip(new, old, standardised(rewards)):
        product = 1.0
        for token, before in zip(completion, completion_old):
            product = product * clipped(token, before, advantage, low, high).abs()
        if advantage != 0:  # sgn(0) = 0
            total = total + product ** (1 / len(completion)) * (1 if advantage > 0 else -1) / len(new)
    return total


def gspo(new, old, rewards, low, high):
    """GSPO eq. 5, with s of eq. 7 as a product of likelihoods and its root."""
    total = 0
    for completion, completion_old, advantage in zip(new, old, standardised(rewards)):
        likelihood = 1.0
        for token, before in zip(completion, completion_old):
            likelihood = likelihood * torch.exp(token) / torch.exp(before)
        s = likelihood ** (1 / len(completion))
        total = total + torch.min(s * advantage, torch.clamp(s, low, high) * advantage) / len(new)
    return total


def cispo(new, old, rewards, low, high):
    """CISPO eq. 4: the clipped ratio is a number, the gradient that of log π."""
    total, tokens = 0, sum(len(completion) for completion in new)
    for completion, completion_old, advantage in zip(new, old, standardised(rewards)):
        for token, before in zip(completion, completion_old):
            weight = min(max(torch.exp(token - before).item(), low), high)
            total = total + weight * advantage * token / tokens
    return total


def filtered(rewards, drift=1e-5, noise=1e-2):
    """KRPO's advantages without a filter's recursion: the level given the rewards so far, by conditioning a Gaussian.

    Prior: level i has the mean 0, and the covariance 1 + drift · min(i, j) with level j. A reward is its level + noise.
    """
    advantages = []
    for i in range(1, len(rewards) + 1):
        steps = torch.arange(1, i + 1).double()
        prior = 1 + drift * torch.minimum(steps[:, None], steps)  # [i, i]
        gain = torch.linalg.solve(prior + noise * torch.eye(i), prior[-1])  # [i]
        level, variance = gain @ torch.tensor(rewards[:i]), prior[-1, -1] - gain @ prior[-1]
        advantages.append(((rewards[i - 1] - level) / (variance.sqrt() + 1e-8)).item())
    return advantages


def krpo(new, old, rewards, low, high):
    """GRPO eq. 3, with KRPO's advantages."""
    terms = [sum(clipped(token, before, advantage, low, high) for token, before in zip(completion, completion_old))
             / len(completion) for completion, completion_old, advantage in zip(new, old, filtered(rewards))]
    return sum(terms) / len(new)


KEEP = 3


def pods(new, old, rewards, low, high):
    """GRPO eq. 3 over the best of all subsets of three, which the group's advantages are taken over, too."""
    variance = lambda rows: torch.tensor([rewards[i] for i in rows]).var().item()  # noqa: E731
    best = max(itertools.combinations(range(len(new)), KEEP), key=variance)
    total = 0
    for i, advantage in zip(best, standardised([rewards[i] for i in best])):
        terms = [clipped(token, before, advantage, low, high) for token, before in zip(new[i], old[i])]
        total = total + sum(terms) / len(terms) / KEEP
    return total


def dynamic_sampling(new, old, rewards, low, high):
    """DAPO eq. 11, once its condition holds."""
    return dapo(new, old, rewards, low, high)


def dapo(new, old, rewards, low, high):
    """DAPO eq. 8."""
    return sum(clipped(token, before, advantage, low, high)
               for completion, completion_old, advantage in zip(new, old, standardised(rewards))
               for token, before in zip(completion, completion_old)) / sum(map(len, new))


def eq3(new, old, advantages, low, high):
    """GRPO eq. 3 for a group, with these advantages."""
    terms = [sum(clipped(token, before, advantage, low, high) for token, before in zip(completion, completion_old))
             / len(completion) for completion, completion_old, advantage in zip(new, old, advantages)]
    return sum(terms) / len(new)


def unchanged(new, old, rewards, low, high):
    """GRPO eq. 3: the training step is grpo.py's, other prompts and completions reach it."""
    return eq3(new, old, standardised(rewards), low, high)


def repo(new, old, rewards, low, high, gamma=0.5):
    """GRPO eq. 3 with A = G/n (close pairs won - lost): on-policy RePO eq. 8. How close a pair is, π_old decides."""
    means = [sum(completion).item() / len(completion) for completion in old]
    advantages, pairs = [0.0] * len(old), 0
    for i, j in itertools.permutations(range(len(old)), 2):
        if rewards[i] > rewards[j]:
            pairs += 1
            if means[i] - means[j] < gamma:
                advantages[i] += 1
                advantages[j] -= 1
    return eq3(new, old, [len(old) * advantage / max(1, pairs) for advantage in advantages], low, high)


def apart(place):
    """In place of TW-GRPO's D, which is tested in test_paper_ideas.py."""
    return 3.0 * place % 5


def tw_grpo(new, old, rewards, low, high):
    """DAPO eq. 8 with TW-GRPO's weights of places: 1 + 0.7 · (D - min)/(max - min)."""
    places = [apart(place) for place in range(max(map(len, new)))]
    least, most = min(places), max(places)
    weights = [1 + 0.7 * (place - least) / (most - least + 1e-8) for place in places]
    return sum(weight * clipped(token, before, advantage, low, high)
               for completion, completion_old, advantage in zip(new, old, standardised(rewards))
               for weight, token, before in zip(weights, completion, completion_old)) / sum(map(len, new))


OBJECTIVES = {  # name: (J of a group, flags, other bounds than the paper's at which the clip is at work as well)
    "gmpo": (gmpo, {}, (0.2, 0.2)), "gspo": (gspo, {}, (0.1, 0.05)), "cispo": (cispo, {}, (0.3, 0.2)),
    "krpo": (krpo, {}, (0.2, 0.28)), "pods": (pods, {"keep": KEEP}, (0.2, 0.28)),
    "dynamic_sampling": (dynamic_sampling, {"loss": "dapo"}, (0.2, 0.28)), "repo": (repo, {}, (0.1, 0.28)),
    "tw_grpo": (tw_grpo, {}, (0.1, 0.3)), **dict.fromkeys(("g2rpo_a", "igrpo", "rc_grpo"), (unchanged, {}, (0.1, 0.28))),
}


class Table(torch.nn.Module):
    """A policy that is its log-probabilities [P·G, T]. The prompt is [p], a completion begins with its number g."""

    def __init__(self, logp):
        super().__init__()
        self.logp = torch.nn.Parameter(logp)

    def set_requires_all_reduce(self, last):
        """Of FSDP: there are no other ranks."""

    def forward(self, input_ids, starts, mask):
        rows = input_ids[:, 0] * len(LENGTHS[0]) + input_ids[:, 1]
        return torch.where(mask, self.logp[rows, : mask.shape[1]], 0.0), torch.zeros(mask.shape)

    def divergence(self, input_ids, start, mask):
        assert mask[:, -1].any() and start == 1  # T is the longest of the group
        return torch.tensor([apart(place) for place in range(mask.shape[1])])


class Mover:
    """In place of an optimizer: notes the gradient, and moves the table to where the test wants it."""

    def __init__(self, policy, logp):
        self.policy, self.logp, self.gradients = policy, logp, []

    def step(self):
        self.gradients.append(self.policy.logp.grad.clone())
        self.policy.logp.data.copy_(self.logp)

    def zero_grad(self):
        self.policy.logp.grad = None


@pytest.mark.parametrize("budget", [10**6, 40])
@pytest.mark.parametrize("bounds", ["paper", "others"])
@pytest.mark.parametrize("name", [name for name in PAPERS if name not in OWN_STEP])
def test_step_is_the_papers(paper, alone, float64, name, bounds, budget, monkeypatch):
    """A whole training step of two updates, on-policy and off: the losses, and the gradient of every token's log π."""
    script, (group_objective, flags, others) = paper(name), OBJECTIVES[name]
    args = script.Args(prompts_per_step=len(LENGTHS), updates_per_batch=2, micro_batch_tokens=budget, **flags)
    if bounds == "others":
        args.clip_low, args.clip_high = others
    new, old, _, mask = batch(LENGTHS, seed=0, drift=0.5)
    losses, wanted = [], []
    for logp in (old, new):
        leaves, low, high = ragged(logp, LENGTHS, grad=True), 1 - args.clip_low, 1 + args.clip_high
        groups = zip(leaves, ragged(old, LENGTHS), REWARDS)
        loss = -sum(group_objective(*group, low, high) for group in groups) / len(LENGTHS)
        loss.backward()
        losses.append(loss.item())
        wanted.append(torch.zeros(mask.shape))
        for (p, g, t) in mask.nonzero().tolist():
            wanted[-1][p, g, t] = 0.0 if leaves[p][g][t].grad is None else leaves[p][g][t].grad

    completions = [script.Completion([g, *[0] * (length - 1)], "stop", old[p, g, :length].tolist())
                   for p, group in enumerate(LENGTHS) for g, length in enumerate(group)]
    norm = types.SimpleNamespace(full_tensor=lambda: torch.ones(()))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: norm)  # the real one is of sharded parameters
    for args.updates_per_batch, expected in enumerate(losses, start=1):  # the metrics are those of the last update
        policy = Table(old.flatten(0, 1).clone())
        mover = Mover(policy, new.flatten(0, 1))
        found, _ = script.train_step(policy, None, mover, args, [[p] for p in range(len(LENGTHS))], completions, torch.tensor(REWARDS))
        assert found["loss"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for gradient, expected in zip(mover.gradients, wanted):
        torch.testing.assert_close(gradient.view(mask.shape), expected, rtol=1e-8, atol=1e-13)
        assert gradient.max() > 1e-4 and gradient.min() < -1e-4  # both signs of A
    assert found["clip_fraction"] > 0.02 and found["reward"] == pytest.approx(torch.tensor(REWARDS).mean().item())
    if OBJECTIVES[name][0] not in (dynamic_sampling, unchanged):  # it is not GRPO
        plain = grpo.Args(prompts_per_step=len(LENGTHS), updates_per_batch=2, loss=args.loss,
                          clip_low=min(args.clip_low, 0.99), clip_high=args.clip_high)
        mover = Mover(Table(old.flatten(0, 1).clone()), new.flatten(0, 1))
        other, _ = grpo.train_step(mover.policy, None, mover, plain, [[p] for p in range(len(LENGTHS))], completions,
                                torch.tensor(REWARDS))
        assert abs(other["loss"] - found["loss"]) > 1e-4


# Identities with grpo.py ----------------------------------------------------------------------------------------------


def loss_and_gradient(script, new, old, mask, **how):
    """policy_loss of a script on the usual batch: (loss, gradient of logp [P·G, T], stats)."""
    loss = "dapo" if script.SCRIPT == "cispo" else how.pop("loss", "grpo")
    logp = new.flatten(0, 1).clone().requires_grad_()
    advantages = grpo.group_advantages(torch.tensor(REWARDS)).flatten()
    weights = grpo.token_weights(mask, loss).flatten(0, 1)
    value, stats = script.policy_loss(logp, old.flatten(0, 1), advantages, weights, **how)
    value.backward()
    return value.item(), logp.grad, stats


@pytest.mark.parametrize("name, loss", [("gmpo", "grpo"), ("gspo", "grpo"), ("cispo", "dapo")])
def test_on_policy_it_is_grpo(paper, float64, name, loss):
    new, _, _, mask = batch(LENGTHS, seed=1)
    _, gradient, stats = loss_and_gradient(paper(name), new, new, mask)
    _, expected, _ = loss_and_gradient(grpo, new, new, mask, loss=loss)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    assert stats["clip_fraction"] == 0


@pytest.mark.parametrize("name", ["gmpo", "gspo"])
def test_of_single_tokens_it_is_grpo(paper, float64, name):
    """Completions of one token: their ratio is the token's. Loss and gradient, off-policy."""
    new, old, _, mask = batch([[1] * 4] * 3, seed=2, drift=0.5)
    loss, gradient, stats = loss_and_gradient(paper(name), new, old, mask)
    expected, wanted, others = loss_and_gradient(grpo, new, old, mask)
    assert loss == pytest.approx(expected, rel=1e-12) and stats == others and stats["clip_fraction"] > 0
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)


def test_cispo_without_bounds_is_the_policy_gradient(paper, float64):
    """r · A · ∇log π is ∇(r · A): off-policy it is DAPO's gradient without a clip."""
    new, old, _, mask = batch(LENGTHS, seed=2, drift=0.5)
    _, gradient, _ = loss_and_gradient(paper("cispo"), new, old, mask, clip_low=1.0, clip_high=1e9)
    _, expected, _ = loss_and_gradient(grpo, new, old, mask, loss="dapo", clip_low=1.0, clip_high=1e9)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["gmpo", "gspo", "cispo"])
def test_padding_counts_for_nothing(paper, float64, name):
    """Whatever stands there; the stats of tokens are grpo.py's; and rows of weight 0 add nothing."""
    new, old, _, mask = batch(LENGTHS, seed=3, drift=0.5)
    garbage = torch.where(mask, 0.0, float("nan"))
    loss, gradient, stats = loss_and_gradient(paper(name), new, old, mask)
    again, other, same = loss_and_gradient(paper(name), new + garbage, old + garbage, mask)
    assert again == loss and torch.equal(other, gradient) and same == stats
    assert gradient.view(mask.shape)[~mask].eq(0).all()
    _, _, plain = loss_and_gradient(grpo, new, old, mask)
    assert stats["tokens"] == plain["tokens"] and stats["kl"] == plain["kl"]
    logp = torch.randn(2, 5).requires_grad_()
    loss, _ = paper(name).policy_loss(logp, torch.randn(2, 5), torch.tensor([1.0, -1.0]), torch.zeros(2, 5))
    loss.backward()
    assert loss == 0 and logp.grad.eq(0).all()


def test_krpo_ends_at_the_groups_mean(paper, float64):
    """The last level is nearly the mean, as in Dr. GRPO. All-wrong groups say nothing, all-right ones a little."""
    rewards = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    advantages = paper("krpo").group_advantages(rewards, normalize_std=False)
    torch.testing.assert_close(advantages[:, -1], grpo.group_advantages(rewards, False)[:, -1], rtol=0, atol=5e-3)
    torch.testing.assert_close(advantages[:, 0], rewards[:, 0] * 0.0099, rtol=0.01, atol=0)  # a level of 0 at first
    advantages = paper("krpo").group_advantages(torch.tensor([[0.0] * 8, [1.0] * 8]))
    assert advantages[0].eq(0).all() and (advantages[1] > 0).all() and (advantages[1] < 0.11).all()


def test_pods_that_keeps_all_is_grpo_bit_for_bit(paper, alone):
    same = {"updates_per_batch": 2, "lr": 1e-5}
    found, parameters = train(paper("pods"), keep=4, **same)
    expected, wanted = train(grpo, **same)
    assert found == expected and all(torch.equal(parameters[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_pods_keeps_the_largest_variance(paper, float64, kind):
    rewards = torch.rand(40, 7, generator=torch.Generator().manual_seed(0))
    rewards = rewards**3 if kind == "continuous" else (rewards < 0.4).double()
    for keep in range(2, 8):
        rows = paper("pods").max_variance(rewards, keep)
        assert rows.shape == (40, keep) and (rows.diff() > 0).all()  # no column twice
        every = [rewards[:, list(subset)].var(-1) for subset in itertools.combinations(range(7), keep)]
        torch.testing.assert_close(rewards.gather(1, rows).var(-1), torch.stack(every).amax(0))
        if kind == "binary":  # Theorem 2: half of each, as far as there are any
            right, kept = rewards.sum(-1), rewards.gather(1, rows).sum(-1)
            assert ((kept - keep / 2).abs() <= 0.5)[(right >= (keep + 1) // 2) & (7 - right >= (keep + 1) // 2)].all()


# Dynamic sampling: what is drawn in main --------------------------------------------------------------------------------


@pytest.mark.long
def test_dynamic_sampling_fills_the_batch(paper, tmp_path, monkeypatch):
    """Every group has right and wrong answers, to its own prompt; the first sampling, and its reward, are grpo.py's."""
    script, seen, honest = paper("dynamic_sampling"), [], paper("dynamic_sampling").train_step
    tokenizer = script.load_tokenizer(str(TINY))

    def observed(policy, reference, optimizer, args, prompts, completions, rewards):
        seen.append((prompts, completions, rewards.clone()))
        return honest(policy, reference, optimizer, args, prompts, completions, rewards)

    monkeypatch.setattr(script, "train_step", observed)
    assert run_here(script, quick("dynamic_sampling", tmp_path / "run", 2), monkeypatch) == 0
    assert run_here(grpo, quick("grpo", tmp_path / "grpo", 1), monkeypatch) == 0
    rows, plain = metrics(tmp_path / "run"), metrics(tmp_path / "grpo")
    assert rows[0]["reward"] == plain[0]["reward"] and plain[0]["zero_variance"] > 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    asked = []
    for row, (prompts, completions, rewards) in zip(rows, seen, strict=True):
        assert row["zero_variance"] == 0 and ((0 < rewards.mean(-1)) & (rewards.mean(-1) < 1)).all()
        problems = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        asked += problems
        for i, completion in enumerate(completions):
            answer = sum(map(int, re.findall(r"\d+", problems[i // 4])))
            text = tokenizer.decode(completion.ids, skip_special_tokens=True)
            assert rewards.flatten()[i] == (f"\\boxed{{{answer}}}" in text)
        first = [sample for sample in samples if sample["step"] == row["step"]]
        assert [sample["problem"] for sample in first] == problems[:1]
        assert [sample["rewards"] for sample in first] == [rewards[0].tolist()]
    assert len(set(asked)) == len(asked)  # no prompt twice
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000002")  # as if killed before it was there
    assert run_here(script, ["dynamic_sampling.py", "--resume", tmp_path / "run"], monkeypatch) == 0
    assert metrics(tmp_path / "run") == rows  # what is drawn depends on the step alone


@pytest.mark.long
def test_dynamic_sampling_of_mixed_groups_is_grpo(paper, tmp_path, monkeypatch):
    """If every group has both at first, nothing is sampled again: the same bit for bit."""
    rows = []
    for script in (paper("dynamic_sampling"), grpo):
        monkeypatch.setattr(script, "rewards_of", lambda texts, *_: [float(i % 3 == 0) for i in range(len(texts))])
        assert run_here(script, quick(script.SCRIPT, tmp_path / script.SCRIPT, 1), monkeypatch) == 0
        rows.append(metrics(tmp_path / script.SCRIPT))
    assert rows[0] == rows[1] and rows[0][0]["grad_norm"] > 0


@pytest.mark.long
def test_dynamic_sampling_with_two_ranks(paper_folder, tmp_path):
    """Each rank fills its own share; what is sampled first, and its mean reward, are those of one rank."""
    for ranks in (None, 2):
        done = launch(quick("dynamic_sampling", tmp_path / str(ranks), 1), ranks=ranks, cwd=paper_folder)
        assert done.returncode == 0, done.stderr[-3000:]
    (one,), (two,) = metrics(tmp_path / "None"), metrics(tmp_path / "2")
    assert one["reward"] == two["reward"] and one["zero_variance"] == two["zero_variance"] == 0


@pytest.mark.long
def test_dynamic_sampling_gives_up(paper, tmp_path, monkeypatch):
    """If no answer is ever right: ten samplings in all, then a step without a gradient."""
    script, asked = paper("dynamic_sampling"), []
    monkeypatch.setattr(script, "rewards_of", lambda texts, *_: asked.append(len(texts)) or [0.0] * len(texts))
    assert run_here(script, quick("dynamic_sampling", tmp_path / "run", 1), monkeypatch) == 0
    (row,) = metrics(tmp_path / "run")
    assert asked == [16] * 10 and row["zero_variance"] == 1 and row["grad_norm"] == 0 and row["reward"] == 0


# Ranks, micro-batches, whole runs -------------------------------------------------------------------------------------

STEPS = [name for name in PAPERS if name not in ("dynamic_sampling", "igrpo")]  # whose step is grpo.py's
CASES = [f"{name}/{variant}" for name in STEPS for variant in VARIANTS[name]]


@pytest.fixture(scope="module")
def results(paper_folder):
    """As test_step.py's, for the papers: one rank with all at once and with a few tokens at a time."""
    found = {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for case in CASES:
        for budget in (WHOLE, SMALL):
            found[1, f"{case}:{budget}"] = run_case(f"{case}:{budget}")
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def two_ranks(paper_folder, tmp_path_factory):
    return run_with_ranks(2, CASES, tmp_path_factory.mktemp("ranks"), PYTHONPATH=f"{paper_folder}:{ROOT}")


@pytest.fixture(scope="module")
def paper_folder(folder):
    """The folder, with all of them in it."""
    for name in PAPERS:
        patches.patched(name, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_same_step_however_computed(results, case):
    check_same_step(results, case)
    found, parameters = results[1, f"{case}:{WHOLE}"]
    assert found["grad_norm"] > 1e-3 and (found.get("clip_fraction", 0) > 0.05) == case.endswith("/clip")
    start = dict(model().named_parameters())
    assert any(not torch.equal(start[key], parameters[key]) for key in start)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_same_step_with_two_ranks(results, two_ranks, case):
    assert (2, f"{case}:{SMALL}") in two_ranks
    check_same_step({**results, **two_ranks}, case)


TOYS = {  # flags with which the clip or the choice is at work
    "gmpo": ["--updates_per_batch", 4], "gspo": ["--updates_per_batch", 4], "cispo": ["--updates_per_batch", 4],
    "krpo": [], "pods": ["--group_size", 32, "--keep", 8], "dynamic_sampling": [], "repo": ["--gamma", 1], "alpha_dpo": [],
    "flowrl": [], "astar_po": [], "tw_grpo": [], "g2rpo_a": [], "igrpo": [], "rc_grpo": [],
}
REWARD = {"g2rpo_a": "unguided_reward", "rc_grpo": "reward_high"}  # the metric that climbs as grpo.py's reward


@pytest.mark.long
@pytest.mark.parametrize("name", PAPERS if os.environ.get("GRPO_TOYS") else ["krpo"])  # minutes
def test_toy_run(paper_folder, tmp_path, name):
    """As a script, in a checkout's root: the reward climbs as grpo.py's does."""
    arguments = [f"{name}.py", *TOYS[name], "--output_dir", tmp_path / "run"]
    process = launch(arguments, wait=False, cwd=paper_folder, PYTHONPATH="")
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    rows = metrics(tmp_path / "run")
    rewards, accuracy = [row[REWARD.get(name, "reward")] for row in rows], rows[-1]["eval_accuracy"]
    assert len(rewards) == 25 and rewards[0] <= 0.3
    if name == "igrpo":  # the tiny model cannot read a prompt with a draft in it
        assert rewards[-1] < 0.3 and accuracy < 0.3
    else:
        assert rewards[-1] >= 0.85 and accuracy >= 0.85


@pytest.mark.long
def test_as_the_readme_does(tmp_path):
    """patch alone writes the same script, and --help begins with what it is."""
    for name in ("gmpo", "astar_po"):
        subprocess.run(["patch", ROOT / "grpo.py", ROOT / "tests" / "papers" / f"{name}.diff", "-o", tmp_path / f"{name}.py"],
                       check=True, capture_output=True)
        done = launch([tmp_path / f"{name}.py", "--help"])
        first = ast.get_docstring(ast.parse((tmp_path / f"{name}.py").read_text())).split("\n")[0]
        assert done.returncode == 0 and first in " ".join(done.stdout.split())
