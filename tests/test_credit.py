"""credit.py: its coefficients against loops in float64 and against the scripts' own training step, and its pictures."""

import dataclasses
import importlib
import json
import math
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import SCRIPTS, TINY
from step_worker import logps_of

import credit

drawn = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib, which requirements.txt leaves out")
IDS = [[5, 6, 7, 8, 9, 0], [5, 6, 7, 3, 0], [5, 6, 2, 4, 4, 4, 4, 0], [9, 0], [9, 0], [5, 6, 7]]  # 7 tokens are shared
REWARDS = [1.0, 0.0, 0.5, 0.0, 1.0, 0.0]
CASES = [  # script, flags
    ("grpo", {}), ("grpo", {"loss": "dapo"}), ("grpo", {"loss": "dr_grpo", "max_new_tokens": 9}),
    *(("grpo_lambda_traces", {"style": style, "variant": variant, "lam": 0.8, "gamma": 0.9})
      for style in ("recent", "both") for variant in ("trace", "weight")),
    ("grpo_lambda_traces", {"min_advantage": -math.inf, "loss": "dapo"}),
    ("lambda_grpo_learnable", {"lam_init": 5.0}), ("lambda_grpo_learnable", {"lam_init": -1.0, "length_scale": 0.2}),
    ("lambda_grpo_prm", {}),
]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_hand(script, args, ids, rewards, lam=None):
    """The coefficients, from the papers' formulas: [G][tokens]."""
    size, total, mean = len(ids), sum(map(len, ids)), sum(rewards) / len(rewards)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (size - 1))
    average = total / size
    spread = math.sqrt(sum((len(row) - average) ** 2 for row in ids) / size)
    lam = lam if lam is not None else getattr(args, "lam_init", None)
    if script == "lambda_grpo_learnable":
        powers = [math.exp((1 + args.length_scale * (len(row) - average) / spread) ** lam) for row in ids]
    result = []
    for i, (row, reward) in enumerate(zip(ids, rewards)):
        loss = getattr(args, "loss", "dapo")
        advantage = reward - mean if loss == "dr_grpo" else (reward - mean) / (std + 1e-4)
        weight = {"grpo": 1 / (size * len(row)), "dapo": 1 / total, "dr_grpo": 1 / (size * args.max_new_tokens)}[loss]
        result.append([])
        for t in range(len(row)):
            factor = 1
            if script == "grpo_lambda_traces":
                advantage, decay = max(advantage, args.min_advantage), args.gamma * args.lam
                factor = sum(max(decay ** (s - t), decay**t if args.style == "both" else 0) for s in range(t, len(row)))
            if script == "lambda_grpo_learnable":
                factor = size * powers[i] / sum(powers)
            if script == "lambda_grpo_prm":
                factor = 1 / sum(other[: t + 1] == row[: t + 1] for other in ids)
            result[-1].append(advantage * weight * factor / args.prompts_per_step)
    return result


def same(found, expected, rel=1e-7):
    assert [len(row) for row in found] == [len(row) for row in expected]
    for row, other in zip(found, expected):
        assert row == pytest.approx(other, rel=rel, abs=rel * max(map(abs, sum(expected, []))))


@pytest.mark.parametrize("script, flags", CASES)
def test_coefficients_are_the_papers(script, flags, float64):
    args = importlib.import_module(script).Args(**{"prompts_per_step": 3, **flags})
    same(credit.coefficients(script, args, IDS, REWARDS), by_hand(script, args, IDS, REWARDS))


@pytest.mark.parametrize("script, flags", CASES)
def test_coefficients_are_those_of_the_training_step(script, flags, alone, monkeypatch):
    """The gradient that reaches the log-probabilities of a real policy, in the order of the micro-batch."""
    method = importlib.import_module(script)
    args = method.Args(**{**method.TOY, "prompts_per_step": 1, "model": str(TINY), **flags})
    policy, gradients, prompt = method.load_policy(args, torch.device("cpu")), [], [3, 4, 5]
    if hasattr(args, "lam_init"):
        policy.register_buffer("lam", torch.tensor(args.lam_init))
    original = method.policy_loss

    def spy(logp, *others, **settings):
        logp.register_hook(lambda gradient: gradients.append(gradient.clone()))
        return original(logp, *others, **settings)

    monkeypatch.setattr(method, "policy_loss", spy)
    completions = [method.Completion(ids, "stop", logps_of(tuple(prompt), tuple(ids))) for ids in IDS]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    method.train_step(policy, None, optimizer, args, [prompt], completions, torch.tensor([REWARDS]))
    pushed = [tuple(round(-value, 5) for value in row) for gradient in gradients for row in gradient.tolist()]
    width = max(map(len, IDS))
    expected = [tuple(round(value, 5) for value in row + [0.0] * (width - len(row)))
                for row in credit.coefficients(script, args, IDS, REWARDS)]
    same([list(row) for row in sorted(pushed)], [list(row) for row in sorted(expected)], rel=1e-3)


