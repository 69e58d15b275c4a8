"""The three README.md pages against the code: commands run, what is named exists, figures have a command."""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, launch, metrics
from papers.make import PAPERS, patched
from torch.distributed.run import get_args_parser
from transformers import HfArgumentParser

import eval as evaluation

PLACES = [ROOT, ROOT / "tests", ROOT / "tests" / "measure"]  # each has a page
PAGES = [(place / "README.md").read_text() for place in PLACES]
README = "\n".join(PAGES)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
FENCED = FENCE.findall(README)  # [(language, content)]
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", README))]
SOURCES = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")] if path.name != "test_docs.py"]
CODE = "\n".join(path.read_text() for path in SOURCES)
FILES = "py|txt|md|json|png|sh|toml|ya?ml"  # what names of files end in
OTHER_FLAGS = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal"}  # sbatch's
OTHER_NAMES = {"diff", "patch", "torchrun", "pip"}  # `names` that are no code of ours
PYTHON = r"(?:\.venv/bin/)?python3?"  # how README calls it


def commands():
    """Every command of the fenced bash blocks, and of the text where it begins like one. Each once."""
    lines = [line for language, content in FENCED if language in ("bash", "sh", "console")
             for line in content.replace("\\\n", " ").splitlines()]
    lines += [span for span in SPANS if re.match(r"(\S+/)?(python3?|torchrun|pip|pytest|srun|sbatch) ", span)]
    parts = [part.strip() for line in lines for part in re.split(r" && |; ", line.split(" #")[0].strip())]
    parts = [re.sub(r"^\.venv/bin/", "", part) for part in parts]
    return list(dict.fromkeys(part for part in parts if part and not part.startswith("#")))


# A reader's clone of the repository, and how the commands are run in it -----------------------------------------------


class Clone:
    """A folder with the scripts, the tests, and what README names besides: papers' scripts, and .jsonl files."""

    def __init__(self, folder):
        self.folder, self.runs, self.launched = folder, {}, False  # runs: {script: folder of its last run}
        for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
            shutil.copy(path, folder)
        (folder / "tests").symlink_to(ROOT / "tests")
        for name in PAPERS:
            if f"python {name}.py" in README:
                patched(name, folder)
        rows = evaluation.load_problems("arithmetic", "train")[:4]
        for name in {"my.jsonl", *re.findall(r"[\w-]+\.jsonl", README)}:
            lines = [{**row, "completion": f"\\boxed{{{row['answer']}}}"} for row in rows]
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(self, script, words):
        """`python SCRIPT WORDS` in the clone, but in this process: importing torch again takes most of the time."""
        before = os.getcwd(), sys.argv, signal.getsignal(signal.SIGTERM)
        os.chdir(self.folder)
        sys.argv = [script, *words]
        try:
            runpy.run_path(str(self.folder / script), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{script} {' '.join(words)}: ended with {end.code}"
        finally:
            os.chdir(before[0])
            sys.argv = before[1]
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            signal.signal(signal.SIGTERM, before[2])

    def train(self, script, words=(), ranks=None):
        """A training command of README, cut down to a few tokens on the tiny model."""
        name = script.removesuffix(".py")
        words, output = small(words), f"runs/{name}-{len(list(self.folder.glob('runs/*')))}"
        if "--resume" in words:
            words[words.index("--resume") + 1] = output = self.run_of(name)
            words += ["--steps", str(len(metrics(self.folder / output)) + 1)]
        else:
            words += ["--output_dir", output, "--steps", "2", "--prompts_per_step", "2", "--group_size", "4",
                      "--max_new_tokens", "12", "--eval_dataset", "my.jsonl", "--save_every", "0"]
            words += ["--dataset", "my.jsonl"] * ("--model" in words)  # its default needs the hub
        if ranks:
            done = launch([self.folder / script, *words], ranks=ranks, cwd=self.folder)
            assert done.returncode == 0, done.stderr
        else:
            self.run(script, words)
        self.runs[name] = output
        assert (self.folder / output / "final" / "config.json").exists()

    def run_of(self, name):
        """The folder of a run of that script."""
        if name not in self.runs:
            self.train(f"{name}.py")
        return self.runs[name]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, request):
    torch.set_default_dtype(torch.float32)
    clone = Clone(tmp_path_factory.mktemp("clone"))
    clone.launched = not request.config.option.all  # torchrun itself is started with --all only
    return clone


