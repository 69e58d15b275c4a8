"""The cost of the scripts, measured side by side: one command, one table.

    python tests/measure/benchmark.py                          all parts
    python tests/measure/benchmark.py --only rows --quick      one part, small: to see that it runs, not to quote
    python tests/measure/benchmark.py --only trl --trl ENV/bin/python
                                          against TRL; ENV: pip install -r requirements.txt trl==1.16.0

  trl       a training step of grpo.py against TRL's GRPOTrainer, equal loss and gradient; a whole step by phase
  rows      a training step that leaves groups of equal rewards out, against one that keeps them
  matmul    a training step of a 135M model, against a matrix product as fast as this core can

The candidates take turns, in alternating order, with one thread. The table has medians and quartiles; a ratio is taken
in each turn, and then its median and quartiles. Each pair is first shown to compute the same thing.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "tiny"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for TRL's process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

from eval import fail, grade, load_problems, load_tokenizer  # noqa: E402

TRL = "1.16.0"
BUDGET = 2048  # tokens of a micro-batch


# Measuring ------------------------------------------------------------------------------------------------------------

def row(part, text, values, unit=""):
    """Print a row of the table; values: a list of measurements, or a text."""
    quartiles = ""
    if not isinstance(values, str):
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        values, quartiles = f"{median:.3g} {unit}".strip(), f"{low:.3g} to {high:.3g}"
    print(f"{part:9} {text:75} {values:>10}  {quartiles:>17}".rstrip(), flush=True)


def timed(function):
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions, repetitions, title):
    """{name: [what its function returns, once per repetition]}: all in turn, every other time backwards."""
    results = {name: [] for name in functions}
    for repetition in tqdm(range(repetitions + 1), title, leave=False, delay=1):
        for name in list(functions)[:: 1 if repetition % 2 else -1]:
            result = functions[name]()
            if repetition > 0:  # the first is to warm up
                results[name].append(result)
    return results


def seconds_of(functions, repetitions, title):
    """{name: [seconds of a call, once per repetition]}."""
    return interleaved({name: lambda f=function: timed(f) for name, function in functions.items()}, repetitions, title)


def ratios(results, above, below):
    """above / below, turn by turn."""
    return [a / b for a, b in zip(results[above], results[below])]


# Batches and steps ----------------------------------------------------------------------------------------------------

def made_up(prompts, group_size, draw):
    """A batch: prompts [P] and completions [P·G] of random token ids, of lengths that a function draws, rewards [P·G]."""
    generator = random.Random(0)
    word = lambda length: [generator.randint(1, 16) for _ in range(length)]  # noqa: E731
    completions = [word(draw(generator) - 1) + [0] for _ in range(prompts * group_size)]
    rewards = [float(generator.random() < 0.5) for _ in completions]
    return {"prompts": [word(12) for _ in range(prompts)], "completions": completions, "rewards": rewards}


def load(name, prompts, group_size, **changes):
    """(script, args, policy, optimizer) on the tiny model; a training step leaves its weights as they are."""
    script = importlib.import_module(name)
    options = {**script.TOY, "group_size": group_size, "prompts_per_step": prompts, "max_grad_norm": 1e9}
    args = script.Args(**{**options, **changes})
    policy = script.load_policy(args, torch.device("cpu"))
    if hasattr(args, "lam_init"):
        policy.register_buffer("lam", torch.tensor(args.lam_init))
    return script, args, policy, torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def training_step(name, batch, gradients=None, **changes):
    """A function that makes a training step of a script on the batch, and returns its metrics.

    gradients: a dict that each step fills with the model's gradients by name, or None.
    """
    prompts, group_size = batch["prompts"], len(batch["completions"]) // len(batch["prompts"])
    script, args, policy, optimizer = load(name, len(prompts), group_size, **changes)
    if gradients is not None:  # the step itself lets go of them
        parameters = list(policy.model.named_parameters())
        keep = lambda *_: gradients.update((key, p.grad.full_tensor().clone()) for key, p in parameters)  # noqa: E731
        optimizer.register_step_pre_hook(keep)
    rewards = torch.tensor(batch["rewards"]).view(-1, group_size)
    completions = []
    for i, ids in enumerate(batch["completions"]):  # an honest sampler reports the policy's own log-probabilities
        prompt = prompts[i // group_size]
        inputs = torch.tensor([prompt + ids]), torch.tensor([len(prompt)]), torch.tensor([[True] * len(ids)])
        with torch.no_grad():
            logp, _ = policy(*inputs)
        completions.append(script.Completion(ids, "stop", logp[0].tolist()))

    return lambda: script.train_step(policy, None, optimizer, args, prompts, completions, rewards)[0]


def whole_step(prompts, problems, group_size):
    """A whole step of grpo.py, as main has it: a function of the seed that returns seconds by phase, and tokens."""
    script, args, policy, optimizer = load("grpo", len(problems), group_size, micro_batch_tokens=BUDGET)
    tokenizer, device = load_tokenizer(str(TINY)), torch.device("cpu")
    sampler = script.HFSampler(args, tokenizer, device)

    def step(seed):
        start = time.perf_counter()
        completions = sampler(prompts, group_size, seed, args.temperature)
        sampled = time.perf_counter()
        texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
        asked = [problem for problem in problems for _ in range(group_size)]
        rewards = torch.tensor(script.rewards_of(texts, asked)).view(len(problems), -1)
        graded = time.perf_counter()
        script.train_step(policy, None, optimizer, args, prompts, completions, rewards)
        trained = time.perf_counter()
        sampler.load(script.full_weights(policy, sampler.dtype))
        return {"whole": time.perf_counter() - start, "sampling": sampled - start, "training": trained - graded,
                "tokens": sum(len(completion.ids) for completion in completions)}

    return step


# Against TRL ----------------------------------------------------------------------------------------------------------

def serve_trl(file):
    """In TRL's environment: one trainer, whose own loop waits before each step to be asked, and times the step.

    A question is a line of JSON on stdin, and so is an answer on stdout, which no other print can reach.
    """
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    if trl.__version__ != TRL:
        fail(f"trl {trl.__version__} is not {TRL}")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = json.loads(Path(file).read_text())
    rows, group_size = work["rows"], work["group_size"]
    total = len(work["problems"]) * group_size
    tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side="left")
    current, clock = {}, {}

    def rollout(prompts, trainer):
        if current["batch"] != "live":  # given
            batch = work["batches"][current["batch"]]
            prompt_ids = [ids for ids in batch["prompts"] for _ in range(group_size)]
            return {"prompt_ids": prompt_ids, "completion_ids": batch["completions"], "logprobs": None}
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        torch.manual_seed(current["seed"])
        completion_ids, _ = trainer._generate_single_turn(prompt_ids, None, {}, group_size)
        current["tokens"] = sum(map(len, completion_ids))
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    def reward(completions, answer, **_):
        if current["batch"] != "live":
            return work["batches"][current["batch"]]["rewards"]
        return [float(verdict["correct"]) for verdict in grade(list(zip(completions, answer)))]

    def watch(name, function):
        """The same method, its seconds added to the clock."""
        def watched(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            clock[name] = clock.get(name, 0) + time.perf_counter() - start
            return result
        return watched

    class Driver(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            question = sys.stdin.readline()
            if not question:
                os._exit(0)  # nothing is to be saved
            current.clear()
            current.update(json.loads(question))
            losses.clear(), clock.clear()
            clock["start"] = time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, model, **_):
            if "gradients" in current:
                gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
                torch.save((sum(losses).item(), gradients), current["gradients"])

        def on_step_end(self, args, state, control, **_):
            whole = time.perf_counter() - clock["start"]
            answer = {"whole": whole, "sampling": clock["sampling"], "tokens": current.get("tokens")}
            answer["training"] = whole - clock["sampling"] - clock["grading"]
            print(json.dumps(answer), file=answers, flush=True)

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
    trainer.train()


class Trainer:
    """serve_trl in another interpreter."""

    def __init__(self, python, file):
        self.errors = open(file.with_suffix(".log"), "w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        self.process = subprocess.Popen([python, __file__, "--serve", str(file)], **pipes)

    def ask(self, **question):
        """The answer. If the process has died, the program ends with the last line it wrote."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            fail(f"TRL: {' '.join(self.errors.read().strip().splitlines()[-1:])}", 1)
        return json.loads(answer)


