"""What the scripts cost, measured side by side in one run: one command, one table.

    python tests/measure/benchmark.py                       all parts
    python tests/measure/benchmark.py --only b,d --quick    some of them, small: to see that they run, not to quote
    python tests/measure/benchmark.py --only a --trl ENV/bin/python
                                                    against TRL; ENV: pip install -r requirements.txt trl==1.16.0

  a  a training step of grpo.py against TRL's GRPOTrainer, equal loss and gradient; a whole step by phase
  b  a training step of each variant against grpo.py's
  c  log-probabilities in chunks (Policy) against full logits, vocabulary 151,936: time and peak memory
  d  eligibility traces (trace) against a T × T matrix: time and peak memory
  e  process sets (process_set_sizes) against a trie in Python
  f  a step's time against group size, completion length, prompts and ranks, with the exponents fitted
  g  on a GPU: c, and the learner's tokens per second

What is compared takes turns, in alternating order. Shown are median and quartiles; a ratio is taken in each turn, then
its median and quartiles. Every compared pair is first shown to compute the same thing. On a machine that others use,
--clock cpu counts the seconds that the process itself was on a core; OMP_NUM_THREADS=1 then leaves out idle spinning.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "tiny"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

from eval import Grader, encode_prompt, fail, load_problems, load_tokenizer, say  # noqa: E402

SCRIPTS = ("grpo", "grpo_lambda_traces", "lambda_grpo_learnable", "lambda_grpo_prm")
TRL = "1.16.0"
VOCABULARY = 151_936  # Qwen2.5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
now = CLOCKS[os.environ.get("GRPO_BENCHMARK_CLOCK", "wall")]  # an environment variable reaches the workers as well


# The table ------------------------------------------------------------------------------------------------------------


class Table:
    """Prints a row as soon as it is known, and keeps it: (part, what, median, quartiles, expected)."""

    def __init__(self, quick):
        self.quick, self.rows = quick, []
        say(f"{'part':4}  {'what':70} {'median':>12}  {'quartiles':>17}  expected")

    def add(self, part, what, values, unit="", bound=None):
        """values: a number, a list of measurements, or a text; bound: ("≤", 0.5) is judged by the median."""
        median, quartiles, expected = values, "", ""
        if not isinstance(values, str):
            values = values if isinstance(values, list) else [values]
            median = statistics.median(values)
            if len(values) > 1:
                low, _, high = statistics.quantiles(values, n=4, method="inclusive")
                quartiles = f"{low:.3g} to {high:.3g}"
            if bound:
                holds = median <= bound[1] if bound[0] == "≤" else median >= bound[1]
                verdict = "not judged" if self.quick else "holds" if holds else "DOES NOT HOLD"
                expected = f"{bound[0]} {bound[1]}: {verdict}"
            median = f"{median:.3g} {unit}".strip()
        self.rows.append((part, what, median, quartiles, expected))
        say(f"{part:4}  {what:70} {median:>12}  {quartiles:>17}  {expected}".rstrip())


# Measuring ------------------------------------------------------------------------------------------------------------


def timed(function, *arguments):
    """Seconds of one call, a GPU's work included."""
    start = now()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - start


def interleaved(functions, repetitions, title, warm_up=1):
    """{name: [what its function returns, once a repetition]}: all in turn, every other time backwards."""
    results = {name: [] for name in functions}
    for repetition in tqdm(range(repetitions + warm_up), title, leave=False, delay=1):
        for name in list(functions)[:: 1 if repetition % 2 else -1]:
            result = functions[name]()
            if repetition >= warm_up:
                results[name].append(result)
    return results


def ratios(results, above, below):
    """above / below, turn by turn."""
    return [a / b for a, b in zip(results[above], results[below])]