def small(words):
    """The words, as --flag value, with what would need a network, a GPU, vLLM or a compiler's minute replaced."""
    words = [part for word in words for part in (word.split("=", 1) if re.match(r"--\w+=", word) else [word])]
    for flag, value in zip(words, words[1:]):
        for name in value.split(",") if flag in ("--dataset", "--eval_dataset", "--benchmarks") else ():
            known = name == "arithmetic" or name in evaluation.HUB or re.search(r"\.(jsonl|parquet)$|/", name)
            assert known, f"no data set is called {name}"
    replaced = {"--model": str(ROOT / "tests" / "tiny"), "--dataset": "my.jsonl", "--eval_dataset": "my.jsonl",
                "--benchmarks": "my.jsonl", "--sampler": "hf", "--wandb": ""}
    return [replaced.get(flag, word) for flag, word in zip(["", *words], words) if word != "--compile"]


def training(clone, words):
    """Run, on the tiny model with two small steps."""
    if "--help" in words:
        return clone.run(words[1], words[2:])
    clone.train(Path(words[1]).name, words[2:])


def torchrun(clone, words):
    """torchrun's own parser reads its part. The first such training runs with two ranks, the others with one."""
    args = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    if args.training_script == "eval.py":
        return evaluating(clone, ["python", "eval.py", *args.training_script_args])
    clone.train(args.training_script, args.training_script_args, ranks=None if clone.launched else 2)
    clone.launched = True


def evaluating(clone, words):
    """Run, on the tiny model, or with --grade without one."""
    words = small(words[2:])
    model = [] if {"--model", "--grade"} & set(words) else ["--model", str(ROOT / "tests" / "tiny"), "--limit", "4"]
    clone.run("eval.py", [*words, *model, "--max_new_tokens", "8"])


class Parsed(Exception):
    """Raised in place of the minutes of measuring."""


