"""Problems, prompts, grading, evaluation, and the files of a run: what the four training scripts share.

    python eval.py --model tests/tiny                                      the tiny model on generated sums
    python eval.py --model A,B --benchmarks math500,mine.jsonl --n 8       two models, and their difference
    torchrun --nproc_per_node=8 -- eval.py --model Qwen/Qwen2.5-7B --benchmarks aime24,math500 --n 8 --out runs/qwen
    python eval.py --grade completions.jsonl                               no model: the columns completion and answer

torchrun needs the "--", else it takes --n for its own. Benchmarks are names (listed below), hub ids "owner/name", or
.jsonl and .parquet files with a problem and an answer a row; where the hub cannot be reached give a file, or set
HF_HOME to a cache. n = 1 is greedy; more are sampled with --temperature and --top_p. The answer is what stands in the
last \\boxed{...}, or without a box what the last line says after "answer is", "Answer:" or "####". It is compared with
the gold as text or number, else by math-verify, which has 3 seconds. The table has a row for each model and benchmark:

    avg@n      accuracy: mean over problems of the share of right completions, ± its standard error over problems
    length     mean tokens of a completion; truncated: share cut off at --max_new_tokens; no box: share without a box
    time-outs  gradings stopped at the 3 seconds; they count as wrong
    pass@k     chance that one of k completions is right, without bias from n: k = 1, 2, 4, ... up to n, or --k

and each further model has its difference to the first, with a 95 % interval (bootstrap over problems, paired).
--out keeps OUT/<model>/<benchmark>.jsonl, a row a completion (`why` is what decided: text, math-verify, time-out,
crash, too long, no answer), and OUT/summary.json. The same command goes on where it was interrupted; other settings
are refused. Seed, settings and number of processes decide the completions.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import typing
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm  # whatever is heavier is imported where it is used: the grader's workers start from this file

HUB = {  # name: (hub id, configuration, split to train on, split to test on)
    "gsm8k": ("openai/gsm8k", "main", "train", "test"),
    "math": ("nlile/hendrycks-MATH-benchmark", None, "train", "test"),
    "openrs": ("knoveleng/open-rs", None, "train", "train"),
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", None, "train", "train"),
    "dapo": ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train", "train"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "train"),
    "aime25": ("math-ai/aime25", None, "test", "test"),
    "amc23": ("math-ai/amc23", None, "test", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "test"),
    "minerva": ("math-ai/minervamath", None, "test", "test"),
    "olympiadbench": ("math-ai/olympiadbench", None, "test", "test"),
}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
PROBLEMS = {"problem": ("problem", "question", "prompt", "query", "instruction", "input")}  # the first that is there
ANSWERS = {"answer": ("answer", "final_answer", "ground_truth", "reward_model", "target", "label", "solution")}
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN_PROMPT = "Question:\n{problem}\nAnswer:\nLet's think step by step.\n"


def say(text):
    """Print on rank 0, without tearing a progress bar."""
    if RANK == 0:
        tqdm.write(str(text), file=sys.stdout)
        sys.stdout.flush()


def fail(message, code=2):
    """End the program: one line on stderr, of a node's first rank if all fail; exit code 2 for bad input."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # or the message would stand behind it, on its line
    if int(os.environ.get("LOCAL_RANK", 0)):  # if the first rank failed too, torchrun ends this one before it speaks
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print("error: " + f"rank {RANK}: " * (RANK > 0) + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)


def check(holds, message):
    """Unless it holds, end the program with the message, as fail does."""
    if not holds:
        fail(message)


# ---- Problems ----

def arithmetic(split):
    """Generated sums such as "37+5+81+26?": 256 to test on, 4096 to train on, none in both, the same everywhere."""
    generator = random.Random(0)
    sums = {}  # a dict keeps the order and drops repetitions
    while len(sums) < 256 + 4096:
        sums[tuple(generator.randint(1, 99) for _ in range(4))] = None
    chosen = list(sums)[:256] if split == "test" else list(sums)[256:]
    return [{"problem": "+".join(map(str, terms)) + "?", "answer": str(sum(terms))} for terms in chosen]


def load_problems(name, split="train"):
    """Rows with their "problem" and cleaned "answer", and their other columns; unusable ones are dropped and counted.

    name: "arithmetic" or one of HUB; a .jsonl or .parquet file; any other hub id "owner/name".
    split: "train" or "test", where the data set has both. Bad input ends the program with one line (see fail).
    """
    if name == "arithmetic":
        return arithmetic(split)
    if name not in HUB and (os.path.exists(name) or name.endswith((".jsonl", ".parquet"))):
        return usable(read_file(name), name)
    if name in HUB or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return usable(read_hub(name, split), name)
    fail(f"unknown data set {name!r}: known are arithmetic, {', '.join(HUB)}; or give a .jsonl or .parquet file, "
         "or a hub id owner/name")


def usable(rows, name, wanted=PROBLEMS | ANSWERS):
    """Those rows that have a problem and a gold the grader can read, with the wanted columns, {key: possible names}."""
    found = {str(column).lower(): column for row in rows for column in row}
    columns = {key: next((found[column] for column in names if column in found), None) for key, names in wanted.items()}
    if None in columns.values():
        has = f"has the columns {', '.join(found.values())}" if found else "is empty"
        missing = [names for key, names in wanted.items() if columns[key] is None]
        fail(f"{name} {has}: it needs " + " and ".join(f"one of {', '.join(names)}" for names in missing))
    texts = [{**row, **{key: read_cell(row.get(column)) for key, column in columns.items()}} for row in rows]
    if wanted.get("problem") == PROBLEMS["problem"]:
        join_columns(texts, name, columns["problem"].lower(), found)
    in_solution = columns["answer"].lower() == "solution"
    for row in texts:
        if "####" in row["answer"]:  # GSM8K's "so she has 18 #### 18"
            row["answer"] = row["answer"].rpartition("####")[2]
        elif "\\boxed" in row["answer"] or in_solution and not quantity(clean(row["answer"])):
            row["answer"] = last_boxed(row["answer"]) or ""
        row["answer"] = clean(row["answer"])
        if len(re.findall(r"(?<![\\a-z])[a-z]{2,}", row["answer"], re.IGNORECASE)) > 12:  # a proof
            row["answer"] = ""
    with Grader(deadline=10.0) as grader:  # a busy machine must not decide
        readable = grader.readable({row["answer"] for row in texts})
    kept = [row for row in texts if row["answer"] in readable and row.get("problem") != ""]
    where = " (in the column solution it must be a number, or stand in \\boxed{} or after ####)" if in_solution else ""
    check(kept, f"{name}: no row of {len(rows)} has a problem and an answer that the grader can read{where}")
    if len(kept) < len(rows):
        say(f"{name}: {len(rows) - len(kept)} of {len(rows)} rows dropped: no problem, or an answer that is empty, has "
            f"open braces, no letter or digit, or more than a dozen words, or is too slow to compare{where}")
    return kept


def join_columns(rows, name, column, found):
    """Join what belongs to a problem: Body and Question, instruction and input, choices. Name what is left out."""
    pair = {"question": ("body", "question"), "instruction": ("instruction", "input")}.get(column, (column,))
    ignored = {"body", "context", "passage", *PROBLEMS["problem"]} & set(found) - set(pair)
    if ignored:
        say(f"{name}: the problem is in {column}; not used: {', '.join(sorted(ignored))}")
    for row in rows:
        choices = row.get(found.get("choices", found.get("options"))) or []
        choices = choices["text"] if isinstance(choices, dict) else [choices] if isinstance(choices, str) else choices
        lines = [f"{chr(65 + place)}. {choice}" for place, choice in enumerate(choices)]
        row["problem"] = "\n".join(filter(None, [*(read_cell(row.get(found.get(key))) for key in pair), *lines]))