def agreement(ours, theirs):
    """Of two (loss, {name: gradient}): the losses' difference, and the gradients' relative to the gradient's norm."""
    (loss, gradients), (other_loss, others) = ours, theirs
    flat = lambda tensors: torch.cat([tensors[name].flatten().double() for name in sorted(gradients)])  # noqa: E731
    return abs(loss - other_loss), ((flat(gradients) - flat(others)).norm() / flat(others).norm()).item()


def part_trl(options):
    """Steps of equal batches; ours in this process, TRL's trainers in theirs."""
    prompts, group_size = (4, 4) if options.quick else (16, 8)
    total, repetitions = prompts * group_size, options.repetitions
    tokenizer, problems = load_tokenizer(str(TINY)), load_problems("arithmetic")[:prompts]
    encoded = [tokenizer.encode(row["problem"]) for row in problems]  # the tiny model's chat template adds nothing
    script, args, _, _ = load("grpo", prompts, group_size)
    sampled = script.HFSampler(args, tokenizer, torch.device("cpu"))(encoded, group_size, 0, 1.0)
    tail = made_up(prompts, group_size, lambda g: min(240, max(8, int(g.lognormvariate(math.log(60), 0.6)))))
    batches = {"toy": {**tail, "prompts": encoded, "completions": [completion.ids for completion in sampled]},
               "long tail": {**tail, "prompts": encoded}}
    trainers = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.trl:
            for rows in sorted({8, min(32, total), total}):
                file = Path(folder, f"work_{rows}.json")
                file.write_text(json.dumps({"rows": rows, "group_size": group_size, "problems": problems, "batches": batches,
                                            "max_new_tokens": args.max_new_tokens, "folder": folder}))
                trainers[rows] = Trainer(options.trl, file)
        try:
            for case, batch in batches.items():
                compare_steps(case, batch, trainers, repetitions, folder)
            compare_phases(encoded, problems, group_size, trainers, repetitions)
        finally:
            for trainer in trainers.values():
                trainer.process.kill()
    if not trainers:
        row("trl", f"TRL {TRL}", "not run: no --trl")


