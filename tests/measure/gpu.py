"""The first thing to run on a machine with GPUs: what holds there, what does not, and what was not run, in one table.

    python tests/gpu.py                                       one GPU, the shape of Qwen2.5-0.5B, some minutes
    python tests/gpu.py --size 1.5B                           the size of the goal: half of bf16's peak at 4096 tokens
    torchrun --nproc_per_node=8 tests/gpu.py --size 7B        eight
    python tests/gpu.py --only numerics,step4k                some items

Nothing is downloaded: weights are random, of a configuration in fits.py, the tokenizer is that of tests/tiny. --json
gets the table's numbers. Each item is by itself: if it raises, that is its line of the table, and the others follow.
The exit code is 1 if anything does not hold. Under torchrun all ranks do an item together; one that fails alone, in the
middle of it, ends the job after ten minutes. Without a GPU everything is "not run"; but the code of each item runs, on
a tiny model with short sequences, and what fails even there does not hold. --quick leaves out what takes longest
there: vllm, compiled, toy and resume.
"""

import argparse
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import fits  # noqa: E402
import grpo  # noqa: E402
from eval import check, fail, join_ranks, say, sum_over_ranks  # noqa: E402

TINY = ROOT / "tests" / "tiny"
PRECISIONS = {"bf16": MixedPrecisionPolicy(torch.bfloat16, torch.float32), "fp32": MixedPrecisionPolicy()}
PEAKS = {  # dense bf16, 1e12 operations a second, by the makers' data sheets; the first that is in the card's name
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A10": 125, "A6000": 155, "4090": 165, "3090": 71,
}
KINDS = {  # of kernels, by their names; the first that matches
    "communication": "nccl", "attention": "flash|fmha|sdpa|attention", "matrix products": "gemm|nvjet|cutlass|::mm$",
    "copies": "memcpy|memset|copy", "the rest": "",
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")  # the host, for the card
WOULD_WAIT = ("aten::_local_scalar_dense", "aten::nonzero")  # on a CPU


# What the items share -------------------------------------------------------------------------------------------------

class Here:
    """This machine, and what was asked for."""

    def __init__(self, options):
        self.device = join_ranks(10)
        self.gpu, self.quick = self.device.type == "cuda", options.quick
        self.card = torch.cuda.get_device_name() if self.gpu else "no GPU"
        self.size = options.size if self.gpu else "tiny"
        self.shrink = 1 if self.gpu else 32  # divides lengths
        self.config, self.mesh = fits.config_of(self.size), fits.mesh_of(self.device.type, grpo.WORLD)

    def policy(self, precision="bf16", checkpointing=True, compile=False):
        """A sharded policy with random weights, the same each time."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        how = {"checkpointing": checkpointing, "args": grpo.Args(compile=compile)}
        return fits.wrap(model, self.mesh, PRECISIONS[precision], **how)

    def batch(self, rows, prompt, completion):
        """Random input_ids [B, S], starts [B], mask [B, T] of completions that are shorter from row to row."""
        generator = torch.Generator().manual_seed(grpo.RANK)
        input_ids = torch.randint(1, self.config.vocab_size, (rows, prompt + completion), generator=generator)
        mask = torch.arange(completion) < (completion // torch.arange(1, rows + 1))[:, None]
        return input_ids.to(self.device), torch.full((rows,), prompt, device=self.device), mask.to(self.device)

    def measured(self, function):
        """What the function returns, its seconds, and the GB it held at most over what was there (nan on a CPU)."""
        before = math.nan
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        result = function()
        if self.gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return result, seconds, ((torch.cuda.max_memory_allocated() if self.gpu else 0) - before) / 1e9


def forward_backward(policy, batch):
    """One micro-batch with made-up advantages: its log-probabilities [B, T]; the gradients are left in place."""
    policy.zero_grad()
    logp, _ = policy(*batch)
    advantages = torch.linspace(-1, 1, len(logp), device=logp.device)
    loss, _ = grpo.policy_loss(logp, logp.detach(), advantages, batch[2] / batch[2].sum())
    (loss * grpo.WORLD).backward()
    return logp.detach()


def second_pass(here, policy, batch):
    """A pass to warm up, then one: log-probabilities, seconds, GB, this rank's shards of all gradients as a vector."""
    forward_backward(policy, batch)
    measured = here.measured(lambda: forward_backward(policy, batch))
    return *measured, torch.cat([parameter.grad.to_local().flatten() for parameter in policy.parameters()])


def compare(one, other, device):
    """Of two vectors spread over the ranks: cosine, norm of the difference over the first's norm, ratio of norms."""
    sums = {"dot": one @ other, "one": one @ one, "other": other @ other, "difference": (one - other).square().sum()}
    dot, one, other, difference = sum_over_ranks(sums, device).values()
    return dot / math.sqrt(one * other), math.sqrt(difference / one), math.sqrt(other / one)


def with_optimizer(policy):
    """AdamW as the scripts have it, but with a learning rate of 0: a step costs as much, and changes nothing."""
    return torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def training_step(here, longest, compile=False):
    """(a function that makes a step by grpo.train_step, {tokens, longest, micro_batches, operations} of this rank).

    The completions are made up: long-tailed lengths, most about a quarter of the longest. A rank has 64, on a CPU 8.
    """
    prompts, group_size, prompt = (8, 8, 256) if here.gpu else (2, 4, 8)
    longest, budget = longest // here.shrink, grpo.Args().micro_batch_tokens // here.shrink
    generator = torch.Generator().manual_seed(grpo.RANK)
    lengths = (longest / 4 * (0.8 * torch.randn(prompts * group_size, generator=generator)).exp()).long()
    lengths[0] = longest
    lengths = lengths.clamp(1, longest - prompt).tolist()
    vocabulary = here.config.vocab_size
    draw = lambda n: torch.randint(1, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    args = grpo.Args(group_size=group_size, prompts_per_step=prompts * grpo.WORLD, micro_batch_tokens=budget)
    policy = here.policy(compile=compile)
    policy.temperature = 100.0  # nearly uniform, so that a sampler can have reported -log V for each token
    optimizer, asked = with_optimizer(policy), [draw(prompt) for _ in range(prompts)]
    completions = [grpo.Completion(draw(n), "stop", [-math.log(vocabulary)] * n) for n in lengths]
    rewards = (torch.arange(len(lengths), device=here.device) % 2).float().view(prompts, group_size)
    totals = [prompt + length for length in lengths]
    plan = grpo.micro_batches(totals, budget, here.device)
    work = {"tokens": sum(totals), "longest": max(totals), "micro_batches": len(plan)}
    work["operations"] = operations(here.config, totals)
    return lambda: grpo.train_step(policy, None, optimizer, args, asked, completions, rewards), work


def operations(config, totals):
    """Of a forward and backward pass over sequences of so many tokens: 6·N a token, and attention. A layer's takes
    12·S²·hidden, of which the causal mask leaves half. What checkpointing recomputes is not counted."""
    attention = 6 * config.num_hidden_layers * config.hidden_size * sum(total**2 for total in totals)
    return 6 * fits.parameters_of(config)[0] * sum(totals) + attention


def union(spans):
    """The time that (start, end, ...) cover, however they overlap, and that from the first start to the last end."""
    covered, reached = 0, -math.inf
    for start, end, *_ in sorted(spans):
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered, reached - min(spans)[0]


def run(*command):
    """Run a Python program to its end. What it says last is the message, if it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
        raise RuntimeError(f"{Path(command[0]).name}, exit code {done.returncode}: {said[-1]}")


# The items: each returns (True: holds, False, or None: not run; numbers; text) ----------------------------------------

def vllm(here):
    """In a process of its own, which has the GPU to itself: see worker."""
    if here.gpu and not find_spec("vllm"):
        return None, {}, "no vLLM here"
    if here.quick or "RANK" in os.environ:
        return None, {}, "--quick" if here.quick else "torchrun: python runs it"
    with tempfile.TemporaryDirectory() as folder:
        run(__file__, "--size", here.size, "--worker", f"{folder}/numbers")
        numbers = json.loads(Path(folder, "numbers").read_text())
    shown = (f"{name} {number if name == 'sampler' else f'{number:.3g}'}" for name, number in numbers.items())
    text = ", ".join(shown) + " (logp_diff < 0.05, gb_asleep < 3)"
    return numbers["logp_diff"] < 0.05 and numbers["gb_asleep"] < 3, numbers, text


def worker(size, file):
    """vLLM as the scripts use it, its numbers into the file. Without vLLM HFSampler goes through the same motions."""
    device = join_ranks(10)
    gpu, kind = device.type == "cuda", grpo.VLLMSampler if find_spec("vllm") else grpo.HFSampler
    used = lambda: (torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / 1e9 if gpu else 0.0  # noqa: E731
    clock = [time.perf_counter()]
    lap = lambda: clock.append(time.perf_counter()) or clock[-1] - clock[-2]  # noqa: E731  seconds since the last one
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(fits.config_of(size), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        if gpu:
            torch.cuda.empty_cache()
        tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
        tokenizer.save_pretrained(folder)
        args = grpo.Args(model=folder, prompts_per_step=16, max_prompt_tokens=64, max_new_tokens=512 if gpu else 16)
        numbers = {"logp_diff": 0.0, "sampler": kind.__name__, "gb_before": used()}
        lap()
        sampler = kind(args, tokenizer, device)
        numbers |= {"seconds_start": lap(), "gb_asleep": used() - numbers["gb_before"]}
        policy = grpo.load_policy(args, device)
        optimizer = with_optimizer(policy)
        prompts = torch.randint(1, 17, (16, 64), generator=torch.Generator().manual_seed(0)).tolist()
        for turn in ("first", "second"):
            lap()
            sampler.load(grpo.full_weights(policy, sampler.dtype))
            numbers |= {f"seconds_load_{turn}": lap(), f"gb_awake_{turn}": used()}
            completions = sampler(prompts, args.group_size, 0, 1.0)
            numbers[f"tokens_per_second_{turn}"] = sum(len(completion.ids) for completion in completions) / lap()
            sampler.sleep()
            rewards = (torch.arange(len(completions), device=device) % 2).float().view(len(prompts), -1)
            metrics = grpo.train_step(policy, None, optimizer, args, prompts, completions, rewards)
            numbers["logp_diff"] = max(numbers["logp_diff"], metrics["logp_diff"])
    Path(file).write_text(json.dumps(numbers))


def numerics(here):
    """bf16 against fp32, both from fp32 weights: log-probabilities and gradients."""
    batch = here.batch(4, 64, 448)
    fp32, bf16 = (second_pass(here, here.policy(precision), batch) for precision in ("fp32", "bf16"))
    gap = (bf16[0] - fp32[0])[batch[2]].abs()
    cosine, _, norms = compare(fp32[3], bf16[3], here.device)
    numbers = {"logp_mean": gap.mean().item(), "logp_max": gap.max().item(), "cosine": cosine, "norms": norms}
    holds = numbers["logp_mean"] < 0.02 and numbers["logp_max"] < 0.2 and cosine > 0.99 and abs(norms - 1) < 0.02
    return holds, numbers, (f"|Δ log p| mean {gap.mean():.1e} (< 0.02), max {gap.max():.1e} (< 0.2); gradients: cosine "
                            f"{cosine:.4f} (> 0.99), ratio of norms {norms:.4f} (1 ± 0.02)")


def checkpointing(here):
    """Gradient checkpointing on against off: the same gradient, less memory, more time."""
    batch = here.batch(2, 64, 960 // here.shrink)
    on, off = (second_pass(here, here.policy(checkpointing=way), batch) for way in (True, False))
    (_, difference, _), seconds, gb = compare(off[3], on[3], here.device), on[1] / off[1], on[2] / off[2]
    numbers = {"gradient_difference": difference, "time": seconds, "memory": gb}
    return difference < 0.02 and not gb >= 1, numbers, (
        f"gradients differ by {difference:.1e} (< 0.02); on / off: time {seconds:.2f}, memory {gb:.2f} (< 1)")


class FullLogits(grpo.Policy):
    """Policy with the logits of all positions at once."""

    def forward(self, input_ids, starts, mask):
        logits = self.model(input_ids=input_ids[:, :-1], use_cache=False).logits.float() / self.temperature  # [B, S, V]
        logp = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)  # [B, S - 1]
        places = starts[:, None] - 1 + torch.arange(mask.shape[1], device=mask.device)  # [B, T]
        return logp.gather(1, places), None


def head(here):
    """The head in chunks against full logits, of whole rows: log-probabilities, time, memory."""
    input_ids, starts, mask = here.batch(4, 16, 1008 if here.gpu else 252)
    batch = input_ids, starts, torch.ones_like(mask)
    chunks = second_pass(here, here.policy(), batch)
    with patch.object(grpo, "Policy", FullLogits):
        full = second_pass(here, here.policy(), batch)
    gap, seconds, gb = (chunks[0] - full[0]).abs().max().item(), chunks[1] / full[1], chunks[2] / full[2]
    _, difference, _ = compare(full[3], chunks[3], here.device)
    numbers = {"logp_max": gap, "gradient_difference": difference, "time": seconds, "memory": gb}
    return gap < 0.05 and difference < 0.02 and not gb >= 0.5, numbers, (
        f"|Δ log p| at most {gap:.1e} (< 0.05), gradients differ by {difference:.1e} (< 0.02); chunks / full: time "
        f"{seconds:.2f}, memory {gb:.2f} (< 0.5)")


def step2k(here, longest=2048, compile=False):
    """A training step: tokens a second, share of the card's bf16 peak, memory. The goal is for 1.5B at 4096 alone."""
    one_step, work = training_step(here, longest, compile)
    metrics, first, _ = here.measured(one_step)
    seconds = statistics.median(here.measured(one_step)[1] for _ in range(3 if here.gpu else 1))
    peak = 1e12 * next((PEAKS[name] for name in PEAKS if name in here.card), math.nan)
    share, speed = work["operations"] / seconds / peak, work["tokens"] / seconds
    numbers = {**work, "seconds": seconds, "seconds_first": first, "tokens_per_second": speed, "share_of_peak": share}
    text = (f"{share:.1%} of the card's {peak / 1e12:.0f} T operations/s, {speed:.0f} tokens/s a rank: "
            f"{work['tokens']} in {work['micro_batches']} micro-batches, rows up to {work['longest']}; {seconds:.2f} s, "
            f"the first {first:.1f} s")
    if here.gpu:
        numbers["gb_allocated"] = torch.cuda.max_memory_allocated() / 1e9
        text += f", {numbers['gb_allocated']:.1f} GB"
    goal = here.size == "1.5B" and longest == 4096
    return metrics["grad_norm"] > 0 and not (goal and share < 0.5), numbers, text + (" (≥ 50 %)" if goal else "")


def step4k(here):
    """The same at 4096 tokens."""
    return step2k(here, 4096)


def compiled(here):
    """--compile: the same gradients, and the step at 4096 tokens once more; its first one pays for the compilation."""
    if here.quick:
        return None, {}, "--quick"
    batch = here.batch(4, 64, 448)
    eager, fused = (second_pass(here, here.policy(compile=way), batch)[3] for way in (False, True))
    _, difference, _ = compare(eager, fused, here.device)
    holds, numbers, text = step2k(here, 4096, compile=True)
    numbers["gradient_difference"] = difference
    return holds and difference < 0.02, numbers, f"gradients differ by {difference:.1e} (< 0.02); {text}"


def where(here):
    """Where a step's time goes: kinds of kernels, the ten longest, gaps between kernels, how often the host waits."""
    one_step, work = training_step(here, 4096)
    one_step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if here.gpu else [])]) as profiler:
        one_step()
        here.measured(lambda: None)  # until the card is done
    waiting = WAITS if here.gpu else WOULD_WAIT
    waits = sum(event.name in waiting for event in profiler.events()) / work["micro_batches"]
    spans = []  # (start, end, name), microseconds: kernels, or on a CPU the operators without what they call
    for event in profiler.events():
        if not here.gpu:
            spans.append((event.time_range.start, event.time_range.start + event.self_cpu_time_total, event.name))
        elif event.device_type == torch.autograd.DeviceType.CUDA and not re.match("FSDP::|Optimizer", event.name):
            spans.append((event.time_range.start, event.time_range.end, event.name))  # without marks in the timeline
    totals, kinds, (busy, elapsed) = {}, dict.fromkeys(KINDS, 0), union(spans)
    for start, end, name in spans:
        totals[name] = totals.get(name, 0) + end - start
    whole = sum(totals.values())
    for name in totals:
        kinds[next(kind for kind in KINDS if re.search(KINDS[kind], name.lower()))] += totals[name] / whole
    longest = sorted(totals, key=totals.get, reverse=True)[:10]
    numbers = {"kinds": kinds, "gaps": 1 - busy / elapsed, "waits_per_micro_batch": waits}
    numbers["longest"] = {name: totals[name] / whole for name in longest}
    text = ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items())
    text += f"; nothing runs for {numbers['gaps']:.1%} of the time; the host waits {waits:.1f} times a micro-batch"
    return True, numbers, text + "".join(f"\n{'':31}{totals[name] / whole:6.1%}  {name[:80]}" for name in longest)


