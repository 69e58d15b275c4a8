"""Tests of eval.py: loading, prompts, evaluation, the command line. Those of the grader are in test_grader.py.

Slow ones start processes: about two minutes in all on one core. Real data is expected beside the repository, in
../shared/bench; without it those tests are skipped, or fail when GRPO_REQUIRE_DATA=1 is set.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import eval as ev  # noqa: E402
from conftest import on_a_terminal  # noqa: E402

BENCH = ROOT.parent / "shared" / "bench"
TINY = ROOT / "tests" / "tiny"
CLEAN_ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ONE_THREAD = CLEAN_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}


def bench(name):
    path = BENCH / f"{name}.jsonl"
    if not path.exists():
        if os.environ.get("GRPO_REQUIRE_DATA") == "1":
            pytest.fail(f"GRPO_REQUIRE_DATA=1, and there is no {path}")
        pytest.skip(f"no {path.name} in ../shared/bench")
    return path


def boxed(answer):
    return f"So the answer is \\boxed{{{answer}}}."


@pytest.fixture(scope="module")
def grader():
    with ev.Grader(workers=2) as grader:
        yield grader


# ---- Loading ----


@pytest.mark.long
def test_gsm8k_train_loads_fast():
    path = bench("gsm8k_train")
    start = time.perf_counter()
    assert len(ev.load_problems(str(path))) == 7473
    assert time.perf_counter() - start < 3


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_arithmetic():
    train, test = ev.load_problems("arithmetic", "train"), ev.load_problems("arithmetic", "test")
    assert (len(train), len(test)) == (4096, 256)
    assert not {row["problem"] for row in train} & {row["problem"] for row in test}
    assert test[0] == {"problem": "50+98+54+6?", "answer": "208"}
    assert all(sum(map(int, row["problem"][:-1].split("+"))) == int(row["answer"]) for row in train + test)


def test_columns_and_cleaning(tmp_path, capsys):
    rows = [
        {"question": "a?", "answer": "She has 3 * 6 = <<3*6=18>>18 eggs.\n#### 18"},
        {"question": "b?", "answer": "#### 1,080"},
        {"question": "c?", "answer": ["$\\frac{1}{2}$"]},
        {"question": "d?", "answer": ["$2$", "$3$."]},
        {"question": "e?", "answer": "$4.5e33$"},
        {"question": "f?", "answer": 7},
        {"question": "g?", "answer": 0.5},
        {"question": "h?", "answer": "8\\,178."},
        {"question": "i?", "answer": "\\boxed{12}"},
        {"question": "", "answer": "1"},
        {"question": "k?", "answer": ""},
        {"question": "l?", "answer": None},
        {"question": "m?"},
        {"question": "n\ud800?", "answer": "5"},
    ]
    problems = ev.load_problems(write(tmp_path / "rows.jsonl", rows))
    assert [row["answer"] for row in problems] == [
        "18", "1080", "\\frac{1}{2}", "2, 3", "4.5 \\times 10^{33}", "7", "0.5", "8178", "12", "5"]  # fmt: skip
    assert problems[-1]["problem"] == "n??"
    assert "4 of 14 rows dropped" in capsys.readouterr().out


def test_gold_that_hangs_is_dropped(tmp_path, capsys, monkeypatch):
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "x?", "answer": "\\frac{" * 40 + "1" + "}{2}" * 40}]
    monkeypatch.setattr(ev.Grader, "ask", lambda self, question: "time-out")  # what a killed worker's question gets
    assert len(ev.load_problems(write(tmp_path / "rows.jsonl", rows))) == 1
    assert "1 of 2 rows dropped" in capsys.readouterr().out


def test_solution_and_other_columns(tmp_path):
    rows = [{"Problem": "a?", "Solution": "Thus $\\boxed{\\frac34}$."}, {"Problem": "b?", "Solution": "no box"}]
    assert [row["answer"] for row in ev.load_problems(write(tmp_path / "a.jsonl", rows))] == ["\\frac{3}{4}"]
    rows = [{"prompt": [{"role": "user", "content": "a?"}], "reward_model": {"ground_truth": "34", "style": "rule"}}]
    (row,) = ev.load_problems(write(tmp_path / "b.jsonl", rows))
    assert (row["problem"], row["answer"]) == ("a?", "34")


OWN = {"kind": "sum", "index": 7, "length": "long", "finish": None}  # columns of a user's own, some with names of ours


def test_own_columns_reach_the_reward(tmp_path):
    """A reward may ask for more than problem and answer; to grade completions no other column counts."""
    path = write(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "2", "completion": "\\boxed{2}", **OWN}])
    (row,) = ev.load_problems(path)
    assert row == {"question": "1+1?", "problem": "1+1?", "answer": "2", "completion": "\\boxed{2}", **OWN}
    (statistics_,) = ev.grade_file(argparse.Namespace(grade=path, out=None, k=None)).values()
    assert statistics_["accuracy"] == 1 and not {"kind", "length"} & set(statistics_["records"][0])


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "1+2?", "answer": "3"}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert ev.load_problems(str(tmp_path / "rows.parquet")) == rows
    nested = [{"prompt": [{"content": "a?", "role": "user"}], "reward_model": {"ground_truth": "34"}}]
    datasets.Dataset.from_list(nested).to_parquet(str(tmp_path / "nested.parquet"))
    assert ev.load_problems(str(tmp_path / "nested.parquet")) == [{**nested[0], "problem": "a?", "answer": "34"}]


def test_names_of_the_hub(monkeypatch):
    """Every known name asks for its data set and split; DAPO's copies are dropped. The network itself is not tested."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        rows = [{"prompt": [{"content": f"{i}?", "role": "user"}], "reward_model": {"ground_truth": str(i)},
                 "extra_info": {"index": f"key {i}"}} for i in (1, 2, 1, 2, 1)]  # fmt: skip
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(ev, "use_cache_without_network", lambda: False)
    assert sorted(row["answer"] for row in ev.load_problems("dapo")) == ["1", "2"]
    assert len(ev.load_problems("gsm8k", "train")) == 5
    for name in ("gsm8k", "math", "aime24", "aime25", "someone/something"):
        ev.load_problems(name, "test")
    assert asked == [
        ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train"), ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"), ("nlile/hendrycks-MATH-benchmark", None, "test"),
        ("HuggingFaceH4/aime_2024", None, "train"), ("math-ai/aime25", None, "test"),
        ("someone/something", None, "test")]  # fmt: skip