def test_the_example_shows_the_ideas(float64):
    """The numbers of README's picture, and what its caption says of them."""
    row, panels = credit.example()
    for (_, _, script, flags), (*_, values) in zip(credit.METHODS, panels, strict=True):
        args = importlib.import_module(script).Args(prompts_per_step=1, **flags)
        same(values, by_hand(script, args, row["ids"], credit.REWARDS))
    grpo, dapo, traces, learnable, prm = (values for *_, values in panels)
    assert ["".join(pieces[:-1]) for pieces in row["pieces"]] == credit.ANSWERS and row["pieces"][0][-1] == "<eos>"
    assert all(max(row) == pytest.approx(min(row)) for values in (grpo, dapo, learnable) for row in values)  # flat rows
    assert grpo[4][0] == pytest.approx(grpo[0][0] * 29 / 5)  # 1/|o_i|
    assert {round(abs(row[0]) / dapo[0][0], 5) for row in dapo} == {1.0}
    assert traces[0][0] == pytest.approx(29 * traces[0][-1]) and sorted(traces[0], reverse=True) == traces[0]
    assert -traces[1][0] < 0.12 * traces[0][0]  # the clamp
    assert learnable[4][0] < 0.4 * learnable[0][0]
    assert [round(dapo[0][t] / prm[0][t]) for t in range(16)] == [4] * 13 + [2] + [1] * 2  # where answers part


class OddTokenizer:
    """Its tokens are long, odd, or hard to draw."""

    texts = ["<eos>", " The", r"$\frac$", "\n\n", "\\boxed{", "é", "extraordinarily", "   ", "\t", "$"]

    def batch_decode(self, rows):
        return [self.texts[token] for [token] in rows]


