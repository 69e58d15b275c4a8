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
import statistics
import subprocess
import sys
import time
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
        {"question": "n?", "answer": "5"},
    ]
    problems = ev.load_problems(write(tmp_path / "rows.jsonl", rows))
    assert [row["answer"] for row in problems] == [
        "18", "1,080", "$\\frac{1}{2}$", "$2$, $3$.", "$4.5e33$", "7", "0.5", "8\\,178.", "12", "5"]  # fmt: skip
    assert [ev.clean(row["answer"]) for row in problems[:8]] == [
        "18", "1080", "\\frac{1}{2}", "2, 3", "4.5e33", "7", "0.5", "8178"]  # fmt: skip
    assert "4 of 14 rows dropped" in capsys.readouterr().out


def test_solution_and_other_columns(tmp_path):
    rows = [{"Problem": "a?", "Solution": "Thus $\\boxed{\\frac34}$."}, {"Problem": "b?", "Solution": "no box"}]
    assert [row["answer"] for row in ev.load_problems(write(tmp_path / "a.jsonl", rows))] == ["\\frac34"]
    rows = [{"prompt": [{"role": "user", "content": "a?"}], "reward_model": {"ground_truth": "34", "style": "rule"}}]
    (row,) = ev.load_problems(write(tmp_path / "b.jsonl", rows))
    assert (row["problem"], row["answer"]) == ("a?", "34")


OWN = {"kind": "sum", "index": 7, "length": "long", "finish": None}  # columns of a user's own, some with names of ours


def test_own_columns_reach_the_reward(tmp_path):
    """A reward may ask for more than the problem and the answer."""
    path = write(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "2", "completion": "\\boxed{2}", **OWN}])
    (row,) = ev.load_problems(path)
    assert row == {"question": "1+1?", "problem": "1+1?", "answer": "2", "completion": "\\boxed{2}", **OWN}


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "1+2?", "answer": "3"}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert ev.load_problems(str(tmp_path / "rows.parquet")) == rows
    nested = [{"prompt": [{"content": "a?", "role": "user"}], "reward_model": {"ground_truth": "34"}}]
    datasets.Dataset.from_list(nested).to_parquet(str(tmp_path / "nested.parquet"))
    assert ev.load_problems(str(tmp_path / "nested.parquet")) == [{**nested[0], "problem": "a?", "answer": "34"}]


