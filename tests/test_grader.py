"""Tests of the grader in eval.py: a table of cases, spellings and disguises of real golds, hostile answers, workers.

Real golds are expected beside the repository, in ../shared/bench. Without them their tests are skipped, or fail when
GRPO_REQUIRE_DATA=1 is set.
"""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import eval as ev  # noqa: E402

BENCH = ROOT.parent / "shared" / "bench"
BENCHMARKS = ("aime24", "amc23", "gsm8k", "math500", "minerva", "olympiadbench")


def boxed(answer):
    return f"So the answer is \\boxed{{{answer}}}."


def golds_of(name):
    path = BENCH / f"{name}.jsonl"
    if not path.exists():
        if os.environ.get("GRPO_REQUIRE_DATA") == "1":
            pytest.fail(f"GRPO_REQUIRE_DATA=1, and there is no {path}")
        pytest.skip(f"no {path.name} in ../shared/bench")
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Workers have more than 3 seconds: these machines are slow."""
    monkeypatch.setattr(ev, "WORKER", [*ev.WORKER[:-1], "30"])


def grade(pairs):
    return [verdict["correct"] for verdict in ev.grade(pairs)]


def worker_that(says, deadline=3.0):
    """The command of a worker that runs this code before it works."""
    code = f"import os, resource, signal, sys, time; sys.path.insert(0, {str(ROOT)!r}); import eval as ev; same = ev.same\n{says}"
    return [sys.executable, "-c", f"{code}\nev.work({deadline})"]


# ---- A table of cases ----


def cases():
    """The table of grader_cases.txt: [(kind, whether right, completion, gold)]."""
    rows, kind, right = [], None, None
    for line in (ROOT / "tests" / "grader_cases.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            kind, _, verdict = line[3:].rpartition(" | ")
            right = {"right": True, "wrong": False}[verdict]
        elif line and not line.startswith("#"):
            answer, _, gold = line.rpartition(" ← ")
            rows.append((kind, right, answer[1:] if answer.startswith("!") else boxed(answer), gold))
    return rows


def test_table_of_cases():
    """As a reward is given: all in one call. Each kind has at least three members."""
    rows = cases()
    verdicts = grade([(completion, gold) for _, _, completion, gold in rows])
    assert [row for row, verdict in zip(rows, verdicts) if verdict != row[1]] == []
    sizes = Counter(row[:2] for row in rows)
    assert len(sizes) > 40 and [kind for kind, size in sizes.items() if size < 3] == []


def test_clean_is_stable():
    for _, _, completion, gold in cases():
        for text in (gold, ev.last_boxed(completion) or completion):
            assert ev.clean(ev.clean(text)) == ev.clean(text)


def test_numbers_are_equal_to_a_millionth():
    """On both sides of the bound, which is of the number itself below 1."""
    for gold, near, far in (("3", "3.0000009", "3.0000011"), ("1234567", "1234567.0000009", "1234568"),
                            ("0.25", "0.2500002", "0.2500003"), ("-2.5", "-2.5000009", "-2.5000011")):
        assert ev.judge_text(gold, near) is True and ev.judge_text(gold, far) is False, gold


def test_text_is_judged_in_linear_time():
    """In the parent nothing stops a regular expression. It takes seconds; of exponential time, it would go on for ever."""
    def stop(*_):
        raise TimeoutError

    parts = ["\\a", "\\pi ", "\\frac", "{", "}", "(", "5", "1 ", "aa ", "so ", "not ", "^", "^{", "= ", "- ", " ", "\\", "\\text{", ".",
             "°", "/", "'", "1/", "\\{x ", "\\sin ", "0.\\overline{3}", "B) ", "_", "llion", "~", "\\,", "|", "5 a"]  # fmt: skip
    handler, _ = signal.signal(signal.SIGALRM, stop), signal.alarm(120)
    for part in parts:
        for before, after in (("", ""), ("5 ", ""), ("\\{x", "\\}"), ("5", "!"), ("x=", "")):
            text = before + part * (3000 // len(part)) + after
            ev.stated(text)
            for gold in ("5", "\\frac{1}{2}", "east", "(1,2)", "x=5 \\text{ cm}"):
                ev.judge_text(gold, ev.clean(text))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def test_last_boxed():
    assert ev.last_boxed("a \\boxed{1} b \\boxed{2}.") == "2"
    assert ev.last_boxed("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert ev.last_boxed("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert ev.last_boxed("\\boxed {7}") == "7"
    assert ev.last_boxed("so } } \\boxed{7} and { {") == "7"
    assert ev.last_boxed("\\boxed{7}, so \\boxed{8") == "7"  # cut off in the second
    assert ev.last_boxed("x = \\boxed{a \\boxed{5}}") == "5"
    assert ev.last_boxed("the answer is 7") is None
    assert ev.last_boxed("\\boxed{") is None
    assert ev.last_boxed("") is None


@pytest.mark.long
def test_last_boxed_is_linear():
    start = time.process_time()
    for text in ("\\boxed{" * 150_000, "{" * 10**6, "}" * 10**6, "\\boxed{" + "{" * 10**5 + "1" + "}" * 10**5 + "}",
                 "\\" * 10**6, "\\boxed " * 150_000, "\\boxed{1}" * 100_000, "a" * 10**7):  # fmt: skip
        ev.last_boxed(text)
    assert time.process_time() - start < 10


def right(completion, gold):
    return grade([(completion, gold)]) == [True]


def test_several_boxes_no_box():
    assert right("First \\boxed{3}, no: \\boxed{4}", "4")
    assert not right("First \\boxed{4}, no: \\boxed{3}", "4")
    assert right("2 + 2 is asked.\nThe final answer is $4$.", "4")  # no box, but the last line states it
    assert right("**Answer:** \\frac{1}{2}", "0.5") and right("2+2=4\n#### 4", "4")
    assert not right("The answer is 4.\nLet us check: 2 + 2 is 4, good.", "4")  # not in the last line
    assert not right("2 + 2 is 4.", "4")
    assert not right("The answer is \\boxed{4", "4")
    assert not right("The answer is 4, no: \\boxed{5}", "4")
    assert not right("\\boxed{}", "4")
    assert not right("\\boxed{4}", "")
    assert not right("\\boxed{}", "")


# ---- Spellings, disguises and changed digits of real golds ----


def spellings(gold):
    """The same number or formula: {kind: text}."""
    return {
        "in dollars": f"${gold}$", "with spaces": rf"\; {gold} \,", "with a full stop": f"{gold}.", "left, right": rf"\left({gold}\right)",
        "after words": rf"\text{{The answer is }} {gold}", "bold": rf"\boldsymbol{{{gold}}}", "approximately": rf"\approx {gold}",
    }  # fmt: skip


def number_spellings(n, a):
    """The same integer n, where a is another one."""
    return {
        "a name": f"x = {n}", "a unit": rf"{n} \text{{ cm}}", "things": f"{n} eggs", "money": rf"\${n}", "a decimal": f"{n}.00",
        "thousands": f"{n:,}", "upright": rf"\mathrm{{{n}}}", "a true equation": f"{n - a}+{a}={n}",
        "a power of ten": rf"{n}0 \times 10^{{-1}}",
        "a fraction": rf"\frac{{{2 * n}}}{{2}}",
    }  # fmt: skip


def disguises(n, a):
    """What is equal to n, but not worked out, or contains n and says something else."""
    return {
        "a sum": f"{n - a}+{a}", "a sum in braces": f"{{{n - a}}}+{{{a}}}", "a difference": f"{n + a}-{a}", "a product": rf"{n}\cdot 1",
        "side by side": f"({n - a})({a})", "with a space": f"{n - a} {a}", "nothing added": f"{n}+0", "a root": rf"\sqrt{{{n * n}}}",
        "improper": rf"{n - 1}\frac{{1}}{{1}}", "nested": rf"\frac{{{n}}}{{1/1}}", "rounded": rf"\lfloor {n}.5\rfloor",
        "a divisor": rf"\gcd({n},{2 * n})", "a sum sign": rf"\sum_{{k=1}}^{{1}} {n}", "an integral": rf"\int_0^1 {n} dx",
        "a power": f"({n})^1", "a logarithm": rf"\log_2 2^{{{n}}}", "units added": rf"{n - a} \text{{ cm}}+{a} \text{{ cm}}",
        "the question": f"{n - a}+{a}=?", "two values": f"{n}={n + a}", "squared": f"{n} squared", "a factor": f"{n}x", "negated": f"not {n}",
        "a bound": f"x > {n}", "one of two": f"{n} or {n + a}", "thousands of it": f"{n} thousand", "a percentage of it": f"{n}% of {a}",
    }  # fmt: skip


def formula_disguises(gold):
    return {
        "nothing added": f"{gold}+1-1", "two halves": rf"\frac{{1}}{{2}}({gold})+\frac{{1}}{{2}}({gold})", "one more": f"{gold}+1",
        "an integral": rf"\int_0^1 ({gold}) dz", "a sum sign": rf"\sum_{{z=1}}^{{1}} ({gold})", "squared": rf"{gold} \text{{ squared}}",
        "negated": rf"\text{{not }} {gold}",
    }  # fmt: skip


def changed(gold, generator):
    """The gold with one of its digits changed."""
    place = generator.choice([match.start() for match in re.finditer(r"\d", gold)])
    digit = generator.choice([digit for digit in "123456789" if digit != gold[place]])
    return gold[:place] + digit + gold[place + 1:]


@pytest.mark.parametrize("share", [0.02, pytest.param(1 if os.environ.get("GRPO_GOLDS") else 0.1, marks=pytest.mark.long)], ids=["some", "more"])
def test_spellings_and_disguises_of_real_golds(share):
    """Made from the golds, not from strings that somebody thought of. GRPO_GOLDS=1 takes all formulas, which is minutes."""
    generator, cases = random.Random(0), []
    for name in BENCHMARKS:
        for gold in golds_of(name)[:: max(1, round(0.1 / share)) if name == "gsm8k" else 1]:
            text, a = ev.clean(gold), generator.randint(2, 99)
            if text.isdecimal():
                cases += [(f"{kind}, right", form, gold) for kind, form in (spellings(text) | number_spellings(int(text), a)).items()]
                cases += [(f"{kind}, wrong", form, gold) for kind, form in disguises(int(text), a).items()]
            elif generator.random() < share and not re.search(r"[,=_]|\\(?:text|cup|circ|begin)", text):
                cases += [(f"{kind}, right, formula", form, gold) for kind, form in spellings(text).items()]
                cases += [(f"{kind}, wrong, formula", form, gold) for kind, form in formula_disguises(text).items()]
            if re.search(r"\d", gold) and (text.isdecimal() or generator.random() < share):
                cases.append(("a changed digit, wrong", changed(gold, generator), gold))
    verdicts = grade([(boxed(form), gold) for _, form, gold in cases])
    false = [case for case, verdict in zip(cases, verdicts) if verdict != ("right" in case[0])]
    asked, failed = Counter(kind for kind, _, _ in cases), Counter(kind for kind, _, _ in false)
    print(*(f"{kind}: {failed[kind]} false of {count}" for kind, count in sorted(asked.items())), sep="\n")
    assert len(asked) > 40
    assert [case for case in false if "wrong" in case[0]] == []
    refused = [case for case in false if "right" in case[0]]  # as \\left([...]\\right), whose brackets nest too deep
    assert len(refused) <= 2, refused


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in ("minerva", "olympiadbench"))) for name in BENCHMARKS])
def test_gold_against_itself(name):
    """No row is dropped, each gold is right, and so is the next row's only if it is the same."""
    golds = golds_of(name)
    problems = ev.load_problems(str(BENCH / f"{name}.jsonl"))
    assert len(problems) == len(golds)
    verdicts = grade([(boxed(gold), problem["answer"]) for gold, problem in zip(golds, problems)])
    assert [gold for gold, verdict in zip(golds, verdicts) if not verdict] == []
    hard = [gold for row in problems if ev.judge_text(gold := ev.clean(row["answer"]), "?") is None][::1 if name == "math500" else 4]
    replies = ev.ask(list(dict.fromkeys(zip(hard, hard))))  # not by their text, but by math-verify
    unread = [gold for (gold, _), reply in replies.items() if reply != "right"]
    assert all(re.search(r"\d_|[EM]_|gamma|\\mho|hbar|t\(0", gold) for gold in unread), unread  # those are right as texts only
    others = [(gold, other) for gold, other in zip(golds, golds[1:]) if gold.split("=")[-1] != other.split("=")[-1]]
    verdicts = grade([(boxed(other), gold) for gold, other in others])
    assert [pair for pair, verdict in zip(others, verdicts) if verdict] == []


