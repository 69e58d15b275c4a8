"""The four scripts are copies on purpose: outside what the paper changes, they must stay the same, line by line."""

import difflib

import pytest
from conftest import ROOT, SCRIPTS

VARIANTS = [name for name in SCRIPTS if name != "grpo"]


def common(text):
    """[(line number, line)] of what all scripts share: not the docstring, Args, the algorithm block, lines marked `# λ:`."""
    lines, kept = text.splitlines(), []
    skipping = '"""'
    for number, line in enumerate(lines, start=1):
        if skipping == '"""' and number > 1 and line.endswith('"""'):
            skipping = None
        elif line == "class Args:":
            skipping = "# 1. The algorithm"
        elif line.startswith("# 2. Sampling"):
            skipping = None
        if skipping is None and "# λ:" not in line:
            kept.append((number, line))
    assert skipping is None and len(kept) > 300
    return kept


def first_difference(base, other):
    """None, or what a maintainer has to look at."""
    left, right = common(base), common(other)
    for (number, line), (other_number, other_line) in zip(left, right):
        if line != other_line:
            return f"grpo.py:{number}: {line.strip()!r} is at line {other_number} {other_line.strip()!r}"
    return None if len(left) == len(right) else f"{len(left)} common lines in grpo.py, {len(right)} in the other"


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
@pytest.mark.parametrize("line", ["    aside.rename", "        optimizer.step()", "    return completions", "TOY = dict("])
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