def refused(capsys, *arguments):
    """The one line that load_problems ends with."""
    with pytest.raises(SystemExit) as caught:
        ev.load_problems(*arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_bad_data(tmp_path, capsys, monkeypatch):
    good = '{"problem": "1+1?", "answer": "2"}\n'
    (tmp_path / "broken.jsonl").write_text(good + "\n" + good + '{"problem": "1+1?", "ans\n' + good)
    assert "line 4" in refused(capsys, str(tmp_path / "broken.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(good.encode() + '{"problem": "Größe?", "answer": "2"}\n'.encode("latin-1"))
    assert "line 2" in refused(capsys, str(tmp_path / "latin.jsonl"))
    (tmp_path / "numbers.jsonl").write_text(good + "7\n")
    assert "line 2" in refused(capsys, str(tmp_path / "numbers.jsonl"))
    (tmp_path / "deep.jsonl").write_text(good + "[" * 100_000)
    assert "line 2" in refused(capsys, str(tmp_path / "deep.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "is empty" in refused(capsys, str(tmp_path / "empty.jsonl"))
    (tmp_path / "columns.jsonl").write_text('{"text": "1+1?", "answer": "2", "level": 3}\n')
    line = refused(capsys, str(tmp_path / "columns.jsonl"))
    assert "text, answer, level" in line and "problem, question" in line
    (tmp_path / "golds.jsonl").write_text('{"problem": "1+1?", "answer": ""}\n{"problem": "1+2?", "answer": null}\n')
    assert "no row of 2" in refused(capsys, str(tmp_path / "golds.jsonl"))
    (tmp_path / "broken.parquet").write_text("PAR1 or not")
    assert "parquet" in refused(capsys, str(tmp_path / "broken.parquet"))
    assert "No such file" in refused(capsys, str(tmp_path / "nothing.jsonl"))
    assert "directory" in refused(capsys, str(tmp_path))

    def no_network(*_, **__):
        raise AssertionError("a name without a slash needs no network")

    monkeypatch.setattr("socket.create_connection", no_network)
    line = refused(capsys, "nosuch")
    assert "'nosuch'" in line and "aime24" in line and "arithmetic" in line and ".jsonl" in line


def test_hub_out_of_reach():
    """Within seconds, one line on stderr that says what to do; no network is needed to have none."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import eval; eval.load_problems('math-ai/aime25')"
    names = [name for name in CLEAN_ENVIRONMENT if "proxy" not in name.lower() and name != "HF_HUB_OFFLINE"]
    environment = {name: CLEAN_ENVIRONMENT[name] for name in names}
    environment |= {"HF_ENDPOINT": "http://nowhere.invalid", "HF_HOME": "/nonexistent"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "HF_HOME" in done.stderr and ".jsonl" in done.stderr, done.stderr
    assert time.perf_counter() - start < 20


# ---- Prompts ----


class FakeTokenizer:
    """Just enough of a tokenizer to see what is asked of it: ids are characters."""

    def __init__(self, chat_template=None, refuses_system=False):
        self.chat_template, self.refuses_system = chat_template, refuses_system

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i) for i in ids if i)


def make_tokenizer(chat_template):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<bos>": 0, "<unk>": 1}, unk_token="<unk>"))
    core.add_special_tokens(["<bos>"])
    alphabet = sorted({chr(i) for i in range(32, 127)} | {"\n"})
    core.add_tokens([tokenizers.AddedToken(character, normalized=False) for character in alphabet])
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    core.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer


def test_solutions_and_proofs(tmp_path, capsys):
    """In a column `solution` a number is an answer, a text needs a box; a proof is none, and a long formula is."""
    rows = [("1+1?", "2"), ("2+2?", "We find 4."), ("3+3?", "It is \\boxed{6}."), ("4+4?", "so 8 #### 8")]
    path = tmp_path / "solution.jsonl"
    path.write_text("".join(json.dumps({"problem": problem, "solution": text}) + "\n" for problem, text in rows))
    assert [row["answer"] for row in ev.load_problems(str(path))] == ["2", "6", "8"]
    assert "1 of 4 rows dropped" in (said := capsys.readouterr().out) and "stand in \\boxed{}" in said
    proof = "By induction on the number of vertices every tree has one edge less than vertices, which was to be shown"
    formula = "f(x)=a x+b, where b is an arbitrary integer, a is an arbitrary positive integer"
    path.write_text("".join(json.dumps({"problem": "Show it.", "answer": text}) + "\n" for text in (proof, formula)))
    assert [row["answer"] for row in ev.load_problems(str(path))] == [formula]


def test_encode_prompt():
    problem = "What is 1+1?"
    plain = make_tokenizer(None)
    text = plain.decode(ev.encode_prompt(plain, problem))
    assert text == f"<bos>Question:\n{problem}\nAnswer:\nLet's think step by step.\n"

    chat = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    chat += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = make_tokenizer(chat)
    ids = ev.encode_prompt(tokenizer, problem)
    assert isinstance(ids, list) and all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == f"<bos>[system]{ev.SYSTEM}[user]{problem}[assistant]"  # one <bos>

    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = make_tokenizer(refusing + chat)
    assert tokenizer.decode(ev.encode_prompt(tokenizer, problem)) == f"<bos>[user]{ev.SYSTEM}\n\n{problem}[assistant]"
    for own, text in ((tokenizer, f"<bos>[user]Be brief.\n\n{problem}[assistant]"), (plain, f"Be brief.\n\nQuestion:\n{problem}")):
        assert text in own.decode(ev.encode_prompt(own, problem, "Be brief."))


def test_what_a_run_needs_is_said_at_its_start(monkeypatch, capsys):
    """135 M parameters on two ranks of a node: 16 bytes each, shared; on a CPU how long a step may be, if it is long."""
    import torch
    import transformers

    class Sampler:
        pass

    policy = torch.nn.Linear(135, 10**6, bias=False, device="meta")
    policy.model = argparse.Namespace(generation_config=transformers.GenerationConfig())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for prompts, tokens, device, hours in ((128, 2048, "cpu", True), (128, 2048, "cuda", False), (1, 8, "cpu", False)):
        args = argparse.Namespace(model="some/model", prompts_per_step=prompts, group_size=8, max_new_tokens=tokens)
        ev.say_start("grpo", args, policy, Sampler(), torch.device(device))
        said = capsys.readouterr().out
        assert "135.0M parameters" in said and "Sampler; weights, gradients, AdamW: 1.08 GB each" in said
        assert ("a step has up to 2,097,152 tokens" in said and " hours on this CPU" in said) == hours
    policy.model.generation_config.temperature = 0.6  # without do_sample: transformers would not save it, at the very end
    ev.say_start("grpo", args, policy, Sampler(), torch.device("cpu"))
    assert "generation_config.json is not valid" in capsys.readouterr().out
    policy.model.generation_config.validate(strict=True)


def test_other_weights_or_problems_under_the_same_name(tmp_path, monkeypatch, capsys):
    """What stands in --out is of the weights as they were; a shorter --limit, or two models with one file, are refused."""
    for name in ("a/b", "a_b"):
        shutil.copytree(TINY, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    few = ("--limit", "4", "--max_new_tokens", "4", "--out", "out", "--model")
    assert run(*few, "a/b", cwd=tmp_path).returncode == 0
    weights = tmp_path / "a/b/model.safetensors"

    def refused(*arguments):
        monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
        with pytest.raises(SystemExit):
            ev.main()
        return capsys.readouterr().err

    assert "would share out/a_b/arithmetic.jsonl" in refused(*few, "a/b,a_b")
    assert "choose another --out" in refused(*few, "a/b", "--limit", "3")
    os.utime(weights, (0, 1.5))
    assert "was made with weights_written" in refused(*few, "a/b")
    path = write(tmp_path / "rows.jsonl", [{"index": i, "problem": f"{i}+1?"} for i in range(3)])
    with pytest.raises(SystemExit):
        ev.finished(path, [{"problem": "0+1?"}, {"problem": "1+1?"}], 1, 1)
    assert "the rows of more problems" in capsys.readouterr().err


def test_two_runs_of_one_second_have_two_folders(tmp_path, monkeypatch):
    import torch.distributed as dist

    monkeypatch.chdir(tmp_path)
    times = iter(["noon", "noon", "later"])
    monkeypatch.setattr(ev.time, "strftime", lambda _: next(times))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    args = argparse.Namespace(resume=None, output_dir=None, wandb=None, steps=1)
    try:
        assert [str(ev.open_run(args, "grpo", 0, [])) for _ in range(2)] == ["runs/grpo-noon", "runs/grpo-later"]
        (tmp_path / "file").write_text("")
        args.output_dir = "file/run"
        with pytest.raises(SystemExit):
            ev.open_run(args, "grpo", 0, [])
    finally:
        dist.destroy_process_group()


def test_a_rank_that_fails_alone_is_heard(monkeypatch, capsys):
    """After torchrun has had the time to end it, which it does if a node's first rank failed too, and spoke."""
    waited, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ev, "RANK", 9)
    monkeypatch.setattr(ev.time, "sleep", waited.append)
    for local, seconds in (("1", [5]), ("0", [5])):  # the second does not wait
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(SystemExit):
            ev.fail("no data here")
        assert capsys.readouterr().err == "error: rank 9: no data here\n" and waited == seconds
    signal.signal(signal.SIGTERM, before)


def test_k_of_graded_completions(tmp_path, capsys):
    path = write(tmp_path / "two.jsonl", [{"problem": "1+1?", "completion": "\\boxed{2}", "answer": "2"}] * 2)
    with pytest.raises(SystemExit):
        ev.grade_file(argparse.Namespace(grade=path, out=None, k=[1, 3]))
    assert "every k must be from 1 to 2" in capsys.readouterr().err


def test_prompts_of_a_run(tmp_path, capsys):
    """They have the run's system prompt in them; too long ones are counted apart from those without a token."""
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"problem": text, "answer": "2"}) + "\n" for text in ("1+1?", "1+1?" * 20)))
    args = argparse.Namespace(model=str(TINY), system_prompt="Be brief.", max_prompt_tokens=90, max_new_tokens=8)
    tokenizer = make_tokenizer(None)
    (row,), skipped = ev.load_prompts(str(path), "train", tokenizer, args)
    assert tokenizer.decode(row["prompt_ids"]).startswith("<bos>Be brief.\n\nQuestion:\n1+1?") and skipped == 1
    assert "1 prompts, 1 skipped: 0 without a token, 1 longer than --max_prompt_tokens 90" in capsys.readouterr().out