def test_names_of_the_hub(monkeypatch, capsys):
    """Names ask for their data set and configuration; a split that is not there is replaced. The network is not tested."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*how):
        asked.append(how)
        known = {"math-ai/aime25": "test", "HuggingFaceH4/aime_2024": "train", "an/other": "train validation", "one/more": "dev test"}
        names = known.get(how[0], "train test").split()
        rows = [{"solution": "", "reward_model": {"ground_truth": str(i)}} for i in range(5)]
        return {name: datasets.Dataset.from_list([{"prompt": f"{name}?", **row} for row in rows]) for name in names}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row["answer"] for row in ev.load_problems("dapo")] == [*"01234"] and "split" not in capsys.readouterr().out
    for name, split, used in (("gsm8k", "train", "train"), ("gsm8k", "test", "test"), ("aime24", "test", "train"),
                              ("math-ai/aime25", "train", "test"), ("someone/something own", "test", "test"),
                              ("an/other", "test", "validation"), ("one/more", "train", "dev")):  # fmt: skip
        assert {row["problem"][:-1] for row in ev.load_problems(name, split)} == {used}
        said = capsys.readouterr().out
        assert (f"{name} has no {split} split; its {used} split is used" in said) == (split != used)
    assert asked == [
        ("open-r1/DAPO-Math-17k-Processed", "en"), *[("openai/gsm8k", "main")] * 2, ("HuggingFaceH4/aime_2024",),
        ("math-ai/aime25",), ("someone/something", "own"), ("an/other",), ("one/more",)]  # fmt: skip


def refused(capsys, *arguments):
    """The one line that load_problems ends with."""
    with pytest.raises(SystemExit) as caught:
        ev.load_problems(*arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_bad_data(tmp_path, capsys):
    good = '{"problem": "1+1?", "answer": "2"}\n'
    (tmp_path / "broken.jsonl").write_text(good + "\n" + good + '{"problem": "1+1?", "ans\n' + good)
    assert "line 4" in refused(capsys, str(tmp_path / "broken.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(good.encode() + '{"problem": "Größe?", "answer": "2"}\n'.encode("latin-1"))
    assert "can't decode byte" in refused(capsys, str(tmp_path / "latin.jsonl"))
    (tmp_path / "numbers.jsonl").write_text(good + "7\n")
    assert "JSON lines or a JSON array" in refused(capsys, str(tmp_path / "numbers.jsonl"))
    (tmp_path / "deep.jsonl").write_text(good + "[" * 100_000)
    assert "recursion" in refused(capsys, str(tmp_path / "deep.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "it has []" in refused(capsys, str(tmp_path / "empty.jsonl"))
    (tmp_path / "columns.jsonl").write_text('{"text": "1+1?", "answer": "2", "level": 3}\n')
    line = refused(capsys, str(tmp_path / "columns.jsonl"))
    assert "['text', 'answer', 'level']" in line and "problem, body question" in line
    (tmp_path / "golds.jsonl").write_text('{"problem": "1+1?", "answer": ""}\n{"problem": "1+2?", "answer": null}\n')
    assert "2 of 2 rows dropped" in refused(capsys, str(tmp_path / "golds.jsonl"))
    (tmp_path / "broken.parquet").write_text("PAR1 or not")
    assert "parquet" in refused(capsys, str(tmp_path / "broken.parquet"))
    assert "No such file" in refused(capsys, str(tmp_path / "nothing.jsonl"))
    assert "directory" in refused(capsys, str(tmp_path))

    assert "cannot load the data set nosuch" in refused(capsys, "nosuch")


def test_hub_out_of_reach():
    """One line on stderr."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import eval; eval.load_problems('math-ai/aime25')"
    environment = CLEAN_ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "cannot load the data set math-ai/aime25" in done.stderr, done.stderr


def test_solutions_and_proofs(tmp_path, capsys):
    """A column `solution` needs a box or ####; a proof is no answer, and a long formula is."""
    rows = [("1+1?", "2 \\boxed{2}"), ("2+2?", "We find 4."), ("3+3?", "It is \\boxed{6}."), ("4+4?", "so 8 #### 8"), ("x?", "so #### x+1")]
    path = tmp_path / "solution.jsonl"
    path.write_text("".join(json.dumps({"problem": problem, "solution": text}) + "\n" for problem, text in rows))
    assert [row["answer"] for row in ev.load_problems(str(path))] == ["2", "6", "8", "x+1"]
    assert "1 of 5 rows dropped" in (said := capsys.readouterr().out) and "a solution \\boxed{}" in said
    proof = "By induction on the number of vertices every tree has one edge less than vertices, which was to be shown"
    formula = "f(x)=a x+b, where b is an arbitrary integer, a is an arbitrary positive integer"
    path.write_text("".join(json.dumps({"problem": "Show it.", "answer": text}) + "\n" for text in (proof, formula)))
    assert [row["answer"] for row in ev.load_problems(str(path))] == [formula]


# ---- Prompts ----


def make_tokenizer(chat_template=None, specials=(), eos=None, single="<bos> $A"):
    """A tokenizer of the printable characters of ASCII, with further tokens. single: what encode puts around a text."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<unk>", *specials, "\n", *map(chr, range(32, 127))])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.add_special_tokens(["<bos>", *specials])
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    around = [(token, vocabulary[token]) for token in single.split() if token != "$A"]
    core.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=around)
    core.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", unk_token="<unk>", eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_with(folder, **changes):
    """A copy of the tiny model's folder, with changes in its config.json; None takes a key out."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    config = json.loads((TINY / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return str(folder)


TURNS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}[assistant]{% endif %}"


