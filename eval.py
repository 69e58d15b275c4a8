"""Problems, prompts, grading and evaluation: the part that the four training scripts share.

    python eval.py --model tests/tiny                  the tiny model on generated sums
    python eval.py --model Qwen/Qwen2.5-7B --benchmarks aime24,math500 --n 8 --out runs/qwen
    torchrun --nproc_per_node=8 -- eval.py --model Qwen/Qwen2.5-7B --benchmarks aime24 --n 8
    python eval.py --compare runs/base runs/trained    the difference of two finished evaluations

torchrun needs the "--", otherwise it takes --n for its own. A benchmark is a name from the list
below, a hub id "owner/name", or a .jsonl or .parquet file with one problem and its answer per row.
With --n 1 decoding is greedy; more completions are sampled with --temperature and --top_p. The
table has one row per benchmark:

    avg@n      accuracy: the share of right completions per problem, averaged over problems,
               ± its standard error over problems
    length     mean number of tokens per completion
    truncated  share of completions that were cut off at --max_new_tokens
    no box     share of completions without a \\boxed answer
    time-outs  gradings that were stopped after 3 seconds; they count as wrong
    pass@k     probability that at least one of k completions is right (unbiased estimate from n),
               for k = 1, 2, 4, .. n

--out keeps OUT/<benchmark>.jsonl with one row per completion (`why` says how it was decided: text,
math-verify, time-out, crash, too long, no answer). After an interruption the same command skips the
benchmarks that are finished. --compare prints the difference in accuracy per benchmark with a 95%
interval (paired bootstrap over problems).
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm  # heavier packages are imported where they are used: the grader's workers start from this file

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
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()  # torchrun sets all; one alone means nothing
RANK, WORLD = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")] if LAUNCHED else [0, 1]
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
    """End the program with one line on stderr. Exit code 2 means bad input."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # otherwise the message would follow it on its line
    if code != 2 or os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks see the same bad input
        print(f"error (rank {RANK}):" if RANK else "error:", " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)


def check(holds, message):
    """Unless it holds, end the program with the message, as fail does."""
    if not holds:
        fail(message)


# ---- Problems ----

def arithmetic(split):
    """Generated sums such as "37+5+81+26?": 256 to test on, 4096 others to train on, always the same ones."""
    generator = random.Random(0)
    sums = {}  # a dict keeps the order and drops repetitions
    while len(sums) < 256 + 4096:
        sums[tuple(generator.randint(1, 99) for _ in range(4))] = None
    terms = list(sums)[:256] if split == "test" else list(sums)[256:]
    return [{"problem": "+".join(map(str, four)) + "?", "answer": str(sum(four))} for four in terms]


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
    in_box = columns["answer"].lower() == "solution"
    for row in texts:
        if "####" in row["answer"]:  # GSM8K's "so she has 18 #### 18"
            row["answer"] = row["answer"].rpartition("####")[2]
        elif "\\boxed" in row["answer"] or in_box and not NUMBER.fullmatch(clean(row["answer"])):
            row["answer"] = last_boxed(row["answer"]) or ""
        row["answer"] = clean(row["answer"])
        if len(re.findall(r"(?<![\\a-z])[a-z]{2,}", row["answer"], re.IGNORECASE)) > 12:  # words: a proof, no answer
            row["answer"] = ""
    with Grader() as grader:
        readable = grader.readable({row["answer"] for row in texts})
    kept = [row for row in texts if row["answer"] in readable and row.get("problem") != ""]
    where = " (in the column solution it must be a number, or stand in \\boxed{} or after ####)" if in_box else ""
    check(kept, f"{name}: no row of {len(rows)} has a problem and an answer that the grader can read{where}")
    if len(kept) < len(rows):
        say(f"{name}: {len(rows) - len(kept)} of {len(rows)} rows dropped: no problem, or an unusable answer{where}")
    return kept


def read_cell(value):
    """The text of a cell: a string or number, a list of answers, a conversation's last turn, {"ground_truth": ...}."""
    if isinstance(value, dict):
        value = value.get("ground_truth", value.get("content"))
    if isinstance(value, list):
        is_conversation = value and isinstance(value[-1], dict)
        value = read_cell(value[-1]) if is_conversation else ", ".join(clean(read_cell(item)) for item in value)
    return "" if value is None else str(value).encode("utf-8", "replace").decode().strip()  # no lone surrogates


def read_file(path):
    """Rows of a .parquet file or of JSON lines, as dicts."""
    rows, place = [], ""
    try:
        if path.endswith(".parquet"):
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f", line {number}"
                if line.strip():
                    rows.append(dict(json.loads(line)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        fail(f"cannot read {path}{place}: {error}; it must be .parquet, or have a JSON object in each line (.jsonl)")
    return rows


def read_hub(name, split):
    """Rows of a data set from the hub, or from its cache, as dicts."""
    import datasets

    hub_id, configuration, *splits = HUB.get(name, (name, None, "train", "test"))
    try:
        rows = datasets.load_dataset(hub_id, configuration, split=splits[split == "test"])
    except Exception as error:  # of a dozen kinds, and all mean that the data cannot be had
        fail(f"cannot load {hub_id} ({type(error).__name__}: {str(error)[:200]}): give the path of a .jsonl file; "
             "without a network set HF_HUB_OFFLINE=1, and HF_HOME to a cache that holds it")
    if name == "dapo":  # each problem is in there a hundred times
        places = {key: place for place, key in enumerate(rows.flatten()["extra_info.index"])}
        rows = rows.select(sorted(places.values()))
    return rows.to_list()


# ---- Models and prompts ----

def load_tokenizer(name):
    """The tokenizer of a model's folder or hub id. Anything else ends the program with one line."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if not tokenizer.encode("1"):  # transformers makes an empty tokenizer for a folder without one
            raise ValueError("it has no tokenizer")
        if os.path.isdir(name) and not list(Path(name).glob("*.safetensors")):
            raise ValueError("it has no .safetensors")
    except Exception as error:  # of a dozen kinds, and all mean that this is not a model
        fail(f"cannot load {name} ({type(error).__name__}: {str(error)[:200]}): give a hub id, or a folder with "
             "config.json, weights in .safetensors and a tokenizer; without a network set HF_HUB_OFFLINE=1")
    return tokenizer


def stop_tokens(model, tokenizer):
    """Ids of the tokens that end a completion. model: folder or hub id. [-1], which never comes, if there are none.

    They are the end tokens of the model and of the tokenizer, and the token that the chat template puts behind an
    assistant's turn: in many models no configuration names it.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        stops = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the model has no such file
        stops = AutoConfig.from_pretrained(model).get_text_config().eos_token_id
    stops = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "42"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("42")[2]
        after = tokenizer.encode(text.lstrip(), add_special_tokens=False)[:1]
        stops += [token for token in after if token in tokenizer.added_tokens_decoder]
    return sorted({stop for stop in stops if stop is not None}) or [-1]


def encode_prompt(tokenizer, problem, system=None):
    """Token ids of the prompt: the tokenizer's chat template if it has one, otherwise a plain question and answer.

    system: the text of the system turn (default: SYSTEM), or the text before a plain question (default: none).
    """
    if not tokenizer.chat_template:
        ids = tokenizer.encode((f"{system}\n\n" if system else "") + PLAIN_PROMPT.format(problem=problem))
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers end every text
    from jinja2.exceptions import TemplateError

    system = SYSTEM if system is None else system
    if len(tokenizer.decode(tokenizer.encode(system))) < len(system) / 2:
        system = ""  # a tokenizer of few characters (the toy's) cannot read it
    user = {"role": "user", "content": problem}
    # A template without a system turn refuses it (Gemma) or leaves it out: then the user says it
    for turns in [{"role": "system", "content": system}, user], [{**user, "content": f"{system}\n\n{problem}"}]:
        with contextlib.suppress(TemplateError):
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            if system.strip() in text and problem.strip() in text:
                return tokenizer.encode(text, add_special_tokens=False)
    fail(f"the chat template of this tokenizer leaves out the problem: {problem[:200]!r}")


def context_of(model):
    """How many tokens a model can see at once, as far as a token's position does not depend on the text's length."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("rope_type") in ("longrope", "dynamic") and rope.get("original_max_position_embeddings")
    return original or getattr(config, "max_position_embeddings", math.inf)


def load_prompts(name, split, tokenizer, args):
    """Problems with their token ids as "prompt_ids", and how many were skipped: without a token, or too long.

    A prompt may have args.max_prompt_tokens, which are lowered to what args.model sees without args.max_new_tokens.
    """
    from transformers import AutoConfig

    problems = load_problems(name, split)[: getattr(args, "limit", None)]
    for row in tqdm(problems, "encoding prompts", disable=RANK > 0 or None, delay=1, leave=False):
        row["prompt_ids"] = encode_prompt(tokenizer, row["problem"], args.system_prompt)
    size = AutoConfig.from_pretrained(args.model).get_text_config().vocab_size
    largest = max(max(row["prompt_ids"], default=0) for row in problems)
    check(largest < size, f"the tokenizer makes token {largest}, but {args.model} has a vocabulary of {size}")
    lost = [row["problem"] for row in problems if "".join(row["problem"].split())
            not in "".join(tokenizer.decode(row["prompt_ids"]).split())]
    if lost:
        say(f"{name}: the tokenizer cannot write all characters of {len(lost)} problems, such as {lost[0][:80]!r}")
    args.max_prompt_tokens = min(args.max_prompt_tokens, context_of(args.model) - args.max_new_tokens)
    kept = [row for row in problems if 0 < len(row["prompt_ids"]) <= args.max_prompt_tokens]
    empty, skipped = sum(not row["prompt_ids"] for row in problems), len(problems) - len(kept)
    found = f"{name}, {split}: {len(kept)} prompts"
    if skipped:
        found += f", skipped: {empty} without a token, {skipped - empty} longer than {args.max_prompt_tokens} tokens"
    check(kept, f"{found} (a prompt and --max_new_tokens {args.max_new_tokens} have to fit the model's context)")
    say(found)
    return kept, skipped


# ---- Grading ----

SYMBOLS = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "²": "^2",
                         "≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ", "°": r"^\circ ", "∪": r"\cup ", "³": "^3"})
NUMBER = re.compile(r"""
    ([-+]?(?:\d{1,500}(?:\.\d{0,500})?|\.\d{1,500}))  # -12, 12.5, .5
    (?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([-+]?\d{1,4})\s*\}|(-?\d)))?  # \times 10^{-3}, * 10^3
    \s*(\\?%)?
    """, re.X)
PLAIN = re.compile(r"""
    (?:[a-z]\s*=)?  # x =
    (?:\\(?:[dt]?frac|sqrt|pi|times|cdot)(?![a-z])|\\?%|[\s\d.{}\[\]^/+-])*  # a value without names
    """, re.X)
UNFINISHED = re.compile(r"""  # what is still to be worked out, and what math-verify misreads
    [^\s({[^,_]\s*(?:[-+]|(?:\*|\\times|\\cdot)(?!\s*(?:10\s*\^|\\sqrt|\\pi)))  # 37+5, 6*7; but 6 \times 10^7, 6*\pi
    |(?<!_)\d\s*\(|\)\s*[\d(]|(?<!_)\d\s+\d  # 6(7), which it takes for a mixed number, (6)7, 6 7
    |^-?\{?\d+\}?\s*\{\s*\d  # 6{7}
    |\d\s*\\[dt]?frac\s*\{\d\d+\}\s*\{\d\}  # 6\frac{12}{7}
    |\d_(?!\{?10\b)  # 101_2, which it takes for 101
    |\\infty|\\sum|\\prod  # \infty^\infty
    """, re.X)
TEXT = re.compile(r"\\(?:text|textbf|mbox|mathrm)\s*\{[\s~]*+([^{}]*)\}")
FILLERS = ("so|thus|hence|therefore|then|and|the|that|this|which|is|are|be|it|we|he|she|they|there|have|has|get|gives"
           "|means|our|my|final|correct|answer|result|value|solutions?|total|sum|equals?|to|of|in|exactly|about")
VALUE = re.compile(rf"""  # in a text whose \text{{...}} are marked by a NUL before them
    (?:\0?(?:{FILLERS})[:,]?\ |\0)*+  # the words before it
    ([^\0]+?(?<!circ)(?<![\^{{])(?=\ \0)  # the value, up to a \text,
    |(?:\\[a-z]+|\\?[^a-z\\])*(?:[\d)}}%\].]|\\pi))  # or as long as there are no names
    (?:\\?\ |~)*(.*)  # a unit, or other words
    """, re.X | re.I)
CHANGES = re.compile(r"""  # words and signs behind a value that make another one of it
    (?i:\b(?:no[rt]?|or|but|except|wrong|incorrect|false
    |than|less|fewer|more|most|least|below|above|under|over|short|off
    |minus|plus|times\ \w+|mod\w*|power|root|point|pi|factorial|percent|inverse|recip\w*
    |zero|one|two|hal[fv]\w*|thirds?|quarters?|dozens?|(?:\w*en|fif|six|eigh|nin|\w+d)ths?  # seventh, hundredth
    |\w+[bilrv]ed|\w*and|\w*llion)\b|n't)  # doubled, squared, halved; thousand; million; isn't
    |(?<![-^])\d|(?<!circ\ )(?<!\0)\b[A-Z]\b|\b[a-fi-knp-rt-z]\b  # factors: 5 2, 5 J, 5 x; but m^2, \text{J}, 5 m
    |[^\w\s\0/^'’\\-]|\\(?!circ)|\^\W?(?!circ|[snrt][tdh])[^\W\d]  # 5!, 5 \pi, 5^x; but 5^\circ, 5^{th}
    """, re.X)
UNITS = (  # the names of a unit, its own first
    "m,meter,metre|cm,centimeter|mm,millimeter|km,kilometer|in,inche,inch|ft,foot,feet|yd,yard|mi,mile"
    "|l,liter,litre|ml,milliliter|g,gram|mg,milligram|kg,kilogram|lb,pound|oz,ounce|hz|khz"
    "|s,sec,second|min,minute|h,hr,hour|day|week|month|year|am|pm|degree,^\\circ|rad,radian|c|f|n|j|v|w|k|a"
    "|cent|dollar|euro|/,per|^ 2,^2,square,sq|^ 3,^3,cubic,cu|mi / h,mph|km / h,kmh")
UNITS = {name: names.split(",")[0] for names in UNITS.split("|") for name in names.split(",")}


def last_boxed(text):
    """What stands in the last \\boxed{...} that is closed, or None. One pass over the text, whatever its nesting."""
    start, end, open_braces = -1, -1, []
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):  # \\. skips escaped braces
        if match[0] == "{" or match[0].startswith("\\boxed"):
            open_braces.append((match.end(), match[0] != "{"))
        elif match[0] == "}" and open_braces:
            opened, is_box = open_braces.pop()
            if is_box and opened > start:
                start, end = opened, match.start()
    return None if start < 0 else text[start:end]


def stated(text):
    """What the last line says after "answer is", "Answer:" or "####" (FILLERS alone before it, and no box), or None."""
    line = text.strip()[-500:].rpartition("\n")[2].replace("**", "")
    match = re.match(rf"(?:.*[^a-z\s'])?\s*(?:(?:{FILLERS}) )*(?:answer is|answer:|####)[\s:]*([^\s:].*)", line, re.I)
    return match[1] if match and "\\boxed" not in line else None


def clean(text):
    """An answer in a form that math-verify reads: "$8\\,178.$" -> "8178", "4.5e33" -> "4.5 \\times 10^{33}"."""
    text = " ".join(text.translate(SYMBOLS).split())
    if text.isdecimal():  # most are, and nothing below changes them
        return text
    text = re.sub(r"^\s*(?:\\approx|\\sim(?:eq)?|[=~])|\\?\$|(?<!\\)\\[()\[\]]", "", text).strip()  # \approx 7; $7$
    text = re.sub(r"(?<=\d)(?:,?\\[,!;: ]\s*|\{,\}\s*|~)(?=\d{3}(?!\d))", "", text)  # 8\,178  8{,}178  8,\!178
    if re.fullmatch(r"[-+]?\d{1,3}(?:[, ]\d{3})+(?:\.\d*)?\D*", text):
        text = re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", text)  # 1,250,000 people
    text = re.sub(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]\+?(-?\d+)(?![\w.])", r"\1 \\times 10^{\2}", text)  # 4.5e33
    text = re.sub(r"(?<!\\)\\(?:[,;:!]|(?:left|middle|right)(?![a-z]))", " ", text)  # thin spaces, and sizes
    text = re.sub(r"(?<![\d.,/])(\d{1,9})(?: |\\ |~)(\d{1,2})/(\d{1,3})(?![\d.])", r"\1\\frac{\2}{\3}", text)  # 1 1/2
    text = re.sub(r"(\.\d{0,99})\\(?:overline|bar|dot) ?\{?(\d{1,30})\}?", lambda x: x[1] + 12 * x[2], text)  # .\bar3
    # \sin 30^\circ in radians
    text = re.sub(r"(\\[cst]..\b[^=,+-]{0,9}?)([\d.]{1,9}) ?\^ ?\{? ?\\circ\b ?\}?", r"\1\\frac{\2\\pi}{180}", text)
    text = re.sub(r"^\s*\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s?\{?R\}?\s*)?(?:\\mid|:|\|)(.*)\\\}$", r"\1", text)  # x: x>3
    text = re.sub(r"^(?:\\[a-z]+\{)?\(?([A-J])[).:]\}?\\?\s\W*\b(?!.*\b[A-J]\b).*", r"\1", text)  # B) 5
    return " ".join(re.sub(r"(?<!\.)\.$", "", text).replace("\\langle", "(").replace("\\rangle", ")").split())


def same_number(gold, answer):
    """Whether two cleaned plain numbers are equal, to 6 decimals (6 digits below 1); None if one is no plain number.

    Percentages are taken as generously as math-verify does: 62.5 and 0.625 are both right for 62.5%.
    """
    matches = [NUMBER.fullmatch(text) for text in (gold, answer)]
    if not all(matches):
        return None
    gold, answer = (Fraction(match[1]) * Fraction(10) ** int(match[2] or match[3] or 0) for match in matches)
    answers = [answer]
    if bool(matches[0][4]) != bool(matches[1][4]):
        answers.append(answer * 100 if matches[0][4] else answer / 100)
    return any(gold == value or abs(gold - value) < min(1, abs(gold)) / 2_000_000 for value in answers)


def parts(text):
    r"""A value without the words around it, and its unit: "x=about 15\text{ cm}^2" -> ("x=15", ["2", "^", "cm"])."""
    label, equals, value = text.rpartition("=")
    match = re.search("[a-zA-Z]", value) and VALUE.fullmatch(" ".join(TEXT.sub(" \0\\1 ", value).split()))
    after = re.sub(r"\^ ?\{ ?([^{} ]*) ?\}|\^ ", r"^\1", match[2].replace(".", "")) if match else "?"
    if CHANGES.search(after):
        return text, []
    names = [UNITS.get(x, UNITS.get(x.removesuffix("s"), "")) for x in re.findall(r"[a-z]+|\^\S\w*|/", after.lower())]
    return label + equals + clean(match[1]), sorted(" ".join(names).split())


def judge_text(gold, answer):
    """True or False, or where two cleaned texts do not decide (gold, answer, ...) that math-verify has to find equal.

    Against a plain value no sum is right ("37+5+81+26"): a model in training would learn to repeat the question.
    """
    same = gold.split() == answer.split() or same_number(gold, answer)
    if same is not None or not gold or not answer:
        return bool(same and gold and answer)
    words = [TEXT.sub(r" \1", text).lower() for text in (gold, answer)]
    if all(re.fullmatch(r"(?=.*[a-z]{2})[a-z\s']*|\d+_\W*\w+\W*", text) for text in words):  # no letters multiplied
        gold, answer = (re.sub(rf"\b(?:{FILLERS})\b|[{{}}]", "", text).split() for text in words)
        return gold == answer != []
    shapes = [re.sub(r"^.*(?:=|\\in\b)|\\[a-z]+|(?<!\\)[{}]|[^(){}\\]", "", text) for text in (gold, answer)]
    (gold, unit), (answer, other) = parts(gold), parts(answer)
    if set(shapes) == {"()", "\\{\\}"} or unit and other and unit != other:  # tuple and set; m and cm
        return False
    plain = PLAIN.fullmatch(gold) and not UNFINISHED.search(gold)  # then each side without a name must be it: not 8=7
    sides = [side.strip() for side in answer.split("=") if re.fullmatch(r"(?=.*\S)(?:\\[a-z]+|[^a-z\\])*", side, re.I)]
    if plain and all(UNFINISHED.search(side) for side in sides or [answer]):
        return False
    same = same_number(gold, answer)
    return (gold, *dict.fromkeys([answer, *sides] if plain else [answer])) if same is None else same


class Grader:
    """Grades completions in worker processes, where a grading ends at its deadline or at the memory limit.

    The answer is the last box, or without one what the last line states; absurdly longer than the gold it is wrong.
    Workers start when first needed; memory_gb is for all of them together. `timeouts` counts gradings that were stopped
    after `deadline` seconds, `crashes` those that died otherwise: their answers are wrong.
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
        """End the workers, also those at work."""
        self.closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self.running.values()):
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()

    def grade(self, completion, gold):
        """Whether the completion's answer is the gold's."""
        return self.grade_all([(completion, gold)])[0]

    def grade_all(self, pairs):
        """Whether the answers are right, for (completion, gold) pairs, in order."""
        return [verdict["correct"] for verdict in self.judge_all(pairs)]

    def judge_all(self, pairs):
        """Verdicts on (completion, gold) pairs, in order; the same answer to the same gold is graded only once.

        A verdict: {"correct", "extracted": the answer or None, "boxed", "why": what decided}, as in the rows of --out.
        """
        verdicts, open_questions = [], {}
        for completion, gold in pairs:
            gold, box = clean(gold), last_boxed(completion)
            extracted = stated(completion) if box is None else box
            correct, why = False, "no answer" if extracted is None else "too long"
            if extracted is not None and len(extracted) <= 400 + 4 * len(gold):
                correct, why = judge_text(gold, clean(extracted)), "text"
                if isinstance(correct, tuple):
                    open_questions.setdefault(correct, []).append(len(verdicts))
            verdicts.append({"correct": correct, "extracted": extracted, "boxed": box is not None, "why": why})
        for reply, places in zip(self.threads.map(self.ask, open_questions), open_questions.values()):
            self.timeouts += reply == "time-out"
            self.crashes += reply == "crash"
            for place in places:
                why = "math-verify" if reply in ("right", "wrong") else reply
                verdicts[place].update(correct=reply == "right", why=why)
        return verdicts

    def readable(self, golds):
        """The set of those cleaned golds that can be graded: plain numbers, and what math-verify parses in time."""
        golds = sorted(golds - {""})
        parsed = self.threads.map(lambda gold: bool(NUMBER.fullmatch(gold)) or self.ask((gold,)) == "right", golds)
        return {gold for gold, good in zip(golds, parsed) if good}

    def ask(self, question):
        """A worker's word on (gold, answer, ...): right (all), wrong, time-out or crash; on (gold,): is it readable?"""
        for _ in range(2):  # a worker that something else killed is replaced, and the question asked once more
            worker = self.running.get(threading.get_ident())
            if worker is None or worker.poll() is not None:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
                pipes["env"] = {**os.environ, "PYTHONHASHSEED": "0"}  # some of sympy's verdicts hang on sets' order
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


def work(deadline, memory_gb):
    """A grader's worker: replies with a word to each JSON line [gold, answer, ...], and ends with its parent.

    This process only imports sympy. A fork of it does the work: at the deadline the kernel ends it by an alarm that
    nobody handles, and the next fork is there at once, where importing sympy again would take a second.
    """
    import logging

    from math_verify import LatexExtractionConfig, grader, parse, parser, verify

    config = [LatexExtractionConfig(False, 0, parser.NormalizationConfig(units=False, malformed_operators=True))]

    def read(text):  # math-verify's own time-outs are off (None): they would take our alarm
        text = re.sub(r"(?<![a-z\\])i(?![a-z])", "{I}", text)  # the root of -1
        trees = parse(f"\\boxed{{{text}}}", config, parsing_timeout=None)
        items = trees[0] if trees and isinstance(trees[0], (grader.FiniteSet, grader.Tuple)) else [None]
        if all(map(grader.is_equation, items)) and len({item.args[0] for item in items}) == len(items):  # y = 4, x = 3
            trees[0] = grader.Tuple(*sorted(items, key=str))
        elif "or" in text and all(map(grader.is_relation, items)):  # x < 1 or x > 3
            trees[0] = sum((item.as_set() for item in items), grader.FiniteSet())  # sympy's union
        return trees

    logging.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    read("1")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    for stream in (1, 2):  # what a library prints is no reply, and sympy's complaints interest nobody
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
        gold, *answers = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, deadline)
        how = {"numeric_precision": 40, "allow_set_relation_comp": True, "timeout_seconds": None}
        right = bool(expected := read(gold)) and all(verify(expected, read(answer), **how) for answer in answers)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(b"right\n" if right else b"wrong\n")


# ---- Evaluation ----

def evaluate(sampler, tokenizer, problems, grader, n=1, seed=0, temperature=0.0, batch_size=256):
    """Sample n completions per problem, grade them, and return their statistics (see summarize), on every rank.

    problems: rows of load_prompts. sampler(prompt_ids, n, seed, temperature) returns len(prompt_ids) * n completions,
    prompt by prompt, each with `ids` (the stop token included) and `finish` ("stop" or "length"). At a time
    batch_size completions are sampled and graded.
    """
    order = sorted(range(len(problems)), key=lambda i: -len(problems[i]["problem"]))  # memory runs out now or never
    mine, size, records = order[RANK::WORLD], max(1, batch_size // n), []
    with tqdm(total=len(mine), desc="evaluating", unit="problem", disable=RANK > 0 or None) as bar:
        for start in range(0, len(mine), size):
            batch = mine[start : start + size]
            prompts = [problems[i]["prompt_ids"] for i in batch]
            completions = sampler(prompts, n, (seed * WORLD + RANK) * len(problems) + start, temperature)
            texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
            indices = [i for i in batch for _ in range(n)]
            verdicts = grader.judge_all([(text, problems[i]["answer"]) for text, i in zip(texts, indices, strict=True)])
            for i, text, completion, verdict in zip(indices, texts, completions, verdicts):
                row = {"index": i, **{key: problems[i][key] for key in ("problem", "answer")}, "completion": text}
                records.append({**row, "length": len(completion.ids), "finish": completion.finish, **verdict})
            bar.set_postfix(accuracy=f"{statistics.fmean(row['correct'] for row in records):.3f}", refresh=False)
            bar.update(len(batch))
    shares = [records] * WORLD
    if WORLD > 1:
        import torch

        torch.distributed.all_gather_object(shares, records)
    return summarize(sorted((row for rows in shares for row in rows), key=lambda row: row["index"]))


def summarize(records):
    """Statistics of graded completions, whose `index` tells which of them answer the same problem.

    Keys: accuracy; standard_error (over problems; nan for a single one); pass_at_k (unbiased, {1: .., 2: .., 4: ..});
    length (mean tokens); truncated, no_box (shares); grader_timeouts; problems; n; means (per problem); records.
    """
    groups = {}
    for record in records:
        groups.setdefault(record["index"], []).append(record["correct"])
    means = [statistics.fmean(group) for group in groups.values()]
    n = len(records) // len(groups)
    return {
        "accuracy": statistics.fmean(means),
        "standard_error": statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else math.nan,
        "pass_at_k": {
            k: statistics.fmean(1 - math.comb(n - sum(group), k) / math.comb(n, k) for group in groups.values())
            for k in [2**power for power in range(n.bit_length())]
        },
        "length": statistics.fmean(record["length"] for record in records),
        "truncated": statistics.fmean(record["finish"] == "length" for record in records),
        "no_box": statistics.fmean(not record["boxed"] for record in records),
        "grader_timeouts": sum(record["why"] == "time-out" for record in records),
        "problems": len(groups),
        "n": n,
        "means": means,
        "records": records,
    }


Completion = namedtuple("Completion", "ids finish")  # token ids with the stop token; "stop" or "length"


def vllm_sampler(args, tokenizer, device):
    """A sampler for evaluate: vLLM's generate. Completion k of prompt i has the seed (seed + i)·n + k."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    engine = vllm.LLM(
        args.model, dtype="bfloat16" if device.type == "cuda" else "float32", seed=args.seed,
        max_model_len=args.max_prompt_tokens + args.max_new_tokens,
        distributed_executor_backend="external_launcher" if WORLD > 1 else None,
        gpu_memory_utilization=args.gpu_memory_utilization, enforce_eager=device.type == "cpu",
    )
    stops = stop_tokens(args.model, tokenizer)

    def sample(prompt_ids, n, seed, temperature):
        how = {"n": n, "temperature": temperature, "top_p": args.top_p, "max_tokens": args.max_new_tokens}
        how |= {"stop_token_ids": stops, "detokenize": False}
        params = [vllm.SamplingParams(seed=(seed + i) * n % 2**62, **how) for i in range(len(prompt_ids))]
        requests = engine.generate([{"prompt_token_ids": ids} for ids in prompt_ids], params, use_tqdm=False)
        return [Completion(list(output.token_ids), output.finish_reason) for row in requests for output in row.outputs]

    return sample


def hf_sampler(args, tokenizer, device):
    """A sampler for evaluate: transformers' generate, without the model's own settings for it (top-k, penalties)."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, use_safetensors=True).to(device).eval()
    stops = stop_tokens(args.model, tokenizer)
    model.generation_config = GenerationConfig()

    def sample(prompt_ids, n, seed, temperature):
        how = {"max_new_tokens": args.max_new_tokens, "eos_token_id": stops, "pad_token_id": max(0, stops[0])}
        if temperature > 0:
            how |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": args.top_p}
        rows = [ids for ids in prompt_ids for _ in range(n)]
        width = max(map(len, rows))  # padded on the left: all prompts end at one place
        input_ids = torch.tensor([[-1] * (width - len(ids)) + ids for ids in rows], device=device)  # [B, S]
        inputs = {"input_ids": input_ids.clamp(min=0), "attention_mask": (input_ids >= 0).long()}
        torch.manual_seed(seed)
        output = model.generate(**inputs, generation_config=GenerationConfig(**how))  # [B, S + T]
        completions = []
        for ids in output[:, width:].tolist():
            stop = next((t for t, token in enumerate(ids) if token in stops), None)
            completions.append(Completion(ids, "length") if stop is None else Completion(ids[: stop + 1], "stop"))
        return completions

    return sample


# ---- The command line ----

def parse_args():
    """The command line, checked as far as that needs neither data nor a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"benchmarks by name: arithmetic,\n{', '.join(HUB)}", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--model", help="folder in transformers' format, or hub id")
    parser.add_argument("--benchmarks", default="arithmetic", help="names, files or hub ids, separated by commas")
    parser.add_argument("--n", type=int, default=1, help="completions per problem (1)")
    parser.add_argument("--system_prompt", help="default: asks for step-by-step reasoning and a boxed answer")
    parser.add_argument("--limit", type=int, help="use only this many problems of each benchmark, the first ones")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="longer completions are cut off (1024)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (0 if n is 1, otherwise 0.6)")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus sampling, unless greedy (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument("--sampler", default="auto", choices=("auto", "vllm", "hf"), help="auto: vllm on a GPU if it is installed")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.9, help="vLLM's share of the GPU's memory (0.9)")
    parser.add_argument("--out", help="folder in which all completions are kept")
    parser.add_argument("--compare", nargs=2, metavar="OUT", help="compare two finished evaluations; needs no --model")
    args = parser.parse_args()
    if args.temperature is None:
        args.temperature = 0.0 if args.n == 1 else 0.6
    for name in ("n", "limit", "max_new_tokens"):
        check(getattr(args, name) is None or getattr(args, name) >= 1, f"--{name} must be at least 1")
    check((args.model is None) != (args.compare is None), "give either --model, or --compare OUT1 OUT2")
    check(0 <= args.temperature < math.inf, f"--temperature must be 0 or above, not {args.temperature}")
    check(args.n == 1 or args.temperature > 0, "--temperature must be above 0 when n is more than 1")
    check(0 < args.top_p <= 1, f"--top_p must be above 0 and at most 1, not {args.top_p}")
    check(0 <= args.seed < 2**32, "--seed must be from 0 to 2**32 - 1")
    check(args.sampler != "vllm" or find_spec("vllm"), "--sampler vllm needs its package: see requirements.txt")
    return args


def compare(first, second):
    """Print the difference in accuracy, second minus first, on each benchmark that both folders hold."""
    import numpy

    names = [{path.name for path in Path(folder).glob("*.jsonl")} for folder in (first, second)]
    common = sorted(names[0] & names[1])
    check(common, f"--compare: {first} and {second} have no finished benchmark in common")
    for name in common:
        both = [summarize(read_file(str(Path(folder, name)))) for folder in (first, second)]
        problems = [[row["problem"] for row in result["records"]][:: result["n"]] for result in both]
        check(problems[0] == problems[1], f"--compare: {name} has other problems in {second}")
        deltas = numpy.subtract(both[1]["means"], both[0]["means"])  # [problems]
        draws = numpy.random.default_rng(0).integers(len(deltas), size=(2000, len(deltas)))
        low, high = numpy.percentile(deltas[draws].mean(1), [2.5, 97.5])
        say(f"{name}: {both[0]['accuracy']:.3f} -> {both[1]['accuracy']:.3f}, difference {deltas.mean():+.3f}, "
            f"95% interval {low:+.3f} to {high:+.3f} ({len(deltas)} problems)")


def main():
    args = parse_args()
    if args.compare:
        return compare(*args.compare)
    tokenizer, args.max_prompt_tokens = load_tokenizer(args.model), math.inf
    most, args.max_new_tokens = args.max_new_tokens, 1  # enough for load_prompts
    benchmarks = {name: load_prompts(name, "test", tokenizer, args)[0] for name in args.benchmarks.split(",")}
    args.max_prompt_tokens = max(len(row["prompt_ids"]) for rows in benchmarks.values() for row in rows)
    args.max_new_tokens = min(most, context_of(args.model) - args.max_prompt_tokens)
    names = ("model", "n", "temperature", "top_p", "max_new_tokens", "seed", "system_prompt", "limit")
    settings = {name: getattr(args, name) for name in names}  # they are kept in every row
    folder, finished = Path(args.out or os.devnull), {}
    files = {name: folder / (re.sub(r"[^\w.-]+", "_", name.removesuffix(".jsonl")) + ".jsonl") for name in benchmarks}
    if args.out:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out: {error}")
    for name, file in files.items():
        if file.exists():
            finished[name] = read_file(str(file))
            check(settings.items() <= finished[name][0].items(), f"{file} has other settings: choose another --out")
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    vllm = args.sampler == "vllm" or args.sampler == "auto" and gpu and find_spec("vllm")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if WORLD > 1:  # the ranks meet only when a benchmark is done, however long that takes
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(days=7))
    say(", ".join(f"{name} {value}" for name, value in settings.items()))
    sampler = None
    if len(finished) < len(files):
        sampler = (vllm_sampler if vllm else hf_sampler)(args, tokenizer, device)
    say(f"{'benchmark':<24}  problems  avg@n          length  truncated  no box  time-outs  pass@k")
    with Grader() as grader:
        for name, file in files.items():
            if name in finished:
                result = summarize(finished[name])
            else:
                how = (args.n, args.seed, args.temperature, 2048 if vllm else 256)
                result = evaluate(sampler, tokenizer, benchmarks[name], grader, *how)
                if args.out and RANK == 0:
                    aside = file.with_suffix(".part")
                    aside.write_text("".join(json.dumps({**settings, **row}) + "\n" for row in result["records"]))
                    aside.rename(file)  # so a file of that name is whole
            row = ("{problems:>8}  {accuracy:.3f} ± {standard_error:.3f}  {length:>6.0f}  {truncated:>9.3f}  "
                   "{no_box:>6.3f}  {grader_timeouts:>9}  ").format(**result)
            say(f"{name:<24}  {row}" + "  ".join(f"{k}: {value:.3f}" for k, value in result["pass_at_k"].items()))
    if WORLD > 1 and not vllm:  # vLLM does it itself
        dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(float(sys.argv[2]), float(sys.argv[3]))
    else:
        signal.signal(signal.SIGINT, lambda *_: fail("interrupted", 130))
        main()
