"""The benchmark runs, compares only what computes the same, and prints its table. How long things take is not tested."""

import os
import re
from types import SimpleNamespace

import benchmark
import pytest
import torch
from conftest import launch

EXPECTED = (  # parts of rows
    "2048 tokens per micro-batch", "one micro-batch", "whole step, sampling", "whole step, training", "not run: no --trl",
    "half equal: rows left out / kept", "share of that rate: training step",
)


@pytest.mark.long
def test_quick_prints_every_part():
    done = launch(["tests/measure/benchmark.py", "--quick"])
    assert done.returncode == 0, done.stderr[-3000:]
    for text in EXPECTED:
        assert text in done.stdout, text


@pytest.mark.skipif("GRPO_TRL_PYTHON" not in os.environ, reason="GRPO_TRL_PYTHON names no Python that has TRL")
def test_loss_and_gradient_are_those_of_trl():
    done = launch(["tests/measure/benchmark.py", "--quick", "--only", "trl", "--trl", os.environ["GRPO_TRL_PYTHON"]])
    assert done.returncode == 0, done.stderr[-3000:]
    agreements = re.findall(r"(toy|tail), (8|16) rows: .* differs by\s+(\S+) / (\S+)", done.stdout)
    assert len(agreements) == 4
    assert all(float(loss) <= 1e-4 and float(gradient) <= 1e-4 for *_, loss, gradient in agreements)
    sampled = re.search(r"sampled tokens: grpo.py, TRL\s+(\d+) / (\d+)", done.stdout)
    assert int(sampled[1]) == pytest.approx(int(sampled[2]), rel=0.5)  # from other random numbers


def test_agreement_sees_a_wrong_loss_or_gradient():
    ours = 0.5, {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert benchmark.agreement(ours, (0.5, dict(ours[1]))) == (0, 0)
    loss, gradient = benchmark.agreement((0.6, {**ours[1], "b": torch.tensor([[4.005]])}), ours)
    assert loss == pytest.approx(0.1) and gradient == pytest.approx(0.001, rel=1e-3)
    with pytest.raises(KeyError):
        benchmark.agreement(ours, (0.5, {"a": ours[1]["a"]}))


def test_a_pair_that_disagrees_is_not_timed(tmp_path, alone, capsys):
    """A trainer with another gradient ends the comparison before a second is reported."""
    batch, kept = benchmark.made_up(2, 2, lambda _: 5), {}
    step = benchmark.training_step("grpo", batch, kept)

    def ask(gradients, **_):
        loss = step()["loss"]
        torch.save((loss, {name: 2 * gradient for name, gradient in kept.items()}), gradients)

    with pytest.raises(SystemExit):
        benchmark.compare_steps("toy", batch, {4: SimpleNamespace(ask=ask)}, 2, tmp_path)
    said = capsys.readouterr()
    assert "gradient by 5.0e-01; not timed" in said.err and not said.out


def test_a_row_has_median_and_quartiles(capsys):
    benchmark.row("sets", "four", [4.0, 1.0, 2.0, 3.0, 9.0], "s")
    assert capsys.readouterr().out.split() == ["sets", "four", "3", "s", "2", "to", "4"]


@pytest.mark.parametrize("arguments, message", [
    (["--only", "trl", "x"], "invalid choice: 'x'"),
    (["--repetitions", "1"], "must be at least 2"),
])
def test_bad_options_end_with_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