def linux_memory(what):
    """A line of Linux's account of this process's memory, in GB."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) / 1e6


def with_peak(make, arguments, device):
    """Of what make(*arguments, device) returns: the result, the GB its first call held at most over what was there
    before, and the seconds of its second."""
    run = make(*arguments, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = run()
        memory = (torch.cuda.max_memory_allocated() - before) / 1e9
    else:
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        before = linux_memory("VmRSS")
        value = run()
        memory = linux_memory("VmHWM") - before
    return value, memory, timed(run)


class Worker:
    """A process that is driven over pipes: a line of JSON in, a line of JSON out."""

    def __init__(self, command, **environment):
        self.errors = tempfile.TemporaryFile("w+")
        environment = {**os.environ, **environment}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        self.process = subprocess.Popen([str(word) for word in command], env=environment, **pipes)

    def ask(self, **question):
        """Its answer. A dead worker raises, with the last line it wrote."""
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.errors.seek(0)
            last = [line for line in self.errors.read().splitlines() if line.strip()][-1:]
            raise RuntimeError(f"{self.process.args[0]}: {last[0].strip() if last else 'died'}")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def questions():
    """What a worker is asked, one by one; its answers go through `reply`. Other prints cannot get among them."""
    global answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        yield json.loads(line)


def reply(**answer):
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


# Batches and steps ----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    prompts: list  # [P] of token ids
    completions: list  # [P·G] of token ids
    rewards: list  # [P·G]

    def named(self):
        tokens, prompts = [len(ids) for ids in self.completions], len(self.prompts)
        return f"{prompts} × {len(tokens) // prompts}, {statistics.mean(tokens):.0f} tokens (≤ {max(tokens)})"


def made_up(prompts, group_size, lengths, seed=0):
    """A batch of random tokens of the tiny model: lengths is a number, or a function of a random generator."""
    generator = random.Random(seed)
    draw = lengths if callable(lengths) else lambda _: lengths
    word = lambda length: [generator.randint(1, 16) for _ in range(length)]  # noqa: E731
    completions = [word(draw(generator) - 1) + [0] for _ in range(prompts * group_size)]
    rewards = [float(generator.random() < 0.5) for _ in completions]
    return Batch([word(12) for _ in range(prompts)], completions, rewards)


def alone(device="cpu"):
    """A process group of this process alone (once)."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def training_step(name, batch, share=slice(None), device="cpu", gradients=None, **changes):
    """(function of no arguments that makes a training step of a script, its policy); the weights stay as they are.

    gradients: a dict that each step fills with the model's gradients by name, or None.
    """
    script = importlib.import_module(name)
    group_size = len(batch.completions) // len(batch.prompts)
    options = {**script.TOY, "group_size": group_size, "prompts_per_step": len(batch.prompts), "max_grad_norm": 1e9}
    args = script.Args(**{**options, **changes})
    policy = script.load_policy(args, torch.device(device))
    if hasattr(args, "lam_init"):
        policy.register_buffer("lam", torch.tensor(args.lam_init, device=device))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    if gradients is not None:  # the step itself lets go of them
        parameters = list(policy.model.named_parameters())
        keep = lambda *_: gradients.update((key, p.grad.full_tensor().clone()) for key, p in parameters)  # noqa: E731
        optimizer.register_step_pre_hook(keep)
    rewards = torch.tensor(batch.rewards, device=device).view(-1, group_size)[share]
    completions = []
    for i, ids in enumerate(batch.completions):  # an honest sampler reports what the policy says
        prompt = batch.prompts[i // group_size]
        inputs = [torch.tensor(x, device=device) for x in ([prompt + ids], [len(prompt)], [[True] * len(ids)])]
        with torch.no_grad():
            completions.append(script.Completion(ids, "stop", policy(*inputs)[0][0].tolist()))
    groups = [completions[i : i + group_size] for i in range(0, len(completions), group_size)][share]
    mine = [completion for group in groups for completion in group]
    return lambda: script.train_step(policy, None, optimizer, args, batch.prompts[share], mine, rewards), policy


# a. TRL ---------------------------------------------------------------------------------------------------------------


def toy_batch(prompts, group_size):
    """The toy's first prompts, and completions that the tiny model samples, once."""
    import grpo

    tokenizer = load_tokenizer(str(TINY))
    problems = load_problems("arithmetic")[:prompts]
    args = grpo.Args(**grpo.TOY)
    encoded = [encode_prompt(tokenizer, row["problem"]) for row in problems]
    sampled = grpo.HFSampler(args, tokenizer, torch.device("cpu"))(encoded, group_size, 0, 1.0)
    generator = random.Random(0)
    return Batch(encoded, [c.ids for c in sampled], [float(generator.random() < 0.5) for _ in sampled]), problems


def imports_trl(python):
    try:
        return subprocess.run([python, "-c", "import trl"], capture_output=True).returncode == 0
    except OSError:
        return False


def serve_trl(file):
    """In TRL's environment: one trainer, whose own loop waits before each step to be asked, and times the step."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    if trl.__version__ != TRL:
        fail(f"trl {trl.__version__} is not {TRL}")
    work = json.loads(Path(file).read_text())
    rows, group_size = work["rows"], work["group_size"]
    total = len(work["problems"]) * group_size
    tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side="left")
    asked, current, clock = questions(), {}, {}

    def rollout(prompts, trainer):
        if current["batch"] != "live":  # given
            batch = Batch(*work["batches"][current["batch"]])
            prompt_ids = [ids for ids in batch.prompts for _ in range(group_size)]
            return {"prompt_ids": prompt_ids, "completion_ids": batch.completions, "logprobs": None}
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        torch.manual_seed(current["seed"])
        completion_ids, _ = trainer._generate_single_turn(prompt_ids, None, {}, group_size)
        current["tokens"] = sum(map(len, completion_ids))
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    def reward(completions, answer, **_):
        if current["batch"] != "live":
            return Batch(*work["batches"][current["batch"]]).rewards
        return [float(right) for right in grader.grade_all(list(zip(completions, answer)))]

    def watch(name, function):
        """The same method, its seconds added to the clock."""
        def watched(*arguments, **options):
            start = now()
            result = function(*arguments, **options)
            clock[name] = clock.get(name, 0) + now() - start
            return result
        return watched

    class Driver(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            current.clear()
            current.update(next(asked, {"stop": True}))
            if "stop" in current:
                os._exit(0)  # nothing is to be saved
            trainer.loss_type = current.get("loss", "grpo")
            trainer.scale_rewards = "none" if trainer.loss_type == "dr_grpo" else "group"
            losses.clear(), clock.clear()
            clock["start"] = now()

        def on_pre_optimizer_step(self, args, state, control, model, **_):
            if "gradients" in current:
                gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
                torch.save((sum(losses).item(), gradients), current["gradients"])

        def on_step_end(self, args, state, control, **_):
            whole = now() - clock["start"]
            others = clock["sampling"] + clock["grading"]
            reply(whole=whole, sampling=clock["sampling"], grading=clock["grading"], training=whole - others,
                  tokens=current.get("tokens"))

    config = trl.GRPOConfig(
        output_dir=work["folder"], per_device_train_batch_size=rows, gradient_accumulation_steps=total // rows,
        num_generations=group_size, max_completion_length=work["max_new_tokens"], loss_type="grpo", beta=0.0,
        temperature=1.0, epsilon=0.2, num_iterations=1, scale_rewards="group", mask_truncated_completions=False,
        learning_rate=0.0, weight_decay=0.0, max_grad_norm=1e9, shuffle_dataset=False, max_steps=10**6, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", logging_strategy="no", save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
    )
    data = Dataset.from_list([{"prompt": row["problem"], "answer": row["answer"]} for row in work["problems"]])
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    trainer = trl.GRPOTrainer(model, reward, config, data, processing_class=tokenizer, rollout_func=rollout,
                              callbacks=[Driver()])
    losses, compute_loss = [], trainer.compute_loss

    def keep_loss(*arguments, **options):
        losses.append((loss := compute_loss(*arguments, **options)).detach())
        return loss

    trainer.compute_loss = keep_loss
    trainer._generate = watch("sampling", trainer._generate)
    trainer._calculate_rewards = watch("grading", trainer._calculate_rewards)
    with Grader() as grader:
        trainer.train()


def agreement(ours, theirs):
    """Of two (loss, {name: gradient}): the losses' difference, and the gradients' relative to the gradient's norm."""
    (loss, gradients), (other_loss, others) = ours, theirs
    if gradients.keys() != others.keys():
        raise ValueError("not the same parameters: " + ", ".join(sorted(gradients.keys() ^ others.keys())[:3]))
    flat = lambda tensors: torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])  # noqa: E731
    return abs(loss - other_loss), ((flat(gradients) - flat(others)).norm() / flat(others).norm()).item()


