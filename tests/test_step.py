"""One training step: whatever the micro-batches and the number of ranks, the same loss, gradient norm and parameters."""

import copy
import importlib
import math

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import SCRIPTS, TINY, launch
from step_worker import GROUP, PROMPTS, VARIANTS, rollouts, run_case, tiny, train
from torch.distributed.fsdp import FSDPModule

WHOLE, SMALL, ONE = 10**6, 200, 1  # tokens a micro-batch: all at once, a few rows, one completion
CASES = [f"{name}/{variant}" for name in SCRIPTS for variant in VARIANTS[name]]
FEW = [case for case in CASES if not case.endswith(("clip", "dapo", "dr_grpo", "weight"))]  # the others are long
ONCE = lambda case: not case.endswith(("clip", "beta"))  # noqa: E731  after one update Adam has magnified all rounding


def run_with_ranks(ranks, cases, folder, **environment):
    """{(ranks, case:budget): (metrics, parameters)}, a few tokens at a time."""
    arguments = ["tests/step_worker.py", folder / str(ranks), *(f"{case}:{SMALL}" for case in cases)]
    done = launch(arguments, ranks=ranks, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(ranks, case): result for case, result in torch.load(folder / str(ranks)).items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """{(ranks, case:budget): (metrics, parameters)}: one rank all at once, two a few at a time; --all: one by one, and three."""
    folder, found, thorough = tmp_path_factory.mktemp("step"), {}, request.config.option.all
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for case in CASES if thorough else FEW:
        for budget in (WHOLE, ONE) if ONCE(case) and thorough else (WHOLE,):
            found[1, f"{case}:{budget}"] = run_case(f"{case}:{budget}")
    dist.destroy_process_group()
    for ranks in (2, 3) if thorough else (2,):
        found.update(run_with_ranks(ranks, CASES if thorough else FEW, folder))
        here, there = (safetensors.torch.load_file(where / "model.safetensors") for where in (folder / f"{ranks}-final", TINY))
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in there)  # tied ones: once
    return found


def distance(tensors, expected):
    """The norm of the difference, relative to the expected parameters'."""
    difference = torch.cat([(tensors[name] - expected[name]).flatten() for name in expected]).norm()
    return difference / torch.cat([tensor.flatten() for tensor in expected.values()]).norm()


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.long] * (case not in FEW)) for case in CASES])
def test_same_step_however_computed(results, case):
    check_same_step(results, case)


def check_same_step(results, case):
    """One rank with all at once, against all else in the results: metrics and parameters.

    The idle cases: one of two ranks, or each, has no row to train on, and does not wait for the other for ever.
    """
    metrics, parameters = results[1, f"{case}:{WHOLE}"]
    once = ONCE(case)
    others = [key for key in results if key[1].rpartition(":")[0] == case and key != (1, f"{case}:{WHOLE}")]
    assert others
    for key in others:
        other, tensors = results[key]
        for name in metrics:
            tolerance = {"rel": 1e-5, "abs": 1e-7} if once else {"rel": 3e-4, "abs": 3e-6}
            if name == "clip_fraction":
                tolerance = {"abs": 0 if once else 0.01}  # a token at the very edge of the clip may fall on either side
            if name == "loss" and once:
                tolerance = {"rel": 1e-5, "abs": 1e-6}  # on-policy it may be rounding alone
            if name == "logp_diff":
                tolerance = {"abs": 1e-6}  # it is rounding itself
            assert other[name] == pytest.approx(metrics[name], **tolerance), (key, name)
        assert distance(tensors, parameters) < 1e-5, key


def test_the_step_does_something(results):
    start = dict(model().named_parameters())
    for (_, case), (metrics, parameters) in results.items():
        changed = any(not torch.equal(start[name], parameters[name]) for name in start)
        if "/equal" in case:
            assert not changed and metrics["grad_norm"] == metrics["loss"] == metrics.get("lam_grad", 0) == 0, case
            continue
        assert metrics["grad_norm"] > 1e-3 and changed, case
        assert (metrics["clip_fraction"] > 0.05) == ("/clip" in case or "/beta" in case), (case, metrics)
        assert metrics["zero_variance"] >= 1 / PROMPTS and metrics["truncated"] == 1 / GROUP
        assert metrics.get("process_set_size", 2) > 1.05 and metrics.get("lam_grad", 1) != 0


def model():
    return copy.deepcopy(tiny())


def test_micro_batches(script, alone):
    """Every row once, at most the budget, at most a sixteenth of it padding; only a row that is longer stands alone."""
    lengths = torch.randint(1, 200, (300,), generator=torch.Generator().manual_seed(0)).tolist() + [700, 5]
    batches = script.micro_batches(lengths, [True] * len(lengths), 640, "cpu")
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        tokens = [lengths[row] for row in rows]
        assert len(rows) == 1 or len(rows) * max(tokens) <= 640 and len(rows) * max(tokens) - sum(tokens) <= 40
    assert script.micro_batches([9] * 10, [True] * 10, 90, "cpu") == [list(range(10))]  # what fits is not cut
    assert script.micro_batches([3, 2, 1, 4], [True, False, False, True], 90, "cpu") == [[0, 3]]
    assert script.micro_batches([3, 2, 1, 4], [False] * 4, 90, "cpu") == [[2]]  # a rank without work has one row


