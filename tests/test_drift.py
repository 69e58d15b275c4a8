"""The four scripts are copies on purpose: outside what the paper changes, they must stay the same, line by line.

And they must stay readable: in the order a reader needs, the method before the machinery, within their budgets of lines.
"""

import ast
import difflib
import io
import re
import tokenize
from itertools import pairwise

import pytest
from conftest import ROOT, SCRIPTS

VARIANTS = [name for name in SCRIPTS if name != "grpo"]


def common(text, own_reward=False):
    """[(line number, line)] of what all scripts share: not the docstring, Args, section 2, lines marked `# λ:`."""
    lines, kept = text.splitlines(), []
    skipping = '"""'
    for number, line in enumerate(lines, start=1):
        if skipping == '"""' and number > 1 and line.endswith('"""'):
            skipping = None
        elif line == "class Args:":
            skipping = "# 2. Advantage" if own_reward else "# 1. Reward"
        elif line.startswith("# 2. Advantage"):
            skipping = "# 3. The training step"
        elif skipping and skipping.startswith("#") and line.startswith(skipping):
            skipping = None
        if skipping is None and "# λ:" not in line:
            kept.append((number, line))
    assert skipping is None and len(kept) > 300
    return kept


def first_difference(base, other, own_reward=False):
    """None, or what a maintainer has to look at. own_reward: section 1 may be another one, too."""
    left, right = common(base, own_reward), common(other, own_reward)
    matcher = difflib.SequenceMatcher(None, [line for _, line in left], [line for _, line in right], autojunk=False)
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag != "equal":
            new = [f"line {number} {line.strip()!r} is not in grpo.py and has no mark `# λ:`"
                   for number, line in right[other_start:other_end]]
            gone = [f"grpo.py:{number} {line.strip()!r} is gone; it has no mark, so let it stay, and a marked line behind "
                    "it undo what it does" for number, line in left[start:end]]
            return "; ".join([*new, *gone])
    return None


def body(text):
    """The lines behind the docstring."""
    return text.split('"""', 2)[2].splitlines()


@pytest.mark.parametrize("name", VARIANTS)
def test_scripts_have_not_drifted_apart(name):
    base, other = (ROOT / "grpo.py").read_text(), (ROOT / f"{name}.py").read_text()
    assert first_difference(base, other) is None
    changed = [line for line in difflib.unified_diff(body(base), body(other), n=0, lineterm="")
               if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= 100, f"{len(changed)} changed lines: a diff is to show the paper's idea and nothing else"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("line", ["        aside.rename", "        optimizer.step()", "    return [float(verdict[", "TOY = dict("])
def test_a_drifted_line_is_named(name, line):
    base, other = (ROOT / "grpo.py").read_text(), (ROOT / f"{name}.py").read_text()
    start = next(text for text in other.splitlines() if line.strip() in text)
    drifted = other.replace(start, start.replace("(", "(0 or ").replace("return", "return  "), 1)
    assert drifted != other
    assert start.strip() in first_difference(base, drifted)


@pytest.mark.parametrize("name", SCRIPTS)
def test_format(name):
    for number, line in enumerate((ROOT / f"{name}.py").read_text().splitlines(), start=1):
        assert len(line) <= 120, f"{name}.py:{number} is {len(line)} characters long"
        assert line == line.rstrip(), f"{name}.py:{number} ends in a blank"


ORDER = ["import ", "class Args:", "# 1. Reward", "# 2. Advantage, weights, loss", "# 3. The training step", "# 4. The run",
         "# ===== From here on: machinery", "# 5. Sampling", "# 6. Policy", "# 7. Flags", "if __name__"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_order_and_budgets(name):
    """The method first, and at most so many lines of it, of the docstring, and in all."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    places = [max(n for n, line in enumerate(lines, 1) if line.startswith(start)) for start in ORDER[1:]]
    assert all(one < other for one, other in pairwise(places)), "the sections are not in their order"
    machinery = places[ORDER.index("# ===== From here on: machinery") - 1]
    assert machinery <= (330 if name == "grpo" else 370), f"the machinery begins at line {machinery}"
    assert len(lines) <= (680 if name == "grpo" else 740)
    assert (ROOT / f"{name}.py").read_text().split('"""')[1].count("\n") <= 30, "the docstring is too long"


def code_lines(path):
    """The lines of code in a file, without docstrings, comments and indentation: what a reader has to trust."""
    source = path.read_text()
    lines, skipped, comments = source.splitlines(), set(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.start[1]
    code = [line[: comments.get(number)].strip() for number, line in enumerate(lines, 1) if number not in skipped]
    return [line for line in code if line]


def test_amount_of_code():
    own, shared = code_lines(ROOT / "grpo.py"), code_lines(ROOT / "eval.py")
    assert sum(map(len, own + shared)) <= 50_000
    for name in [*SCRIPTS, "eval"]:
        code = code_lines(ROOT / f"{name}.py")
        assert sum(map(len, code)) / len(code) < 54.5, f"{name}.py is dense"


@pytest.mark.parametrize("name", [*SCRIPTS, "eval"])
def test_one_statement_per_line(name):
    places = [node.lineno for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())) if isinstance(node, ast.stmt)]
    assert len(places) == len(set(places))


def test_all_of_eval_is_reached_from_its_command_line():
    """No function is there for the scripts alone. And they import at most eight names."""
    tree = ast.parse((ROOT / "eval.py").read_text())
    own = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    reached, found = set(), [node for node in tree.body if node not in own.values()]
    while found:
        names = {node.id for node in ast.walk(found.pop()) if isinstance(node, ast.Name)} & set(own) - reached
        reached |= names
        found += [own[name] for name in names]
    assert reached == set(own), f"only the scripts use {set(own) - reached}"
    for name in SCRIPTS:
        imported = [alias for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
                    if isinstance(node, ast.ImportFrom) and node.module == "eval" for alias in node.names]
        assert 0 < len(imported) <= 8


def passages(text, size=6):
    """Every run of `size` lines that are no blanks, imports or comments, as a tuple."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.match(r"#|import |from |\"\"\"|[)\]}]+$", line)]
    return [tuple(lines[i : i + size]) for i in range(len(lines) - size + 1)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_stands_twice(name):
    """Six lines that stand twice in a script, or in it and in eval.py, are a function that is missing."""
    own = passages((ROOT / f"{name}.py").read_text())
    shared = set(passages((ROOT / "eval.py").read_text()))
    twice = [passage for passage in own if own.count(passage) > 1 or passage in shared]
    assert not twice, "\n".join(twice[0])


def test_only_eval_is_shared():
    """The scripts import no file of the project but eval.py, and eval.py none at all."""
    for name in [*SCRIPTS, "eval"]:
        found = re.findall(r"^\s*(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        assert set(found) & {*SCRIPTS, "eval"} == ({"eval"} if name != "eval" else set())
