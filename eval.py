"""Problems, prompts, grading and evaluation: the one file that the four training scripts share.

    python eval.py --model tests/tiny --benchmarks arithmetic --limit 64 --show 3
    python eval.py --model runs/X/final --benchmarks gsm8k,my_problems.jsonl --n 8
    torchrun --nproc_per_node=8 -- eval.py --model Qwen/Qwen2.5-7B --benchmarks aime24,math500 --n 8

Samples n completions a problem, grades the last \\boxed{...} of each, and prints a table: accuracy with its standard
error over problems, mean length in tokens, share cut off at --max_new_tokens, share without a box, gradings stopped at
the grader's deadline (they count as wrong), and pass@k, the chance that one of k completions is right.
"""

import argparse
import json
import math
import os
import random
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

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
PROBLEM_COLUMNS = ("problem", "question", "prompt", "query", "instruction", "input")  # the first that is there
ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth", "reward_model", "target", "label", "solution")
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN_PROMPT = "Question:\n{problem}\nAnswer:\nLet's think step by step.\n"


def say(text):
    """Print on rank 0, without tearing a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(str(text), file=sys.stdout)
        sys.stdout.flush()


def fail(message, code=2):
    """End the program: one line on rank 0's stderr, exit code 2 for bad input."""
    if os.environ.get("RANK", "0") == "0":
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)


# ---- Problems ----

def arithmetic(split):
    """Generated sums: problems "37+5+81+26?" with answers "149", the same on every machine; split "train" or "test".

    Four numbers from 1 to 99; 256 sums for testing and 4096 for training, no sum in both.
    """
    generator = random.Random(0)
    sums = {}  # a dict keeps the order and drops repetitions
    while len(sums) < 256 + 4096:
        sums[tuple(generator.randint(1, 99) for _ in range(4))] = None
    chosen = list(sums)[:256] if split == "test" else list(sums)[256:]
    return [{"problem": "+".join(map(str, terms)) + "?", "answer": str(sum(terms))} for terms in chosen]


def load_problems(name_or_path, split="train"):
    """Problems as a list of {"problem", "answer"}, the answers cleaned; unusable rows are dropped and counted.

    name_or_path: "arithmetic" or a name in HUB; a .jsonl, .json or .parquet file; any other hub id "owner/name".
    split: "train" or "test", where the data set has both. Bad input ends the program with one line (see fail).
    """
    if name_or_path == "arithmetic":
        return arithmetic(split)
    is_file = os.path.exists(name_or_path) or name_or_path.endswith((".jsonl", ".json", ".parquet"))
    if name_or_path in HUB or (not is_file and re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path)):
        rows = read_hub(name_or_path, split)
    elif is_file:
        rows = read_file(name_or_path)
    else:
        fail(f"unknown data set {name_or_path!r}: known are arithmetic, {', '.join(HUB)}; or give a .jsonl, .json or "
             ".parquet file, or a hub id owner/name")
    columns = {str(column).lower(): column for row in rows for column in row}
    problem_column = next((columns[name] for name in PROBLEM_COLUMNS if name in columns), None)
    answer_column = next((columns[name] for name in ANSWER_COLUMNS if name in columns), None)
    if problem_column is None or answer_column is None:
        found = f"has the columns {', '.join(columns.values())}" if columns else "is empty"
        fail(f"{name_or_path} {found}: it needs a problem (one of {', '.join(PROBLEM_COLUMNS)}) "
             f"and an answer (one of {', '.join(ANSWER_COLUMNS)})")
    problems = []
    for row in rows:
        answer = read_cell(row.get(answer_column))
        if "####" in answer:  # GSM8K's "so she has 18 #### 18"
            answer = answer.rpartition("####")[2]
        elif "\\boxed" in answer or answer_column.lower() == "solution":
            answer = last_boxed(answer) or ""
        problems.append({"problem": read_cell(row.get(problem_column)), "answer": clean(answer)})
    with Grader() as grader:
        readable = grader.readable({row["answer"] for row in problems})
    kept = [row for row in problems if row["problem"] and row["answer"] in readable]
    if not kept:
        fail(f"{name_or_path}: no row of {len(rows)} has a problem ({problem_column}) and an answer ({answer_column}) "
             f"the grader can read; the first answer is {problems[0]['answer'][:80]!r}")
    if len(kept) < len(rows):
        say(f"{name_or_path}: {len(rows) - len(kept)} of {len(rows)} rows dropped: no problem, or an unusable answer")
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
    """Rows of a .parquet file, a .json list or JSON lines, as dicts."""
    if not os.path.isfile(path):
        fail(f"{path} is a folder: give a file in it" if os.path.isdir(path) else f"there is no file {path}")
    if path.endswith(".parquet"):
        from pyarrow import ArrowException, parquet

        try:
            return parquet.read_table(path).to_pylist()
        except (ArrowException, OSError) as error:
            fail(f"{path} cannot be read as parquet: {error}")
    with open(path, "rb") as file:
        text = file.read()
    rows = []
    for number, line in enumerate([text] if text.lstrip()[:1] == b"[" else text.splitlines(), start=1):
        try:
            found = json.loads(line) if line.strip() else []
        except (ValueError, RecursionError) as error:
            fail(f"{path}, line {number} is not JSON: {error}")
        found = found if isinstance(found, list) else [found]
        if not all(isinstance(row, dict) for row in found):
            fail(f'{path}, line {number} is no row such as {{"problem": "1+1?", "answer": "2"}}')
        rows += found
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
    """Whether there is no hub; then its clients, which would retry for a minute, are told to use their cache."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not {"https_proxy", "all_proxy"} & {name.lower() for name in os.environ}:
        host, _, port = constants.ENDPOINT.rpartition("//")[2].partition("/")[0].partition(":")
        try:
            socket.create_connection((host, int(port or 443)), timeout=5).close()
        except OSError as error:
            say(f"the hub cannot be reached ({error}): only what is in its cache can be used")
            constants.HF_HUB_OFFLINE = True
    return constants.HF_HUB_OFFLINE


# ---- Prompts ----

def encode_prompt(tokenizer, problem):
    """Token ids of the prompt: the tokenizer's chat template if it has one, else a plain question and answer."""
    if not tokenizer.chat_template:
        return tokenizer.encode(PLAIN_PROMPT.format(problem=problem))
    from jinja2.exceptions import TemplateError

    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem}]
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except TemplateError:  # a template without system role (Gemma): the user says it
        return tokenizer.apply_chat_template([{"role": "user", "content": f"{SYSTEM}\n\n{problem}"}], **options)