def test_micro_batches_are_cut_at_the_same_places(script, alone, monkeypatch):
    """Another rank has longer rows: both cut where that one has to, and still every row is there once."""
    def of_all_ranks(own, how):
        others = torch.tensor(answers.pop(0))
        own.copy_(torch.maximum(own, others))

    monkeypatch.setattr(script.dist, "all_reduce", of_all_ranks)
    answers = [14, [5] * 8 + [60] * 4 + [90] * 2]
    batches = script.micro_batches([9] * 12 + [40] * 2, [True] * 14, 120, "cpu")
    assert batches == [[*range(8)], [8, 9], [10, 11], [12], [13]]
    answers = [9, [1] * 9]  # its nine rows are short, but there are nine
    batches = script.micro_batches([40] * 3 + [9, 8, 7, 6, 5, 4, 3, 2], [True] * 3 + [False] * 8, 120, "cpu")
    assert sorted(row for rows in batches for row in rows) == [0, 1, 2, 5, 6, 7, 8, 9, 10] and batches[-1] == [0, 1, 2]


def step_and_gradient(script, monkeypatch, **changes):
    """What train returns, and the gradient of its last update as one vector."""
    honest, found = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, limit):
        parameters = list(parameters)
        found[:] = [parameter.grad.full_tensor().flatten() for parameter in parameters]
        return honest(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    return *train(script, **changes), torch.cat(found)


LOSSES = [(name, {"loss": loss}) for name in ("grpo", "grpo_lambda_traces") for loss in ("grpo", "dapo", "dr_grpo")]


@pytest.mark.parametrize("name, flags", [
    *LOSSES, ("grpo", {"updates_per_batch": 3}), ("grpo_lambda_traces", {"variant": "weight"}),
    ("lambda_grpo_learnable", {"lam_init": 0.5}), ("lambda_grpo_learnable", {"updates_per_batch": 3}), ("lambda_grpo_prm", {}),
])
def test_rows_without_advantage_are_left_out(alone, name, flags, monkeypatch):
    """Gradient and parameters are those of a step that keeps all rows, as any β does: here one whose term rounds to 0."""
    script, rows = importlib.import_module(name), []
    honest = script.Policy.forward
    monkeypatch.setattr(script.Policy, "forward", lambda self, *batch: rows.append(len(batch[0])) or honest(self, *batch))
    flags = {"updates_per_batch": 1, **flags, "equal": 3, "lr": 1e-6, "micro_batch_tokens": SMALL}
    metrics, parameters, gradient = step_and_gradient(script, monkeypatch, **flags)
    updates, left = flags["updates_per_batch"], sum(rows)
    expected, others, all_gradient = step_and_gradient(script, monkeypatch, beta=1e-30, **flags)
    assert left == updates * 3 * GROUP and sum(rows) - left == (updates + 1) * PROMPTS * GROUP  # + 1: of the reference
    assert (gradient - all_gradient).norm() < (2e-6 if updates == 1 else 1e-5) * all_gradient.norm()
    assert distance(parameters, others) < 2e-6
    for key in {"reward", "length", "truncated", "zero_variance", "grad_norm", "lam", "lam_grad"} & set(metrics):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.parametrize("name, off, least", [
    ("grpo", {}, float("-inf")), ("grpo_lambda_traces", {"lam": 0.0, "style": "recent"}, -0.1),
])
def test_step_is_the_objective(alone, name, off, least):
    """The first update's gradient norm, from the whole objective in float64 and full logits. The EOS token is trained.

    And of the traces without their trace, which are GRPO with advantages that are not below -0.1.
    """
    import grpo

    prompts, completions, rewards = rollouts(grpo)
    net, total = model().double(), 0
    for p, prompt in enumerate(prompts):
        group = completions[p * GROUP : (p + 1) * GROUP]
        centred = rewards[p].double() - rewards[p].double().mean()
        for i, completion in enumerate(group):
            ids = torch.tensor([prompt + completion.ids])
            logp = net(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
            advantage = (centred[i] / (rewards[p].double().std() + 1e-4)).clamp(min=least)
            total = total - advantage * logp[len(prompt) - 1 :].mean() / (GROUP * PROMPTS)
    total.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).norm().item()
    assert train(importlib.import_module(name), **off)[0]["grad_norm"] == pytest.approx(expected, rel=1e-5)


SWITCHED_OFF = {  # what turns a variant's idea off, and the --loss of grpo.py that is left; the prm's needs distinct prefixes
    "grpo_lambda_traces": ({"lam": 0.0, "style": "recent", "min_advantage": float("-inf")}, "grpo"),
    "lambda_grpo_learnable": ({"lam_lr": 0.0}, "dapo"),
    "lambda_grpo_prm": ({}, "dapo"),
}


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "grpo"])
@pytest.mark.parametrize("updates", [1, 2])
def test_switched_off_it_is_grpo_bit_for_bit(alone, name, updates):
    """The parameters after three steps; and they do differ when the idea is on."""
    import grpo

    script = importlib.import_module(name)
    off, loss = SWITCHED_OFF[name]
    same = {"steps": 3, "shared_prefixes": False, "updates_per_batch": updates, "lr": 1e-5}  # else the sampler is stale
    _, expected = train(grpo, loss=loss, **same)
    _, parameters = train(script, **off, **same)
    assert all(torch.equal(parameters[key], expected[key]) for key in expected)
    if updates == 1:
        on = {"lam_init": 1.0} if name == "lambda_grpo_learnable" else {}
        _, parameters = train(script, **on, **{**same, "shared_prefixes": True})
        _, expected = train(grpo, loss=loss, **{**same, "shared_prefixes": True})
        assert not all(torch.equal(parameters[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", SCRIPTS)
def test_importance_weights_and_the_alarm(alone, name, monkeypatch, capsys):
    """A sampler that reports log-probabilities off by a constant: all gradients scale by exp(-constant), up to the cap."""
    script = importlib.import_module(name)
    honest = rollouts(script)
    off = {"style": "recent", "lam": 0.0} if name == "grpo_lambda_traces" else {}

    def reported(shift):
        """The rollouts with the sampler's log-probabilities shifted."""
        prompts, completions, rewards = honest
        return prompts, [c._replace(logps=[logp + shift for logp in c.logps]) for c in completions], rewards

    def step(shift, **changes):
        monkeypatch.setattr("step_worker.rollouts", lambda *_: reported(shift))
        return train(script, micro_batch_tokens=300, **off, **changes)[0]

    plain = step(0.0, tis_cap=1e9)
    for shift, cap, factor in ((0.0, 2.0, 1.0), (0.4, 2.0, 0.6703), (-0.4, 2.0, 1.4918), (-0.4, 1.2, 1.2)):
        metrics = step(shift, tis_cap=cap)
        assert metrics["tis_mean"] == pytest.approx(factor, rel=1e-3)
        assert metrics["tis_capped"] == pytest.approx(float(cap == 1.2))
        assert metrics["logp_diff"] == pytest.approx(abs(shift), abs=1e-4)
        assert metrics["grad_norm"] == pytest.approx(factor * plain["grad_norm"], rel=1e-3)
    with pytest.raises(SystemExit) as stop:
        step(0.6)
    assert stop.value.code == 1 and "Δ log p" in capsys.readouterr().err


def test_replicas_add_up_their_gradients_once_an_update(alone, script, monkeypatch):
    """Over nodes FSDP's all-reduce is asked for with the last micro-batch of an update, and not before."""
    asked, honest = [], FSDPModule.set_requires_all_reduce
    monkeypatch.setattr(FSDPModule, "set_requires_all_reduce", lambda self, last: asked.append(last) or honest(self, last))
    train(script, micro_batch_tokens=SMALL, updates_per_batch=2, lr=1e-6)
    count = len(asked) // 2
    assert count > 2 and asked == ([False] * (count - 1) + [True]) * 2


def test_lambda_of_the_step_is_the_objectives(alone):
    """λ goes down the slope of the loss, by a difference quotient of the formula: on-policy a token's term is its A."""
    import lambda_grpo_learnable as script

    _, completions, rewards = rollouts(script)
    lengths = [[len(c.ids) for c in completions[p * GROUP : (p + 1) * GROUP]] for p in range(PROMPTS)]

    def loss(lam):
        total = 0.0
        for group, earned in zip(lengths, rewards.double()):
            advantages = (earned - earned.mean()) / (earned.std() + 1e-4)
            mean = sum(group) / GROUP
            std = math.sqrt(sum((length - mean) ** 2 for length in group) / GROUP)
            powers = [math.exp((1 + (length - mean) / std / 9) ** lam) for length in group]
            f = [GROUP * power / sum(powers) for power in powers]
            total -= sum(f[i] * group[i] * advantages[i].item() for i in range(GROUP)) / sum(group) / PROMPTS
        return total

    metrics, _ = train(script, lam_init=0.5, lam_lr=0.1, micro_batch_tokens=SMALL)
    slope = (loss(0.5 + 1e-5) - loss(0.5 - 1e-5)) / 2e-5
    assert abs(slope) > 1e-3 and metrics["lam_grad"] == pytest.approx(slope, rel=1e-4)
    assert metrics["lam"] == pytest.approx(0.5 - 0.1 * slope, rel=1e-5)
