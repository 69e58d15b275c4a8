"""Problems, prompts, grading and evaluation: the part that the four training scripts share.

    python eval.py --model tests/tiny                  the tiny model on generated sums
    python eval.py --model Qwen/Qwen2.5-7B --benchmarks aime24,math500 --n 8 --out runs/qwen
    torchrun --nproc_per_node=8 -- eval.py --model Qwen/Qwen2.5-7B --benchmarks aime24 --n 8
    python eval.py --compare runs/base runs/trained    the difference of two finished evaluations

torchrun needs the "--", otherwise it takes --n for its own. A benchmark is a name (arithmetic,
gsm8k, math, dapo, aime24, math500), a hub id "owner/name" (or "owner/name configuration"), or a
.jsonl or .parquet file with one problem and its answer per row. With --n 1 decoding is greedy;
otherwise completions are sampled with --temperature and --top_p. On a GPU vLLM generates them, if
it is installed. The table has one row per benchmark:

    avg@n      accuracy: the share of right completions per problem, averaged over problems,
               ± its standard error over problems
    length     mean number of tokens per completion
    truncated  share of completions that were cut off at --max_new_tokens
    pass@k     probability that at least one of k completions is right (unbiased estimate from n),
               for k = 1, 2, 4, .. n

--out keeps OUT/<benchmark>.jsonl with one row per completion (`why` says how it was decided: by its
text, or by math-verify as right, wrong, time-out or crash). After an interruption the same command
skips the benchmarks that are finished. --compare prints the difference in accuracy per benchmark,
paired problem by problem, with a 95% interval.
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
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm  # heavier packages are imported where they are used: the grader's workers start from this file

HUB = {  # short names of hub ids, with a configuration where there are several
    "gsm8k": "openai/gsm8k main",
    "math": "nlile/hendrycks-MATH-benchmark",
    "dapo": "open-r1/DAPO-Math-17k-Processed en",
    "aime24": "HuggingFaceH4/aime_2024",
    "math500": "HuggingFaceH4/MATH-500",
}
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()  # torchrun sets all; one alone means nothing
RANK, WORLD = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")] if LAUNCHED else [0, 1]
PROBLEMS = ("problem", "body question", "question", "prompt", "query", "instruction input", "instruction", "input")
ANSWERS = ("answer", "final_answer", "ground_truth", "reward_model", "target", "label", "solution")  # the first found
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN_PROMPT = "Question:\n{problem}\nAnswer:\nLet's think step by step.\n"


def say(text):
    """Print on rank 0, without tearing a progress bar."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


def fail(message, code=2):
    """End the program with one line on stderr. Exit code 2 means bad input."""
    if code != 2 or os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks see the same bad input
        tqdm.write(" ".join(["error:", *message.split()]), file=sys.stderr)
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
    """Rows with their "problem" and "answer", and their other columns; unusable ones are dropped and counted.

    name: "arithmetic" or one of HUB; a .jsonl or .parquet file; any other hub id "owner/name", or "owner/name
    configuration". split: "train" or "test", where the data set has both. Bad input ends the program with one line.
    """
    if name == "arithmetic":
        return arithmetic(split)
    is_file = name not in HUB and (os.path.exists(name) or name.endswith((".jsonl", ".parquet")))
    return usable(read_file(name) if is_file else read_hub(name, split), name)


def usable(rows, name):
    """Those rows that have a problem, and an answer that can be graded."""
    columns = dict.fromkeys(str(column).lower() for row in rows for column in row)  # a dict keeps the order
    asked, answered = (next((names.split() for names in sets if columns.keys() >= {*names.split()}), [])
                       for sets in (PROBLEMS, ANSWERS))
    check(asked and answered, f"{name} needs one of the columns {', '.join(PROBLEMS)}, and one of "
                              f"{', '.join(ANSWERS)}; it has {[*columns]}")
    unused = [column for column in columns if column not in (*asked, *answered)]
    if unused:
        say(f"{name}: columns that are not in the prompt: {', '.join(unused)}")
    kept = []
    for row in rows:
        cells = {str(column).lower(): value for column, value in row.items()}
        problem = "\n".join(filter(None, [read_cell(cells.get(column)) for column in asked]))
        cell = read_cell(cells.get(answered[0]))
        gold = cell.rpartition("####")[2].strip()  # GSM8K's "so she has 18 #### 18"
        if "\\boxed" in gold or answered == ["solution"] and "####" not in cell:
            gold = last_boxed(gold) or ""
        words = re.findall(r"(?<![\\a-z])[a-z]{2,}", gold, re.I)
        if problem and re.search(r"\w", clean(gold)) and gold.count("{") == gold.count("}") and len(words) <= 12:
            kept.append({**row, "problem": problem, "answer": gold})
    lost = (f"{name}: {len(rows) - len(kept)} of {len(rows)} rows dropped: each needs a problem, and an answer of at "
            "most a dozen words, a solution \\boxed{} or ####")
    check(kept, lost)
    if len(kept) < len(rows):
        say(lost)
    return kept