# ---- Grading ----

SYMBOLS = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ",
                         "≤": r"\le ", "≥": r"\ge ", "°": r"^\circ ", "∪": r"\cup ", "\u00a0": " ", "\u202f": " "})
NUMBER = re.compile(r"([-+]?(?:\d{1,500}(?:\.\d{0,500})?|\.\d{1,500}))"
                    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([-+]?\d{1,4})\s*\}|(-?\d)))?\s*(\\?%)?")
TEXT = re.compile(r"\\(?:text|textbf|mbox|mathrm)\s*\{([^{}]*)\}")
NUMBER_IN_WORDS = re.compile(r"\s*(?:[a-z]{2,}[,:]?\s+)*([-+]?[\d.,]*\d(?:\s?\\?%)?)(?:\s+[a-z]{2,})*[\s.]*", re.I)
WORDS_THAT_COUNT = re.compile(r"hundred|thousand|llion|dozen|half|minus|negative|\b(pi|sqrt|ln|log|exp|sin|cos|tan)\b")
UNFINISHED = re.compile(r"\d\s*(?:[-+]|(?:\*|\\times|\\cdot)(?!\s*10\s*\^))\s*\d")


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


def clean(text):
    """An answer in a form that math-verify reads: "$8\\,178.$" -> "8178", "4.5e33" -> "4.5 \\times 10^{33}"."""
    text = text.translate(SYMBOLS)
    text = re.sub(r"\\?\$|(?<!\\)\\[()\[\]]", "", text).strip()  # the marks of maths mode, and dollars
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"(?<=\d)(?:,?\\[,!;: ]\s*|\{,\}\s*|~)(?=\d{3}(?!\d))", "", text)  # 8\,178  8{,}178  8,\!178
    if re.fullmatch(r"[-+]?\d{1,3}(?:[, ]\d{3})+(?:\.\d*)?\D*", text):
        text = re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", text)  # 1,250,000 people
    text = re.sub(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]\+?(-?\d+)(?![\w.])", r"\1 \\times 10^{\2}", text)
    return re.sub(r"(?<!\.)\.$", "", text).strip()


def squash(text):
    """A cleaned answer to compare letter by letter: no spaces, no \\left and \\right; words without \\text and case."""
    text = re.sub(r"\s+|\\(?:left|right)(?![a-z])", "", text)
    word = TEXT.sub(r"\1", text)
    return word.casefold() if re.fullmatch(r"[A-Za-z]{3,}", word) else text


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