def read_cell(value):
    """The text of a cell: a string or number, a list of answers, a conversation, {"ground_truth": ...}."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("ground_truth", "content", "text") if key in value), None)
    if isinstance(value, list) and value and isinstance(value[0], dict):  # turns: all but the one to be written
        value = "\n\n".join(read_cell(turn) for turn in value[: -1 if value[-1].get("role") == "assistant" else None])
    elif isinstance(value, list):
        value = ", ".join(clean(read_cell(item)) for item in value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or value != value:  # not a number: a gap in a parquet file
        return ""
    return str(value).encode("utf-8", "replace").decode().strip()  # no lone surrogates


def read_file(path):
    """Rows of a .parquet file, of JSON lines or of a JSON array, as dicts."""
    rows, place = [], ""
    try:
        if path.endswith(".parquet"):
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        content = Path(path).read_bytes()
        if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):  # one JSON array
            return [dict(row) for row in json.loads(content)]
        for number, line in enumerate(content.splitlines(), start=1):
            place = f", line {number}"
            if line.strip():
                rows.append(dict(json.loads(line)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        fail(f"cannot read {path}{place}: {error}; it must be .parquet, or have a JSON object in each line (.jsonl), "
             "or be one JSON array of objects")
    return rows


def read_hub(name, split):
    """Rows of a data set of the hub, or of the hub's cache when there is no network, as dicts."""
    import datasets

    datasets.config.HF_HUB_OFFLINE = use_cache_without_network()
    hub_id, configuration, *splits = HUB.get(name, (name, None, "train", "test"))
    try:
        rows = datasets.load_dataset(hub_id, configuration, split=splits[split == "test"])
    except Exception as error:  # a dozen kinds, and all mean that the data cannot be had
        fail(f"cannot load {hub_id} ({type(error).__name__}: {str(error)[:200]}): "
             "give the path of a .jsonl file, or set HF_HOME to a cache that holds it")
    if name == "dapo":  # each problem stands there a hundred times
        places = {key: place for place, key in enumerate(rows.flatten()["extra_info.index"])}
        rows = rows.select(sorted(places.values()))
    return rows.to_list()


def use_cache_without_network():
    """Whether there is no hub; then its clients, which would retry for half a minute, are told to use their cache."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not {"https_proxy", "all_proxy"} & {name.lower() for name in os.environ}:
        hub = urlsplit(constants.ENDPOINT)
        try:
            socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
        except OSError as error:
            say(f"the hub cannot be reached ({error}): only what is in its cache can be used")
            constants.HF_HUB_OFFLINE = True
    return constants.HF_HUB_OFFLINE


def load_tokenizer(name):
    """The tokenizer of a model's folder or hub id; what is no model ends the program with one line, at once."""
    check(not os.path.isfile(name), f"{name} is a file: give the folder of a model in transformers' format, that is "
          "config.json, weights in .safetensors and a tokenizer")
    if not os.path.isdir(name) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        fail(f"there is no folder {name}, and it is no hub id owner/name")
    if not os.path.isdir(name):
        use_cache_without_network()
    elif not any(file.endswith(".safetensors") for file in os.listdir(name)):
        fail(f"{name} is no model folder: it needs config.json, weights in .safetensors and a tokenizer")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if not tokenizer.encode("1"):  # what transformers makes of a folder without a tokenizer
            raise ValueError("no tokenizer")
    except Exception as error:  # a dozen kinds, and all mean that this is no model
        fail(f"cannot load {name} ({type(error).__name__}: {str(error)[:200]}): give a folder with a model and its "
             "tokenizer, a hub id, or set HF_HOME to a cache that holds it")
    return tokenizer


def encode_prompt(tokenizer, problem, system=None):
    """Token ids of the prompt: the tokenizer's chat template if it has one, else a plain question and answer.

    system: what the template's system turn says (default: SYSTEM), or what stands before the plain question.
    """
    if not tokenizer.chat_template:
        return tokenizer.encode((f"{system}\n\n" if system else "") + PLAIN_PROMPT.format(problem=problem))
    from jinja2.exceptions import TemplateError

    system = SYSTEM if system is None else system
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    turns = [{"role": "system", "content": system}, {"role": "user", "content": problem}]
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except TemplateError:  # a template without system role (Gemma): the user says it
        return tokenizer.apply_chat_template([{"role": "user", "content": f"{system}\n\n{problem}"}], **options)