def test_encode_prompt_of_the_tiny_model():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.decode(ev.encode_prompt(tokenizer, "37+5+81+26?")) == "37+5+81+26?"


# ---- Evaluation ----

Completion = namedtuple("Completion", "ids finish")


def make_sampler(right, n, lengths=None):
    """A sampler that answers problem "i?" rightly in its first right[i] completions; the last has no box, the rest lie."""

    def sample(prompt_ids, n_asked, seed, temperature):
        assert n_asked == n
        completions = []
        for ids in prompt_ids:
            i = int(re.search(r"(\d+)\?", "".join(map(chr, ids)))[1])
            for j in range(n):
                text = boxed(i if j < right[i] else i + 1) if j < n - 1 or right[i] == n else "no idea"
                completions.append(Completion([ord(c) for c in text] + [0], "length" if text == "no idea" else "stop"))
        return completions

    return sample


@pytest.mark.parametrize("n, count", [(1, 7), (4, 600), (6, 5), (8, 33)])
def test_evaluate_against_brute_force(n, count, grader):
    generator = random.Random(n)
    right = [generator.randint(0, n) for _ in range(count)]
    problems = [{"problem": f"{'x' * generator.randint(0, 30)}{i}?", "answer": str(i)} for i in range(count)]
    result = ev.evaluate(make_sampler(right, n), FakeTokenizer(), problems, grader, n=n)
    assert result["accuracy"] == pytest.approx(sum(right) / n / count)
    means = [c / n for c in right]
    assert result["standard_error"] == pytest.approx(statistics.stdev(means) / math.sqrt(count))
    resampled = [statistics.fmean(generator.choices(means, k=count)) for _ in range(2000)]
    assert result["standard_error"] == pytest.approx(statistics.stdev(resampled), rel=0.25 if count < 10 else 0.1)
    assert list(result["pass_at_k"]) == [k for k in (1, 2, 4, 8) if k <= n]
    for k, value in result["pass_at_k"].items():
        subsets = [[any(j < c for j in chosen) for chosen in itertools.combinations(range(n), k)] for c in right]
        assert value == pytest.approx(statistics.fmean(statistics.fmean(subset) for subset in subsets))
    no_box = sum(c < n for c in right) / n / count
    assert result["no_box"] == pytest.approx(no_box) == result["truncated"]
    assert (result["problems"], result["n"], result["grader_timeouts"]) == (count, n, 0)
    records = result["records"]
    assert [record["index"] for record in records] == [i for i in range(count) for _ in range(n)]
    assert [sum(record["correct"] for record in records[i * n:i * n + n]) for i in range(count)] == right
    assert result["length"] == pytest.approx(statistics.fmean(len(record["completion"]) + 1 for record in records))
    assert all(record["answer"] == str(record["index"]) for record in records)


