"""One training step: whatever the micro-batches and the number of ranks, the same loss, gradient norm and parameters."""

import pytest
import torch
from conftest import SCRIPTS, TINY, launch
from step_worker import GROUP, PROMPTS, VARIANTS, rollouts

WHOLE, SMALL, ONE = 10**6, 200, 1  # tokens a micro-batch: all at once, a few rows, one completion


@pytest.fixture(scope="module", params=SCRIPTS)
def results(request, tmp_path_factory):
    """{(ranks, case): (metrics, parameters)}; the world of one rank makes all at once what the others cut up."""
    folder, found = tmp_path_factory.mktemp("step"), {}
    for ranks in (1, 2, 3):
        budgets = {1: (WHOLE, ONE), 2: (SMALL,), 3: (SMALL,)}[ranks]
        cases = [f"{variant}:{budget}" for variant in VARIANTS for budget in budgets]
        done = launch(["tests/step_worker.py", folder / str(ranks), request.param, *cases], ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        for case, result in torch.load(folder / str(ranks)).items():
            found[ranks, case] = result
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_step_however_computed(results, variant):
    metrics, parameters = results[1, f"{variant}:{WHOLE}"]
    norm = torch.cat([tensor.flatten() for tensor in parameters.values()]).norm()
    others = [key for key in results if key[1].startswith(variant + ":") and key != (1, f"{variant}:{WHOLE}")]
    assert len(others) == 3
    for key in others:
        other, tensors = results[key]
        assert [name for name in other if other[name] is None] == ["tis_mean", "tis_capped", "logp_diff"]  # no vLLM here
        for name in metrics.keys() - {"tis_mean", "tis_capped", "logp_diff"}:
            assert other[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), (key, name)
        difference = torch.cat([(tensors[name] - parameters[name]).flatten() for name in parameters]).norm()
        assert difference < 1e-5 * norm, (key, difference / norm)


def test_the_step_does_something(results):
    start = {name: tensor for name, tensor in model().named_parameters()}
    for (ranks, case), (metrics, parameters) in results.items():
        assert metrics["grad_norm"] > 1e-3, case
        assert any(not torch.equal(start[name], parameters[name]) for name in parameters), case
        assert (metrics["clip_fraction"] > 0.1) == case.startswith("clip"), (case, metrics)
        assert metrics["zero_variance"] >= 1 / PROMPTS and metrics["truncated"] == 1 / GROUP


def model():
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def test_step_is_the_objective():
    """The first update's gradient norm, from the whole objective in float64 and full logits. The EOS token is trained."""
    import grpo

    prompts, completions, rewards = rollouts(grpo)
    net, total = model().double(), 0
    for p, prompt in enumerate(prompts):
        group = completions[p * GROUP : (p + 1) * GROUP]
        centred = rewards[p].double() - rewards[p].double().mean()
        for i, completion in enumerate(group):
            ids = torch.tensor([prompt + completion.ids])
            logp = net(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
            advantage = centred[i] / (rewards[p].double().std() + 1e-4)
            total = total - advantage * logp[len(prompt) - 1 :].mean() / (GROUP * PROMPTS)
    total.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).norm().item()
    assert measured_norm(grpo) == pytest.approx(expected, rel=1e-5)


def measured_norm(script):
    """The gradient norm of one GRPO step on the rollouts, in this process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        prompts, completions, rewards = rollouts(script)
        args = script.Args(**{**script.TOY, "prompts_per_step": PROMPTS})
        policy = script.load_policy(args, init_device_mesh("cpu", (1,)), torch.device("cpu"), prompts[0])
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
        return script.train_step(policy, None, optimizer, args, prompts, completions, rewards)["grad_norm"]
    finally:
        dist.destroy_process_group()