def memory(here):
    """The peak of a step's second micro-batch at the default flags: measured, simulated, by README's arithmetic."""
    flags = grpo.Args()
    prompt, completion = flags.max_prompt_tokens // here.shrink, flags.max_new_tokens // here.shrink
    rows = flags.micro_batch_tokens // (flags.max_prompt_tokens + flags.max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        run(ROOT / "tests" / "fits.py", "--cases", f"{here.size}:{grpo.WORLD}", "--json", f"{folder}/fits.json",
            "--max_prompt_tokens", prompt, "--max_new_tokens", completion,
            "--micro_batch_tokens", rows * (prompt + completion))
        result = json.loads(Path(folder, "fits.json").read_text())[0]
    policy = here.policy()
    optimizer = with_optimizer(policy)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its states
    optimizer.zero_grad()

    def two_micro_batches():
        with torch.device(here.device):
            fits.micro_batch(policy, rows, prompt, completion)
            fits.micro_batch(policy, rows, prompt, completion)

    before = torch.cuda.memory_allocated() / 1e9 if here.gpu else 0
    numbers = {key: sum(result[key].values()) / 1e9 for key in ("simulated", "arithmetic")}
    numbers |= {"measured": before + here.measured(two_micro_batches)[2]}
    numbers |= {"reserved": torch.cuda.max_memory_reserved() / 1e9 if here.gpu else math.nan}
    return not abs(numbers["measured"] / numbers["simulated"] - 1) > 0.1, numbers, (
        "{measured:.3g} GB measured ({reserved:.3g} reserved), {simulated:.3g} simulated (± 10 %), {arithmetic:.3g} by "
        "README's arithmetic without its 2 GB for vLLM asleep").format(**numbers)