def read_cell(value):
    """The text of a cell: a string or number, a list of answers, a conversation, {"ground_truth": ...}."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("ground_truth", "content", "text") if key in value), None)
    if isinstance(value, list):
        turns = value and isinstance(value[-1], dict)
        if turns and value[-1].get("role") == "assistant":  # the turn that is to be written
            value = value[:-1]
        value = ("\n\n" if turns else ", ").join(map(read_cell, value))
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or value != value:  # not a number: a gap in a parquet file
        return ""
    return str(value).strip()


def read_file(path):
    """Rows of a .parquet file, of JSON lines or of a JSON array, as dicts."""
    try:
        if str(path).endswith(".parquet"):
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        text = Path(path).read_text("utf-8-sig").strip()
        if not text.startswith("["):  # JSON lines, some of them blank; an error then names the line or the next
            text = "[" + re.sub(r"\n(?!\s*\n)", ",\n", text) + "]"
        return [dict(row) for row in json.loads(text)]
    except Exception as error:  # of half a dozen kinds, and all mean that the file cannot be read
        fail(f"cannot read {path} as .parquet, JSON lines or a JSON array: {error}")


def read_hub(name, split):
    """Rows of a data set from the hub, or from its cache, as dicts.

    Without the split that was asked for, its last split is used to test, and its first one to train.
    """
    import datasets

    try:
        splits = datasets.load_dataset(*HUB.get(name, name).split())
    except Exception as error:  # of a dozen kinds, and all mean that the data cannot be had
        fail(f"cannot load the data set {name}, {type(error).__name__}: {str(error)[:300]}")
    if split not in splits:
        wanted, split = split, list(splits)[-1 if split == "test" else 0]
        say(f"{name} has no {wanted} split; its {split} split is used")
    return splits[split].to_list()


# ---- Models and prompts ----

def load_tokenizer(name):
    """The tokenizer of a model's folder or hub id. Anything else ends the program with one line."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        transformers.AutoConfig.from_pretrained(name)
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of a dozen kinds, and all mean that this is not a model
        fail(f"cannot load the model {name}, {type(error).__name__}: {str(error)[:300]}")


def stop_tokens(model, tokenizer):
    """Ids of the tokens that end a completion. model: folder or hub id. [-1], which never comes, if there are none.

    They are the end tokens of the model and of the tokenizer, and the token that the chat template puts behind an
    assistant's turn: in many models no configuration names it.
    """
    from jinja2.exceptions import TemplateError
    from transformers import GenerationConfig

    try:
        stops = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the model has no such file
        stops = text_config(model).eos_token_id
    stops = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "42"}]
        with contextlib.suppress(TemplateError):  # some have no assistant's turn
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
    user = {"role": "user", "content": problem}
    # A template without a system turn refuses it (Gemma) or leaves it out: then the user says it
    for turns in [{"role": "system", "content": system}, user], [{**user, "content": f"{system}\n\n{problem}"}]:
        with contextlib.suppress(TemplateError):
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            if problem.strip() in text and (system.strip() in text or user not in turns):
                return tokenizer.encode(text, add_special_tokens=False)
    fail("the chat template of this tokenizer leaves out the problem")


