"""A variant of your own: is it grpo.py outside its idea, and right in what every method has to be right in?

    python -m pytest -q tests --script gmpo.py

Runs these tests alone, on a script that began as a copy of grpo.py. What the paper's formula says is still to be tested
by a loop of your own, in float64: test_papers.py has examples.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, launch, metrics
from step_worker import PROMPTS, rollouts, train
from test_drift import first_difference


@pytest.fixture
def path(request):
    path = Path(request.config.option.script).resolve()
    sys.path.insert(0, str(path.parent))
    return path


@pytest.fixture
def variant(path):
    """The script, in a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield importlib.import_module(path.stem)
    dist.destroy_process_group()


def test_outside_its_idea_it_is_grpo(path):
    """Other lines only in the docstring, Args, sections 1 and 2, or marked "# λ:"."""
    difference = first_difference((ROOT / "grpo.py").read_text(), path.read_text(), own_reward=True)
    assert difference is None, difference


def norm_of(parameters):
    return torch.cat([tensor.flatten() for tensor in parameters.values()]).norm()


@pytest.mark.parametrize("updates", [1, 2])
def test_micro_batches_change_nothing(variant, updates):
    """A step with all completions at once, and with one at a time."""
    how = {"updates_per_batch": updates, "lr": 1e-5}
    loss, parameters = train(variant, micro_batch_tokens=10**6, **how)
    other_loss, others = train(variant, micro_batch_tokens=1, **how)
    assert other_loss["loss"] == pytest.approx(loss["loss"], rel=1e-4, abs=1e-6)
    difference = norm_of({name: tensor - others[name] for name, tensor in parameters.items()})
    assert difference < 1e-5 * norm_of(parameters) and loss["grad_norm"] > 0


def test_ranks_change_nothing(path, variant, tmp_path):
    _, parameters = train(variant, micro_batch_tokens=200)
    done = launch(["tests/step_worker.py", tmp_path / "two", f"{path.stem}/own:200"], ranks=2,
                  PYTHONPATH=f"{ROOT}:{path.parent}")
    assert done.returncode == 0, done.stderr[-2000:]
    ((_, others),) = torch.load(tmp_path / "two").values()
    assert norm_of({name: tensor - others[name] for name, tensor in parameters.items()}) < 1e-5 * norm_of(parameters)


def test_equal_rewards_teach_nothing(variant, monkeypatch):
    """A group whose completions all earn the same has no better ones."""
    prompts, completions, rewards = rollouts(variant)
    monkeypatch.setattr("step_worker.rollouts", lambda *_: (prompts, completions, torch.ones_like(rewards)))
    assert train(variant)[0]["grad_norm"] == pytest.approx(0, abs=1e-6) and PROMPTS > 1


def test_the_toy_runs(path, tmp_path):
    done = launch([path, "--steps", 2, "--prompts_per_step", 4, "--eval_dataset", "", "--output_dir", tmp_path / "run"],
                  cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
