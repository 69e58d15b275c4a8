"""pretrained.py with the tiny model and tiny settings: its table and curves hold what the runs' files say."""

import argparse
import itertools
import json
import random
import shutil
import statistics
from importlib.util import find_spec

import pytest
from conftest import ROOT, SCRIPTS, TINY

import pretrained

SETTINGS = "--seeds 1 --steps 2 --prompts_per_step 1 --group_size 4 --max_new_tokens 4 --samples 2 --warmup_steps 2".split()


def start(folder, *flags):
    """pretrained.py as its command line would, with its runs in this process, which saves their start."""
    def in_turn(function, cases, jobs, title, done):
        for case in cases:
            function(*case)

    with pytest.MonkeyPatch.context() as patch:
        paths = [f"--model={TINY}", f"--output={folder}", f"--picture={folder}/curves.png"]
        patch.setattr("sys.argv", ["pretrained.py", *paths, *SETTINGS, *flags])
        patch.setattr(pretrained, "run_cases", in_turn)
        pretrained.main()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A folder with all runs, table and picture."""
    folder = tmp_path_factory.mktemp("pretrained")
    start(folder)
    return folder


def finished(output):
    return {path: path.stat().st_mtime_ns for path in output.glob("*/*/held_out.json")}


@pytest.mark.long
def test_each_script_runs_with_equal_flags_and_our_reward(output):
    runs = [json.loads((output / "seed0" / script / "args.json").read_text()) for script in SCRIPTS]
    assert [run["script"] for run in runs] == SCRIPTS
    for run in runs:
        assert [run[flag] for flag in ("steps", "group_size", "max_new_tokens", "lr", "seed")] == [2, 4, 4, 4e-5, 0]
    trained = {row["problem"] for row in pretrained.make_problems()[0]}
    problems = [[json.loads(line)["problem"] for line in open(output / "seed0" / script / "samples.jsonl")] for script in SCRIPTS]
    assert problems[0] == problems[1] == problems[2] == problems[3] and set(problems[0]) <= trained


@pytest.mark.long
def test_finished_runs_are_not_repeated_and_others_not_mixed_in(output, capsys):
    before = finished(output)
    start(output)
    assert finished(output) == before and len(before) == 5
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        start(output, "--steps", "3")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: --output") and said.count("\n") == 1


@pytest.mark.long
def test_a_run_that_fails_is_named_in_one_line(tmp_path, monkeypatch, capfd):
    """In a process of its own, as from the shell."""
    write_runs(tmp_path, 1, steps=2)
    shutil.rmtree(tmp_path / "seed0" / "grpo")
    flags = [f"--model={TINY}", f"--output={tmp_path}", *SETTINGS, "--lr=-1"]
    monkeypatch.setattr("sys.argv", ["pretrained.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        pretrained.main()
    said = capfd.readouterr().err
    assert stopped.value.code == 1 and "error: grpo.py --steps=2" in said and "--lr must be from 0" in said
    assert not (tmp_path / "seed0" / "grpo").exists()


def test_problems_are_disjoint_and_right():
    train, held_out = pretrained.make_problems()
    terms = [[tuple(sorted(map(int, row["problem"][8:-1].split(" * ")))) for row in part] for part in (train, held_out)]
    assert not set(terms[0]) & set(terms[1]) and len(set(terms[0]) | set(terms[1])) == 66
    assert len(held_out) == 33 and len(train) + 33 == len({row["problem"] for row in train + held_out})
    for (a, b), row in zip(terms[0] + terms[1], train + held_out):
        assert row["answer"] == str(a * b)


def test_reward_is_the_last_number():
    texts = ["7 * 8 is 56.", "56, not 54", "56.5", "-56", "none", "**56**", "1 and\n56"]
    assert pretrained.rewards_of(texts, [{"answer": "56"}] * 7) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def write_runs(folder, seeds, steps):
    """Runs with random figures; what was written, by script, one per seed."""
    generator, figures = random.Random(0), {}
    for seed, name in itertools.product(range(seeds), ["start", *SCRIPTS]):
        run = folder / f"seed{seed}" / name
        run.mkdir(parents=True)
        judged = {kind: generator.random() for kind in ("greedy", "sampled")}
        rows = [{"step": step, **{key: 100 * generator.random() for key in ("reward", "length")}} for step in range(1, steps + 1)]
        (run / "held_out.json").write_text(json.dumps(judged))
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        figures.setdefault(name, []).append((rows, judged))
    return figures


def test_the_table_and_the_curves_are_the_runs(tmp_path):
    figures = write_runs(tmp_path, 3, steps=12)
    args = argparse.Namespace(output=tmp_path, steps=12, samples=2, seeds=3)
    found = pretrained.results(args)
    text = pretrained.table(args, found)
    assert f"before it {sum(end['sampled'] for _, end in figures['start']) / 3:.3f} sampled" in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if "`" in line]
    assert [line[0] for line in lines] == [f"`{script}.py`" for script in SCRIPTS]
    for script, line in zip(SCRIPTS, lines):
        for key, cell, digits in (("reward", line[1], 3), ("length", line[2], 1)):
            last = sum(row[key] for rows, _ in figures[script] for row in rows[7:]) / 15
            assert cell.startswith(f"{last:.{digits}f} ± ")
        for kind, cell in zip(("greedy", "sampled"), line[3:]):
            assert cell.startswith(f"{sum(end[kind] for _, end in figures[script]) / 3:.3f} ± ")
        if script != "grpo":  # by hand: the t-distribution with two degrees of freedom has a closed form
            pairs = [own["sampled"] - base["sampled"] for (_, own), (_, base) in zip(figures[script], figures["grpo"])]
            center, error = statistics.fmean(pairs), statistics.stdev(pairs) / 3**0.5
            t = abs(center) / error
            assert line[5] == f"{center:+.3f} ± {4.302653 * error:.3f}" and line[6] == f"{1 - t / (2 + t * t) ** 0.5:.4f}"
        curve = pretrained.curve(found[script], "reward")
        assert len(curve) == 12
        windows = [sum(row["reward"] for row in rows[2:7]) / 5 for rows, _ in figures[script]]
        expected = statistics.fmean(windows), 4.302653 * statistics.stdev(windows) / 3**0.5
        assert [float(value) for value in curve[6]] == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed: only the picture needs it")
@pytest.mark.long
def test_the_picture_is_drawn(output):
    picture = output / "curves.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size < 120_000


def test_the_picture_in_git_is_small():
    assert (ROOT / "tests" / "measure" / "pretrained.png").stat().st_size <= 120_000