def text_config(model):
    """The configuration of a model's folder or hub id, of its text part if it has several."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config()


def context_of(model):
    """How many tokens a model can see at once, as far as a token's position does not depend on the text's length."""
    config = text_config(model)
    rope, most = getattr(config, "rope_parameters", None) or {}, getattr(config, "max_position_embeddings", math.inf)
    by_length = rope.get("rope_type") in ("longrope", "dynamic")
    return rope.get("original_max_position_embeddings", most) if by_length else most


def load_prompts(name, split, tokenizer, args):
    """Problems with their token ids as "prompt_ids", except those without a token and those that are too long.

    A prompt may have args.max_prompt_tokens, which are lowered to what args.model sees without args.max_new_tokens.
    """
    args.max_prompt_tokens = min(args.max_prompt_tokens, context_of(args.model) - args.max_new_tokens)
    problems, known = load_problems(name, split), text_config(args.model).vocab_size
    for row in tqdm(problems, "encoding prompts", disable=RANK > 0 or None, delay=1, leave=False):
        ids = row["prompt_ids"] = encode_prompt(tokenizer, row["problem"], args.system_prompt)
        check(max(ids, default=0) < known, f"{args.model} knows {known} tokens, and its tokenizer makes more")
    kept = [row for row in problems if 0 < len(row["prompt_ids"]) <= args.max_prompt_tokens]
    found = f"{name}, {split}: {len(kept)} of {len(problems)} prompts have 1 to {args.max_prompt_tokens} tokens"
    check(kept, f"{found}; a prompt and --max_new_tokens have to fit the model's context")
    say(found)
    return kept


# ---- Grading ----

SIGNS = str.maketrans({
    "×": r"\times ", "π": r"\pi ", "∞": r"\infty ", "²": "^2", "³": "^3", "°": r"\text{degrees}",
})
LAYOUT = (  # (pattern, replacement), one after the other: then what means the same is written the same
    ("[−–]", "-"),
    (r"√ ?(\d+|\w)", r"\\sqrt{\1}"),
    (r"\\\\", "\0"),  # the end of a matrix's row
    (r"\\! ?|\\[()\[\]$]|[$£€`“”\x22]|^\*\*|\*\*$|</?answer>", ""),
    (r"\.$", ""),
    (r"\\(left|right|displaystyle|mathbf|boldsymbol)(?![a-z])", ""),
    (r"(\\[,;: ]|\\quad|[~\s])+", " "),
    (r"\\(mathrm|mbox|text[a-z]*) ?\{ ?", r"\\text{"),
    (r",? ?(\\text\{|\b)(and|or)\b ?\}? ?", ", "),
    (r"(?<![\w.}^])(\d+) ?/ ?(\d+)(?![\d.])", r"\\frac{\1}{\2}"),  # 1/2
    (r"(?<![\w})\],]) | (?!\w)", ""),  # "x = 5" is "x=5", but "5 cm" stays
    (r"\^(\\circ|\{\\circ\})", r"\\text{degrees}"),
    (r"\\?%", r"\\text{percent}"),
    (r"\{,\}", ","),
    (r"\\[cdt]frac", r"\\frac"),
    (r"\\(frac|sqrt) ?(\d)", r"\\\1{\2}"),  # \frac12
    (r"(\\frac\{[^{}]*\}) ?(\w)", r"\1{\2}"),
    (r"\\text\{([^a-zA-Z{}]*|\d[^{}]*|[ei])\}", r"\1"),  # e from \mathrm{e}
    (r"^\{((?:[^{}]|\{[^{}]*\})*)\}$|^\(([^(),]*)\)$", r"\1\2"),  # {5} and (5)
    (r"^(-?)10\^", r"\g<1>1\\times 10^"),
    ("\0", r"\\\\"),
)
UNITS = ("m km cm mm g kg s h hr min in ft foot feet mi l lb ml mg mph N J W V K C percent cent day people square "
         "cubic per of a each").split()  # and all plurals
NO_UNITS = tuple("less times minus plus thirds halves quarters ths pairs dozens hundreds thousands "
                 "illions".split())  # endings
NUMBER = re.compile(
    r"([-+]?)(?:(\d*)\\frac\{(-?\d+)\}\{(\d+)\}|(\d+\.?\d*|\.\d+))"  # 1\frac{1}{2} or 12.5
    r"(?:(?:(?:\\times|\\cdot|\*) ?10\^\{?|[eE]\+?)(-?\d{1,4})\}?)?"  # \times 10^{-3} or e-3
)


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
    """The text after "answer is", "Answer:" or "####" in the last line; None without one, or if the line has a box."""
    line = text.strip()[-500:].rpartition("\n")[2].replace("**", "").removesuffix(" I hope it is correct.")
    match = re.fullmatch(r".*(?:(?:answer|total|value|result) is\b|answer:|####)[\s:]*(.+)", line, re.I)
    return match[1] if match and "\\boxed" not in line else None


def clean(text):
    r"""An answer in one layout: "$8\,178$" -> "8178", "\dfrac12" -> "\frac{1}{2}", "5 \mbox{ cm}" -> "5\text{cm}"."""
    text = text.translate(SIGNS).strip()
    for pattern, replacement in LAYOUT:
        text = re.sub(pattern, replacement, text).strip()
    text = (stated(text) or text).lstrip("}").strip()
    if re.match(r"[^\d,(\[{]*\d{1,3}([, ]\d{3})+(?![\d,])", text):
        text = re.sub(r"(?<=\d)[, ](?=\d{3})", "", text)  # 1,234
    return text


def measured(text):
    r"""A value and its unit, a known name or a plural: "5\text{meters}^2" -> ("5", ["meter", "^2"]).

    Single letters are factors, and other words change the value: "5 x" and "5 squared" have no unit and stay whole.
    """
    value, rest = re.fullmatch(r"(.*?)(\\text.*| [a-z][a-z/][^\\]*|)", text, re.I).groups()
    words = re.findall(r"\^-?\d|\w+|\S", re.sub(r"[{}.]", "", rest.replace(r"\text", " ").replace("/", " per ")))
    for place, word in enumerate(words):
        plural = word.isalpha() and len(word) > 3 and word.endswith("s") and not word.lower().endswith(NO_UNITS)
        if not (plural or word in UNITS or word[0] == "^" and place):
            return text, []
    return value, [word.lower().removesuffix("s") or word for word in words]


def quantity(text):
    r"""A number that is written out, and its unit: "1\frac{1}{2}\text{cm}" -> (Fraction(3, 2), ["cm"]); else None."""
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
    return (unit == other or not unit or not other) and abs(gold - answer) * 10**6 <= min(1, abs(gold))


def sides(text):
    """The values of an equation, without a name on its left: "x = 3+4 = 7" -> ["3+4", "7"], "7" -> ["7"]."""
    first, *rest = [side.strip() for side in re.split(r"=|\\approx\b|\\in\b", text) if side.strip()] or [""]
    name = r"(?!\\(n[oe]|\w+\([a-z]))(\\text\{[\w ]+\}|\\?[a-z]+)(_\w|_\{[^{}]*\})?'?(\([-\w, ]*\))?"  # x_1, f(n), Area
    name += r"|\([a-z\\]+, ?[a-z\\, ]+\)"  # (x, y)
    return rest if rest and re.fullmatch(name, first, re.I) else [first, *rest]


def words_of(text):
    r"""A text in small letters if it is words, a date, time or ratio, else "": "\text{East}" -> "east", "2k" -> ""."""
    words = " ".join(re.sub(r"\\text|[{}()]", " ", text).split())
    is_words = re.fullmatch(r"[a-z]|(?=.*[a-z]{2})[a-z' ]+|[\d:/.-]+", words, re.I)
    return (words if len(words) == 1 else words.lower()) if is_words else ""


def judge_text(gold, answer):
    """True or False by principles 2 to 4, for cleaned texts; None if formulas have to be compared."""
    tight = [re.sub(r"\{(\w)\}|(?<!\d) | (?!\d)", r"\1", text) for text in (gold, answer)]
    if tight[0] == tight[1]:
        return bool(gold)
    values, found = sides(gold), sides(answer)
    expected = quantity(values[0]) if len(values) == 1 else None
    if expected:  # the other sides may be sums, but not 2x, or 5 <
        numbers = [quantity(side) for side in found]
        sums = [side for side in found if re.fullmatch(r"(\\(frac|sqrt|cdot|times)|[^a-z\\<>,?!])*", side, re.I)]
        readable = any(numbers) and all(number or side in sums for number, side in zip(numbers, found))
        return readable and all(same_quantity(expected, number) for number in numbers if number)
    if words_of(gold):
        return words_of(gold) == words_of(answer)
    return None


def grade(pairs):
    r"""Verdicts on (completion, gold) pairs, in order, by six principles.

    1. The answer is the content of the last box, or what the last line states. A thought (<think>) is not read, and
       layout does not count.
    2. The same text is right. Where the gold is words, only these words are right, in upper or lower case.
    3. Where the gold is a number, only a number that is written out is right: an integer, decimal, fraction or mixed
       number, times a power of ten, equal to within a millionth. 37+5 is wrong for 42: a model in training would learn
       to repeat the question. Every side of an equation that is a number counts: 37+5=42 is right for 42, 8=7 is wrong
       for 7.
    4. A value may be followed by its unit, but not by a word that changes it. Two units have to be the same.
    5. math-verify compares everything else. But nothing may be left to add, multiply, integrate, or raise to a power,
       no function may stand in the answer that the gold does not have, a list has the same length and brackets, and an
       inequality is wrong for an interval.
    6. A grading that takes 3 seconds of computing or 0.5 GB of memory is stopped. It counts as wrong, and so does an
       absurdly long answer.

    A verdict: {"correct", "extracted": the answer or None, "why": what decided}, as in the rows of --out. The same
    answer to the same gold is compared by math-verify only once.
    """
    verdicts, questions = [], {}  # (gold, answer): the verdicts that wait for a worker
    for completion, gold in pairs:
        seen = re.split(r"<think\w*>", re.split(r"</think\w*>", completion)[-1])[0]  # without thoughts
        gold, box = clean(gold), last_boxed(seen)
        answer = stated(seen) if box is None else box
        verdict = {"correct": False, "extracted": answer, "why": "text"}
        verdicts.append(verdict)
        if answer is not None and len(answer) <= 400 + 4 * len(gold):
            answer = clean(answer)
            verdict["correct"] = judge_text(gold, answer)
            if verdict["correct"] is None:
                questions.setdefault((gold, answer), []).append(verdict)
    count = min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(questions) // 4)
    count = max(1, count)  # workers, each of which takes a second to start
    shares = [[*questions][k::count] for k in range(count)]
    with ThreadPoolExecutor(count) as pool:
        for replies in pool.map(ask, shares):
            for question, reply in replies.items():
                for verdict in questions[question]:
                    verdict.update(correct=reply == "right", why=reply)
    return verdicts


WORKER = [sys.executable, os.path.abspath(__file__), "--worker", "3"]  # seconds of computing per question


def ask(questions):
    """{(gold, answer): a worker's reply} for distinct pairs. A reply is right, wrong, time-out or crash.

    After a time-out or a crash another worker goes on, and rank 0 prints the pair.
    """
    replies = {}
    while left := questions[len(replies) :]:
        worker = subprocess.run(
            WORKER, input=json.dumps(left), stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy depends on the order of sets
        )
        if worker.returncode > 0:
            fail("the grader's worker failed: see above", 1)
        replies |= zip(left, worker.stdout.split())
        if len(replies) < len(questions):  # the worker has ended at this question
            gold, answer = stopped = questions[len(replies)]
            replies[stopped] = "time-out" if worker.returncode == -signal.SIGPROF else "crash"
            say(f"{replies[stopped]}, counted as wrong: {answer!r} for {gold!r}")
    return replies


def read(text):
    r"""math-verify's tree of a cleaned text, not evaluated, a list sorted. None if it differs from what is written.

    The parser adds adjacent numbers, and works out \gcd: then numbers are missing from the tree. It may also read
    \gamma as a function that has no value there.
    """
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify.grader import sort_key
    from sympy import FiniteSet, Number, Tuple, nan, zoo

    as_written = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    tree = latex2sympy(text, is_real=True, conversion_config=as_written)
    written = re.findall(r"\d*\.?\d+", re.sub(r"(?<!\d)_(?:\w|\{[^{}]*\})", "", text))
    kept = {abs(part) for number in tree.atoms(Number) for part in (number, *number.as_numer_denom())}
    if isinstance(tree, FiniteSet):  # sympy's comparison would forget how often an element occurs
        tree = Tuple(*sorted(tree._unsorted_args, key=sort_key))
    return tree if kept.issuperset(map(Number, written)) and not tree.has(nan, zoo) else None


def work_left(tree):
    """How much work a formula leaves: 2x + 3x can be shortened and (x+1)(x+2) expanded, but n(n-1) is finished."""
    from sympy import Expr, cancel, expand, preorder_traversal

    def size(form):  # operations, and the letters, roots of -1, ... that they combine
        return form.count_ops() + sum(part.is_Atom and not part.is_Rational for part in preorder_traversal(form))

    if not isinstance(tree, Expr):
        return sum(map(work_left, getattr(tree, "args", tree)))  # a matrix has no args
    left = 0
    for part in preorder_traversal(tree):
        left += part.is_Mul and sum(factor.is_Add for factor in part.args) > 1
        numbers = sum(term.is_Rational and (term != -1 or part.is_Add) for term in part.args)
        left += (part.is_Add or part.is_Mul) and numbers > 1  # 1-3, 2·3π
        if part.is_Pow:  # (x+1)^2, a root of 7+4√3
            raised = part.exp.is_Integer and part.exp > 1
            left += part.base.is_Add and bool(raised or part.base.is_number)
    done = tree.doit()
    single = done if done.is_Add else cancel(done)  # the fractions of a sum need not be brought together
    return left + max(0, size(tree) - min(map(size, (done, expand(done), single))))


def same(gold, answer):
    """Whether two cleaned texts mean the same, by principle 5. Every side of an equation that states a value has to."""
    (gold, unit), (answer, other) = measured(gold), measured(answer)
    values, found = sides(gold), sides(answer)
    if len(values) > 1 or len(found) > 1 and "," in answer:
        values, found = [gold], [answer]
    # The brackets and commas of each: (,] for (3,4]
    shapes = [re.sub(r"\\sqrt\[\w+\]|[^][(),]", "", side.replace(r"\pm", ",")) for side in values + found]
    shapes = [sorted(shape.replace("()", "").replace("()", "")) for shape in shapes]
    if any(shape != shapes[0] for shape in shapes) or unit and other and unit != other:
        return False
    return all(same_formula(read(values[0]), read(side)) for side in found)


def same_formula(gold, answer):
    """Whether math-verify finds two trees equal, and the answer is as far worked out and solved as the gold.

    The answer may not use a function, sum or integral that the gold lacks: the sine of 30 degrees is wrong for 1/2.
    """
    from math_verify import verify
    from sympy import Float, Function, Rel
    from sympy.concrete.expr_with_limits import ExprWithLimits

    if gold is None or answer is None or work_left(answer) > work_left(gold):
        return False
    known, used = ({type(part) for part in tree.atoms(Function, ExprWithLimits)} for tree in (gold, answer))
    if not used <= known or gold.has(Rel) and len(answer.atoms()) > len(gold.atoms()):
        return False
    if isinstance(answer, Float) and gold.is_number:  # a decimal may be rounded
        return abs((gold - answer).evalf(30, maxn=1000)) * 10**6 <= min(1, abs(gold.evalf()))
    return verify(gold, answer, numeric_precision=1000, timeout_seconds=None)


def work(deadline):
    """The grader's worker: reads (gold, answer) pairs, and prints its reply to each of them.

    After `deadline` seconds of computing the kernel ends it by a signal that nobody handles, whatever sympy is doing.
    """
    import logging

    questions = json.load(sys.stdin)
    logging.disable()
    same("x", "x")  # imports sympy before the clock runs
    sys.stdout = sys.stderr = None  # the messages of a library are not replies
    with contextlib.suppress(ValueError):  # macOS has no such limit, and a lower one stays
        resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
    for gold, answer in questions:
        signal.setitimer(signal.ITIMER_PROF, deadline)
        try:
            right = same(gold, answer)
        except Exception:  # it cannot be read, or sympy cannot compare it
            right = False
        print("right" if right else "wrong", file=sys.__stdout__, flush=True)


# ---- Evaluation ----

def evaluate(sampler, tokenizer, problems, n=1, seed=0, temperature=0.0, batch_size=256):
    """Sample n completions per problem, grade them, and return their statistics (see summarize), on every rank.

    problems: rows of load_prompts. sampler(prompt_ids, n, seed, temperature) returns len(prompt_ids) * n completions,
    prompt by prompt, each with `ids` (the stop token included) and `finish` ("stop" or "length"). At a time
    batch_size completions are sampled and graded.
    """
    mine, size, records = list(enumerate(problems))[RANK::WORLD], max(1, batch_size // n), []
    for start in tqdm(range(0, len(mine), size), "evaluating", disable=RANK > 0 or None):
        batch = mine[start : start + size]
        prompts = [row["prompt_ids"] for _, row in batch]
        completions = sampler(prompts, n, (seed * WORLD + RANK) * len(problems) + start, temperature)
        texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
        asked = [pair for pair in batch for _ in range(n)]
        verdicts = grade([(text, row["answer"]) for text, (_, row) in zip(texts, asked)])
        for (index, row), text, completion, verdict in zip(asked, texts, completions, verdicts):
            record = {"index": index, "problem": row["problem"], "answer": row["answer"], "completion": text}
            records.append({**record, "length": len(completion.ids), "finish": completion.finish, **verdict})
    shares = [records]
    if WORLD > 1:
        import torch

        shares = [None] * WORLD
        torch.distributed.all_gather_object(shares, records)
    return summarize(sorted((row for rows in shares for row in rows), key=lambda row: row["index"]))


def summarize(records):
    """Statistics of graded completions, whose `index` tells which of them answer the same problem.

    Keys: accuracy; standard_error (over problems; nan for a single one); pass_at_k (unbiased, {1: .., 2: .., 4: ..});
    length (mean tokens); truncated (share); problems; n; means (per problem); records.
    """
    groups = {}
    for record in records:
        groups.setdefault(record["index"], []).append(record["correct"])
    means, n = [statistics.fmean(group) for group in groups.values()], len(records) // len(groups)

    def pass_at(k):
        return statistics.fmean(1 - math.comb(n - sum(group), k) / math.comb(n, k) for group in groups.values())

    return {
        "accuracy": statistics.fmean(means),
        "standard_error": statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else math.nan,
        "pass_at_k": {2**power: pass_at(2**power) for power in range(n.bit_length())},
        "length": statistics.fmean(record["length"] for record in records),
        "truncated": statistics.fmean(record["finish"] == "length" for record in records),
        "problems": len(groups), "n": n, "means": means, "records": records,
    }


Completion = namedtuple("Completion", "ids finish")  # token ids with the stop token; "stop" or "length"


def vllm_sampler(args, tokenizer, device):
    """A sampler for evaluate: vLLM's generate. Completion k of prompt i has the seed (seed + i)·n + k."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    engine = vllm.LLM(
        args.model, dtype="bfloat16", max_model_len=args.max_prompt_tokens + args.max_new_tokens,
        distributed_executor_backend="external_launcher" if WORLD > 1 else None,
    )
    stops = stop_tokens(args.model, tokenizer)

    def sample(prompt_ids, n, seed, temperature):
        params = [
            vllm.SamplingParams(seed=(seed + i) * n, n=n, temperature=temperature, top_p=args.top_p,
                                max_tokens=args.max_new_tokens, stop_token_ids=stops, detokenize=False)
            for i in range(len(prompt_ids))
        ]
        requests = engine.generate([{"prompt_token_ids": ids} for ids in prompt_ids], params, use_tqdm=False)
        return [Completion(list(output.token_ids), output.finish_reason) for row in requests for output in row.outputs]

    return sample