def test_encode_prompt():
    problem = "What is 1+1?"
    plain = make_tokenizer(None)
    text = plain.decode(ev.encode_prompt(plain, problem))
    assert text == f"<bos>Question:\n{problem}\nAnswer:\nLet's think step by step.\n"

    tokenizer = make_tokenizer(TURNS)
    ids = ev.encode_prompt(tokenizer, problem)
    assert isinstance(ids, list) and all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == f"<bos>[system]{ev.SYSTEM}[user]{problem}[assistant]"  # one <bos>

    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = make_tokenizer(refusing + TURNS)
    assert tokenizer.decode(ev.encode_prompt(tokenizer, problem)) == f"<bos>[user]{ev.SYSTEM}\n\n{problem}[assistant]"
    for own, text in ((tokenizer, f"<bos>[user]Be brief.\n\n{problem}[assistant]"), (plain, f"Be brief.\n\nQuestion:\n{problem}")):
        assert text in own.decode(ev.encode_prompt(own, problem, "Be brief."))


@pytest.mark.parametrize("condition", ["m.role != 'system'", "loop.last"])
def test_template_that_leaves_out_the_system_turn(condition):
    """Then the user says it, as where the template refuses it."""
    turn = "[{{ m.role }}]{{ m.content }}"
    tokenizer = make_tokenizer(TURNS.replace(turn, "{% if " + condition + " %}" + turn + "{% endif %}"))
    assert tokenizer.decode(ev.encode_prompt(tokenizer, "1+1?")) == f"<bos>[user]{ev.SYSTEM}\n\n1+1?[assistant]"
    assert "[user]Be brief.\n\n1+1?" in tokenizer.decode(ev.encode_prompt(tokenizer, "1+1?", "Be brief."))


@pytest.mark.parametrize("content", ["{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}",
                                     "{% if m.role in ('system', 'human') %}{{ m.content }}{% endif %}"])
def test_template_that_leaves_out_the_problem(content, capsys):
    """It knows lists of parts alone, or other names of the roles: no prompt can be made of it."""
    with pytest.raises(SystemExit):
        ev.encode_prompt(make_tokenizer(TURNS.replace("{{ m.content }}", content)), "1+1?")
    assert "leaves out the problem" in capsys.readouterr().err


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = "{% for m in messages %}<|header|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
COLONS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"


@pytest.mark.parametrize("template, specials, end", [
    (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    (LLAMA3, ["<|endoftext|>", "<|header|>", "<|end_header|>", "<|eot|>"], "<|eot|>"),
    (CHATML.replace("<|im_end|>", "\n<|im_end|>"), ["<|endoftext|>", "<|im_end|>"], "<|im_end|>"),
    (COLONS, ["<|endoftext|>"], None), (COLONS.replace("\n\n", " (end)\n"), ["<|endoftext|>"], None),
    (None, ["<|endoftext|>"], None),
    ("{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}",
     ["<|endoftext|>"], None)])  # fmt: skip
def test_end_of_an_assistants_turn_is_a_stop_token(template, specials, end):
    """Although neither the model's configurations nor the tokenizer call it that; a turn without one adds none."""
    tokenizer = make_tokenizer(template, specials, eos="<|endoftext|>")
    named = {0, tokenizer.eos_token_id}  # the tiny model's is 0
    assert set(ev.stop_tokens(str(TINY), tokenizer)) == named | ({tokenizer.convert_tokens_to_ids(end)} if end else set())


@pytest.mark.parametrize("single", ["$A </s>", "<bos> $A </s>", "<bos> $A"])
def test_a_plain_prompt_does_not_end_with_the_end_token(single):
    tokenizer = make_tokenizer(specials=["</s>"], eos="</s>", single=single)
    assert tokenizer.decode(ev.encode_prompt(tokenizer, "1+1?")).endswith("step by step.\n")


LONG = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize("changes, context", [
    ({}, 256),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **LONG}}, 64),
    ({"model_type": "phi3", "rope_parameters": None, "rope_scaling": {"type": "longrope", **LONG},
      "original_max_position_embeddings": 32}, 32),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 256),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}}, 256),
    ({"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4}
                          for kind in ("full_attention", "sliding_attention")}, "model_type": "gemma3_text"}, 256),
    ({"model_type": "bloom", "max_position_embeddings": None}, math.inf)])  # fmt: skip