# ---- Golds and problems as data sets have them ----


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_cells_that_are_not_text(tmp_path, capsys):
    """Bytes are decoded, a missing number is no gold, and markup around a gold does not count."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"problem": [b"0+1?", b"1+1?", b"2+1?"], "answer": [1.0, float("nan"), None]}
    parquet.write_table(pyarrow.table(table), tmp_path / "cells.parquet")
    assert ev.load_problems(str(tmp_path / "cells.parquet")) == [{"problem": "0+1?", "answer": "1.0"}]
    assert "2 of 3 rows dropped" in capsys.readouterr().out
    golds = ["**5**", "<answer>5</answer>", "`5`", "**Answer:** 5", "The answer is 5."]
    rows = [{"problem": "4+1?", "answer": gold} for gold in golds]
    assert [row["answer"] for row in ev.load_problems(write(tmp_path / "golds.jsonl", rows))] == golds
    assert [ev.clean(gold) for gold in golds] == ["5"] * len(golds)


def test_problems_in_several_columns_or_turns(tmp_path, capsys):
    """Known pairs are joined, turns too. Whatever is left out is named."""
    def problem(**row):
        (loaded,) = ev.load_problems(write(tmp_path / "row.jsonl", [{**row, "answer": "5"}]))
        return loaded["problem"]

    assert problem(instruction="Add.", input="2+3") == "Add.\n2+3"
    assert problem(Body="Tom has 2 and 3.", Question="How many?") == "Tom has 2 and 3.\nHow many?"
    assert problem(prompt=[{"role": "system", "content": "Add."}, {"role": "user", "content": "2+3?"}]) == "Add.\n\n2+3?"
    turns = [{"role": "user", "content": [{"type": "text", "text": "2+3?"}]}, {"role": "assistant", "content": "5"}]
    assert problem(prompt=turns) == "2+3?"
    assert capsys.readouterr().out == ""
    assert problem(problem="How many?", context="2 and 3.") == "How many?"
    assert "columns that are not in the prompt: context" in capsys.readouterr().out
    assert problem(problem="2+3?", prompt="Be brief.") == "2+3?"
    assert "not in the prompt: prompt" in capsys.readouterr().out
    assert problem(question="2+3?", choices=["4", "5"], options="4 or 5") == "2+3?"
    assert "not in the prompt: choices, options" in capsys.readouterr().out


def test_a_json_array_is_read(tmp_path):
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "1+2?", "answer": "3"}]
    for text in (json.dumps(rows), "\ufeff\n" + json.dumps(rows, indent=1)):
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
        assert ev.load_problems(str(tmp_path / "rows.jsonl")) == rows


def test_golds_that_nothing_can_be_compared_with(tmp_path, capsys):
    """Dropped with a notice: without a letter or digit, with open braces, or longer than a dozen words."""
    proof = "By induction on the number of vertices every tree has one edge less than vertices, which was to be shown"
    bad = ["???", "\\begin{foo", "\\frac{1}{", "--", "", proof]
    good = ["5", "\\frac{1}{2}", "east", "52_8", "(3,4]", "2k\\pi", "\\infty"]
    rows = [{"problem": "What?", "answer": gold} for gold in bad + good]
    assert [row["answer"] for row in ev.load_problems(write(tmp_path / "golds.jsonl", rows))] == good
    assert f"{len(bad)} of {len(rows)} rows dropped" in capsys.readouterr().out


# ---- Hostile answers, and workers that die ----

HOSTILE = [
    "9^{9^{9^{9}}}", "9^9^9^9", "2^{2^{2^{2^{2^{2}}}}}", "10^{10^{10}}", "(-1)^{10^{10^{10}}}", "99999999^{99999999}",
    "10000000!", "((10!)!)!", "3!!!!!!!!!!", "\\binom{10^9}{5 \\cdot 10^8}", "\\prod_{n=1}^{10^9} n", "1" * 390,
    "\\sum_{n=1}^{10^{12}} \\sin(n)", "\\int_0^1 x^{x^{x^x}} dx", "\\int e^{x^2} \\sin(x^3) \\ln(x) dx", "\\infty^{\\infty}",
    "\\lim_{x \\to 0} \\frac{\\sin(x^{x^x})}{x}", "\\sqrt[10^{10}]{10^{10^{10}}}", "x^{1000} + (x+1)^{1000} - (x-1)^{1000}",
    "(x+y+z)^{300}", "(1+x)^{99999}", "\\sin(\\sin(\\sin(\\sin(\\sin(10^{10^{8}})))))", "\\frac{1}{0}", "0/0", "\\frac{0}{0}",
    "{" * 190 + "4" + "}" * 190, "(" * 199 + "4" + ")" * 199, "[" * 400, "\\frac{" * 60, "\\sqrt{" * 66, "-" * 399 + "4",
    "\\frac{1}{1+" * 30 + "x" + "}" * 30, "\\{" + ",".join(map(str, range(110))) + "\\}", "{" * 100_000 + "5" + "}" * 100_000,
    "\\{" + ",".join(map(str, range(2000))) + "\\}", "9" * 10**6, "a" * 10**6, "\\boxed{" * 1000, "5" + " " * 10**6 + "6",
    "4\x00", "\x00", "\ud800", "4\udfff", "\u202e4", "😀" * 100, "\\x00\\u0000", "%s%s%n", "'; DROP TABLE golds; --",
    "__import__('os').system('touch /tmp/hostile')", "eval('5')", "lambda x: 5", "exec(\"raise SystemExit\")", "import os",
    "exit()", "quit()", "os._exit(0)", "while True: pass", "Symbol('x')", "N(pi, 10**9)", "factorial(10**8)", "True", "None",
    "nan", "\\text{nan}", "1e999999999", "1e9999", "10^{-999999999}", "\\begin{pmatrix} " + "1 & " * 90 + "1 \\end{pmatrix}",
    "\\det " + "x_{1}" * 70, "5 \\neq 5", "1 = 1", "x = x", "x", "\\gold", "\\boxed", "?", "\\", "5 \\mod 10^{10^{10}}",
    "\\sum_{k=1}^{\\infty} \\frac{1}{k^{k^{k}}}", "\\int_0^{\\infty} \\frac{\\sin(x^{9})}{x^{x}} dx", "\\frac{d^{99}}{dx^{99}} \\tan(\\tan(x))",
    "\\prod_{p=1}^{10^{6}} (x - p)", "(x-1)" * 80, "(x^2-1)(x^3-1)(x^5-1)" * 20, "\\cos(1)^{\\cos(1)^{\\cos(10^{99})}}", "7^{7^{7}} \\bmod 10",
    "|".join("x" * 50), "\\left(" * 90 + "4" + "\\right)" * 90, "\\sqrt{5 + " * 35 + "x" + "}" * 35, "\\log(" * 60 + "5" + ")" * 60,
    "x^{" * 60 + "5" + "}" * 60, "\\{5, " * 50, "5," * 190, "[0, 5) \\cup " * 30 + "(5, 6)", "\\tan(10^{10^{5}})", "\\arcsin(10^{10^{10}})",
    "1.5e3e3e3", "0." + "3" * 390, "\\frac{10^{400}}{10^{399}} - 6 + 10^{-400}", "\\text{" * 80 + "4" + "}" * 80, "\\infty - \\infty",
    "F_{10^{9}}", "\\Gamma(10^{10})", "\\zeta(-10^{9})", "\\log_{2}(\\log_{2}(10^{10^{10}}))", "\\pi^{\\pi^{\\pi^{\\pi}}}",
]  # fmt: skip


@pytest.mark.parametrize("answers", [HOSTILE[::16], pytest.param(HOSTILE[::2], marks=pytest.mark.long)], ids=["few", "more"])
def test_hostile_answers(answers, monkeypatch, capsys):
    """None hangs the batch, none is right. Good ones among and after them are, and dead workers are counted and replaced."""
    gold, deadline = r"\sqrt{5}", 1.5  # on a busy machine a good answer may take one
    monkeypatch.setattr(ev, "WORKER", [*ev.WORKER[:-1], str(deadline)])
    good = [(boxed(f"{n} + x"), f"x + {n}") for n in range(50)]  # each needs a worker
    hostile = [(boxed(answer), gold) for answer in answers]
    mixed = [pair for pairs in itertools.zip_longest(hostile, good) for pair in pairs if pair]
    start = time.perf_counter()
    verdicts = ev.grade(mixed)
    seconds = time.perf_counter() - start
    ended = Counter(verdict["why"] for verdict in verdicts)
    print(f"{len(hostile)} hostile in {seconds:.1f} s: {dict(ended)}")
    wrong = [pair for pair, verdict in zip(mixed, verdicts) if verdict["correct"] != (pair in good)]
    assert [(completion[:80], gold) for completion, gold in wrong] == []
    killed = ended["time-out"] + ended["crash"]
    assert ended["time-out"] > 0 and capsys.readouterr().out.count("counted as wrong") == killed
    assert seconds < 10 * killed * deadline + 60  # ten times what it takes on an idle machine: a hang is for ever
    assert all(verdict["correct"] and verdict["why"] == "right" for verdict in ev.grade(good))


@pytest.mark.long
def test_hostile_golds(monkeypatch):
    """No answer is right for a gold that hangs."""
    golds = [answer for answer in HOSTILE if ev.clean(answer) and len(answer) < 500]
    monkeypatch.setattr(ev, "WORKER", [*ev.WORKER[:-1], "1"])
    assert not any(grade([(boxed("7"), gold) for gold in golds]))


@pytest.mark.long
def test_memory_limit(monkeypatch):
    """A grading that wants more memory than allowed does not take the machine's: the answer is wrong and others go on."""
    greedy = (boxed("2^{2^{33}}"), r"\sqrt{7}")  # one gigabyte, and more while it is computed
    first, second = ev.grade([greedy, (boxed("1+x"), "x+1")])
    assert not first["correct"] and first["why"] != "time-out" and second["correct"]
    monkeypatch.setattr(ev, "WORKER", worker_that("ev.same = lambda *_: resource.getrlimit(resource.RLIMIT_AS)[0] == 2**29"))
    assert sys.platform == "darwin" or right(boxed("1+x"), "x+2")  # right if the worker has this limit