def judge_text(gold, answer):
    """True or False where two cleaned texts decide, None where math-verify has to.

    Against a number, words around a number do no harm ("18 eggs"), and a sum or product not carried out is wrong:
    math-verify takes "37+5+81+26" for 149, and a model in training would learn to repeat the question.
    """
    if not gold or not answer or squash(gold) == squash(answer):
        return bool(gold and answer)
    if NUMBER.fullmatch(gold):
        words = TEXT.sub(r" \1 ", answer)
        inside = NUMBER_IN_WORDS.fullmatch(words)
        if inside and not WORDS_THAT_COUNT.search(words.lower()):
            answer = clean(inside[1])
        if UNFINISHED.search(answer.rpartition("=")[2]):
            return False
        return same_number(gold, answer)
    bases = [re.fullmatch(r"(\d+)_\{?(\d+)\}?", text) for text in (gold, answer)]  # math-verify ignores the base
    return bases[0].groups() == bases[1].groups() if all(bases) else None


class Grader:
    """Grades completions in worker processes, which are killed and replaced at the deadline or the memory limit.

    The answer is what stands in the last \\boxed{...}. A completion without a box is wrong, in training and evaluation,
    since the prompt asks for one; so is an answer absurdly longer than the gold. Workers start when first needed.
    `timeouts` counts gradings killed after `deadline` seconds, `crashes` those whose worker died otherwise.
    """

    def __init__(self, workers=None, deadline=3.0, memory_gb=2.0):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = workers or max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.deadline = deadline
        self.command = [sys.executable, os.path.abspath(__file__), "--worker", str(deadline), str(memory_gb)]
        self.timeouts = self.crashes = 0
        self.threads = ThreadPoolExecutor(self.workers)
        self.lock = threading.Lock()
        self.own = threading.local()  # each thread has a worker of its own
        self.running = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the workers, also those at work."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self.running):
            self.stop(worker)

    def grade(self, completion, gold):
        """Whether the completion's boxed answer is the gold's."""
        return self.grade_all([(completion, gold)])[0]

    def grade_all(self, pairs):
        """Verdicts on (completion, gold) pairs, in order; the same answer to the same gold is graded only once."""
        verdicts, open_questions = [], {}
        for place, (completion, gold) in enumerate(pairs):
            gold, answer = clean(gold), last_boxed(completion)
            if answer is None or len(answer) > 400 + 4 * len(gold):
                verdicts.append(False)
                continue
            verdicts.append(judge_text(gold, clean(answer)))
            if verdicts[-1] is None:
                open_questions.setdefault((gold, clean(answer)), []).append(place)
        for verdict, places in zip(self.threads.map(self.ask, open_questions), open_questions.values()):
            for place in places:
                verdicts[place] = verdict
        return verdicts

    def readable(self, golds):
        """The set of those cleaned golds that can be graded: plain numbers, and what math-verify parses in time."""
        golds = sorted(golds - {""})
        parsed = self.threads.map(lambda gold: bool(NUMBER.fullmatch(gold)) or self.ask((gold, None)), golds)
        return {gold for gold, good in zip(golds, parsed) if good}

    def ask(self, question):
        """A worker's verdict on (gold, answer), or with answer None whether it can read the gold; False if it died."""
        worker = getattr(self.own, "worker", None)
        if worker is None or worker.poll() is not None:
            worker = self.own.worker = self.start()
        try:
            worker.stdin.write(json.dumps(question).encode() + b"\n")
            worker.stdin.flush()
            reply = self.read(worker, self.deadline)
        except BrokenPipeError:
            reply = b""
        if reply not in (b"1\n", b"0\n"):
            self.stop(worker)
            with self.lock:
                self.timeouts += reply is None
                self.crashes += reply is not None
        return reply == b"1\n"

    def start(self):
        """A new worker, ready: the second that it takes to import sympy is on nobody's deadline."""
        worker = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.running.add(worker)
        if self.read(worker, 120) != b"ready\n":
            self.stop(worker)
            raise RuntimeError("the grader's worker did not start: is math-verify installed? It said what stands above")
        return worker

    def stop(self, worker):
        worker.kill()
        worker.wait()
        self.running.discard(worker)

    @staticmethod
    def read(worker, seconds):
        """The worker's next line, b"" if it died, None if the time is over."""
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            return worker.stdout.readline() if selector.select(seconds) else None


