"""compare.py, run with tiny settings: its table and curves hold what the runs' metrics.jsonl say."""

import argparse
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT

import compare


ARGS = argparse.Namespace(methods=None, seeds=1, sweep_seeds=0, rates=[1e-4], tasks=["tree"])


def start(folder, *flags):
    """compare.py with tiny settings, as its command line would, on its shortest task."""
    settings = "--seeds 1 --sweep_seeds 0 --rates 1e-4 --steps 2 --model_steps 2 --jobs 1 --tasks tree".split()
    with pytest.MonkeyPatch.context() as patch:
        paths = [f"--output={folder}", f"--picture={folder}/curves.png"]
        patch.setattr("sys.argv", ["compare.py", *settings, *paths, *flags])
        threads = torch.get_num_threads()
        compare.main()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A folder in which the six methods have run two steps."""
    folder = tmp_path_factory.mktemp("compare")
    start(folder)
    return folder


def rows_of(output, task, method):
    """The metrics of a run, read without compare.py; folders are named after the command without .py, spaces and =."""
    (path,) = output.glob(f"{task}/{method.replace('.py', '').replace(' --', '-').replace(' ', '-').replace('=-', '-')}/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_teaches_the_same_model(tmp_path):
    """Whatever the number of threads it starts with: the figures come from these models."""
    before, models = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        compare.teach(tmp_path / str(threads), compare.TASKS["far"].answer, 5)
        models.append((tmp_path / str(threads) / "model.safetensors").read_bytes())
    torch.set_num_threads(before)
    assert models[0] == models[1]


@pytest.mark.long
def test_the_table_is_the_runs(output):
    text = (output / "table.md").read_text()
    lines = [line.split(" | ") for line in text.partition("The methods' own")[0].splitlines() if "`" in line]
    every = [(task, method) for task in ["tree"] for method in compare.methods_of(ARGS, task)]
    assert [(line[0], line[1]) for line in lines] == [(f"| {task}", f"`{method}`") for task, method in every]
    assert len(every) == 6 and len(compare.methods_of(ARGS, "toy")) == 11 and len(compare.methods_of(ARGS, "far")) == 13
    for line in lines:
        rows = rows_of(output, line[0][2:], line[1].strip("`"))
        final = [sum(row[key] for row in rows) / 2 for key in ("reward", "length")]
        assert [row["step"] for row in rows] == [1, 2] and rows[0]["lr"] < 1e-4
        assert line[2:4] == ["0.0001", "not in 2"]
        assert line[4:7] == [f"{final[0]:.3f}", f"{final[0]:.3f}", f"{final[1]:.1f}"]


@pytest.mark.long
def test_the_length_of_wrong_answers(output):
    """In tokens, of what earns less than 1; on the tree nearly all does, so it is the mean length, perhaps without the end."""
    ARGS.output = output
    for rows in compare.results(ARGS)["tree"]["grpo.py"]:
        assert all(-0.1 < row["length"] - row["wrong_length"] < 1.1 for row in rows)
    rewards_of = compare.recording(None, compare.tree_reward, output / "wrong")
    assert rewards_of(["++=+", "++\\boxed{=", "="], [{"problem": ""}] * 3) == [1.0, -0.5, 0.7]
    assert json.loads((output / "wrong").read_text()) == {"wrong_length": 2.5}
    assert [compare.tree_reward(text, "") for text in ("++=+", "++=", "+=++", "++=++")] == [1.0, -0.5, 0.7, -0.5]


def test_the_comparisons_pair_the_seeds():
    """Against grpo.py with as many updates, and the λ-GRPOs also against dapo; the differences are seed by seed."""
    row = {"length": 1, "entropy": 0, "wrong_length": None}
    runs = {"grpo.py": [0.1, 0.3], "grpo.py --loss dapo": [0.2, 0.2], "lambda_grpo_prm.py": [0.4, 0.5],
            "grpo.py --updates_per_batch 3": [0.0, 0.5], "grpo_lambda_traces.py --updates_per_batch 3": [0.25, 0.5]}
    found = {"far": {method: [[{**row, "reward": value}] for value in values] for method, values in runs.items()}}
    pairs = {(method, base): early for _, method, base, early, _ in compare.comparisons(found)}
    assert pairs == {
        ("grpo.py --loss dapo", "grpo.py"): pytest.approx([0.1, -0.1]),
        ("lambda_grpo_prm.py", "grpo.py"): pytest.approx([0.3, 0.2]),
        ("lambda_grpo_prm.py", "grpo.py --loss dapo"): pytest.approx([0.2, 0.3]),
        ("grpo_lambda_traces.py --updates_per_batch 3", "grpo.py --updates_per_batch 3"): pytest.approx([0.25, 0.0]),
    }


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed: only the picture needs it")
def test_many_methods_are_drawn_as_differences(tmp_path, monkeypatch):
    """A line per method, in their order, at the mean of its differences."""
    row, drawn = {"length": 1, "entropy": 0, "wrong_length": None}, []
    rewards = {"grpo.py": [0.1, 0.3], "krpo.py": [0.2, 0.3], "pods.py --keep 4": [0.1, 0.1]}
    found = {"toy": {method: [[{**row, "reward": value}] for value in values] for method, values in rewards.items()}}
    monkeypatch.setattr(compare, "save_picture", lambda figure, path: drawn.append(figure))
    compare.draw_differences(argparse.Namespace(picture=tmp_path / "x.png"), found)
    (axis,) = drawn[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["krpo.py", "pods.py --keep 4"]
    points = [line.get_xydata()[0].tolist() for line in axis.lines if line.get_marker() == "o"]
    assert points == [pytest.approx([0.05, 0]), pytest.approx([-0.1, 1])]


def test_p_values_and_holms_correction():
    """t = 2 / (1 / √3) = 3.46 with two degrees of freedom; Holm: .01·4, .02·3, then never less than the one before."""
    assert compare.p_value([1.0, 2.0, 3.0]) == pytest.approx(0.07418, abs=1e-5)
    assert compare.holm([0.03, 0.01, 0.02, 0.5]) == pytest.approx([0.06, 0.04, 0.06, 0.5])
    assert compare.interval([float(value) for value in range(20)])[1] == pytest.approx(2.0930 * 5.9161 / 20**0.5, rel=1e-4)


def test_steps_to_target_and_intervals():
    rewards = [0.9, 0.2, 0.6, 0.75, 0.8, 0.9]  # means of three: .567, .517, .717
    assert compare.steps_to_target([{"reward": reward} for reward in rewards], 0.7) == 5
    assert compare.steps_to_target([{"reward": reward} for reward in rewards], 0.8) == 6
    assert compare.steps_to_target([{"reward": 0.69}] * 9, 0.7) is None
    assert compare.plus_minus([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"  # 4.30 · 1 / √3
    assert list(compare.curve([[{"lam": 1.0}], [{"lam": 3.0}]], "lam"))[0] == (2.0,)


@pytest.mark.long
def test_finished_runs_are_not_repeated_and_others_not_mixed_in(output, capsys):
    before = {path: path.stat().st_mtime_ns for path in output.rglob("metrics.jsonl")}
    start(output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("metrics.jsonl")} == before and len(before) == 6
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        start(output, "--steps", "3")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: --output") and said.count("\n") == 1


def test_a_script_of_ones_own(tmp_path, monkeypatch, capsys):
    """It is known when it lies beside grpo.py; runs that it made before it was changed are not taken for its own."""
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    script = tmp_path / "mine.py"

    def parse(method):
        monkeypatch.setattr("sys.argv", ["compare.py", "--methods", method, "--output", str(tmp_path / "runs")])
        return compare.parse_args()

    script.write_text("1")
    assert parse("mine.py --lr 1").picture == tmp_path / "runs" / "compare.png"
    parse("mine.py --lr 1")
    script.write_text("2")
    for method, message in [("mine.py --lr 1", "holds runs"), ("yours.py", "beside grpo.py"), ("./mine.py", "beside grpo.py")]:
        with pytest.raises(SystemExit):
            parse(method)
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_papers_patch_beside_grpo(tmp_path, capsys):
    start(tmp_path, "--tasks", "toy", "--methods", "gspo.py --clip_high 0.1", "lambda_grpo_prm.py")
    lines = [line.split(" | ")[1] for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| toy")]
    assert lines[:3] == ["`grpo.py`", "`gspo.py --clip_high 0.1`", "`lambda_grpo_prm.py`"]
    assert (tmp_path / "toy" / "gspo-clip_high-0.1" / "lr0.0001-seed300" / "metrics.jsonl").exists()
    with pytest.raises(SystemExit):
        start(tmp_path, "--methods", "ppo.py")
    assert "--methods 'ppo.py'" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed: only the picture needs it")
def test_the_pictures_are_drawn(output, monkeypatch):
    """That of the comparison, and the curves of any runs."""
    runs = [str(path.parent) for path in output.glob("tree/*/*/metrics.jsonl")]
    monkeypatch.setattr("sys.argv", ["compare.py", "--draw", *runs[:2], "--picture", str(output / "new" / "two.png")])
    compare.main()
    for picture in (output / "curves.png", output / "new" / "two.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size < 200_000


@pytest.mark.parametrize("matplotlib, message", [(True, "error: --draw"), (False, "error: a picture needs a package")])
def test_curves_that_cannot_be_drawn(matplotlib, message, tmp_path, monkeypatch, capsys):
    """One line of error: for a folder without metrics, or without matplotlib."""
    if not matplotlib:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    elif not find_spec("matplotlib"):
        pytest.skip("matplotlib is not installed")
    monkeypatch.setattr("sys.argv", ["compare.py", "--draw", str(tmp_path), "--picture", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit):
        compare.main()
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_the_picture_in_git_is_small():
    assert (ROOT / "tests" / "measure" / "compare.png").stat().st_size <= 200_000