def test_context_of(changes, context, tmp_path):
    """Where positions are scaled by the text's length, what can be seen ends where that begins."""
    assert ev.context_of(tiny_with(tmp_path, **changes)) == context


def test_prompts_of_a_run(tmp_path, capsys):
    """They have the run's system prompt in them; too long ones are counted."""
    path = write(tmp_path / "some.jsonl", [{"problem": text, "answer": "2"} for text in ("1+1?", "1+1?" * 20)])
    args = argparse.Namespace(model=tiny_with(tmp_path / "model", vocab_size=200), system_prompt="Be brief.")
    args.max_prompt_tokens, args.max_new_tokens = 90, 8
    tokenizer = make_tokenizer()
    (row,) = ev.load_prompts(path, "train", tokenizer, args)
    assert tokenizer.decode(row["prompt_ids"]).startswith("<bos>Be brief.\n\nQuestion:\n1+1?")
    said = capsys.readouterr().out
    assert "1 of 2 prompts have 1 to 90 tokens" in said
    args.model = tiny_with(tmp_path / "small", vocab_size=60)
    with pytest.raises(SystemExit):
        ev.load_prompts(path, "train", tokenizer, args)
    assert "and its tokenizer makes more" in capsys.readouterr().err


def test_encode_prompt_of_the_tiny_model():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.decode(ev.encode_prompt(tokenizer, "37+5+81+26?")) == "37+5+81+26?"
    assert tokenizer.decode(ev.encode_prompt(tokenizer, "37+5?\n\n81+26?")) == "37+5?81+26?"  # it knows no blank


# ---- Evaluation ----


class FakeTokenizer:
    """Ids are characters, and 0 is the stop token."""

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(i) for i in ids if i) for ids in rows]


def make_problems(texts):
    """Rows as load_prompts makes them; the answer is the number before the question mark."""
    return [{"problem": text, "answer": re.search(r"(\d+)\?", text)[1], "prompt_ids": [*map(ord, text)]} for text in texts]


def make_sampler(right, n):
    """A sampler that answers problem "i?" rightly in its first right[i] completions; the last has no box, the rest lie."""

    def sample(prompt_ids, n_asked, seed, temperature):
        assert n_asked == n
        completions = []
        for ids in prompt_ids:
            i = int(re.search(r"(\d+)\?", "".join(map(chr, ids)))[1])
            for j in range(n):
                text = boxed(i if j < right[i] else i + 1) if j < n - 1 or right[i] == n else "no idea"
                completions.append(ev.Completion([ord(c) for c in text] + [0], "length" if text == "no idea" else "stop"))
        return completions

    return sample


@pytest.mark.parametrize("n, count", [(1, 7), (4, 600), (6, 5), (8, 33)])
def test_evaluate_against_brute_force(n, count):
    generator = random.Random(n)
    right = [generator.randint(0, n) for _ in range(count)]
    problems = make_problems(f"{'x' * generator.randint(0, 30)}{i}?" for i in range(count))
    result = ev.evaluate(make_sampler(right, n), FakeTokenizer(), problems, n=n, batch_size=64)
    assert result["accuracy"] == pytest.approx(sum(right) / n / count)
    means = [c / n for c in right]
    assert result["standard_error"] == pytest.approx(statistics.stdev(means) / math.sqrt(count))
    resampled = [statistics.fmean(generator.choices(means, k=count)) for _ in range(2000)]
    assert result["standard_error"] == pytest.approx(statistics.stdev(resampled), rel=0.25 if count < 10 else 0.1)
    assert list(result["pass_at_k"]) == [k for k in (1, 2, 4, 8) if k <= n]
    for k, value in result["pass_at_k"].items():
        subsets = [[any(j < c for j in chosen) for chosen in itertools.combinations(range(n), k)] for c in right]
        assert value == pytest.approx(statistics.fmean(statistics.fmean(subset) for subset in subsets))
    assert result["truncated"] == pytest.approx(sum(c < n for c in right) / n / count)
    assert (result["problems"], result["n"]) == (count, n)
    records = result["records"]
    assert [record["index"] for record in records] == [i for i in range(count) for _ in range(n)]
    assert [sum(record["correct"] for record in records[i * n:i * n + n]) for i in range(count)] == right
    assert result["length"] == pytest.approx(statistics.fmean(len(record["completion"]) + 1 for record in records))
    assert all(record["answer"] == str(record["index"]) for record in records)