def compare_steps(case, batch, trainers, repetitions, folder):
    """Rows of one batch's training step, after loss and gradient have been compared."""
    kept = {}
    loss = training_step("grpo", batch, kept, micro_batch_tokens=BUDGET)()["loss"]
    for rows, trainer in trainers.items():
        file = Path(folder, "gradients")
        trainer.ask(batch=case, gradients=str(file))
        off = agreement((loss, kept), torch.load(file))
        if not max(off) <= 1e-4:
            fail(f"{case}: loss off by {off[0]:.1e}, gradient by {off[1]:.1e}; not timed", 1)
        row("trl", f"{case}, {rows} rows: TRL's loss / gradient differs by", f"{off[0]:.0e} / {off[1]:.0e}")
    ours, whole = f"grpo.py, {BUDGET} tokens per micro-batch", "grpo.py, one micro-batch"
    steps = {ours: training_step("grpo", batch, micro_batch_tokens=BUDGET),
             whole: training_step("grpo", batch, micro_batch_tokens=10**9)}
    functions = {key: lambda step=step: timed(step) for key, step in steps.items()}
    theirs = {f"TRL, {rows} rows per micro-batch": lambda t=trainer: t.ask(batch=case)["training"]
              for rows, trainer in trainers.items()}
    times = interleaved({**functions, **theirs}, repetitions, f"trl: {case}")
    for key in times:
        row("trl", f"{case}, {len(batch['completions'])} completions: {key}", times[key], "s")
    if theirs:
        fastest = min(theirs, key=lambda key: statistics.median(times[key]))
        row("trl", f"{case}: grpo.py / fastest {fastest}", ratios(times, ours, fastest))
        row("trl", f"{case}: grpo.py / TRL, both in one micro-batch", ratios(times, whole, list(theirs)[-1]))


def compare_phases(prompts, problems, group_size, trainers, repetitions):
    """Rows of a whole step, from the same weights and seed; TRL's with 32 rows per micro-batch, or all."""
    step, seeds = whole_step(prompts, problems, group_size), {"grpo.py": 0, "TRL": 0}

    def run(who):
        seeds[who] += 1
        if who == "grpo.py":
            return step(seeds[who])
        return trainers[min(32, max(trainers))].ask(batch="live", seed=seeds[who])

    who = ("grpo.py", "TRL") if trainers else ("grpo.py",)
    results = interleaved({name: lambda name=name: run(name) for name in who}, repetitions, "trl: whole steps")
    tokens = [str(sum(result["tokens"] for result in results[name])) for name in who]
    row("trl", f"whole steps, sampled tokens: {', '.join(who)}", " / ".join(tokens))
    for phase in ("sampling", "training", "whole"):
        times = {name: [result[phase] for result in results[name]] for name in who}
        for name in times:
            row("trl", f"whole step, {phase}: {name}", times[name], "s")
        if len(times) > 1:
            row("trl", f"whole step, {phase}: grpo.py / TRL", ratios(times, *who))


