"""pretrained.py with the tiny model and tiny settings: its table and curves hold what the runs' files say."""

import argparse
import json
import random
import shutil
from importlib.util import find_spec

import pytest
from conftest import ROOT, SCRIPTS, TINY

import pretrained

SETTINGS = "--steps 2 --prompts_per_step 1 --group_size 4 --max_new_tokens 4 --samples 2 --warmup_steps 2".split()


def start(folder, *flags):
    """pretrained.py as its command line would, with its runs in this process, which saves their start."""
    def in_turn(function, cases, jobs, title):
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
    return {path: path.stat().st_mtime_ns for path in output.glob("*/held_out.json")}


@pytest.mark.long
def test_each_script_runs_with_equal_flags_and_our_reward(output):
    runs = [json.loads((output / script / "args.json").read_text()) for script in SCRIPTS]
    assert [run["script"] for run in runs] == SCRIPTS
    for run in runs:
        assert [run[flag] for flag in ("steps", "group_size", "max_new_tokens", "lr", "seed")] == [2, 4, 4, 4e-5, 0]
    trained = {row["problem"] for row in pretrained.make_problems()[0]}
    problems = [[json.loads(line)["problem"] for line in open(output / script / "samples.jsonl")] for script in SCRIPTS]
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
    write_runs(tmp_path, steps=2)
    shutil.rmtree(tmp_path / "grpo")
    flags = [f"--model={TINY}", f"--output={tmp_path}", *SETTINGS, "--lr=-1"]
    monkeypatch.setattr("sys.argv", ["pretrained.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        pretrained.main()
    said = capfd.readouterr().err
    assert stopped.value.code == 1 and "error: grpo.py --steps=2" in said and "--lr must be from 0" in said
    assert not (tmp_path / "grpo").exists()


def test_problems_are_disjoint_and_right():
    train, held_out = pretrained.make_problems()
    terms = [[tuple(sorted(map(int, row["problem"][8:-1].split(" * ")))) for row in part] for part in (train, held_out)]
    assert not set(terms[0]) & set(terms[1]) and len(set(terms[0]) | set(terms[1])) == 66
    assert len(held_out) == 33 and len(train) + 33 == len({row["problem"] for row in train + held_out})
    for (a, b), row in zip(terms[0] + terms[1], train + held_out):
        assert row["answer"] == str(a * b)


def test_reward_is_the_last_number():
    texts = ["7 * 8 is 56.", "56, not 54", "56.5", "-56", "none", "**56**", "1 and\n56"]
    assert pretrained.rewards_of(texts, [{"answer": "56"}] * 7, None) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def write_runs(folder, steps):
    """Runs with random figures; what was written, by script."""
    generator, figures = random.Random(0), {}
    for name in ["start", *SCRIPTS]:
        (folder / name).mkdir()
        judged = {kind: [generator.random() for _ in range(6)] for kind in ("greedy", "sampled")}
        keys = ("reward", "length", "seconds_sampling", "seconds_training")
        rows = [{"step": step, **{key: 100 * generator.random() for key in keys}} for step in range(1, steps + 1)]
        (folder / name / "held_out.json").write_text(json.dumps(judged))
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        figures[name] = rows, judged
    return figures


def test_the_table_and_the_curves_are_the_runs(tmp_path):
    figures = write_runs(tmp_path, steps=12)
    args = argparse.Namespace(output=tmp_path, steps=12, samples=2)
    start, found = pretrained.results(args)
    lines = [line.strip("| ").split(" | ") for line in pretrained.table(args, start, found).splitlines() if "`" in line]
    assert [line[0] for line in lines] == [f"`{script}.py`" for script in SCRIPTS]
    for script, line in zip(SCRIPTS, lines):
        rows, judged = figures[script]
        first, last = ({key: sum(row[key] for row in part) / 5 for key in rows[0]} for part in (rows[:5], rows[7:]))
        ends = figures["start"][1], judged
        before, after = ({kind: sum(values) / 6 for kind, values in end.items()} for end in ends)
        assert line[1] == f"{first['reward']:.3f} → {last['reward']:.3f}"
        assert line[2] == f"{before['sampled']:.3f} → {after['sampled']:.3f}"
        assert line[3].startswith(f"{after['sampled'] - before['sampled']:+.3f} ± ")
        assert line[4] == f"{before['greedy']:.3f} → {after['greedy']:.3f}"
        assert line[5] == f"{first['length']:.1f} → {last['length']:.1f}"
        assert line[6] == f"{sum(row['seconds_sampling'] + row['seconds_training'] for row in rows) / 60:.0f}"
        curve = pretrained.curve(found[script][0], "reward")
        assert len(curve) == 12 and curve[0] == rows[0]["reward"]
        assert curve[6] == pytest.approx(sum(row["reward"] for row in rows[2:7]) / 5)


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed: only the picture needs it")
@pytest.mark.long
def test_the_picture_is_drawn(output):
    picture = output / "curves.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size < 120_000


def test_the_picture_in_git_is_small():
    assert (ROOT / "tests" / "measure" / "pretrained.png").stat().st_size <= 120_000