def test_evaluate_one_problem():
    result = ev.evaluate(make_sampler([1], 1), FakeTokenizer(), make_problems(["0?"]))
    assert result["accuracy"] == 1 and math.isnan(result["standard_error"])


RANKS = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import eval as ev
import test_eval
torch.distributed.init_process_group("gloo", f"file://{out}-meeting", rank=ev.RANK, world_size=ev.WORLD)
problems = test_eval.make_problems(f"{{i}}?" for i in range(7))
result = ev.evaluate(test_eval.make_sampler([i % 5 for i in range(7)], 4), test_eval.FakeTokenizer(), problems, n=4)
open(f"{out}{{ev.RANK}}", "w").write(json.dumps(result))
torch.distributed.destroy_process_group()
"""


@pytest.mark.long
def test_evaluate_on_ranks(tmp_path):
    """Two ranks return what one process does, both of them, although seven problems do not divide by two."""
    pytest.importorskip("torch")
    code = RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), out=tmp_path / "rank")
    torchrun = ONE_THREAD | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    ranks = [subprocess.Popen([sys.executable, "-c", code], env=torchrun | {"RANK": rank}) for rank in "01"]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    problems = make_problems(f"{i}?" for i in range(7))
    alone = ev.evaluate(make_sampler([i % 5 for i in range(7)], 4), FakeTokenizer(), problems, n=4)
    alone = json.loads(json.dumps(alone))
    assert [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)] == [alone, alone]


# ---- The command line ----


def run(*arguments, **environment):
    command = [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD | environment, timeout=120)


def main(monkeypatch, *arguments):
    """The command line in this process: importing transformers takes most of the time."""
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, arguments)])
    ev.main()


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_command_line(tmp_path, monkeypatch, capsys):
    """A benchmark and a file, sampled: the table and the rows. Then each is read again, and only the same is."""
    write(tmp_path / "mine.jsonl", [{"question": "1+2+3+4?", "answer": "10", **OWN}])
    monkeypatch.chdir(tmp_path)
    flags = ("--model", TINY, "--limit", 16, "--n", 4, "--seed", 5, "--max_new_tokens", 64, "--out", "out")
    done = run(*flags[:-1], tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "'temperature': 0.6, 'top_p': 0.95, 'seed': 5" in done.stdout
    assert done.stderr == ""  # no progress bar where it would fill a file
    table = next(line for line in done.stdout.splitlines() if re.match(r"arithmetic +16 ", line))
    rows = read_rows(tmp_path / "out" / "arithmetic.jsonl")
    assert len(rows) == 64 and {row["why"] for row in rows} <= {"text", "right", "wrong"}
    assert all(row["correct"] == (row["extracted"] == row["answer"]) for row in rows)
    accuracy = sum(row["correct"] for row in rows) / 64
    assert 0 < accuracy < 0.6 and float(table.split()[2]) == round(accuracy, 3)
    assert rows[0]["system_prompt"] is None and rows[0]["seed"] == 5 and rows[0]["model"] == str(TINY)

    written = (tmp_path / "out" / "arithmetic.jsonl").stat().st_mtime_ns
    main(monkeypatch, *flags, "--benchmarks", "arithmetic,mine.jsonl")
    assert table in capsys.readouterr().out and (tmp_path / "out" / "arithmetic.jsonl").stat().st_mtime_ns == written
    mine = read_rows(tmp_path / "out" / "mine.jsonl.jsonl")
    assert [row["index"] for row in mine] == [0] * 4 and "kind" not in mine[0] and mine[0]["length"] > 0
    for other in (("--seed", 6), ("--system_prompt", "1"), ("--limit", 15), ("--n", 2), ("--temperature", 1)):
        with pytest.raises(SystemExit):
            main(monkeypatch, *flags, *other)
        assert "arithmetic.jsonl has other settings: choose another --out" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"arithmetic.jsonl", "mine.jsonl.jsonl"}
    shutil.copy(tmp_path / "mine.jsonl", tmp_path / "arithmetic.jsonl")  # its results have a file of their own
    main(monkeypatch, *flags, "--benchmarks", "arithmetic,arithmetic.jsonl")
    assert len(read_rows(tmp_path / "out" / "arithmetic.jsonl.jsonl")) == 4


def test_compare(tmp_path, monkeypatch, capsys):
    """The difference of means, its interval against the formula; benchmarks that one of the two lacks are left out."""
    generator = random.Random(0)

    def rows(n, chance, count=200, text="{}?"):
        return [{"index": i, "problem": text.format(i), "correct": generator.random() < chance, "length": 1,
                 "finish": "stop", "why": "text"} for i in range(count) for _ in range(n)]  # fmt: skip

    for name, n, chance in (("a", 1, 0.3), ("b", 4, 0.5)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "math.jsonl", rows(n, chance))
    write(tmp_path / "b" / "only.jsonl", rows(1, 0.5))
    main(monkeypatch, "--compare", tmp_path / "a", tmp_path / "b")
    line = capsys.readouterr().out
    groups = [[[], []] for _ in range(200)]
    for run, name in enumerate("ab"):
        for row in read_rows(tmp_path / name / "math.jsonl"):
            groups[row["index"]][run].append(row["correct"])
    deltas = [statistics.fmean(second) - statistics.fmean(first) for first, second in groups]
    number = r"([-+]\d\.\d{3})"
    mean, half = map(float, re.search(f"difference {number} ± (.*) \\(95% interval", line).groups())
    error = 1.96 * statistics.stdev(deltas) / 200**0.5
    assert line.count("\n") == 1 and "200 problems)" in line and mean == pytest.approx(statistics.fmean(deltas), abs=6e-4)
    assert half == pytest.approx(error, abs=6e-4)
    write(tmp_path / "b" / "math.jsonl", rows(1, 0.5, text="{}+1?"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "turned").mkdir()
    turned = [row | {"index": 199 - row["index"]} for row in read_rows(tmp_path / "a" / "math.jsonl")]
    write(tmp_path / "turned" / "math.jsonl", turned[::-1])
    for one, other, message in (("a", "turned", "other problems"), ("a", "b", "math.jsonl has other problems"), ("a", "empty", "cannot read"),
                                ("empty", "a", "no finished benchmark"), ("nowhere", "a", "no finished benchmark")):  # fmt: skip
        with pytest.raises(SystemExit):
            main(monkeypatch, "--compare", tmp_path / one, tmp_path / other)
        assert message in capsys.readouterr().err


def test_help():
    done = run("--help")
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 100
    for word in ("pass@k", *ev.HUB, "torchrun", "--compare", "95% interval", "time-out", "top_p", "OUT/<benchmark>"):
        assert word in done.stdout, word


def test_bad_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "a", "label": "2"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "long.jsonl").write_text('{"problem": "' + "1+" * 300 + '1?", "answer": "301"}\n')
    cases = [
        (("--model", TINY, "--benchmarks", "nosuch"), "cannot load the data set nosuch"),
        (("--model", TINY, "--benchmarks", "nothing.jsonl"), "No such file"),
        (("--model", TINY, "--benchmarks", tmp_path / "text.jsonl"), "it has ['text', 'label']"),
        (("--model", TINY, "--benchmarks", tmp_path / "empty.jsonl"), "it has []"),
        (("--model", TINY, "--benchmarks", tmp_path / "long.jsonl"), "0 of 1 prompts have 1 to 255 tokens"),
        (("--model", TINY, "--n", 0), "--n must be above 0"),
        (("--model", TINY, "--limit", 0), "--limit must be above 0"),
        (("--model", TINY, "--max_new_tokens", 0), "--max_new_tokens must be above 0"),
        (("--model", TINY, "--temperature", "nan"), "--temperature"),
        (("--model", TINY, "--temperature", -1), "--temperature"),
        (("--model", TINY, "--n", 4, "--temperature", 0), "--temperature must be above 0"),
        (("--model", TINY, "--n", 4, "--top_p", 0), "--top_p"),
        (("--model", TINY, "--n", "many"), "--n"),
        (("--model", TINY, "--seed", -1), "--seed must be above 0 and below 2**32"),
        (("--model", TINY, "--n", 2, "--seed", 1785000000123456789), "--seed must be above 0 and below 2**32"),
        (("--model", TINY, "--bogus", 1), "--bogus"),
        (("--model", TINY, "--compare", "a", "b"), "either --model, or --compare"),
        (("--compare", "a"), "--compare"),
        ((), "--model"),
        (("--model", ROOT / "tests"), "cannot load"),
        (("--model", tmp_path / "nowhere" / "at" / "all"), "cannot load"),
        (("--model", "nobody/nothing"), "cannot load"),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises(SystemExit) as ended:
            main(monkeypatch, *arguments)
        said = capsys.readouterr().err
        assert ended.value.code == 2, (arguments, said)
        assert said.count("\n") == 1 and said.startswith("error: ") and message in said, (arguments, said)
    for arguments, message in (cases[0], cases[5]):  # data, a flag
        done = run(*arguments)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and message in done.stderr


@pytest.mark.parametrize("variables", ["WORLD_SIZE", "RANK", "RANK WORLD_SIZE", "MASTER_ADDR WORLD_SIZE",
                                       "MASTER_ADDR RANK"])
def test_variables_of_ranks_belong_together(variables):
    """What some other launcher left in the environment does not make a part of an evaluation of this one."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import eval; print(eval.RANK, eval.WORLD); eval.say('heard')"
    environment = {key: value for key, value in ONE_THREAD.items() if key != "MASTER_ADDR"} | dict.fromkeys(variables.split(), "2")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "0 1\nheard\n", done