def work(deadline, memory_gb):
    """A grader's worker: reads a JSON line [gold, answer], replies 1 or 0, and ends with its parent."""
    import logging
    import resource

    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no reply
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if sys.platform != "darwin":  # macOS does not know this limit
        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    logging.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def read(text):  # math-verify's own time-outs are off (None): they would take SIGALRM away from us
        return parse(f"\\boxed{{{text}}}", config, parsing_timeout=None)

    read("1")
    os.dup2(1, 2)  # from here on sympy's complaints interest nobody
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, deadline + 5)  # ends us if our parent died and cannot kill us
        gold, answer = json.loads(line)
        expected = read(gold)
        right = bool(expected) and (
            answer is None or verify(expected, read(answer), numeric_precision=40, timeout_seconds=None)
        )
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(b"1\n" if right else b"0\n")


# ---- Evaluation ----

def evaluate(sampler, tokenizer, problems, grader, n=1, seed=0, temperature=0.0, progress=True):
    """Sample n completions a problem, grade them, and return statistics, the same on every rank of a process group.

    sampler(prompt_ids, n, seed, temperature) returns len(prompt_ids) * n completions, those of a prompt together, each
    with `ids` (stop token kept) and `finish` ("stop" or "length"). Each rank takes its share of the problems.
    Keys: accuracy; standard_error (over problems; nan when there is one); pass_at_k (unbiased, {1: .., 2: .., 4: ..});
    length (mean tokens); truncated and no_box (shares); grader_timeouts; problems; n; records (a dict a completion).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed and not (distributed.is_available() and distributed.is_initialized()):
        distributed = None
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed else (0, 1)
    prompts = {i: encode_prompt(tokenizer, problems[i]["problem"]) for i in range(rank, len(problems), world)}
    order = sorted(prompts, key=lambda i: -len(prompts[i]))  # longest first: if memory runs out, then at once
    chunk_size = max(1, 256 // n)
    timeouts = grader.timeouts
    records = []
    with tqdm(total=len(order), desc="evaluating", unit="problem", disable=not progress or rank > 0) as bar:
        for chunk in (order[start:start + chunk_size] for start in range(0, len(order), chunk_size)):
            completions = sampler([prompts[i] for i in chunk], n, seed + chunk[0], temperature)
            owners = [i for i in chunk for _ in range(n)]
            texts = [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
            verdicts = grader.grade_all([(text, problems[i]["answer"]) for text, i in zip(texts, owners)])
            for i, completion, text, verdict in zip(owners, completions, texts, verdicts, strict=True):
                records.append({"index": i, **problems[i], "completion": text, "extracted": last_boxed(text),
                                "correct": verdict, "length": len(completion.ids), "finish": completion.finish})
            bar.set_postfix(accuracy=f"{statistics.fmean(record['correct'] for record in records):.3f}", refresh=False)
            bar.update(len(chunk))
    shares = [(records, grader.timeouts - timeouts)]
    if distributed:
        shares *= world
        distributed.all_gather_object(shares, shares[0])
    records = sorted((record for share in shares for record in share[0]), key=lambda record: record["index"])
    right = [sum(record["correct"] for record in records[i:i + n]) for i in range(0, len(records), n)]
    ks = [2**power for power in range(n.bit_length())]
    return {
        "accuracy": statistics.fmean(right) / n,
        "standard_error": statistics.stdev(right) / n / len(right) ** 0.5 if len(right) > 1 else math.nan,
        "pass_at_k": {k: statistics.fmean(1 - math.comb(n - c, k) / math.comb(n, k) for c in right) for k in ks},
        "length": statistics.fmean(record["length"] for record in records),
        "truncated": statistics.fmean(record["finish"] == "length" for record in records),
        "no_box": statistics.fmean(record["extracted"] is None for record in records),
        "grader_timeouts": sum(share[1] for share in shares),
        "problems": len(right),
        "n": n,
        "records": records,
    }


Completion = namedtuple("Completion", "ids finish")


def transformers_sampler(model, tokenizer, max_new_tokens, batch_size):
    """A sampler for evaluate: transformers' generate on batches of similar length, padded on the left."""
    import torch
    from transformers import GenerationConfig

    stops = model.generation_config.eos_token_id
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    padding = next((i for i in (tokenizer.pad_token_id, *stops) if i is not None), 0)
    model.generation_config = GenerationConfig()  # else the model's own top_k, top_p and penalties leak in
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    def sample(prompt_ids, n, seed, temperature):
        torch.manual_seed(seed)
        prompts = [ids for ids in prompt_ids for _ in range(n)]  # evaluate sends them sorted by length
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        completions = []
        for batch in (prompts[start:start + batch_size] for start in range(0, len(prompts), batch_size)):
            width = max(map(len, batch))
            rows = [[padding] * (width - len(ids)) + ids for ids in batch]
            masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
            config = GenerationConfig(max_new_tokens=max(1, min(max_new_tokens, context - width)),
                                      eos_token_id=sorted(stops) or None, pad_token_id=padding, **how)
            tokens = model.generate(torch.tensor(rows, device=model.device), generation_config=config,
                                    attention_mask=torch.tensor(masks, device=model.device))  # [batch, width + new]
            for ids in tokens[:, width:].tolist():
                end = next((place for place, token in enumerate(ids, start=1) if token in stops), None)
                completions.append(Completion(ids[:end], "stop" if end else "length"))
        return completions

    return sample