def test_duplicates_are_graded_once(monkeypatch, capfd):
    """A worker that is ended is named once. Neither it nor math-verify says anything else."""
    monkeypatch.setattr(ev, "WORKER", [*ev.WORKER[:-1], "0.7"])
    verdicts = grade([(boxed("9^{9^{9^{9}}}"), "\\sqrt{5}")] * 20 + [(boxed("x+1"), "1+x")] * 20)
    assert verdicts == [False] * 20 + [True] * 20
    said = "time-out, counted as wrong: '9^{9^{9^{9}}}' for '\\\\sqrt{5}'\n"
    assert capfd.readouterr() == (said, "")


def test_the_deadline_is_of_computing(monkeypatch):
    """A worker that has to wait for a busy machine is not stopped; one that computes for as long is."""
    for busy, why in (("time.sleep(1.5)", "right"), ("[x for x in iter(int, 1)]", "time-out")):
        monkeypatch.setattr(ev, "WORKER", worker_that(f"ev.same = lambda *pair: pair == ('x', 'x') or {busy} is None", 0.5))
        assert ev.grade([(boxed("x+1"), "1+x")])[0]["why"] == why


def test_a_worker_that_is_killed_costs_one_question(monkeypatch):
    """From outside (by the kernel that is short of memory, say), while it has a question: the others are graded."""
    dies = "ev.same = lambda *pair: os.kill(os.getpid(), signal.SIGKILL) if pair == ('x+2', '2+x') else same(*pair)"
    monkeypatch.setattr(ev, "WORKER", worker_that(dies))
    monkeypatch.setattr(ev.os, "cpu_count", lambda: 2)
    pairs = [(f"x+{n}", f"{n}+x") for n in range(1, 10)]  # enough for two workers
    verdicts = ev.grade([(boxed(answer), gold) for gold, answer in pairs])
    assert [verdict["why"] for verdict in verdicts] == ["right", "crash"] + ["right"] * 7
    assert [verdict["correct"] for verdict in verdicts] == [True, False] + [True] * 7