@pytest.mark.long
def test_killed_and_resumed(tmp_path):
    """Killed in a benchmark, none of it is left; the same command then ends with the files of an undisturbed one."""
    (mine := tmp_path / "mine.jsonl").write_text('{"problem": "1+2+3+4?", "answer": "10"}\n')
    flags = ("--model", TINY, "--limit", 200, "--n", 4, "--max_new_tokens", 64, "--benchmarks", f"{mine},arithmetic", "--out")
    assert run(*flags, tmp_path / "whole").returncode == 0
    command = [sys.executable, str(ROOT / "eval.py"), *map(str, flags), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    while not list((tmp_path / "killed").glob("*.jsonl")):  # the first one is done
        time.sleep(0.005)
        assert process.poll() is None
    time.sleep(0.5)
    process.kill()
    process.wait()
    (first,) = (tmp_path / "killed").iterdir()
    written = first.stat().st_mtime_ns
    code, shown = on_a_terminal(["eval.py", *flags, tmp_path / "killed"])
    assert code == 0 and b"evaluating" in shown and b"4/4" in shown, shown
    assert first.stat().st_mtime_ns == written
    for whole in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / whole.name).read_bytes() == whole.read_bytes()


@pytest.mark.long
def test_two_ranks_and_one(tmp_path):
    """The same table and the same file under greedy decoding, and once more when it is read again."""
    flags = ["--model", str(TINY), "--limit", "15", "--out"]
    tables = [run(*flags, tmp_path / "one").stdout]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", str(ROOT / "eval.py")]
    for _ in range(2):
        command = [sys.executable, *ranks, *flags, str(tmp_path / "two"), "--n", "1"]
        done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=120)
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout)
    assert tables[0] == tables[1] == tables[2] and tables[0].count("\n") == 4
    assert (tmp_path / "one/arithmetic.jsonl").read_bytes() == (tmp_path / "two/arithmetic.jsonl").read_bytes()


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
    sampler = ev.hf_sampler(args, tokenizer, torch.device("cpu"))
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