def hf_sampler(args, tokenizer, device):
    """A sampler for evaluate: transformers' generate, without the model's own settings for it (top-k, penalties)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, use_safetensors=True).to(device).eval()
    model.generation_config = GenerationConfig()
    stops = stop_tokens(args.model, tokenizer)

    def sample(prompt_ids, n, seed, temperature):
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": args.top_p} if temperature else {}
        rows = [torch.tensor(ids, device=device) for ids in prompt_ids for _ in range(n)]
        ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")  # [B, S], the same end
        torch.manual_seed(seed)
        output = model.generate(
            ids.clamp(min=0), attention_mask=(ids >= 0).long(), max_new_tokens=args.max_new_tokens,
            eos_token_id=stops, pad_token_id=max(0, stops[0]), **how,
        )  # [B, S + T]
        completions = []
        for ids in output[:, ids.shape[1]:].tolist():
            end = next((t + 1 for t, token in enumerate(ids) if token in stops), None)
            completions.append(Completion(ids[:end], "stop" if end else "length"))
        return completions

    return sample


# ---- The command line ----

FLAGS = (  # name, type, default, help
    ("model", str, None, "folder or hub id"),
    ("benchmarks", str, "arithmetic", "names, files or hub ids, separated by commas"),
    ("n", int, 1, "completions per problem"),
    ("system_prompt", str, None, "not given: asks for reasoning and a boxed answer"),
    ("limit", int, None, "at most so many problems per benchmark"),
    ("max_new_tokens", int, 1024, "longer completions are cut off"),
    ("temperature", float, 0.6, "of the samples; with n 1 decoding is greedy"),
    ("top_p", float, 0.95, "nucleus sampling"),
    ("seed", int, 0, "of the sampling"),
    ("out", str, None, "folder for all completions"),
)


def parse_args():
    """The command line, checked as far as that needs neither data nor a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    for name, kind, default, text in FLAGS:
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--compare", nargs=2, metavar="OUT", help="compare two finished evaluations")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):
            fits = 0 < value < 2**32 or name == "seed" and value == 0
            check(fits, f"--{name} must be above 0 and below 2**32, not {value}")
    args.temperature = args.temperature if args.n > 1 else 0.0
    Path(args.out or ".").mkdir(parents=True, exist_ok=True)
    check((args.model is None) != (args.compare is None), "give either --model, or --compare OUT1 OUT2")
    return args