def test_evaluate_one_problem(grader):
    problems = [{"problem": "0?", "answer": "0"}]
    result = ev.evaluate(make_sampler([1], 1), FakeTokenizer(), problems, grader)
    assert result["accuracy"] == 1 and math.isnan(result["standard_error"])


RANKS = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import eval as ev
import test_eval
torch.distributed.init_process_group("gloo")
right = [i % 5 for i in range(7)]
problems = [dict(problem=f"{{i}}?", answer=str(i)) for i in range(7)]
with ev.Grader(workers=1) as grader:
    result = ev.evaluate(test_eval.make_sampler(right, 4), test_eval.FakeTokenizer(), problems, grader, n=4)
open({out!r} + str(torch.distributed.get_rank()), "w").write(json.dumps(result))
torch.distributed.destroy_process_group()
"""


def test_evaluate_on_ranks(tmp_path, grader):
    """Two ranks return what one process does, both of them, although seven problems do not divide by two."""
    pytest.importorskip("torch")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(tmp_path / "rank")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    subprocess.run(command, check=True, env=CLEAN_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120)
    problems = [{"problem": f"{i}?", "answer": str(i)} for i in range(7)]
    alone = ev.evaluate(make_sampler([i % 5 for i in range(7)], 4), FakeTokenizer(), problems, grader, n=4)
    alone = json.loads(json.dumps(alone))
    assert [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)] == [alone, alone]


# ---- The end of a program, and its curves ----


@pytest.mark.parametrize("end, code, lines", [
    ("pass", 0, []), ("sys.exit(3)", 3, []), ("sys.exit('error: no')", 1, ["error: no"]),
    ("raise torch.OutOfMemoryError('no\\nroom')", 1, ["error: rank 0: no room What weights"]),
    ("raise ValueError('odd')", 1, ["Traceback (most recent call last):"]),
])
def test_ending(end, code, lines):
    """Exit codes and what is said; a traceback only of what nobody foresaw. The process group is left in any case."""
    program = f"import sys, torch, eval\nwith eval.ending():\n    eval.join_ranks(1)\n    {end}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=ONE_THREAD, timeout=60)
    said = done.stderr.splitlines()
    assert done.returncode == code and len(said) == len(lines) or "Traceback" in said[0] and "odd" in said[-1]
    assert all(line.startswith(start) for line, start in zip(said, lines)) and "destroy_process_group" not in done.stderr


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed: only the picture needs it")
def test_curves_of_two_runs(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        rows = [{"step": step, "reward": 0.1 * step, "length": 9, "entropy": 1.0} for step in (1, 2)]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ev.draw_curves([tmp_path / "a", tmp_path / "b"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- The command line ----


def run(*arguments, **options):
    command = [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=120, **options)


def test_command_line(tmp_path):
    """Two models and a file, sampled; the table, the rows, the summary; and the rows graded again by --grade."""
    write(tmp_path / "mine.jsonl", [{"question": "1+2+3+4?", "answer": "10", **OWN}])
    arguments = ("--model", f"{TINY},{TINY}/", "--benchmarks", f"arithmetic,{tmp_path / 'mine.jsonl'}", "--limit", 16)
    done = run(*arguments, "--n", 4, "--k", "1,3", "--seed", 5, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "temperature 0.6, top_p 0.95" in done.stdout and "seed 5" in done.stdout
    assert done.stderr == ""  # no progress bar where it would fill a file: on a terminal see test_killed_and_resumed
    assert "interval +0.000 to +0.000" in done.stdout  # the model against itself
    table = next(line for line in done.stdout.splitlines() if re.match(r"\S+tiny  +arithmetic ", line)).split()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["problems"] for row in summary] == [16, 1, 16, 1] and summary[3]["interval"] == [0, 0]
    assert list(summary[0]["pass_at_k"]) == ["1", "3"] and float(table[3]) == round(summary[0]["accuracy"], 3)
    rows_file = next((tmp_path / "out").rglob("arithmetic.jsonl"))
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert len(rows) == 64 and {row["why"] for row in rows} <= {"text", "math-verify", "no answer"}
    assert all(row["correct"] == (row["extracted"] == row["answer"]) for row in rows)
    assert sum(row["correct"] for row in rows) / 64 == summary[0]["accuracy"] and 0 < summary[0]["accuracy"] < 0.6
    mine = [json.loads(line) for line in next(path for path in (tmp_path / "out").rglob("*mine.jsonl")).open()]
    assert {row["index"] for row in mine} == {0} and "kind" not in mine[0] and mine[0]["length"] > 0
    assert rows[0]["system_prompt"] is None  # so that with another one, in either order, --out is refused
    done = run(*arguments, "--n", 4, "--seed", 5, "--system_prompt", "1", "--out", tmp_path / "out")
    assert done.returncode == 2 and "was made with system_prompt None, not '1'" in done.stderr
    done = run("--grade", rows_file, "--out", tmp_path / "graded")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "graded" / "summary.json").read_text())[0]
    kept = ("accuracy", "standard_error", "no_box", "problems", "n")
    assert {key: again[key] for key in kept} == {key: summary[0][key] for key in kept}
    assert len((tmp_path / "graded" / "graded.jsonl").read_text().splitlines()) == 64


def test_help_and_bad_input(tmp_path, monkeypatch, capsys):
    done = run("--help")
    assert done.returncode == 0
    for word in ("pass@k", "olympiadbench", "torchrun", "--grade", "HF_HOME", "bootstrap", "time-outs", "top_p", "\\boxed"):
        assert word in done.stdout, word
    for missing in ("model.safetensors", "tokenizer*"):
        folder = tmp_path / missing.strip("*")
        folder.mkdir()
        for file in TINY.iterdir():
            if not file.match(missing):
                (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.jsonl").write_text('{"text": "a", "label": "2"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "long.jsonl").write_text('{"problem": "' + "1+" * 300 + '1?", "answer": "301"}\n')
    cases = [
        (("--model", TINY, "--benchmarks", "nosuch"), "unknown data set 'nosuch': known are arithmetic, gsm8k"),
        (("--model", TINY, "--benchmarks", "arithmetic,nothing.jsonl"), "No such file"),
        (("--model", TINY, "--benchmarks", tmp_path / "text.jsonl"), "has the columns text, label"),
        (("--model", TINY, "--benchmarks", tmp_path / "empty.jsonl"), "is empty"),
        (("--model", TINY, "--benchmarks", tmp_path / "long.jsonl"), "has room for 256 tokens"),
        (("--model", TINY, "--n", 0), "--n must be at least 1"),
        (("--model", TINY, "--n", 4, "--k", "1,8"), "every k must be from 1 to --n 4"),
        (("--model", TINY, "--n", 4, "--k", "0"), "every k must be from 1 to --n 4"),
        (("--model", TINY, "--k", "two"), "--k"),
        (("--model", TINY, "--limit", 0), "--limit must be at least 1"),
        (("--model", TINY, "--temperature", "nan"), "--temperature"),
        (("--model", TINY, "--temperature", -1), "--temperature"),
        (("--model", TINY, "--n", 4, "--temperature", 0), "above 0 when n is more than 1"),
        (("--model", TINY, "--n", 4, "--top_p", 0), "--top_p"),
        (("--model", TINY, "--n", "many"), "--n"),
        (("--model", TINY, "--bogus", 1), "--bogus"),
        (("--model", TINY, "--vllm_tp", 2), "--vllm_tp"),
        (("--model", TINY, "--out", tmp_path / "text.jsonl"), "is a file"),
        ((), "--model"),
        (("--model", TINY, "--grade", tmp_path / "text.jsonl"), "--grade"),
        (("--grade", tmp_path / "text.jsonl"), "has the columns text, label: it needs one of completion\n"),
        (("--grade", tmp_path / "empty.jsonl"), "is empty"),
        (("--model", ROOT / "tests"), "is no model folder"),
        (("--model", tmp_path / "nowhere" / "at" / "all"), "there is no folder"),
        (("--model", "nobody/nothing"), "cannot load"),
        (("--model", tmp_path / "model.safetensors"), "is no model folder"),
        (("--model", tmp_path / "tokenizer"), "no tokenizer"),
    ]  # fmt: skip
    if not find_spec("vllm"):
        cases.append((("--model", TINY, "--sampler", "vllm"), "needs its package"))
    for arguments, message in cases:  # in this process, but for a few: importing transformers takes most of the time
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            ev.main()
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.out == "", (arguments, said)
        assert said.err.count("\n") == 1 and said.err.startswith("error: ") and message in said.err, (arguments, said)
    for arguments, message in (cases[0], cases[5], cases[-2]):  # data, a flag, a model
        done = run(*arguments)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and message in done.stderr


SAMPLED = ("--model", TINY, "--limit", 48, "--n", 4, "--batch_size", 32)


@pytest.mark.long
def test_killed_and_resumed(tmp_path):
    """Killed in the middle of a run, with a torn last line, it goes on, samples nothing twice, and ends with the same file."""
    assert run(*SAMPLED, "--out", tmp_path / "whole").returncode == 0
    whole = next((tmp_path / "whole").rglob("arithmetic.jsonl"))
    command = [sys.executable, "-u", str(ROOT / "eval.py"), *map(str, SAMPLED), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    killed = tmp_path / "killed" / whole.relative_to(tmp_path / "whole")
    while not (killed.exists() and killed.stat().st_size):
        time.sleep(0.005)
        assert process.poll() is None
    process.kill()
    process.wait()
    left = killed.read_bytes()
    assert 0 < len(left) < whole.stat().st_size and whole.read_bytes().startswith(left)
    killed.write_bytes(left + b'{"index": 7, "prob')  # torn
    code, shown = on_a_terminal(["eval.py", *SAMPLED, "--out", tmp_path / "killed"])
    problems = left.count(b"\n") // 32 * 8  # of whole batches
    assert code == 0 and b"evaluating" in shown and f"{problems}/48".encode() in shown, shown  # where the bar starts
    assert killed.read_bytes() == whole.read_bytes()
    summaries = [(tmp_path / run / "summary.json").read_text() for run in ("whole", "killed")]
    assert summaries[0] == summaries[1]
    for other in (("--seed", 1), ("--n", 2)):
        refused = run(*SAMPLED, *other, "--out", tmp_path / "killed")
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
        assert f"with {other[0][2:]} " in refused.stderr and "another --out" in refused.stderr
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.long
def test_two_ranks_and_one(tmp_path):
    """The same table under greedy decoding; and two ranks, resumed, leave what stands in their files."""
    arguments = ["--model", str(TINY), "--limit", "15", "--out"]
    assert run(*arguments, tmp_path / "one").returncode == 0
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", str(ROOT / "eval.py")]
    command = [sys.executable, *ranks, *arguments, str(tmp_path / "two"), "--n", "1"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=120)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for path in (tmp_path / "two").rglob("*.jsonl") for line in open(path)]
        assert sorted(row["index"] for row in rows) == list(range(15))
    summaries = [(tmp_path / run / "summary.json").read_text() for run in ("one", "two")]
    assert summaries[0] == summaries[1] and done.stdout.count("arithmetic") == 2


@pytest.mark.long
def test_interrupt():
    command = [sys.executable, str(ROOT / "eval.py"), "--model", str(TINY), "--n", "64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=CLEAN_ENVIRONMENT)
    assert "arithmetic" in process.stdout.readline()  # it has begun
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors and errors.endswith("interrupted\n")


def test_sampler_with_a_models_own_settings(tmp_path):
    """A model that comes with top_k=1 still samples, and stops at each of its stop tokens; padding changes nothing."""
    torch = pytest.importorskip("torch")
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = ev.load_tokenizer(str(tmp_path))
    closing = tokenizer.encode("}")[0]
    own = {"top_k": 1, "repetition_penalty": 5.0, "eos_token_id": [closing], "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    args = argparse.Namespace(model=str(tmp_path), max_new_tokens=60, top_p=1.0)
    sampler = ev.hf_sampler(args, tokenizer, torch.device("cpu"), 100)
    prompts = [tokenizer.encode(text) for text in ("1+2+3+4?", "50+98+54+6?", "12+34+56+78?")]
    completions = sampler(prompts, 4, 0, 1.0)
    assert len(completions) == 12 and len({tuple(completion.ids) for completion in completions[4:8]}) > 1
    assert all(completion.ids[-1] in (closing, tokenizer.eos_token_id) for completion in completions)
    assert all(completion.finish == "stop" and closing not in completion.ids[:-1] for completion in completions)
    assert completions == sampler(prompts, 4, 0, 1.0) != sampler(prompts, 4, 1, 1.0)  # seeds
    greedy = sampler(prompts, 1, 0, 0.0)
    args.top_p = 1e-6
    assert sampler(prompts, 1, 7, 1.0) == greedy  # only the likeliest token is left
    args.max_new_tokens = 2
    short = sampler(prompts, 1, 0, 0.0)
    assert all(completion.finish == "length" and len(completion.ids) == 2 for completion in short)