def load_tokenizer(name):
    """The tokenizer of a model's folder or hub id; what is no model ends the program with one line, at once."""
    is_folder = os.path.isdir(name)
    if not is_folder and not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name):
        fail(f"there is no model folder {name}")
    files = os.listdir(name) if is_folder else []
    if is_folder and not ("config.json" in files and any(file.endswith(".safetensors") for file in files)):
        fail(f"{name} is no model folder: it needs config.json, weights in .safetensors and a tokenizer")
    if not is_folder:
        use_cache_without_network()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if not tokenizer.encode("1"):  # what transformers makes of a folder without a tokenizer
            raise ValueError("no tokenizer")
    except Exception as error:  # a dozen kinds, and all mean that this is no model
        fail(f"cannot load {name} ({type(error).__name__}: {str(error)[:200]}): give a folder with a model and its "
             "tokenizer, or a hub id, or set HF_HOME to a cache that holds it")
    return tokenizer


def load_model(name):
    """The tokenizer and the model of a folder or hub id, for evaluation: bf16 on a GPU, fp32 without."""
    tokenizer = load_tokenizer(name)
    import torch
    import transformers

    device, kind = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=kind, use_safetensors=True)
    return tokenizer, model.to(device).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"data sets by name: arithmetic, {', '.join(HUB)}", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--model", required=True, help="a folder in transformers' format, or a hub id")
    parser.add_argument("--benchmarks", default="arithmetic", help="names, files or hub ids, with commas between")
    parser.add_argument("--split", default="test", choices=("train", "test"), help="where a data set has both (test)")
    parser.add_argument("--n", type=int, default=1, help="completions a problem (1)")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each benchmark")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="a completion is cut off here (1024)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (0 if n is 1, else 0.6)")
    parser.add_argument("--batch_size", type=int, default=32, help="completions sampled at a time (32)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and settings give the same completions (0)")
    parser.add_argument("--show", type=int, default=0, help="print so many completions of each benchmark (0)")
    args = parser.parse_args()
    for name in ("n", "limit", "max_new_tokens", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.temperature is None:
        args.temperature = 0.0 if args.n == 1 else 0.6
    if not 0 <= args.temperature < math.inf or (args.n > 1 and args.temperature == 0):
        fail(f"--temperature must be at least 0, and above 0 when n is more than 1, not {args.temperature}")
    benchmarks = {name: load_problems(name, args.split)[:args.limit] for name in args.benchmarks.split(",")}
    import torch

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    tokenizer, model = load_model(args.model)
    say(f"{args.model} on {', '.join(benchmarks)}: n {args.n}, temperature {args.temperature}, seed {args.seed}")
    sampler = transformers_sampler(model, tokenizer, args.max_new_tokens, args.batch_size)
    table = []
    with Grader() as grader, torch.inference_mode():
        for name, problems in benchmarks.items():
            start = time.time()
            result = evaluate(sampler, tokenizer, problems, grader, args.n, args.seed, args.temperature)
            for record in result["records"][:args.show]:
                say(f"\n{record['problem']}\n--> {record['completion']}\n"
                    f"{'right' if record['correct'] else 'wrong'}: {record['extracted']}, gold {record['answer']}\n")
            passes = "  ".join(f"{k}: {value:.3f}" for k, value in result["pass_at_k"].items())
            accuracy = f"{result['accuracy']:.3f} ± {result['standard_error']:.3f}"
            table.append(f"{os.path.basename(name):<16}{result['problems']:>9}{accuracy:>16}{result['length']:>8.0f}"
                         f"{result['truncated']:>11.3f}{result['no_box']:>8.3f}{result['grader_timeouts']:>10}"
                         f"{time.time() - start:>9.0f}   {passes}")
    say("benchmark        problems        accuracy  length  truncated  no box time-outs  seconds   pass@k")
    say("\n".join(table))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(float(sys.argv[2]), float(sys.argv[3]))
    else:
        try:
            main()
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
