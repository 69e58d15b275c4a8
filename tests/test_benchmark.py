"""The benchmark runs, compares only what computes the same, and prints its table. How long things take is not tested."""

import os
import re
from types import SimpleNamespace

import benchmark
import pytest
import torch
import torch.distributed as dist
from conftest import launch

EXPECTED = {  # what each part's rows must say something of
    "a": ("2048 tokens a micro-batch", "one micro-batch", "whole step, sampling", "whole step, training", "syncing"),
    "b": ("lambda_grpo_learnable.py / grpo.py", "lambda_grpo_prm.py / grpo.py", "grpo_lambda_traces.py / grpo.py"),
    "c": ("time: chunks / full", "memory: chunks / full"),
    "d": ("time: matrix / trace", "memory: trace / matrix"),
    "e": ("trie / process_set_sizes",),
    "f": ("exponent in prompts", "exponent in group size", "exponent in a rank's work", "attention's share"),
    "g": ("on a GPU",),
}


def rows(output):
    """(part, what, median) of the printed table, its head aside."""
    lines = [line for line in output.splitlines() if re.match(r"[a-g] {5}\S", line)]
    return [(line[0], line[6:76].strip(), line[76:].split("  ")[0].strip() or line[76:].strip()) for line in lines]


@pytest.mark.long
def test_quick_prints_every_part():
    halves = [launch(["tests/benchmark.py", "--quick", "--only", only], wait=False) for only in ("a,b,e,g", "c,d,f")]
    found = {part: [] for part in EXPECTED}
    for half in halves:
        output, errors = half.communicate(timeout=300)
        assert half.returncode == 0, errors[-3000:]
        assert "DOES NOT HOLD" not in output and "not judged" in output  # quick figures are never judged
        for part, what, median in rows(output):
            found[part].append(what)
            assert median
    for part, names in EXPECTED.items():
        for name in names:
            assert any(name in what for what in found[part]), (part, name, found[part])
    if not torch.cuda.is_available():
        assert len(found["g"]) == 1


@pytest.mark.skipif("GRPO_TRL_PYTHON" not in os.environ, reason="GRPO_TRL_PYTHON names no Python that has TRL")
def test_loss_and_gradient_are_those_of_trl():
    done = launch(["tests/benchmark.py", "--quick", "--only", "a", "--trl", os.environ["GRPO_TRL_PYTHON"]])
    assert done.returncode == 0, done.stderr[-3000:]
    agreements = re.findall(r"(toy|tail), (grpo|dr_grpo): .* differs by\s+(\S+) / (\S+)", done.stdout)
    assert len(agreements) == 4
    assert all(float(loss) <= 1e-4 and float(gradient) <= 1e-4 for *_, loss, gradient in agreements)
    sampled = re.search(r"sampled tokens: grpo.py, TRL\s+(\d+) / (\d+)", done.stdout)
    assert sampled[1] == sampled[2]


def test_agreement_sees_a_wrong_loss_or_gradient():
    ours = 0.5, {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert benchmark.agreement(ours, (0.5, dict(ours[1]))) == (0, 0)
    loss, gradient = benchmark.agreement((0.6, {**ours[1], "b": torch.tensor([[4.005]])}), ours)
    assert loss == pytest.approx(0.1) and gradient == pytest.approx(0.001, rel=1e-3)
    with pytest.raises(ValueError, match="not the same parameters: b"):
        benchmark.agreement(ours, (0.5, {"a": ours[1]["a"]}))


@pytest.fixture
def mesh():
    yield benchmark.alone()
    dist.destroy_process_group()


def test_what_disagrees_is_not_timed(tmp_path, mesh):
    """A trainer whose gradient is another one ends the comparison before a second is reported."""
    batch, kept, table = benchmark.made_up(2, 2, 5), {}, benchmark.Table(quick=True)
    step, _ = benchmark.training_step("grpo", batch, gradients=kept)

    def ask(gradients, **_):
        loss = step()["loss"]
        torch.save((loss, {name: 2 * gradient for name, gradient in kept.items()}), gradients)

    with pytest.raises(RuntimeError, match="gradient by 5.0e-01; not timed"):
        trainers = {4: SimpleNamespace(ask=ask)}
        benchmark.compare_steps(table, "toy", "toy", batch, 2048, trainers, 2, tmp_path)
    assert not table.rows


def test_the_table_judges_by_the_median(capsys):
    table = benchmark.Table(quick=False)
    table.add("b", "low", [0.9, 1.0, 3.0], "", ("≤", 1.03))
    table.add("d", "high", [4.0, 4.5, 9.0], "", ("≥", 5))
    table.add("e", "one", 2.0, "s")
    assert [row[4] for row in table.rows] == ["≤ 1.03: holds", "≥ 5: DOES NOT HOLD", ""]
    assert [row[2:4] for row in table.rows] == [("1", "0.95 to 2"), ("4.5", "4.25 to 6.75"), ("2 s", "")]
    assert rows(capsys.readouterr().out)[2] == ("e", "one", "2 s")


def test_trie_and_exponent():
    assert benchmark.by_trie([["ABC", "ABD", "AE"]]) == [[[3, 2, 1], [3, 2, 1], [3, 1]]]
    assert benchmark.exponent((1, 2, 4), (3, 12, 48)) == pytest.approx(2)


@pytest.mark.parametrize("arguments, message", [
    (["--only", "a,x"], "there is no part x"),
    (["--only", "a", "--trl", os.devnull], "--trl"),
    (["--repetitions", "1"], "must be at least 2"),
])
def test_bad_options_end_with_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