def measuring(clone, words):
    """Takes minutes: it is started, and stopped when its own parser has accepted the flags."""
    def parse_and_stop(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise Parsed

    source, parse = (ROOT / words[1]).read_text(), argparse.ArgumentParser.parse_args
    compile(source, words[1], "exec")
    if "parse_args()" in source:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
            clone.run(words[1], words[2:])
    else:
        assert not words[2:], f"{words[1]} takes no arguments"


def installing(clone, words):
    """Needs a registry: the files of -r exist, and requirements.txt knows every pin."""
    for flag, value in zip(words, words[1:]):
        assert flag != "-r" or (ROOT / value).exists(), value
    for pin in [word for word in words if "==" in word]:
        assert pin in (ROOT / "requirements.txt").read_text(), pin


def naming(clone, words):
    """Makes an environment, runs these tests, or copies: that the files exist is what test_files checks."""


HOW = [  # how a command is covered: the first pattern that fits says it
    (PYTHON + r" (" + "|".join(SCRIPTS + PAPERS) + r")\.py\b", training),
    (r"(srun .*)?torchrun ", torchrun),
    (PYTHON + r" eval\.py\b", evaluating),
    (PYTHON + r" tests/[\w/]+\.py\b", measuring),
    (r"(\S+/)?pip install ", installing),
    (PYTHON + r" -m (venv|pytest) ", naming),
    (r"(cp|diff|patch|cd|git clone|source) ", naming),
]


def cover(command):
    """The function of HOW that covers a command, and its words, without variables, assignments and `...`."""
    words = shlex.split(re.sub(r"\$\(.*?\)|\$\{?\w+\}?", "1", command).removesuffix("..."))
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    for pattern, how in HOW:
        if re.match(pattern, " ".join(words)):
            return how, words
    return pytest.fail(f"README has a command that no pattern of HOW covers: {command}")


@pytest.mark.parametrize("command", commands())
def test_command(command, clone):
    how, words = cover(command)
    how(clone, words)


# What README names ----------------------------------------------------------------------------------------------------


def test_files(clone):
    """Files exist in the repository or in the folder of a run; the papers' scripts, X.py and .jsonl are the reader's."""
    run = clone.folder / clone.run_of("grpo")
    text = re.sub(r"https?://[^\s)]+", "", README)
    named = set(re.findall(rf"(?<![\w./-])[\w./-]*\w\.(?:{FILES})(?!\w)", text))
    named |= {word for span in SPANS for word in span.split() if re.fullmatch(r"[\w.-]+/[\w./-]*", word)}
    named |= {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("#")} - {""}
    for name in sorted(named):
        if re.match(r"\.venv/|[A-Z]\w*/", name) or name.removesuffix(".py") in ("X", "curves.png", *PAPERS):  # an environment, a hub id
            continue
        place = re.sub(r"^runs/[^/]+/?", "", name)
        places = [*(folder / name for folder in PLACES), run / place]
        assert any(found.exists() for found in places), f"README names {name}, which does not exist"


def test_links():
    """A link leads to a file, as seen from its page, and a # to one of the headings there."""
    for place, page in zip(PLACES, PAGES):
        for link in re.findall(r"\]\(([^)\s]+)\)", page):
            if not re.match("https?://", link):
                name, _, heading = link.partition("#")
                target = place / name if name else place / "README.md"
                assert target.exists(), f"{place}/README.md has a link to {link}"
                slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                         for title in re.findall(r"^#+ (.*)", target.read_text(), re.M)] if heading else [heading]
                assert heading in slugs, f"{place}/README.md has a link to {link}"


def parsers():
    """Those of the four scripts."""
    return [HfArgumentParser(importlib.import_module(name).Args) for name in SCRIPTS]