def context_of(model):
    """How many tokens a model can see at once."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", math.inf)


def load_prompts(name, split, tokenizer, args):
    """Problems with their token ids as "prompt_ids", and how many were skipped: without a token, or too long.

    A prompt may have args.max_prompt_tokens, and args.model must have room for it and args.max_new_tokens more.
    """
    problems = load_problems(name, split)
    for row in tqdm(problems, "encoding prompts", disable=RANK > 0 or None, delay=1, leave=False):
        row["prompt_ids"] = encode_prompt(tokenizer, row["problem"], args.system_prompt)
    lengths = [len(row["prompt_ids"]) for row in problems]
    kept = [row for row in problems if 0 < len(row["prompt_ids"]) <= args.max_prompt_tokens]
    empty, skipped = lengths.count(0), len(problems) - len(kept)
    why = f": {empty} without a token, {skipped - empty} longer than --max_prompt_tokens {args.max_prompt_tokens}"
    check(kept, f"{name}: no prompt is left{why}")
    context, longest = context_of(args.model), max(len(row["prompt_ids"]) for row in kept)
    check(longest + args.max_new_tokens <= context,
          f"{args.model} sees {context} tokens at once: the longest prompt has {longest}, so --max_new_tokens can be "
          f"{context - longest} at most, or --max_prompt_tokens has to be lower")
    say(f"{name}, {split}: {len(kept)} prompts, {skipped} skipped{why if skipped else ''}")
    return kept, skipped


# ---- Grading ----

SPELLINGS = {  # what stands in an answer: how it is read
    r"\\": "\0", "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "²": "^2",
    "³": "^3", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "°": r"^\circ ", "∪": r"\cup ",
    "√": r"\sqrt ", r"\$": "", "$": "", "£": "", "€": "", "**": "", "`": "", "<answer>": "", "</answer>": "", "~": " ",
    r"\(": "", r"\)": "", r"\[": "", r"\]": "", r"\!": "", r"\,": " ", r"\;": " ", r"\:": " ", r"\ ": " ",
    r"\left": "", r"\right": "", r"\mathbf": "", r"\boldsymbol": "", r"\mathrm{e}": "e", r"\mathrm{i}": "i",
    r"\mathrm": r"\text", r"\mbox": r"\text", r"\textbf": r"\text", r"\text {": r"\text{", r"\text{ ": r"\text{",
    " }": "}", r"\text{and}": ",", r"\text{or}": ",", " and ": ",", " or ": ",", ",,": ",", "{,}": ",",
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", "\0": r"\\"}
FILLERS = ("so thus hence therefore then the that this it we is are be get final correct answer value result total "
           "about exactly approximately").split()
UNITS = (r"m meter|km kilometer|cm centimeter|mm millimeter|g gram|kg kilogram|s second|min minute|h hr hour"
         r"|in inche inch|ft foot feet|mi mile|l liter|lb pound|degree \circ|cent|dollar|% percent \%|day|month|year"
         r"|unit|square sq|people|mph|N|J|W|V|K|C|/ per|of|a|each")
UNITS = {spelling: names.split()[0] for names in UNITS.split("|") for spelling in names.split()}
NO_UNITS = ("less", "times", "minus", "plus", "thirds", "halves", "quarters", "ths", "pairs", "tens", "scores",
            "dozens", "hundreds", "thousands", "illions", "doubles", "triples", "cubes")  # endings
NUMBER = re.compile(r"""
    ([-+]?)\s?(?:(\d*)\s?\\frac\s?\{(-?\d+)\}\s?\{(\d+)\}|(\d+\.?\d*|\.\d+))  # 1\frac{1}{2} or 12.5
    (?:\s?(?:\\times|\\cdot|\*)\s?10\s?\^\s?\{?(-?\d{1,4})\}?)?               # \times 10^{-3}
    """, re.X)


def last_boxed(text):
    """The content of the last closed \\boxed{...} or \\boxed 5, or None. One pass, however deep the text nests."""
    start, content, open_braces = -1, None, []
    for match in re.finditer(r"\\boxed\s*(?:\{|(\w+))|\\.|[{}]", text, re.DOTALL):  # \\. skips escaped braces
        if match[1]:
            start, content = match.start(), match[1]
        elif match[0] == "{" or match[0].startswith("\\boxed"):
            open_braces.append(match)
        elif match[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened[0] != "{" and opened.start() > start:
                start, content = opened.start(), text[opened.end():match.start()]
    return content


def stated(text):
    """What the last line says after "answer is", "Answer:" or "####" (only FILLERS before it, and no box), or None."""
    line = text.strip()[-500:].rpartition("\n")[2].replace("**", "").removesuffix(" I hope it is correct.")
    before = rf"(?:.*[^a-z\s'])?\s*(?:(?:{'|'.join(FILLERS)}) )*"
    match = re.match(rf"{before}(?:answer is|answer:|####)[\s:]*([^\s:].*)", line, re.I)
    return match[1] if match and "\\boxed" not in line else None


def clean(text):
    r"""An answer in one layout: "$8\,178$" -> "8178", "\dfrac12" -> "\frac{1}{2}", "4.5e3" -> "4.5 \times 10^{3}"."""
    if text.isdecimal():  # most answers are
        return text
    for spelling, meaning in SPELLINGS.items():
        text = text.replace(spelling, meaning)
    text = " ".join(text.split()).removesuffix(".")
    text = re.sub(r"\\(frac|sqrt) ?(\d)", r"\\\1{\2}", text)  # \frac12
    text = re.sub(r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}", text)
    text = re.sub(r"(?<![\w.}])(\d+) ?/ ?(\d+)(?![\d.])", r"\\frac{\1}{\2}", text)  # 1/2
    text = re.sub(r"(\d)[eE]\+?(-?\d+)$", r"\1 \\times 10^{\2}", text)
    text = re.sub(r"^(-?)10 ?\^", r"\g<1>1 \\times 10^", text)
    text = re.sub(r"\\text\{([^a-zA-Z{}]*)\}", r"\1", text)  # \text{5}
    text = re.sub(r"^\{((?:[^{}]|\{[^{}]*\})*)\}$|^\(([^(),]*)\)$", r"\1\2", text)  # {5} and (5)
    text = re.sub(r"\\text\{for all( real| integers?)*\} ?\w$|, ?\w ?\\in ?\\mathbb ?\{?\w\}?$", "", text)
    if re.match(r"[^\d,(\[{]*\d{1,3}([, ]\d{3})+(?![\d,])", text):
        text = re.sub(r"(?<=\d)[, ](?=\d{3})", "", text)  # 1,234
    while (word := re.match(r"(?:\\text\{)?(\w+):?[ }]+", text)) and word[1].lower() in FILLERS:
        text = text[word.end():]
    return text.strip()


def measured(text):
    r"""A value and its unit, a known name or a plural: "5 \text{ meters}^2" -> ("5", ["m", "^2"]).

    Single letters are factors, and other words change the value: "5 x" and "5 squared" have no unit and stay whole.
    """
    value, rest = re.fullmatch(r"(.*?) ?(\^?\{?\\circ.*|\\?%.*|\\text.*| [a-z][a-z/].*|)", text, re.I).groups()
    unit = []
    for word in re.findall(r"\^-?\d|\\?[a-zA-Z]+|\\?\S", re.sub(r"\\text|[{}.]|\^(?=[{ ]*\\circ)", "", rest)):
        known = UNITS.get(word) or UNITS.get(word.lower().removesuffix("s"))
        plural = word.isalpha() and len(word) > 3 and word.endswith("s") and not word.lower().endswith(NO_UNITS)
        if not (known or plural or word[0] == "^" and unit):
            return text, []
        unit.append(known or word.lower())
    return value, unit


def quantity(text):
    r"""A number that is written out, and its unit: "1\frac{1}{2} \text{ cm}" -> (Fraction(3, 2), ["cm"]); else None."""
    value, unit = measured(text)
    match = NUMBER.fullmatch(value)
    if not match or len(value) > 1000:
        return None
    sign, whole, top, bottom, decimal, power = match.groups()
    if bottom and (int(bottom) == 0 or whole and not 0 <= int(top) < int(bottom)):
        return None
    number = int(whole or 0) + Fraction(decimal or f"{top}/{bottom}")
    return number * Fraction(10) ** int(power or 0) * (-1 if sign == "-" else 1), unit


def same_quantity(gold, answer):
    """Whether two quantities are equal to a millionth, and in their units if both have one."""
    (gold, unit), (answer, other) = gold, answer
    return not (unit and other and unit != other) and abs(gold - answer) * 10**6 <= min(1, abs(gold))


def sides(text):
    """The name and the values of an equation: "x = 3+4 = 7" -> ("x", ["3+4", "7"]), "7" -> ("", ["7"])."""
    first, *rest = [side.strip() for side in re.split(r"=|\\approx\b|\\in\b", text) if side.strip()] or [""]
    name = r"(?!\\(pi|no|ne))(\\text\{[\w ]+\}|\\?[a-z]+)(_\w|_\{[^{}]*\})?'?(\([\w, ]*\))?"  # x_1, f(n), Area
    return (first, rest) if rest and re.fullmatch(name, first, re.I) else ("", [first, *rest])


def words_of(text):
    r"""A text in small letters if it is words, a date, time or ratio, else "": "\text{East}" -> "east", "2k" -> ""."""
    words = " ".join(re.sub(r"\\text|[{}()]", " ", text).split())
    is_words = re.fullmatch(r"[a-z]|(?=.*[a-z]{2})[a-z' ]+|[\d:/.-]+", words, re.I)
    return (words if len(words) == 1 else words.lower()) if is_words else ""


def judge_text(gold, answer):
    """True or False by principles 2 to 4, for cleaned texts; None if formulas have to be compared."""
    tight = [re.sub(r"\{(\w)\}|(?<!\d) | (?!\d)", r"\1", text) for text in (gold, answer)]
    if tight[0] == tight[1] or not gold or not answer:
        return bool(gold and answer)
    (name, values), (other, found) = sides(gold), sides(answer)
    if name and other and name != other and "," not in gold:
        return False
    expected = quantity(values[0]) if len(values) == 1 else None
    if expected:  # the other sides may be sums, but not 2x, or 5 <
        numbers = [number for side in found if (number := quantity(side))]
        sums = [side for side in found if re.fullmatch(r"(\\(frac|sqrt|cdot|times)|[^a-z\\<>,?!])*", side, re.I)]
        return (bool(numbers) and all(same_quantity(expected, number) for number in numbers)
                and all(side in sums or quantity(side) for side in found))
    if words_of(gold):
        return words_of(gold) == words_of(answer)
    return None


class Grader:
    r"""Grades completions by six principles.

    1. The answer is the content of the last box, or what the last line states. A thought (<think>) is not read, and
       layout does not count.
    2. The same text is right. Where the gold is words, only these words are right, in capitals or not.
    3. Where the gold is a number, only a number that is written out is right: an integer, decimal, fraction or mixed
       number, times a power of ten, equal to a millionth. 37+5 is wrong for 42: a model in training would learn to
       repeat the question. Every side of an equation that is a number counts: 37+5=42 is right for 42, 8=7 wrong for 7.
    4. A value may be followed by its unit, but not by a word that changes it. Two units have to be the same.
    5. math-verify compares everything else. But nothing may be left to add, multiply or integrate, a list has the same
       length and brackets, and an inequality is wrong for an interval.
    6. A grading that reaches its deadline or memory limit is stopped, and wrong. So is an absurdly long answer.

    Workers start when first needed, and share memory_gb. `timeouts` and `crashes` count the gradings that were stopped.
    """

    def __init__(self, workers=None, deadline=3.0, memory_gb=3.0):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = workers or max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        limits = [str(deadline), str(memory_gb / workers)]
        self.command = [sys.executable, os.path.abspath(__file__), "--worker", *limits]
        self.timeouts, self.crashes, self.closed = 0, 0, False
        self.threads = ThreadPoolExecutor(workers)  # each talks to a worker of its own
        self.running = {}  # thread: its worker

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End the workers, including those at work."""
        self.closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self.running.values()):
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()

    def grade(self, completion, gold):
        """Whether the completion's answer is the gold's."""
        return self.judge_all([(completion, gold)])[0]["correct"]

    def grade_all(self, pairs):
        """Whether the answers are right, for (completion, gold) pairs, in order."""
        return [verdict["correct"] for verdict in self.judge_all(pairs)]

    def judge_all(self, pairs):
        """Verdicts on (completion, gold) pairs, in order. The same answer to the same gold is graded only once.

        A verdict: {"correct", "extracted": the answer or None, "boxed", "why": what decided}, as in the rows of --out.
        """
        verdicts, open_questions = [], {}
        for completion, gold in pairs:
            seen = re.split(r"<think\w*>", re.split(r"</think\w*>", completion)[-1])[0]  # without thoughts
            gold, box = clean(gold), last_boxed(seen)
            extracted = stated(seen) if box is None else box
            correct, why = False, "no answer" if extracted is None else "too long"
            if extracted is not None and len(extracted) <= 400 + 4 * len(gold):
                answer = clean(extracted)
                correct, why = judge_text(gold, answer), "text"
                if correct is None:
                    open_questions.setdefault((gold, answer), []).append(len(verdicts))
            verdicts.append({"correct": correct, "extracted": extracted, "boxed": box is not None, "why": why})
        for reply, places in zip(self.threads.map(self.ask, open_questions), open_questions.values()):
            self.timeouts += reply == "time-out"
            self.crashes += reply == "crash"
            for place in places:
                why = "math-verify" if reply in ("right", "wrong") else reply
                verdicts[place].update(correct=reply == "right", why=why)
        return verdicts

    def readable(self, golds):
        """The cleaned golds that can be compared: with a letter or digit, without an open brace, and not too slow."""
        golds = sorted(gold for gold in golds if re.search(r"\w", gold) and gold.count("{") == gold.count("}"))
        hard = [gold for gold in golds if judge_text(gold, "?") is None]
        replies = self.threads.map(self.ask, zip(hard, hard))
        return set(golds) - {gold for gold, reply in zip(hard, replies) if reply not in ("right", "wrong")}

    def ask(self, question):
        """A worker's reply to (gold, answer): right, wrong, time-out or crash. For (gold,): whether it can be read."""
        for _ in range(2):  # if something else killed the worker, the next one is asked
            worker = self.running.get(threading.get_ident())
            if worker is None or worker.poll() is not None:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
                pipes["env"] = {**os.environ, "PYTHONHASHSEED": "0"}  # sympy depends on the order of sets
                worker = subprocess.Popen(self.command, start_new_session=True, **pipes)  # out of reach of Ctrl-C
                self.running[threading.get_ident()] = worker
            try:
                worker.stdin.write(json.dumps(question).encode() + b"\n")
                reply = worker.stdout.read(20).decode().strip()
            except BrokenPipeError:
                reply = ""
            if reply or self.closed:
                return reply
            if worker.wait() > 0:
                raise RuntimeError("the grader's worker did not start: is math-verify installed? What it said is above")
        return "crash"