def folder_of_run(folder, script, flags, advantages, monkeypatch):
    """A run's folder, whose two steps have the same group with long completions: the folder, the row of the second step."""
    monkeypatch.setattr(credit, "load_tokenizer", {"odd": OddTokenizer()}.__getitem__)
    method, folder = importlib.import_module(script), folder / script
    folder.mkdir()
    args = dataclasses.asdict(method.Args(prompts_per_step=2, model="odd", **flags))
    (folder / "args.json").write_text(json.dumps({"script": script, **args}))
    ids = [IDS[0] * 12, *IDS[1:-1], IDS[0] * 16]
    row = {"step": 2, "problem": "How many\nare there?", "answer": "3", "completions": ["any"] * 6, "ids": ids,
           "rewards": REWARDS, "advantages": advantages}
    (folder / "samples.jsonl").write_text(f"{json.dumps({**row, 'step': 1})}\n{json.dumps(row)}\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "lam": 2.5}\n{"step": 2, "lam": 4.0}\n')
    return folder, {**row, "pieces": [[OddTokenizer.texts[token] for token in tokens] for tokens in ids]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_drawn_as_it_weighed_its_group(script, tmp_path, float64, monkeypatch):
    """With the advantages and the λ of the run, and GRPO beside it, unless the run is GRPO."""
    flags = {"style": "recent", "lam": 0.9} if script == "grpo_lambda_traces" else {}
    run, row = folder_of_run(tmp_path, script, flags, [2 * reward - 1 for reward in REWARDS], monkeypatch)
    args = importlib.import_module(script).Args(prompts_per_step=2, **flags)
    found, panels = credit.group_of_run(run, 2)
    assert found == row and credit.group_of_run(run, None)[0]["step"] == 2
    plain = by_hand(script, args, row["ids"], REWARDS, lam=2.5)
    own = importlib.import_module(script).group_advantages(torch.tensor([REWARDS]))[0]
    own = own.clamp(min=getattr(args, "min_advantage", -9)).tolist()
    expected = [[value / advantage * (2 * reward - 1) for value in values]
                for values, advantage, reward in zip(plain, own, REWARDS)]
    same(panels[0][3], expected)
    assert len(panels) == 1 + (script != "grpo") and panels[0][:2] == (f"{script}.py", f"step 2 of {script}")
    if script != "grpo":
        same(panels[1][3], by_hand("grpo", importlib.import_module("grpo").Args(prompts_per_step=2), row["ids"], REWARDS))
    if script == "lambda_grpo_learnable":
        assert panels[0][2] == "λ = 2.5"
        other = credit.group_of_run(run, 1)[1][0][3]
        assert max(map(max, other)) == pytest.approx(2 / 2 / sum(map(len, row["ids"])) / 2)  # λ = 0, DAPO


def texts_of_picture(folder, *flags):
    """The texts that credit.py writes into a picture: none overlaps another, or leaves the page."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    texts, save = [], Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path: (texts.extend(figure.axes[0].texts), save(figure, path)))
        patch.setattr(sys, "argv", ["credit.py", *map(str, flags), "--out", str(folder / "a.png")])
        credit.main()
    height, width, _ = imread(folder / "a.png").shape
    texts = [text for text in texts if text.get_text()]
    x0, y0, x1, y1 = torch.tensor([text.get_window_extent().extents.tolist() for text in texts]).T
    assert width == 1660 and x0.min() > 0 and y0.min() > 0 and x1.max() < width and y1.max() < height
    overlap = (x0[:, None] < x1) & (x0 < x1[:, None]) & (y0[:, None] < y1) & (y0 < y1[:, None])
    assert overlap.sum() == len(texts)  # each with itself
    return [text.get_text() for text in texts]


@drawn
@pytest.mark.parametrize("script", ["grpo", "lambda_grpo_prm"])
def test_a_run_makes_a_picture(script, tmp_path, monkeypatch):
    """Also with equal rewards, and with tokens that are long, odd or many."""
    run, _ = folder_of_run(tmp_path, script, {}, [0.0] * 6 if script == "grpo" else REWARDS, monkeypatch)
    written = texts_of_picture(tmp_path, "--run", run, "--step", 2)
    assert {"+12", "+36", "↵↵", r"$\frac$", "■", "extraordinaril"} <= set(written)
    assert "6 answers to “How many are there?” with their rewards at the left." in written
    assert written.count("0.5") == 1 + (script != "grpo")


def test_tokens_are_broken_into_lines():
    boxes = credit.place([" word", "a"] * 40, 300)
    assert boxes[0][1:3] == (credit.INDENT, 0) and boxes[-1][2] > 3
    for (_, x, line, width), (_, next_x, next_line, next_width) in zip(boxes, boxes[1:]):
        fits = x + width + next_width <= 300
        assert (next_x, next_line) == ((x + width, line) if fits else (credit.INDENT, line + 1))


@drawn
def test_the_example_makes_a_picture(tmp_path):
    written = texts_of_picture(tmp_path)
    assert {name for name, *_ in credit.METHODS} <= set(written) and written.count(r"\boxed{") == 30


@pytest.mark.parametrize("case, message", [
    ("no folder", "is not the folder of a run"), ("broken", "is not the folder of a run"), ("old", "has an old format"),
    ("step", "does not have step 7, only 2 steps"), ("script", "was made by mine.py, which is not in"),
    ("matplotlib", "pip install matplotlib"), ("step alone", "--step needs --run"),
])
def test_bad_input_ends_in_one_line(case, message, tmp_path, monkeypatch, capsys):
    run, row = folder_of_run(tmp_path, "grpo", {}, REWARDS, monkeypatch)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: case != "matplotlib" if name == "matplotlib" else found(name))
    if case == "broken":
        (run / "samples.jsonl").write_text('{"step": 1, "pro')
    if case == "old":
        old = {"step": 7, "problem": "1+1?", "answer": "2", "completion": "2", "reward": 1.0}
        (run / "samples.jsonl").write_text(json.dumps(old) + "\n")
    if case == "script":
        (run / "args.json").write_text('{"script": "mine"}')
    flags = ["--run", str(run / "none" if case == "no folder" else run)] if case != "step alone" else []
    monkeypatch.setattr(sys, "argv", ["credit.py", *flags, "--step", "2" if case == "script" else "7"])
    with pytest.raises(SystemExit) as ended:
        credit.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("error: ")