def toy(here):
    """python grpo.py, as README has it."""
    if here.quick or "RANK" in os.environ:
        return None, {}, "--quick" if here.quick else "torchrun: python runs it"
    with tempfile.TemporaryDirectory() as folder:
        run(ROOT / "grpo.py", "--output_dir", f"{folder}/toy")
        rows = [json.loads(line) for line in Path(folder, "toy", "metrics.jsonl").read_text().splitlines()]
    numbers = {"accuracy": rows[-1]["eval_accuracy"], "logp_diff": max(row["logp_diff"] for row in rows)}
    text = "accuracy {accuracy:.3f} (> 0.9), logp_diff {logp_diff:.1e}".format(**numbers)
    return numbers["accuracy"] > 0.9, numbers, text


def resume(here):
    """The toy, killed after a checkpoint and resumed: every step is there once, and the model."""
    if here.quick or "RANK" in os.environ:
        return None, {}, "--quick" if here.quick else "torchrun: python runs it"
    with tempfile.TemporaryDirectory() as folder:
        saved, log = Path(folder, "run", "checkpoints", "step_2"), Path(folder, "run", "metrics.jsonl")
        flags = ["--steps", "8", "--save_every", "2", "--output_dir", f"{folder}/run"]
        process = subprocess.Popen([sys.executable, ROOT / "grpo.py", *flags], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline and not saved.exists():
            time.sleep(0.01)
        process.kill()
        if process.wait() >= 0 or not saved.exists():
            raise RuntimeError("the run ended by itself, or had no checkpoint after 600 s")
        killed = len(log.read_text().splitlines())
        run(ROOT / "grpo.py", "--resume", f"{folder}/run")
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        whole = Path(folder, "run", "final", "model.safetensors").exists()
    return steps == list(range(1, 9)) and whole, {"killed_after": killed, "steps": steps}, (
        f"killed after step {killed} of 8, then steps {steps[0]} to {steps[-1]}, final/ is there: {whole}")


# The table ------------------------------------------------------------------------------------------------------------

ITEMS = {
    vllm: "vLLM: start, sleep, wake, reload", numerics: "bf16 against fp32", checkpointing: "gradient checkpointing",
    head: "the head in chunks", step2k: "a training step of 2048 tokens", step4k: "a training step of 4096 tokens",
    compiled: "the same with --compile",
    where: "where its time goes", memory: "peak memory", toy: "the toy by default", resume: "saved, killed, resumed",
}


def outcome(here, item):
    """An item's row of the JSON file; of several ranks one where it does not hold, else the first."""
    start = time.perf_counter()
    try:
        holds, numbers, text = item(here)
    except (Exception, SystemExit) as error:  # whatever it is, it is this item's answer, and the next may hold
        holds, numbers, text = False, {}, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    gc.collect()
    if here.gpu:
        torch.cuda.empty_cache()
    answers = [None] * grpo.WORLD
    dist.all_gather_object(answers, (holds, text))
    holds, text = next((answer for answer in answers if answer[0] is False), answers[0])
    if holds and not here.gpu:
        holds, text = None, f"no GPU; on this CPU it holds, nan is not measured: {text}"
    numbers = {key: None if number != number else number for key, number in numbers.items()}  # JSON has no nan
    verdict = {True: "holds", False: "does not hold", None: "not run"}[holds]
    return {"verdict": verdict, "text": text, "numbers": numbers, "seconds": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    names = {item.__name__: item for item in ITEMS}
    parser.add_argument("--size", default="0.5B", choices=fits.SHAPES, help="the model's shape (0.5B; on a CPU tiny)")
    parser.add_argument("--only", default=",".join(names), help="items, with commas between: " + ", ".join(names))
    file = f"runs/gpu-{time.strftime('%Y%m%d-%H%M%S')}.json"
    parser.add_argument("--json", default=file, help="file for the numbers (runs/gpu-<time>.json)")
    parser.add_argument("--quick", action="store_true", help="without vllm, compiled, toy and resume")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if options.worker:
        return worker(options.size, options.worker)
    check(set(options.only.split(",")) <= set(names), f"--only {options.only}: the items are {', '.join(names)}")
    here = Here(options)
    machine = {"card": here.card, "ranks": grpo.WORLD, "size": here.size, "torch": torch.__version__,
               "transformers": transformers.__version__}
    say(", ".join(f"{key}: {value}" for key, value in machine.items()))
    rows = {}
    for name in options.only.split(","):
        rows[name] = row = outcome(here, names[name])
        say(f"{row['verdict']:13}  {name:13}  {ITEMS[names[name]]}, {row['seconds']:.0f} s: {row['text']}")
    verdicts = [row["verdict"] for row in rows.values()]
    counts = (f"{verdicts.count(verdict)} {verdict}" for verdict in ("holds", "does not hold", "not run"))
    say(", ".join(counts) + f"; written to {options.json}")
    if grpo.RANK == 0:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps({"machine": machine, "items": rows}, indent=1))
    dist.destroy_process_group()
    sys.exit("does not hold" in verdicts)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