def test_flags():
    actions = [action for parser in [*parsers(), get_args_parser()] for action in parser._actions]
    known = {flag for action in actions for flag in action.option_strings}
    for path in [path for path in SOURCES if not path.name.startswith("test_")]:
        known |= set(re.findall(r'"(--[\w-]+)"', path.read_text()))
    for path in (ROOT / "tests" / "papers").glob("*.diff"):  # flags of the papers' own
        known |= {f"--{name}" for name in re.findall(r"^\+    (\w+): \w+ = flag", path.read_text(), re.M)}
    known |= {"--help"} | OTHER_FLAGS | {f"--{name}" for name, *_ in evaluation.FLAGS}
    for flag in sorted(set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", README))):
        assert flag in known, f"README names {flag}, which no script has"
    for flag, value in re.findall(r"`(--\w+)[ =](\w+)`", README):
        choices = {choice for action in actions if flag in action.option_strings for choice in action.choices or ()}
        assert not choices or value in choices, f"README names {flag} {value}: {value} is not among {sorted(choices)}"


def test_metrics(clone):
    """The table of the metrics and the rows that the four scripts write name the same keys."""
    written = {key for name in SCRIPTS for row in metrics(clone.folder / clone.run_of(name), timed=True) for key in row}
    (section,) = re.findall(r"What the metrics mean</summary>\n(.*?)</details>", README, re.S)
    named = []
    for cell in re.findall(r"^\| (.*?) \|", section, re.M):
        for key in re.findall(r"`(\w+)`", cell):  # `seconds_sampling`, `_grading`: the first part is not repeated
            named.append(named[-1].rsplit("_", 1)[0] + key if key.startswith("_") else key)
    assert sorted(set(named) - written) == [], "README explains metrics that no script writes"
    assert sorted(written - set(named)) == [], "README does not explain metrics that a script writes"


def test_diffs_that_are_shown():
    """The front page's diffs: each line stands in grpo.py or in the variant that the text before names."""
    shown = re.findall(r"\(`diff -u grpo.py (\w+)\.py`\).*?```diff\n(.*?)```", PAGES[0], re.S)
    assert [name for name, _ in shown] == SCRIPTS[1:]
    for name, diff in shown:
        for line in diff.splitlines():
            source = (ROOT / f"{name if line[0] == '+' else 'grpo'}.py").read_text()
            assert line[1:] in source, f"README shows {line!r}"


def test_the_patch_that_is_shown():
    """The other page's diff stands in tests/papers/gmpo.diff."""
    (shown,) = [content for language, content in FENCE.findall(PAGES[1]) if language == "diff"]
    assert shown in (ROOT / "tests" / "papers" / "gmpo.diff").read_text()


def test_the_front_page_is_short():
    lines = [line for line in PAGES[0].splitlines() if not line.startswith("|")]
    assert len(PAGES[0].splitlines()) <= 240 and max(map(len, lines)) <= 130
    code = [content for _, content in FENCE.findall(PAGES[0])] + re.findall(r"^    (?=\S).*", PAGES[0], re.M)
    assert max(len(line) for text in code for line in text.splitlines()) <= 104, "a browser would cut off its end"


def test_the_reward_that_is_shown():
    """README's example of a reward of one's own, in the place of a script's."""
    (source,) = [content for language, content in FENCED if language == "python"]
    names = {"grade": evaluation.grade}
    exec(source, names)
    rows = [{"problem": "1+1?", "answer": "2"}] * 3
    rewards = names["rewards_of"](["\\boxed{2}", "\\boxed{3}", "3"], rows)
    assert rewards == pytest.approx([1.0, 0.1, 0.0])


def test_names():
    """Names in `code` stand in the code: functions, fields, metrics, data sets, values. Calls have its parameters."""
    for span in SPANS:
        if re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)?", span) and not re.search(rf"\.({FILES}|jsonl|parquet)$", span):
            for name in span.split("."):
                assert re.search(rf"\b{name}\b", CODE) or name in OTHER_NAMES, f"README names `{span}`: not in the code"
        elif call := re.fullmatch(r"(\w+)\(([\w, ]*)\)", span):
            known = f"def {span}:" in CODE or not call[2] and f"{call[1]}(" in CODE
            assert known, f"README names `{span}`: not in the code"



# Figures --------------------------------------------------------------------------------------------------------------


def figures():
    """(first paragraph, item) of the sections with results: all of tests/measure, and those called Measured or Results.

    An item is a paragraph or an item of a list; a table or a picture belongs to the text before it.
    """
    items = []
    for page in PAGES:
        for title, section in re.findall(r"^##+ ([^\n]*)\n(.*?)(?=^##+ |\Z)", page, re.M | re.S):
            if page is PAGES[2] or re.search("Measured|Results", title):
                texts = [text.strip() for text in re.split(r"\n(?=- )|\n\n(?=[^ |!\n])", section) if text.strip()]
                items += [(texts[0], text) for text in texts]
    return items


@pytest.mark.parametrize("first, text", figures(), ids=lambda text: " ".join(text.split()[:5]))
def test_figures_have_a_command(first, text):
    """It stands in the item itself, or in the first paragraph of the section."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", first + "\n" + text)]
    assert not re.search(r"\d", text) or any(re.match(PYTHON + " |torchrun |pytest |diff ", span) for span in spans), \
        f"figures without the command that they come from: {text[:200]}"


def test_there_are_figures_and_commands():
    """The tests above would be silent if README's form changed so that nothing is found."""
    assert len(figures()) >= 5 and len(commands()) >= 8 and len(SPANS) >= 50