def live_step(name, encoded, problems, group_size, budget):
    """A whole step, phase by phase as main has it: a function of the seed that returns the seconds and the tokens."""
    script = importlib.import_module(name)
    args = script.Args(**{**script.TOY, "prompts_per_step": len(problems), "group_size": group_size,
                          "max_grad_norm": 1e9, "micro_batch_tokens": budget})
    tokenizer, device = load_tokenizer(str(TINY)), torch.device("cpu")
    policy = script.load_policy(args, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    sampler, grader = script.HFSampler(args, tokenizer, device), Grader()

    def step(seed):
        clock = [now()]
        completions = sampler(encoded, group_size, seed, args.temperature)
        clock.append(now())
        texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
        asked = [row for row in problems for _ in range(group_size)]
        rewards = torch.tensor(script.rewards_of(texts, asked, grader)).view(len(problems), -1)
        clock.append(now())
        script.train_step(policy, None, optimizer, args, encoded, completions, rewards)
        clock.append(now())
        sampler.load(script.full_weights(policy, sampler.dtype))
        clock.append(now())
        phases = dict(zip(("sampling", "grading", "training", "syncing"), (b - a for a, b in zip(clock, clock[1:]))))
        return {**phases, "whole": clock[-1] - clock[0], "tokens": sum(len(c.ids) for c in completions)}

    return step


def part_a(table, options):
    """Steps of equal batches; ours in this process, TRL's trainers in theirs."""
    prompts, group_size, repetitions = (4, 4, 2) if options.quick else (16, 8, options.repetitions)
    total, budget = prompts * group_size, 2048
    alone()
    toy, problems = toy_batch(prompts, group_size)
    tail = made_up(prompts, group_size, lambda g: min(240, max(8, int(g.lognormvariate(math.log(60), 0.6)))))
    batches = {"toy": toy, "tail": tail._replace(prompts=toy.prompts)}
    named = {"toy": f"toy, {toy.named()}", "tail": f"long tail, {tail.named()}"}
    trainers = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.trl:
            for rows in (8, total) if options.quick else (8, 32, total):
                work = {"rows": rows, "group_size": group_size, "problems": problems, "folder": folder,
                        "max_new_tokens": 48, "batches": batches}
                file = Path(folder, f"work_{rows}.json")
                file.write_text(json.dumps(work))
                trainers[rows] = Worker([options.trl, __file__, "--worker", "trl", "--file", file])
        try:
            for case, batch in batches.items():
                compare_steps(table, case, named[case], batch, budget, trainers, repetitions, folder)
            compare_phases(table, toy.prompts, problems, group_size, budget, trainers, repetitions)
        except RuntimeError as error:
            fail(f"part a: {error}", 1)
        finally:
            for trainer in trainers.values():
                trainer.close()
    if not trainers:
        table.add("a", f"TRL {TRL}", "not run: --trl names no Python that has it")


def compare_steps(table, case, name, batch, budget, trainers, repetitions, folder):
    """Rows of one batch's training step, after loss and gradient have been compared under two losses."""
    for loss in ("grpo", "dr_grpo") if trainers else ():
        kept, sizes = {}, {"max_new_tokens": 48, "micro_batch_tokens": budget}
        step, _ = training_step("grpo", batch, gradients=kept, loss=loss, **sizes)
        ours = step()["loss"], kept
        for rows, trainer in trainers.items():
            file = Path(folder, "gradients")
            trainer.ask(batch=case, loss=loss, gradients=str(file))
            off = agreement(ours, torch.load(file))
            if not max(off) <= 1e-4:
                raise RuntimeError(f"{name}, {loss}: loss off by {off[0]:.1e}, gradient by {off[1]:.1e}; not timed")
        table.add("a", f"{case}, {loss}: TRL's loss / gradient differs by", f"{off[0]:.0e} / {off[1]:.0e}")
    ours = f"grpo.py, {budget} tokens a micro-batch"
    functions = {ours: training_step("grpo", batch, micro_batch_tokens=budget)[0],
                 "grpo.py, one micro-batch": training_step("grpo", batch, micro_batch_tokens=10**9)[0]}
    functions = {key: lambda step=step: timed(step) for key, step in functions.items()}
    theirs = {f"TRL, {rows} rows a micro-batch": lambda t=trainer: t.ask(batch=case)["training"]
              for rows, trainer in trainers.items()}
    times = interleaved({**functions, **theirs}, repetitions, f"a: {case}")
    for key in times:
        table.add("a", f"{name}: {key}", times[key], "s")
    if theirs:
        fastest = min(theirs, key=lambda key: statistics.median(times[key]))
        table.add("a", f"{case}: grpo.py / fastest {fastest}", ratios(times, ours, fastest), "", ("≤", 0.5))
        table.add("a", f"{case}: grpo.py / TRL, both in one micro-batch",
                  ratios(times, "grpo.py, one micro-batch", list(theirs)[-1]))


def compare_phases(table, encoded, problems, group_size, budget, trainers, repetitions):
    """Rows of a whole step, from the same weights and seed; TRL's with 32 rows a micro-batch."""
    step, seeds = live_step("grpo", encoded, problems, group_size, budget), {"grpo.py": 0, "TRL": 0}
    trainer = trainers.get(32) or (list(trainers.values()) or [None])[-1]

    def run(who):
        seeds[who] += 1
        return step(seeds[who]) if who == "grpo.py" else trainer.ask(batch="live", seed=seeds[who])

    who = ("grpo.py", "TRL") if trainer else ("grpo.py",)
    results = interleaved({name: lambda name=name: run(name) for name in who}, repetitions, "a: whole steps")
    tokens = {name: sum(result["tokens"] for result in results[name]) for name in who}
    table.add("a", "whole steps, sampled tokens: " + ", ".join(who), " / ".join(str(n) for n in tokens.values()))
    for phase in ("sampling", "grading", "training", "syncing", "whole"):
        times = {name: [result[phase] for result in results[name]] for name in who if phase in results[name][0]}
        for name in times:
            table.add("a", f"whole step, {phase}: {name}", times[name], "s")
        if len(times) > 1:
            table.add("a", f"whole step, {phase}: grpo.py / TRL", ratios(times, *who))


# b to e. The variants and their functions -----------------------------------------------------------------------------


def part_b(table, options):
    prompts, group_size, repetitions = (4, 4, 2) if options.quick else (16, 8, 2 * options.repetitions)
    alone()
    batch = made_up(prompts, group_size, lambda g: g.randint(10, 40))
    steps = {name: training_step(name, batch)[0] for name in SCRIPTS}
    times = interleaved({name: lambda s=step: timed(s) for name, step in steps.items()}, repetitions, "b: variants")
    for name in SCRIPTS:
        table.add("b", f"training step, {batch.named()}: {name}.py", times[name], "s")
    for name in SCRIPTS[1:]:
        table.add("b", f"{name}.py / grpo.py", ratios(times, name, "grpo"), "", ("≤", 1.03))


def logits_pass(way, tokens, vocabulary, device):
    """A function that makes the forward and backward pass over a thin model with a large vocabulary."""
    import transformers

    import grpo

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        input_ids = torch.randint(vocabulary, (8, tokens // 8 + 1))
        starts, mask = torch.ones(8, dtype=torch.long), torch.ones(8, tokens // 8, dtype=torch.bool)
    policy = grpo.Policy(model, 1.0)
    policy(input_ids[:, :3], starts, mask[:, :2])[0].sum().backward()  # allocates the gradients

    def run():
        if way == "chunks":
            logp, _ = policy(input_ids, starts, mask)
        else:
            logits = model(input_ids=input_ids).logits[:, :-1]
            logp = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        logp.mean().backward()
        return logp.mean().item()

    return run


def by_matrix(x, decay, style):
    """The trace by a [T, T] matrix of weights, built once for the whole batch: the plain way, at its best."""
    t = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
    lag = t[:, None] - t  # [T, T]: the place of row t's token k, l = t - k
    weights = decay ** lag.clamp(min=0)
    if style == "both":
        weights = torch.maximum(weights, decay ** t.expand_as(lag))
    return x @ (weights * (lag >= 0)).T


def trace_pass(way, length, style, device):
    """A function that makes the forward and backward pass of a trace of [16, T]."""
    import grpo_lambda_traces

    function = grpo_lambda_traces.trace if way == "trace" else by_matrix
    torch.manual_seed(0)
    x = torch.randn(16, length, device=device, requires_grad=True)
    function(torch.randn(16, 64, device=device, requires_grad=True), 0.99, style).sum().backward()  # torch's own needs

    def run():
        x.grad = None
        function(x, 0.99, style).square().sum().backward()
        return x.grad.norm().item()

    return run


def memory_rows(table, part, what, make, ways, arguments, repetitions, device, bounds):
    """Rows of seconds and of peak memory of two ways to compute the same, each time in a fresh process."""
    fresh = multiprocessing.get_context("forkserver")  # forked from one that has everything imported
    fresh.set_forkserver_preload(["__main__", "grpo", "grpo_lambda_traces"])

    def run(way):
        with ProcessPoolExecutor(1, fresh) as pool:
            return pool.submit(with_peak, make, (way, *arguments), device).result()

    try:
        measured = {way: lambda way=way: run(way) for way in ways}
        results = interleaved(measured, repetitions, f"{part}: {what}", warm_up=0)
    except BrokenProcessPool:
        fail(f"part {part}: the process was killed, for want of memory?", 1)
    values = [value for way in ways for value, _, _ in results[way]]
    if max(values) - min(values) > 1e-4 * abs(values[0]):
        fail(f"part {part}: {' and '.join(ways)} do not compute the same: {min(values)}, {max(values)}", 1)
    for place, quantity, unit, bound in ((2, "time", "s", bounds[0]), (1, "memory", "GB", bounds[1])):
        measured = {way: [result[place] for result in results[way]] for way in ways}
        for way in ways:
            table.add(part, f"{what}, {quantity}: {way}", measured[way], unit)
        above, below = reversed(ways) if bound and bound[0] == "≥" else ways
        table.add(part, f"{what}, {quantity}: {above} / {below}", ratios(measured, above, below), "", bound)


def part_c(table, options, part="c", device="cpu"):
    tokens, vocabulary, repetitions = (512, 16_384, 1) if options.quick else (options.tokens, VOCABULARY, 2)
    what = f"log-probabilities of {tokens} tokens, V = {vocabulary:,}"
    memory_rows(table, part, what, logits_pass, ("chunks", "full"), [tokens, vocabulary], repetitions, device,
                (None, ("≤", 0.1)))


def part_d(table, options):
    length, repetitions = (256, 1) if options.quick else (4096, 5)
    for style in ("both",) if options.quick else ("recent", "both"):
        memory_rows(table, "d", f"trace of [16, {length}], {style}", trace_pass, ("trace", "matrix"), [length, style],
                    repetitions, "cpu", (("≥", 5), ("≤", 0.1)))


def by_trie(groups):
    """Process set sizes by a prefix tree of each group's completions: a node is (children, completions through it)."""
    sizes = []
    for completions in groups:
        root, paths = ({}, [0]), []
        for ids in completions:
            node, path = root, []
            for token in ids:
                node = node[0].setdefault(token, ({}, [0]))
                node[1][0] += 1
                path.append(node)
            paths.append(path)
        sizes.append([[node[1][0] for node in path] for path in paths])
    return sizes


def part_e(table, options):
    """On one core. Each completion starts as one before it, for a random part of its length."""
    import gc

    from lambda_grpo_prm import process_set_sizes

    groups, group_size, longest, repetitions = (4, 4, 64, 2) if options.quick else (64, 16, 1024, options.repetitions)
    generator, data = random.Random(0), []
    for _ in range(groups):
        data.append([])
        for i in range(group_size):
            ids = [generator.randrange(32_000) for _ in range(generator.randint(longest // 2, longest))]
            if i:
                shared = generator.choice(data[-1])[: int(generator.random() ** 2 * len(ids))]
                ids[: len(shared)] = shared
            data[-1].append(ids)
    lengths = torch.tensor([[len(ids) for ids in group] for group in data])
    mask = torch.arange(longest) < lengths[..., None]  # [P, G, T]
    padded = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(
        mask, torch.tensor([token for group in data for ids in group for token in ids]))
    sizes = process_set_sizes(padded, mask)
    expected = torch.tensor([size for group in by_trie(data) for row in group for size in row])
    if not torch.equal(sizes[mask].long(), expected):
        fail("part e: process_set_sizes and the trie do not compute the same", 1)

    def without_collector():
        gc.disable()
        try:
            return timed(by_trie, data)
        finally:
            gc.enable()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleaved({
        "process_set_sizes": lambda: timed(process_set_sizes, padded, mask), "trie": lambda: timed(by_trie, data),
        "trie, garbage collector off": without_collector,
    }, repetitions, "e: process sets")
    torch.set_num_threads(threads)
    name = f"{groups} groups of {group_size} × {longest}, |λ| {expected.float().mean():.1f}"
    for key in times:
        table.add("e", f"{name}: {key}", times[key], "s")
    table.add("e", "trie / process_set_sizes", ratios(times, "trie", "process_set_sizes"), "", ("≥", 10))
    table.add("e", "trie, garbage collector off / process_set_sizes",
              ratios(times, "trie, garbage collector off", "process_set_sizes"))


# f. Growth ------------------------------------------------------------------------------------------------------------


def exponent(sizes, times):
    """The slope of log time over log size, a least-squares fit."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(t) for t in times]).slope


def attention_share(step):
    """Share of a step's time spent in attention itself (scores, softmax, sum; not the projections)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    attention = [time for key, time in times.items() if key.startswith("aten") and "scaled_dot_product" in key]
    return sum(attention) / sum(times.values())


def part_f(table, options):
    quick = options.quick
    alone()
    repetitions = 2 if quick else max(3, options.repetitions // 2)
    cases = {
        "prompts": ((2, 4) if quick else (4, 8, 16, 32), lambda n: made_up(n, 4 if quick else 8, 32)),
        "group size": ((2, 4) if quick else (4, 8, 16, 32), lambda n: made_up(4 if quick else 8, n, 32)),
        "completion length": ((16, 64) if quick else (64, 128, 256, 512, 1024), lambda n: made_up(4, 4, n)),
    }
    for what, (sizes, batch) in cases.items():
        steps = {n: training_step("grpo", batch(n), micro_batch_tokens=2048)[0] for n in sizes}
        times = interleaved({n: lambda s=step: timed(s) for n, step in steps.items()}, repetitions, f"f: {what}")
        for n in sizes:
            table.add("f", f"training step, {what} {n}: {batch(n).named()}", times[n], "s")
        fitted = [exponent(sizes, turn) for turn in zip(*times.values())]
        table.add("f", f"exponent in {what}", fitted, "", None if what == "completion length" else ("≤", 1.1))
    shares = [attention_share(step) for step in steps.values()]
    table.add("f", f"attention's share of the step at completion lengths {' / '.join(map(str, sizes))}",
              " / ".join(f"{share:.0%}" for share in shares))
    others = [[time * (1 - share) for time, share in zip(turn, shares)] for turn in zip(*times.values())]
    table.add("f", "exponent in completion length, without attention", [exponent(sizes, turn) for turn in others], "",
              ("≤", 1.1))
    ranks_rows(table, (8, 4, 32) if quick else (32, 8, 32), repetitions + 2)


def ranks_rows(table, sizes, repetitions):
    """The same batch by one rank and by two, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    arguments = [__file__, "--worker", "ranks", "--file", json.dumps(sizes)]
    workers = {n: Worker([*command, f"--nproc_per_node={n}", *arguments], OMP_NUM_THREADS="1") for n in (1, 2)}
    try:
        functions = {n: lambda worker=worker: worker.ask()["seconds"] for n, worker in workers.items()}
        times = interleaved(functions, repetitions, "f: ranks")
    except RuntimeError as error:
        fail(f"part f: {error}", 1)
    finally:
        for worker in workers.values():
            worker.close()
    for n in times:
        table.add("f", f"training step, {n} ranks of one thread: {made_up(*sizes).named()}", times[n], "s")
    table.add("f", "1 rank / 2 ranks", ratios(times, 1, 2))
    work = [exponent((2, 1), turn) for turn in zip(times[1], times[2])]
    table.add("f", "exponent in a rank's work (1: perfect; less: what a rank costs by itself)", work, "", ("≤", 1.1))


def serve_ranks(file):
    """Under torchrun: rank 0 is asked, all ranks make a step of the same batch."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    batch = made_up(*json.loads(file))
    mine = slice(rank * len(batch.prompts) // world, (rank + 1) * len(batch.prompts) // world)
    step, _ = training_step("grpo", batch, mine, micro_batch_tokens=2048)
    asked = questions() if rank == 0 else None
    while True:
        order = [next(asked, None) if rank == 0 else None]
        dist.broadcast_object_list(order)
        if order[0] is None:
            break
        seconds = torch.tensor(timed(step))
        dist.all_reduce(seconds)
        if rank == 0:
            reply(seconds=seconds.item() / world)
    dist.destroy_process_group()


# g. GPU ---------------------------------------------------------------------------------------------------------------


def part_g(table, options):
    if not torch.cuda.is_available():
        return table.add("g", "on a GPU: log-probabilities, the learner's tokens per second", "not run: no GPU")
    table.add("g", "card", torch.cuda.get_device_name())
    part_c(table, options, "g", "cuda")
    learner_rows(table, options, "cuda")


def learner_rows(table, options, device):
    """Completion tokens per second of train_step, a model of Qwen2.5-0.5B's shape with random weights."""
    import transformers

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    config = transformers.Qwen2Config(**(small if options.quick else shape), num_key_value_heads=2,
                                      vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=4096)
    prompts, group_size, length = (2, 2, 64) if options.quick else (8, 8, 1024)
    batch = made_up(prompts, group_size, length)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        alone(device)
        budget = 16384
        step, policy = training_step("grpo", batch, device=device, model=folder, micro_batch_tokens=budget)
    times = interleaved({"step": lambda: timed(step)}, 2 if options.quick else 7, "g: learner")["step"]
    size = sum(parameter.numel() for parameter in policy.parameters()) / 1e9
    speeds = [prompts * group_size * length / seconds for seconds in times]
    table.add("g", f"learner, {size:.2f} G parameters, {batch.named()}", speeds, "tokens/s")


# ----------------------------------------------------------------------------------------------------------------------

PARTS = {"a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e, "f": part_f, "g": part_g}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, by letter: a,c")
    parser.add_argument("--quick", action="store_true", help="small sizes, two repetitions: no figures to quote")
    parser.add_argument("--trl", metavar="PYTHON", help=f"interpreter of an environment with trl=={TRL}, for part a")
    parser.add_argument("--repetitions", type=int, default=11, help="of a step (default 11)")
    parser.add_argument("--tokens", type=int, default=8192, help="of part c; the full logits of 8192 take 16 GB")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what seconds are: see above")
    for hidden in ("--worker", "--file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clock != "wall":
        global now
        os.environ["GRPO_BENCHMARK_CLOCK"], now = options.clock, CLOCKS[options.clock]
    if options.worker == "trl":
        return serve_trl(options.file)
    if options.worker == "ranks":
        return serve_ranks(options.file)
    chosen = options.only.split(",")
    for letter in chosen:
        if letter not in PARTS:
            fail(f"--only {options.only}: there is no part {letter}, only {', '.join(PARTS)}")
    if options.repetitions < 2:
        fail(f"--repetitions {options.repetitions}: must be at least 2")
    if options.trl and not imports_trl(options.trl):
        fail(f"--trl {options.trl}: no Python that can import trl")
    if set(chosen) & {"c", "d"} and not sys.platform.startswith("linux"):
        fail("parts c and d read Linux's account of memory: leave them out with --only")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    say(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load}; {options.clock} seconds; torch "
        + torch.__version__ + ("; quick: sizes too small to judge" if options.quick else ""))
    table = Table(options.quick)
    for letter in chosen:
        PARTS[letter](table, options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