def compare(first, second):
    """Print the difference in accuracy, second minus first, on each benchmark of the first folder."""
    for file in sorted(Path(first).glob("*.jsonl")) or fail(f"{first} has no finished benchmark"):
        rows = [read_file(file), read_file(Path(second, file.name))]
        problems = [list(dict.fromkeys(row["problem"] for row in part)) for part in rows]
        check(problems[0] == problems[1], f"{file.name} has other problems in {second}")
        before, after = map(summarize, rows)
        deltas = [b - a for a, b in zip(before["means"], after["means"])]
        half = 1.96 * statistics.stdev(deltas) / len(deltas) ** 0.5 if len(deltas) > 1 else math.nan
        say(f"{file.stem}: {before['accuracy']:.3f} -> {after['accuracy']:.3f}, difference "
            f"{statistics.fmean(deltas):+.3f} ± {half:.3f} (95% interval, {len(deltas)} problems)")


def main():
    args = parse_args()
    if args.compare:
        return compare(*args.compare)
    tokenizer, args.max_prompt_tokens = load_tokenizer(args.model), math.inf
    most, args.max_new_tokens = args.max_new_tokens, 1  # enough for load_prompts
    benchmarks = {name: load_prompts(name, "test", tokenizer, args)[: args.limit] for name in args.benchmarks.split(",")}
    args.max_prompt_tokens = max(len(row["prompt_ids"]) for rows in benchmarks.values() for row in rows)
    args.max_new_tokens = min(most, context_of(args.model) - args.max_prompt_tokens)
    others = ("benchmarks", "out", "compare", "max_prompt_tokens")
    settings = {name: value for name, value in vars(args).items() if name not in others}  # they are kept in every row
    import torch
    import torch.distributed as dist

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    vllm = device.type == "cuda" and find_spec("vllm")
    if WORLD > 1:  # the ranks meet only when a benchmark is done, however long that takes
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    say(str(settings))
    say(f"{'benchmark':<24}  problems  avg@n          length  truncated  pass@k")
    folder, sampler = Path(args.out or os.devnull), None  # in the latter there are no files
    for name, problems in benchmarks.items():
        file = folder / (re.sub(r"[^\w.-]+", "_", name) + ".jsonl")
        if file.exists():
            records = read_file(file)
            check(settings.items() <= records[0].items(), f"{file} has other settings: choose another --out")
            result = summarize(records)
        else:
            sampler = sampler or (vllm_sampler if vllm else hf_sampler)(args, tokenizer, device)
            how = (args.n, args.seed, args.temperature, 2048 if vllm else 256)
            result = evaluate(sampler, tokenizer, problems, *how)
            if args.out and RANK == 0:
                aside = file.with_suffix(".part")
                aside.write_text("".join(json.dumps({**settings, **row}) + "\n" for row in result["records"]))
                aside.rename(file)  # so a file of that name is whole
        say("{:<24}  {problems:>8}  {accuracy:.3f} ± {standard_error:.3f}  {length:>6.0f}  {truncated:>9.3f}  "
            .format(name, **result)
            + "  ".join(f"{k}: {chance:.3f}" for k, chance in result["pass_at_k"].items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(float(sys.argv[2]))
    else:
        main()