def test_a_worker_that_dies_after_its_last_reply_costs_nothing(monkeypatch):
    """Its clock still runs while it ends."""
    monkeypatch.setattr(ev, "WORKER", worker_that("import atexit; atexit.register(os.kill, os.getpid(), signal.SIGPROF)"))
    assert [verdict["why"] for verdict in ev.grade([(boxed("x+1"), "1+x"), (boxed("x+2"), "1+x")])] == ["right", "wrong"]


def test_worker_that_cannot_start(monkeypatch, capsys):
    """In one line, on any rank."""
    monkeypatch.setattr(ev, "WORKER", [sys.executable, "-c", "raise ImportError('no sympy here')"])
    with pytest.raises(SystemExit) as caught:
        right(boxed("x+1"), "1+x")
    assert caught.value.code == 1 and "worker failed" in capsys.readouterr().err


PARENT = """
import sys
sys.path.insert(0, {root!r})
import eval as ev
print(flush=True)
ev.WORKER[-1] = "2"
ev.grade([("\\\\boxed{{9^{{9^{{9^{{" + str(n) + "}}}}}}}}", "\\\\sqrt{{5}}") for n in range(9, 99)])
"""


def is_alive(pid):
    """Whether the process runs: a zombie, which nobody has collected in this container, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(status) and not status.startswith("Z")


@pytest.mark.long
def test_no_orphans_when_parent_is_killed():
    """A worker that hangs in sympy ends by itself, however many questions it has."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(root=str(ROOT))], stdout=subprocess.PIPE)
    parent.stdout.readline()
    children, end = [], time.time() + 20
    while not children and time.time() < end:
        time.sleep(0.2)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True).stdout.split()
    time.sleep(3)  # it has sympy, and is at its questions
    parent.kill()
    parent.wait()
    end = time.time() + 2 + 10
    while (alive := is_alive(int(children[0]))) and time.time() < end:
        time.sleep(0.2)
    assert not alive