@functools.lru_cache(1000)  # a group of completions has one gold
def read(text):
    r"""math-verify's tree of a cleaned text, not evaluated, a list sorted. None if it differs from what is written.

    Its parser adds numbers that stand side by side, and works out \gcd: then numbers are missing from the tree.
    """
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify.grader import sort_key
    from sympy import FiniteSet, Number, Tuple, nan, zoo

    text = re.sub(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", "{I}", text)  # the root of -1
    as_written = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    tree = latex2sympy(text, is_real=True, conversion_config=as_written)
    written = re.findall(r"\d*\.?\d+", re.sub(r"(?<!\d)_(?:\w|\{[^{}]*\})", "", text))
    kept = {abs(part) for number in tree.atoms(Number) for part in (number, *number.as_numer_denom())}
    if isinstance(tree, FiniteSet):  # sympy's comparison would forget how often an element stands there
        tree = Tuple(*sorted(tree._unsorted_args, key=sort_key))
    return tree if kept.issuperset(map(Number, written)) and not tree.has(nan, zoo) else None


def length(tree):
    """How many names, numbers and functions a formula has: four in 2x + 3x, two in 5x."""
    if tree.is_Rational:
        return (abs(tree.p) != 1) + (tree.q != 1) or 1
    counted = [part for part in tree.args if not (part in (1, -1) and (tree.is_Mul or tree.is_Pow))]
    return sum(map(length, counted)) + tree.is_Function if tree.args else 1


def work_left(tree):
    """How much a formula leaves to be done: sympy makes 2x + 3x shorter, (x+1)(x+2) multiplies sums; n(n-1) is done."""
    from sympy import Expr, cancel, expand, preorder_traversal
    from sympy.concrete.expr_with_limits import ExprWithLimits

    if not isinstance(tree, Expr):
        return sum(map(work_left, getattr(tree, "args", tree)))  # a matrix has no args
    left = int(tree.has(ExprWithLimits))
    for part in preorder_traversal(tree):
        left += part.is_Add and sum(term.is_rational is True for term in part.args) > 1
        left += part.is_Mul and sum(factor.is_Add for factor in part.args) > 1
        left += bool(part.is_Pow and part.base.is_Add and part.exp.is_Integer and part.exp > 1)
    done = tree.doit()
    return left + max(0, length(tree) - min(map(length, (done, expand(done), cancel(done)))))


def same(gold, answer):
    """Whether two cleaned texts mean the same, by principle 5. Of an equation that states a value, every side does."""
    (gold, unit), (answer, other) = measured(gold), measured(answer)
    shapes = [re.sub(r"\\[{}]|[^][(),]", "", text.replace(r"\pm", ",")) for text in (gold, answer)]  # (,] for (3,4]
    shapes = [sorted(shape.replace("()", "").replace("()", "")) for shape in shapes]
    if shapes[0] != shapes[1] or unit != other and (unit and other or ["degree"] in (unit, other)):
        return False
    (_, values), (_, found) = sides(gold), sides(answer)
    if len(values) > 1 or len(found) > 1 and "," in answer:
        values, found = [gold], [answer]
    return all(same_formula(read(values[0]), read(side)) for side in found)


def same_formula(gold, answer):
    """Whether math-verify finds two trees equal, and the answer is as far worked out and solved as the gold."""
    from math_verify import verify
    from sympy import Number, Symbol
    from sympy.core.relational import Relational

    if gold is None or answer is None or work_left(answer) > work_left(gold):
        return False
    if isinstance(gold, Relational) and isinstance(answer, Relational):
        if any(isinstance(side, Symbol) for side in gold.args) > any(isinstance(side, Symbol) for side in answer.args):
            return False
    if isinstance(answer, Number) and gold.is_number:
        return abs((gold - answer).evalf(30, maxn=1000)) * 10**6 <= min(1, abs(gold.evalf()))
    return verify(gold, answer, numeric_precision=1000, timeout_seconds=None)


def work(deadline, memory_gb):
    """A grader's worker: replies with a word to each JSON line [gold, answer], and ends with its parent.

    This process only imports sympy. A fork of it does the work. At the deadline the kernel ends the fork by an alarm
    that nobody handles, and the next fork is there at once, where importing sympy again would take a second.
    """
    import logging

    logging.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    same(r"\sqrt{3}-\frac{x^{2}}{2}", r"-\frac{x^{2}}{2}+\sqrt{3}")  # imports and prepares what is needed
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    for stream in (1, 2):  # a library's output is not a reply
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if sys.platform != "darwin":  # macOS does not know this limit
        limit, hard = int(memory_gb * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    while child := os.fork():
        status = os.waitpid(child, 0)[1]
        if status == 0:  # there are no more questions
            return
        replies.write(b"time-out\n" if status == signal.SIGALRM else b"crash\n")
    for line in sys.stdin.buffer:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, deadline)
        try:
            right = same(gold, answer)
        except Exception:  # it cannot be read, or sympy cannot compare it
            right = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(b"right\n" if right else b"wrong\n")


# ---- Evaluation ----

def finished(path, problems, n, size):
    """This rank's problems, the longest first (if memory runs out, then at once), and the rows that `path` has of them.

    The file of an interrupted run is cut back to whole batches of `size` problems, each with n completions.
    """
    order = sorted(range(len(problems)), key=lambda i: -len(problems[i]["problem"]))
    order = order[RANK::WORLD]
    mine, lines = [{"index": i, **problems[i]} for i in order], []
    if path and os.path.exists(path):
        with open(path, "rb") as file:
            lines = [line for line in file if line.endswith(b"\n")]
        for line, problem in zip(lines[::n], mine):
            for key, value in problem.items():
                if (found := json.loads(line).get(key)) != value:
                    fail(f"{path} was made with {key} {found!r}, not {value!r}: choose another --out")
        check(len(lines) <= len(mine) * n, f"{path} has the rows of more problems: choose another --out")
        if len(lines) < len(mine) * n:
            lines = lines[: len(lines) // (size * n) * size * n]
        os.truncate(path, sum(map(len, lines)))
    return mine, [json.loads(line) for line in lines]


def evaluate(sampler, tokenizer, problems, grader, n=1, seed=0, temperature=0.0, batch_size=256, out=None, ks=None,
             system=None):
    """Sample n completions a problem, grade them, and return their statistics (see summarize), the same on every rank.

    sampler(prompt_ids, n, seed, temperature) returns len(prompt_ids) * n completions, those of a prompt together, each
    with `ids` (stop token kept) and `finish` ("stop" or "length"). A batch has batch_size completions; a finished one
    is written to the file `out`, and is not done again if it stands there already.
    """
    most, size = -(-len(problems) // WORLD), max(1, batch_size // n)
    mine, records = finished(out, problems, n, size)
    done = len(records) // n
    with (
        open(out or os.devnull, "a") as file,
        tqdm(total=len(mine), initial=done, desc="evaluating", unit="problem", disable=RANK > 0 or None) as bar,
    ):
        for start in range(0, most, size):
            batch = mine[max(start, done) : start + size]
            if not batch:
                continue
            prompts = [encode_prompt(tokenizer, row["problem"], system) for row in batch]
            completions = sampler(prompts, n, (seed * WORLD + RANK) * most + start, temperature)
            texts = [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
            rows = [dict(row) for row in batch for _ in range(n)]
            verdicts = grader.judge_all([(text, row["answer"]) for text, row in zip(texts, rows, strict=True)])
            for row, text, completion, verdict in zip(rows, texts, completions, verdicts):
                row.update(completion=text, length=len(completion.ids), finish=completion.finish, **verdict)
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            records += rows
            bar.set_postfix(accuracy=f"{sum(row['correct'] for row in records) / len(records):.3f}", refresh=False)
            bar.update(len(batch))
    shares = [records] * WORLD
    if WORLD > 1:
        import torch

        torch.distributed.all_gather_object(shares, records)
    return summarize(sorted((row for rows in shares for row in rows), key=lambda row: row["index"]), ks)


def summarize(records, ks=None):
    """Statistics of graded completions, whose `index` tells which of them answer the same problem.

    Keys: accuracy; standard_error (over problems; nan when there is one); pass_at_k (unbiased, {1: .., 2: .., 4: ..});
    length (mean tokens); truncated, no_box (shares); grader_timeouts; problems; n; means (of each problem); records.
    """
    groups = {}
    for record in records:
        groups.setdefault(record["index"], []).append(record["correct"])
    counts = [(len(group), sum(group)) for group in groups.values()]
    means = [right / size for size, right in counts]
    n = min(size for size, _ in counts)
    return {
        "accuracy": statistics.fmean(means),
        "standard_error": statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else math.nan,
        "pass_at_k": {
            k: statistics.fmean(1 - math.comb(size - right, k) / math.comb(size, k) for size, right in counts)
            for k in ks or [2**power for power in range(n.bit_length())]
        },
        "length": statistics.fmean(record.get("length", math.nan) for record in records),
        "truncated": statistics.fmean(row["finish"] == "length" if "finish" in row else math.nan for row in records),
        "no_box": statistics.fmean(not record["boxed"] for record in records),
        "grader_timeouts": sum(record["why"] == "time-out" for record in records),
        "problems": len(counts),
        "n": n,
        "means": means,
        "records": records,
    }


def difference(first, second):
    """Mean of the second list minus that of the first, and the ends of its 95 % interval: a paired bootstrap."""
    import numpy

    deltas = numpy.subtract(second, first)  # [problems]
    draws = numpy.random.default_rng(0).integers(len(deltas), size=(2000, len(deltas)))
    return deltas.mean().item(), *numpy.percentile(deltas[draws].mean(1), [2.5, 97.5]).tolist()


# ---- Ranks, samplers ----

Completion = namedtuple("Completion", "ids finish")  # token ids with the stop token; "stop" or "length"


def join_ranks(timeout_minutes):
    """Join torchrun's process group, or without torchrun make one of this process alone. Returns this rank's device."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **alone)
    return device


@contextlib.contextmanager
def ending():
    """Around a program: leaves the process group, and says in one line that memory ran out.

    After an error on a GPU the process ends at once: a teardown waits for other ranks, which may never come.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        code = 1
        if type(error).__name__ == "OutOfMemoryError":
            code = (f"error: rank {RANK}: {' '.join(str(error).split())} What weights, gradients and AdamW take stands "
                    "in the first lines. The rest is lowered by --micro_batch_tokens (training) and "
                    "--gpu_memory_utilization (vLLM)")
        else:
            traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    torch = sys.modules.get("torch")
    if code and torch and torch.cuda.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if torch and torch.distributed.is_initialized() and "vllm" not in sys.modules:  # vLLM does it at its own end
        torch.distributed.destroy_process_group()
    sys.exit(code)


def sum_over_ranks(values, device):
    """{name: number} -> {name: sum over all ranks}."""
    import torch

    totals = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(totals)
    return dict(zip(values, totals.tolist()))


def stop_tokens(model, tokenizer):
    """The ids that end a completion: the model's own and the tokenizer's; if there are none [-1], which never comes."""
    stops = model.generation_config.eos_token_id
    stops = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id]
    return sorted({stop for stop in stops if stop is not None}) or [-1]


def start_vllm(model, args, dtype, longest, **options):
    """vLLM's engine for sequences of `longest` tokens at most, in this process. args: flags that all scripts have."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where new weights can reach it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    import vllm

    try:
        return vllm.LLM(
            model, dtype=dtype, seed=args.seed, max_model_len=min(context_of(model), longest),
            distributed_executor_backend="external_launcher" if WORLD > 1 else None,
            gpu_memory_utilization=args.gpu_memory_utilization,
            enforce_eager=args.enforce_eager or not torch.cuda.is_available(), **options,
        )
    except (ValueError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        sys.exit(f"error: rank {RANK}: vLLM does not fit: {' '.join(str(error).split())} Now: --gpu_memory_utilization "
                 f"{args.gpu_memory_utilization}; shorter prompts and a shorter --max_new_tokens need less")


def vllm_sampler(args, tokenizer, device, longest):
    """A sampler for evaluate: vLLM's generate. Completion k of prompt i has the seed (seed + i)·n + k."""
    import torch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine = start_vllm(args.model, args, dtype, longest, tensor_parallel_size=args.vllm_tp)

    def sample(prompt_ids, n, seed, temperature):
        from vllm import SamplingParams

        how = {"n": n, "temperature": temperature, "top_p": args.top_p, "max_tokens": args.max_new_tokens}
        params = [SamplingParams(seed=(seed + i) * n, detokenize=False, **how) for i in range(len(prompt_ids))]
        requests = engine.generate([{"prompt_token_ids": ids} for ids in prompt_ids], params, use_tqdm=False)
        return [Completion(list(output.token_ids), output.finish_reason) for row in requests for output in row.outputs]

    return sample


def hf_sampler(args, tokenizer, device, longest):
    """A sampler for evaluate: transformers' generate, without the model's own settings for it (top-k, penalties)."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, use_safetensors=True).to(device).eval()
    stops = stop_tokens(model, tokenizer)
    model.generation_config = GenerationConfig()

    def sample(prompt_ids, n, seed, temperature):
        how = {"do_sample": temperature > 0}
        if temperature > 0:
            how.update(temperature=temperature, top_k=0, top_p=args.top_p)
        how |= {"max_new_tokens": args.max_new_tokens, "eos_token_id": stops, "pad_token_id": max(0, stops[0])}
        rows, completions = [ids for ids in prompt_ids for _ in range(n)], []
        torch.manual_seed(seed)
        for batch in (rows[i : i + 256] for i in range(0, len(rows), 256)):  # bounds the memory of the key-value cache
            width = max(map(len, batch))  # padded on the left: all prompts end at one place
            input_ids = torch.tensor([[-1] * (width - len(ids)) + ids for ids in batch], device=device)  # [B, S]
            inputs = {"input_ids": input_ids.clamp(min=0), "attention_mask": (input_ids >= 0).long()}
            output = model.generate(**inputs, generation_config=GenerationConfig(**how))  # [B, S + T]
            for ids in output[:, width:].tolist():
                stop = next((t for t, token in enumerate(ids) if token in stops), None)
                completions.append(Completion(ids, "length") if stop is None else Completion(ids[: stop + 1], "stop"))
        return completions

    return sample


# ---- A training run: its flags, folder and log ----

def help_text(Args, script, toy):
    """What --help prints: the docstring's first line and examples, and the flags in the groups of Args."""
    about, *doc = sys.modules[Args.__module__].__doc__.splitlines()
    examples = [line for line in doc if line.startswith(("    python ", "    torchrun "))]
    width = shutil.get_terminal_size().columns
    toy = ", ".join(f"{key} {value}" for key, value in toy.items() if key != "model")
    toy = textwrap.fill(f"Without --model: {toy}", width)
    lines = [about, "", *examples, "", toy,
             "Results: args.json, metrics.jsonl, samples.jsonl, checkpoints/ and final/ in --output_dir.", "",
             "  --flag                    default  meaning"]
    for line in inspect.getsource(Args).splitlines():
        if line.startswith("    # "):
            lines.append(f"\n{line[6:]}:")
        elif match := re.match(r"    (\w+): ", line):
            field = Args.__dataclass_fields__[match[1]]
            default = "" if field.default is None else str(field.default)
            choices = "|".join(typing.get_args(field.type))
            meaning = (f"{choices}; " if choices else "") + field.metadata["help"]
            lines += textwrap.wrap(f"  --{match[1]:<23} {default:<8} {meaning}", width, subsequent_indent=" " * 37)
    return "\n".join(lines) + "\n"


def read_flags(Args, script, toy):
    """Args from the command line, over those of the resumed run, or without --model over `toy`, over the defaults."""
    from transformers import HfArgumentParser, logging

    logging.set_verbosity_error()
    parser = HfArgumentParser(Args, prog=f"{script}.py", allow_abbrev=False)
    parser.error, parser.format_help = fail, lambda: help_text(Args, script, toy)
    given = parser.parse_args()
    folder = given.resume or given.output_dir
    done = checkpoints(folder) if folder else []
    over = not given.resume and folder and Path(folder, "final").exists()  # if only its checkpoints were removed
    if given.resume:
        check(done, f"--resume {given.resume}: no checkpoint there (one comes every --save_every steps): start anew")
        saved = json.loads(Path(given.resume, "args.json").read_text())
        check(saved.pop("script") == script and given.model in (None, saved["model"]),
              f"--resume {given.resume}: that run is of another script or model; start a new run without --resume")
        check(not given.output_dir, "--resume goes on in the folder of its run: leave --output_dir out")
        parser.set_defaults(**saved)
    elif given.model is None:
        parser.set_defaults(**toy)
    args = Args(**vars(parser.parse_args()))
    check(given.resume or not done and not over,
          f"--output_dir {args.output_dir} holds a run: choose another, or --resume it")
    check(not done or int(done[-1].name[5:]) <= args.steps, f"--resume {args.resume}: it is past --steps {args.steps}")
    return args


def checkpoints(run):
    """The whole checkpoints of a run's folder, oldest first."""
    return sorted(Path(run, "checkpoints").glob("step_*[0-9]"), key=lambda path: int(path.name[5:]))


def open_run(args, script, done, columns):
    """Make the folder of a run, or cut an old one back to its first `done` steps. Returns its path, on all ranks.

    Prints the steps to be done, and the heads of the columns that log_step prints.
    """
    from torch.distributed import broadcast_object_list

    name = [args.resume or args.output_dir]
    try:
        while RANK == 0 and not name[0]:
            with contextlib.suppress(FileExistsError):  # another run began in this second
                run = Path(f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}")
                run.mkdir(parents=True)
                name = [str(run)]
        if RANK == 0:
            Path(name[0], "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"a run's folder cannot be made: {error}; choose another --output_dir")
    broadcast_object_list(name)  # the clocks of the ranks may differ
    run = Path(name[0])
    if RANK == 0:
        for part in (run / "checkpoints").glob("*.part"):  # left by a run that was killed while saving
            shutil.rmtree(part)
        for path in (run / "metrics.jsonl", run / "samples.jsonl"):
            with open(path, "ab+") as file:
                file.seek(0)
                rows = [row for row in file if row.endswith(b"\n") and json.loads(row)["step"] <= done]
                file.truncate(sum(map(len, rows)))
        write_whole(run / "args.json", json.dumps({"script": script, **vars(args), "resume": None}, indent=1))
        if args.wandb:
            import wandb

            wandb.init(project=args.wandb, name=run.name, config=vars(args))
    if done < args.steps:
        say(f"steps {done + 1} to {args.steps}, written to {run}\n" + " ".join(f"{column:>9}" for column in columns))
    else:
        say(f"all {done} steps of {run} are done: only its final/ is written again")
    return run


def say_start(script, args, policy, sampler, device):
    """Who trains what on what: a line with what it takes, and on a CPU, if it is much, how long a step may be."""
    import torch

    own = policy.model.generation_config
    try:  # save_final would be the first to complain
        own.validate(strict=True)
    except ValueError as error:
        own.do_sample = True  # a temperature or top_p without sampling is what many have
        say(f"generation_config.json is not valid ({str(error).splitlines()[0]}): final/ has it with do_sample")
        own.validate(strict=True)
    size = sum(parameter.numel() for parameter in policy.parameters())
    states = 16e-9 * size / int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))  # GB: a node's ranks share them
    say(f"{script}: {Path(args.model).name}, {size / 1e6:.1f}M parameters, {WORLD} x {device.type}, "
        f"{type(sampler).__name__}; weights, gradients, AdamW: {states:.2f} GB each")
    tokens = args.prompts_per_step * args.group_size * args.max_new_tokens
    hours = tokens * 8 * size / (2e10 * WORLD * torch.get_num_threads()) / 3600  # 8 operations a parameter and token
    if device.type == "cpu" and hours > 0.1:
        say(f"a step has up to {tokens:,} tokens, by a rough estimate {hours:.1f} hours on this CPU: lower "
            "--prompts_per_step, --group_size, --max_new_tokens (try 4, 8, 64)")


def log_accuracy(run, args, step, sampler, tokenizer, problems, grader):
    """Evaluate greedily where it is due and not done yet, and add eval_accuracy to the step's row in metrics.jsonl."""
    from torch.distributed import broadcast_object_list

    if not problems or step == 0 or step < args.steps and not (args.eval_every and step % args.eval_every == 0):
        return
    rows = (run / "metrics.jsonl").read_text().splitlines() if RANK == 0 else []
    done = [RANK == 0 and "eval_accuracy" in json.loads(rows[-1])]
    broadcast_object_list(done)
    if done[0]:
        return
    problems = [{"problem": row["problem"], "answer": row["answer"]} for row in problems]
    accuracy = evaluate(sampler, tokenizer, problems, grader, system=args.system_prompt)["accuracy"]
    say(f"accuracy on {args.eval_dataset}: {accuracy:.3f} ({len(problems)} problems, greedy)")
    if RANK == 0:
        rows[-1] = json.dumps({**json.loads(rows[-1]), "eval_accuracy": accuracy})
        write_whole(run / "metrics.jsonl", "".join(row + "\n" for row in rows))
        if args.wandb:
            sys.modules["wandb"].log({"eval_accuracy": accuracy}, step=step)


def write_whole(path, text):
    """Write a file aside, then rename it: whole at any moment."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    aside.replace(path)


def say_end(run):
    """Where the model and the metrics are; with matplotlib also their curves."""
    for file in (run / "final").glob("*.safetensors") if RANK == 0 else []:
        file.chmod((run / "args.json").stat().st_mode)  # safetensors would let nobody else read them
    say(f"the model is in {run / 'final'}, metrics.jsonl and samples.jsonl beside it")
    if RANK == 0 and find_spec("matplotlib"):
        draw_curves([run], run / "curves.png")
        say(f"reward, length and entropy as curves: {run / 'curves.png'}")


def draw_curves(runs, picture):
    """Reward, length and entropy of each step of some runs, as their metrics.jsonl have them, drawn into a PNG."""
    check(find_spec("matplotlib"), "curves need a package: pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for run, style in zip(runs, itertools.cycle(("-", "--", "-.", ":"))):
        rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        for axis, key, unit in zip(axes, ("reward", "length", "entropy"), ("", ", tokens", ", nats a token")):
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], style, label=Path(run).name)
            axis.set(title=key + unit, xlabel="step")
            axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes[0].legend()
    figure.savefig(picture, dpi=80)
    pyplot.close(figure)


class Seconds:
    """A clock of the phases of a step; the bar shows which is on."""

    def __init__(self, bar):
        self.bar, self.starts = bar, {}

    def start(self, phase):
        """From here on it is this phase."""
        self.bar.set_postfix_str(phase)
        self.starts[phase] = time.perf_counter()

    def metrics(self, tokens):
        """Seconds of each phase but the last, tokens a second over them all, and the peak memory of GPU or process."""
        import torch

        times = list(self.starts.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
        return {
            **{f"seconds_{phase}": end - start for phase, start, end in zip(self.starts, times, times[1:])},
            "tokens_per_second": tokens / (times[-1] - times[0]),
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else peak,
        }


def log_step(run, args, metrics, columns, samples):
    """Print a step's columns; append its metrics, and the first of its (problem, text, reward), to the run's files."""
    say(" ".join(f"{metrics[column]:{max(9, len(column))}{'' if column == 'step' else '.4g'}}" for column in columns))
    if RANK == 0:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        with open(run / "samples.jsonl", "a") as file:
            for row, text, reward in list(samples)[:4]:
                row = {"problem": row["problem"], "answer": row["answer"], "completion": text, "reward": reward}
                file.write(json.dumps({"step": metrics["step"], **row}) + "\n")
        if args.wandb:
            sys.modules["wandb"].log(metrics, step=metrics["step"])


# ---- The command line ----

def parse_args():
    """The command line, checked as far as that needs no data and no model."""
    def numbers(text):
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"data sets by name: arithmetic, {', '.join(HUB)}", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--model", help="folder in transformers' format, or hub id; several with commas between")
    parser.add_argument("--grade", metavar="FILE", help="instead of --model: a file of completions and their answers")
    parser.add_argument("--benchmarks", default="arithmetic", help="names, files or hub ids, with commas between")
    parser.add_argument("--n", type=int, default=1, help="completions a problem (1)")
    parser.add_argument("--k", type=numbers, help="the k of pass@k, with commas between (1,2,4,... up to n)")
    parser.add_argument("--system_prompt", help="what stands before each problem (asks for steps and a box)")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each benchmark")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="a completion is cut off here (1024)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (0 if n is 1, else 0.6)")
    parser.add_argument("--top_p", type=float, default=0.95, help="samples come from the likeliest tokens (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other samples (0)")
    parser.add_argument("--batch_size", type=int, default=256, help="completions sampled and saved at a time (256)")
    parser.add_argument("--sampler", default="auto", choices=("auto", "vllm", "hf"), help="auto: vllm if CUDA has it")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.9, help="vLLM's share of the GPU (0.9)")
    parser.add_argument("--vllm_tp", type=int, default=1, help="GPUs that share a vLLM engine (1); not with torchrun")
    parser.add_argument("--enforce_eager", action="store_true", help="vLLM without CUDA graphs: starts sooner")
    parser.add_argument("--out", help="folder for all completions and the summary")
    args = parser.parse_args()
    if args.temperature is None:
        args.temperature = 0.0 if args.n == 1 else 0.6
    for name in ("n", "limit", "max_new_tokens", "batch_size", "vllm_tp"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(args, name)}")
    check((args.model is None) != (args.grade is None), "give --model, or --grade FILE for completions made elsewhere")
    check(0 <= args.temperature < math.inf, f"--temperature must be 0 or above, not {args.temperature}")
    check(args.n == 1 or args.temperature > 0, "--temperature must be above 0 when n is more than 1")
    check(0 < args.top_p <= 1, f"--top_p must be above 0 and at most 1, not {args.top_p}")
    check(args.grade or all(1 <= k <= args.n for k in args.k or ()), f"--k: every k must be from 1 to --n {args.n}")
    check(args.sampler != "vllm" or find_spec("vllm"), "--sampler vllm needs its package: see requirements.txt")
    check(args.vllm_tp == 1 or WORLD == 1 and find_spec("vllm"),
          "--vllm_tp needs vllm, and goes with python: with torchrun every process has an engine of its own")
    check(not args.out or not os.path.isfile(args.out), f"--out {args.out} is a file: give a folder")
    return args


def report(results, args):
    """Print the tables of results {(model, benchmark): statistics}; with --out also write OUT/summary.json."""
    summary, notes, first = [], [], next(iter(results))[0]
    width = max(len(text) for names in results for text in names)
    head = "problems  avg@n          length  truncated  no box  time-outs  pass@k"
    say(f"{'model':<{width}}  {'benchmark':<{width}}  {head}")
    for (model, benchmark), result in results.items():
        passes = "  ".join(f"{k}: {value:.3f}" for k, value in result["pass_at_k"].items())
        row = ("{problems:>8}  {accuracy:.3f} ± {standard_error:.3f}  {length:>6.0f}  {truncated:>9.3f}  "
               "{no_box:>6.3f}  {grader_timeouts:>9}  ").format(**result)
        say(f"{model:<{width}}  {benchmark:<{width}}  {row}{passes}")
        summary.append({"model": model, "benchmark": benchmark, **result})
        del summary[-1]["means"], summary[-1]["records"]
        if model != first:
            change, low, high = difference(results[first, benchmark]["means"], result["means"])
            notes.append(f"{model} minus {first}, {benchmark}: {change:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
            summary[-1].update(minus=first, difference=change, interval=[low, high])
    say("\n".join(notes))
    if args.out and RANK == 0:
        with open(os.path.join(args.out, "summary.json"), "w") as file:
            json.dump(summary, file, indent=1)


def grade_file(args):
    """Grade completions made elsewhere. Rows of one problem belong together, if there is a column problem."""
    rows = read_file(args.grade)
    grouped = {"problem": ("problem",)} if any("problem" in row for row in rows) else {}
    wanted = {"completion": ("completion",)} | ANSWERS | grouped
    rows = [{key: row[key] for key in wanted} for row in usable(rows, args.grade, wanted)]
    with Grader() as grader:
        verdicts = grader.judge_all([(row["completion"], row["answer"]) for row in rows])
    rows = [{"index": row.get("problem", i), **row, **verdict} for i, (row, verdict) in enumerate(zip(rows, verdicts))]
    least = min(Counter(row["index"] for row in rows).values())
    check(max(args.k or [1]) <= least, f"every k must be from 1 to {least}, the completions of a problem in {args.grade}")
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        with open(os.path.join(args.out, "graded.jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return {("-", args.grade): summarize(rows, args.k)}


def evaluate_models(args):
    """Every model on every benchmark. What can be wrong is found before the first model is loaded."""
    benchmarks = {name: load_problems(name, "test")[: args.limit] for name in args.benchmarks.split(",")}
    tokenizers = {name: load_tokenizer(name) for name in args.model.split(",")}
    import torch

    vllm = args.sampler == "vllm" or args.sampler == "auto" and torch.cuda.is_available() and find_spec("vllm")
    keys = ("n", "temperature", "top_p", "max_new_tokens", "seed", "batch_size", "system_prompt")
    settings = {key: getattr(args, key) for key in keys}
    settings |= {"sampler": "vllm" if vllm else "hf", "processes": WORLD}
    for name, rows in benchmarks.items():
        kept = [row for row in rows
                if all(encode_prompt(own, row["problem"], args.system_prompt) for own in tokenizers.values())]
        check(kept, f"{name}: of no problem a tokenizer knows a character")
        if len(kept) < len(rows):
            say(f"{name}: {len(rows) - len(kept)} of {len(rows)} rows dropped: their prompts have no token")
        benchmarks[name] = [{"problem": row["problem"], "answer": row["answer"], **settings} for row in kept]
    files, owners, asked, room, missing = {}, {}, {}, {}, {}
    for model, tokenizer in tokenizers.items():
        prompts = (row["problem"] for rows in benchmarks.values() for row in rows)
        longest = max(len(encode_prompt(tokenizer, problem, args.system_prompt)) for problem in prompts)
        context = context_of(model)
        room[model], missing[model] = (longest, min(args.max_new_tokens, context - longest)), 0
        check(context > longest, f"{model} has room for {context} tokens, and the longest prompt has {longest}")
        for name, rows in benchmarks.items():  # a file for each rank
            parts = [re.sub(r"[^\w.-]+", "_", part.strip("./").removesuffix(".jsonl")) for part in (model, name)]
            rank = f".{RANK}.jsonl" if WORLD > 1 else ".jsonl"
            files[model, name] = path = os.path.join(args.out, *parts) + rank if args.out else None
            asked[model, name] = [{**row, "weights_written": written(model)} for row in rows]
            if args.out:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                owner = os.path.realpath(model), os.path.realpath(name)
                check(owners.setdefault(path, owner) == owner, f"--out: {model} and another model, or {name} and another "
                      f"benchmark, would share {path}: give them by their full paths")
            mine, records = finished(path, asked[model, name], args.n, max(1, args.batch_size // args.n))
            missing[model] += len(mine) * args.n - len(records)
    device = join_ranks(7 * 24 * 60)  # minutes: ranks meet when all is done, however long that takes
    missing = sum_over_ranks(missing, device)
    if vllm and sum(number > 0 for number in missing.values()) > 1:
        return one_by_one(args)
    say(f"{args.model} on {args.benchmarks}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    results, how = {}, (args.n, args.seed, args.temperature, args.batch_size)
    with Grader() as grader:
        for args.model, tokenizer in tokenizers.items():
            longest, args.max_new_tokens = room[args.model]
            start = vllm_sampler if vllm else hf_sampler
            sampler = start(args, tokenizer, device, longest + args.max_new_tokens) if missing[args.model] else None
            for name in benchmarks:
                more = files[args.model, name], args.k, args.system_prompt
                results[args.model, name] = evaluate(sampler, tokenizer, asked[args.model, name], grader, *how, *more)
            del sampler  # before the next one is loaded
    return results


def written(model):
    """When the weights in a folder were written, so that --out does not take others under its name for them, or None."""
    times = [file.stat().st_mtime for file in Path(model).glob("*.safetensors")]
    return datetime.fromtimestamp(max(times), UTC).isoformat() if times else None


def one_by_one(args):
    """Several models with vLLM, which takes one a process: a process for each, then one that reads what they wrote."""
    check(WORLD == 1, "with torchrun vLLM takes one model a run: give each --model alone, with the same --out, and "
          "then all of them, which compares what is there")
    with tempfile.TemporaryDirectory() as aside:
        own = [] if args.out else ["--out", aside]
        for model in [*args.model.split(","), args.model]:
            done = subprocess.run([sys.executable, *sys.argv, *own, "--model", model])
            if done.returncode:
                sys.exit(done.returncode)


def main():
    args = parse_args()
    results = grade_file(args) if args.grade else evaluate_models(args)
    if results:
        report(results, args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(float(sys.argv[2]), float(sys.argv[3]))
        sys.exit()
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted", 130))
    with ending():
        main()
