"""compare.py, run with tiny settings: its table and curves hold what the runs' metrics.jsonl say."""

import argparse
import json
from importlib.util import find_spec
from itertools import product

import pytest
from conftest import ROOT

import compare


def start(folder, *flags):
    """compare.py with tiny settings, as its command line would; in this process, for time."""
    settings = "--seeds 1 --sweep_seeds 0 --rates 1e-4 --steps 2 --prompts_per_step 1 --model_steps 2".split()
    with pytest.MonkeyPatch.context() as patch:
        paths = [f"--output={folder}", f"--picture={folder}/curves.png"]
        patch.setattr("sys.argv", ["compare.py", *settings, *paths, *flags])
        compare.main()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A folder in which all six have run two steps of both tasks."""
    folder = tmp_path_factory.mktemp("compare")
    start(folder)
    return folder


def rows_of(output, task, method):
    """The metrics of a run, read without compare.py."""
    folders = {"grpo.py --loss dapo": "grpo-dapo", "grpo_lambda_traces.py --min_advantage=-inf": "grpo_lambda_traces-inf"}
    (path,) = output.glob(f"{task}/{folders.get(method, method[:-3])}/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_table_is_the_runs(output):
    lines = [line.split(" | ") for line in (output / "table.md").read_text().splitlines() if "`" in line]
    every = product(compare.TASKS, compare.METHODS)
    assert [(line[0], line[1]) for line in lines] == [(f"| {task}", f"`{method}`") for task, method in every]
    for line in lines:
        task, method = line[0][2:], line[1].strip("`")
        rows = rows_of(output, task, method)
        base = rows_of(output, task, "grpo.py")
        final = [sum(row[key] for row in rows) / 2 for key in ("reward", "length", "entropy")]
        difference = final[0] - sum(row["reward"] for row in base) / 2
        assert [row["step"] for row in rows] == [1, 2] and rows[0]["lr"] < 1e-4
        assert line[2:4] == ["0.0001", "not in 2"]
        assert line[4:6] == [f"{final[0]:.3f}"] * 2
        assert line[6].strip() == ("" if method == "grpo.py" else f"{difference:+.3f}")
        assert line[7:9] == [f"{final[1]:.1f}", f"{final[2]:.3f}"]


def test_the_curves_are_the_runs(output):
    args = argparse.Namespace(output=output, tasks=list(compare.TASKS), seeds=1, sweep_seeds=0, rates=[1e-4])
    found = compare.results(args)
    for task, method in product(compare.TASKS, compare.METHODS):
        rows = rows_of(output, task, method)
        own = {"lambda_grpo_learnable.py": ["lam"], "lambda_grpo_prm.py": ["path_depth"]}.get(method, [])
        for key in ["reward", "length", "entropy", "grad_norm", *own]:
            centre, _ = compare.curve(found[task][method], key)
            assert list(centre) == pytest.approx([row[key] for row in rows])


def test_steps_to_target_and_intervals():
    rewards = [0.9, 0.2, 0.6, 0.75, 0.8, 0.9]  # means of three: .567, .517, .717
    assert compare.steps_to_target([{"reward": reward} for reward in rewards]) == 5
    assert compare.steps_to_target([{"reward": 0.69}] * 9) is None
    assert compare.plus_minus([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"  # 4.30 · 1 / √3
    assert list(compare.curve([[{"lam": 1.0}], [{"lam": 3.0}]], "lam"))[0] == (2.0,)


def test_finished_runs_are_not_repeated_and_others_not_mixed_in(output, capsys):
    before = {path: path.stat().st_mtime_ns for path in output.rglob("metrics.jsonl")}
    start(output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("metrics.jsonl")} == before and len(before) == 12
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        start(output, "--steps", "3")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: --output") and said.count("\n") == 1


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed: only the picture needs it")
def test_the_picture_is_drawn(output):
    picture = output / "curves.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size < 200_000


def test_the_picture_in_git_is_small():
    assert (ROOT / "tests" / "compare.png").stat().st_size <= 200_000