# What a step leaves out, and what it spends ----------------------------------------------------------------------------

def part_rows(options):
    """Half of the groups, and seven of eight as late in the toy's run, have equal rewards."""
    import grpo

    plan = grpo.micro_batches
    for name, share in (("half", 0.5), ("seven eighths", 0.875)):
        batch = made_up(*((8, 4) if options.quick else (16, 8)), lambda g: g.randint(10, 40))
        size = len(batch["rewards"]) // len(batch["prompts"])
        batch["rewards"] = [1.0 if i < share * len(batch["rewards"]) else float(i % 2) for i in range(len(batch["rewards"]))]
        step = training_step("grpo", batch)

        def keep_all():
            with patch.object(grpo, "micro_batches", lambda lengths, teaches, *how: plan(lengths, [True] * len(lengths), *how)):
                return step()

        if abs(step()["grad_norm"] / keep_all()["grad_norm"] - 1) > 1e-4:
            fail("with and without the rows the gradient is not the same", 1)
        times = seconds_of({"left out": step, "kept": keep_all}, 2 * options.repetitions, "rows")
        row("rows", f"groups of {size}, {name} equal: rows left out / kept", ratios(times, "left out", "kept"))


def part_matmul(options):
    """SmolLM2-135M's shape with random weights, one completion of 2,048 tokens: 6·N operations per token, and attention."""
    import grpo

    hidden, inner, layers, vocabulary, length = (64, 128, 2, 512, 64) if options.quick else (576, 1536, 30, 49_152, 2048)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64 if options.quick else 3, vocab_size=vocabulary, tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        args = grpo.Args(model=folder, group_size=2, prompts_per_step=1)
        policy = grpo.load_policy(args, torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    rows = [list(range(1, 17)) * ((length - 16) // 16)] * 2  # behind a prompt of 16 tokens
    completions = [grpo.Completion(ids, "stop", [-math.log(vocabulary)] * len(ids)) for ids in rows]
    rewards = torch.tensor([[0.0, 1.0]])
    step = lambda: grpo.train_step(policy, None, optimizer, args, [rows[0][:16]], completions, rewards)  # noqa: E731
    policy.temperature = 100.0  # nearly uniform, as the sampler is said to be
    one, other = torch.randn(length, hidden), torch.randn(hidden, inner)
    times = seconds_of({"step": step, "product": lambda: [one @ other for _ in range(20)]}, min(3, options.repetitions), "matmul")
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    work = 2 * (6 * parameters * length + 6 * layers * hidden * length**2)
    rates = {"step": [work / t for t in times["step"]], "product": [40 * length * hidden * inner / t for t in times["product"]]}
    row("matmul", f"{parameters / 1e6:.0f}M parameters, 2 × {length} tokens: a training step", times["step"], "s")
    row("matmul", "rate of a product of matrices", [rate / 1e9 for rate in rates["product"]], "GFLOP/s")
    row("matmul", "share of that rate: training step", ratios(rates, "step", "product"))


# ----------------------------------------------------------------------------------------------------------------------

PARTS = {"trl": part_trl, "rows": part_rows, "matmul": part_matmul}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--quick", action="store_true", help="small sizes, two repetitions: no figures to quote")
    parser.add_argument("--trl", metavar="PYTHON", help=f"interpreter of an environment with trl=={TRL}")
    parser.add_argument("--repetitions", type=int, default=11, help="of a step (default: 11)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve_trl(options.serve)
    if options.repetitions < 2:
        fail(f"--repetitions {options.repetitions}: must be at least 2")
    options.repetitions = 2 if options.quick else options.repetitions
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}: "
          "median, quartiles" + ("; quick: too small to quote" if options.quick else ""))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for part in options.only:
        PARTS[part](options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
