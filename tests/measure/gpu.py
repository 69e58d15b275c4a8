"""The first script to run on a machine with GPUs: a table of items that hold there, do not hold, or were not run.

On one GPU, three commands of at most ten minutes each, the most valuable items first:

    python tests/measure/gpu.py --json $OUT/gpu.json --size 1.5B --only toy numerics sampler step4k memory
    python tests/measure/gpu.py --json $OUT/gpu.json --size 1.5B --only compiled where step2k checkpointing head equal
    python tests/measure/gpu.py --json $OUT/gpu.json --size 7B/4 --only step4k micro same resume

Others:

    torchrun --nproc_per_node=8 tests/measure/gpu.py --size 7B       eight GPUs
    python tests/measure/gpu.py --fits 8 --size 7B                   no GPU: a step's memory on each of eight, simulated

Nothing is downloaded: the weights are random, and the tokenizer and the toy are those of tests/tiny, so neither vLLM nor
math-verify is needed. Each item runs in a process of its own, and its numbers are added to the file of --json at once.
If an item fails, its line of the table says so, and the next one runs. The exit code is 1 if any item does not hold.
Under torchrun all ranks do an item together; if one rank fails alone, the item ends after ten minutes. Without a GPU
every item is "not run", but its code runs on a tiny model with short sequences, and an item that fails even there does
not hold. README.md in this folder says how the simulation of --fits works, and where it ends.
"""

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

import grpo  # noqa: E402
from eval import fail  # noqa: E402

TINY = ROOT / "tests" / "tiny"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SHAPES = {  # of Qwen2.5: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
    "tiny": (128, 256, 2, 4, 2, 4096, True),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B/4": (3584, 18944, 7, 28, 4, 152_064, False),  # a quarter of its layers fits on one card
    "7B": (3584, 18944, 28, 28, 4, 152_064, False),
}
NODE = 8  # GPUs
ROWS = {  # the rows of the simulated table, with the kinds of torch's tracker that belong to each
    "parameters": ("Sharded Param",),
    "gradients": ("Sharded Grad",),
    "AdamW": ("OptState",),
    "gathered layers": ("Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter"),
    "activations and temporaries": ("Activation", "Temp", "Buffer", "Inputs"),
}
PEAKS = {  # dense bf16, 1e12 operations a second, by the makers' data sheets; the first whose key is in the card's name
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "4090": 165,
}


# Models and micro-batches ---------------------------------------------------------------------------------------------

def config_of(size):
    """transformers' configuration of a model in the shape of Qwen2.5."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[size]
    return transformers.Qwen2Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, rope_theta=1e6,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )


def parameters_of(config):
    """The number of a model's parameters; tied ones count once."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def random_model(config):
    """A bf16 model with random weights, the same ones each time."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def load_policy(model, mesh, bf16=True, checkpointing=True, compile=False):
    """grpo.load_policy of a model that exists already, with a GPU's settings, whatever device it is on.

    mesh: (nodes, GPUs of a node), named as load_policy names them.
    """
    nodes, local = mesh.shape
    precision = MixedPrecisionPolicy if bf16 else lambda *_: MixedPrecisionPolicy()
    with contextlib.ExitStack() as stack:
        for where, name, new in (
            (grpo.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model),
            (grpo.AutoConfig, "from_pretrained", lambda *_, **__: model.config),
            (dist, "init_device_mesh", lambda *_, **__: mesh), (grpo, "WORLD", nodes * local),
            (grpo, "MixedPrecisionPolicy", precision), (torch, "allclose", lambda *_, **__: True),
        ):
            stack.enter_context(patch.object(where, name, new))
        stack.enter_context(patch.dict(os.environ, LOCAL_WORLD_SIZE=str(local)))
        policy = grpo.load_policy(grpo.Args(compile=compile), SimpleNamespace(type="cuda"))
    if not checkpointing:  # load_policy wraps the forward of each layer
        for module in policy.modules():
            vars(module).pop("forward", None)
    return policy


def mesh_of(device, ranks):
    """load_policy's mesh: shards inside a node, replicas across nodes."""
    local = min(ranks, NODE)
    return dist.init_device_mesh(device, (ranks // local, local), mesh_dim_names=("replicate", "shard"))


def micro_batch(policy, input_ids, starts, mask):
    """A forward and backward pass with made-up advantages, which adds to the gradients. Returns log-probabilities."""
    logp, _ = policy(input_ids, starts, mask)  # [B, T]
    advantages = torch.linspace(-1, 1, len(logp), device=logp.device)
    loss, _ = grpo.policy_loss(logp, logp.detach(), advantages, mask / mask.sum())
    (loss * WORLD).backward()
    return logp.detach()


def full_rows(rows, prompt, completion, device="cpu"):
    """A batch of rows that all have the same lengths: input_ids [B, S], starts [B], mask [B, T]."""
    mask = torch.ones(rows, completion, dtype=torch.bool, device=device)
    starts = torch.full((rows,), prompt, device=device)
    return torch.zeros(rows, prompt + completion, dtype=torch.long, device=device), starts, mask


def with_optimizer(policy):
    """AdamW as the scripts have it, but with a learning rate of 0: a step costs as much, and changes nothing."""
    return torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def make_states(policy, optimizer):
    """A step with gradients of zero, after which AdamW has its states."""
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


# --fits: a step's memory, simulated -----------------------------------------------------------------------------------

class KnownMask(TorchFunctionMode):
    """Answers mask.nonzero(as_tuple=True) for a mask [B, T] of ones: fake tensors hold no values to count."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.nonzero:
            rows, length = args[0].shape
            places = torch.arange(rows * length)
            return places // length, places % length
        return func(*args, **(kwargs or {}))


def simulate(config, ranks, rows, prompt, completion):
    """{row: bytes} at the peak of the second of two micro-batches on rank 0."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = mesh_of("cpu", ranks)  # before FakeTensorMode, because it makes real tensors
    # transformers makes a mask if it finds packed sequences among the positions; fake ones have no values to look at
    unpacked = patch("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    try:
        with FakeTensorMode(), unpacked:
            policy = load_policy(random_model(config), mesh)
            optimizer = with_optimizer(policy)
            make_states(policy, optimizer)
            tracker = FSDPMemTracker(policy, optimizer)
            with tracker, KnownMask():
                for _ in range(2):  # the second one runs beside the gradients of the first
                    micro_batch(policy, *full_rows(rows, prompt, completion))
                    tracker.reset_mod_stats()
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    finally:
        dist.destroy_process_group()
    peak = {getattr(kind, "value", kind): number for kind, number in peak.items()}
    parts = {row: sum(peak[kind] for kind in kinds) for row, kinds in ROWS.items()}
    if sum(parts.values()) != peak["Total"]:
        fail(f"the rows do not cover all kinds of torch's tracker: {', '.join(peak)}", 1)
    return parts


def print_memory(config, ranks):
    """The peak at the default flags, row by row."""
    warnings.filterwarnings("ignore")
    if ranks < 1 or ranks > NODE and ranks % NODE:
        fail(f"--fits {ranks}: up to {NODE} ranks, or whole nodes of {NODE}")
    args = grpo.Args()
    prompt, completion = args.max_prompt_tokens, args.max_new_tokens
    rows = max(1, args.micro_batch_tokens // (prompt + completion))
    print(f"GB on each of {ranks} GPUs at the peak of a training step; {rows} × {prompt + completion} tokens; torch "
          f"{torch.__version__}", flush=True)
    parts = simulate(config, ranks, rows, prompt, completion)
    for row, number in {**parts, "together": sum(parts.values())}.items():
        print(f"{row:27} {number / 1e9:8.1f}")


# What the items share -------------------------------------------------------------------------------------------------

class Here:
    """This machine, and the size that was asked for."""

    def __init__(self, size):
        self.device = grpo.join_ranks()
        self.gpu = self.device.type == "cuda"
        self.card = torch.cuda.get_device_name() if self.gpu else "no GPU"
        self.size = size if self.gpu else "tiny"
        self.shrink = 1 if self.gpu else 32  # divides lengths
        self.config, self.mesh = config_of(self.size), mesh_of(self.device.type, WORLD)

    def policy(self, **how):
        """A sharded policy with random weights, the same each time."""
        with torch.device(self.device):
            return load_policy(random_model(self.config), self.mesh, **how)

    def batch(self, rows, prompt, completion):
        """Random input_ids [B, S], starts [B], mask [B, T] of completions that are shorter from row to row."""
        generator = torch.Generator().manual_seed(RANK)
        input_ids = torch.randint(1, self.config.vocab_size, (rows, prompt + completion), generator=generator)
        mask = torch.arange(completion) < (completion // torch.arange(1, rows + 1))[:, None]
        return input_ids.to(self.device), torch.full((rows,), prompt, device=self.device), mask.to(self.device)

    def measured(self, function):
        """The function's result, its seconds, and the GB it held at most above those before it (nan on a CPU)."""
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

    def second_pass(self, batch, **how):
        """A policy's second pass: log-probabilities, seconds, GB, this rank's shards of all gradients as a vector."""
        policy = self.policy(**how)
        micro_batch(policy, *batch)
        policy.zero_grad()
        measured = self.measured(lambda: micro_batch(policy, *batch))
        return *measured, torch.cat([parameter.grad.to_local().flatten() for parameter in policy.parameters()])


def compare(one, other):
    """Of two vectors spread over the ranks: cosine, norm of the difference over the first's norm, ratio of norms."""
    sums = torch.stack([one @ other, one @ one, other @ other, (one - other).square().sum()]).double()
    dist.all_reduce(sums)
    dot, one, other, difference = sums.tolist()
    return dot / math.sqrt(one * other), math.sqrt(difference / one), math.sqrt(other / one)


def training_step(here, longest, compile=False, budget=None, equal=0):
    """(a function that makes a step by grpo.train_step, {tokens, longest, micro_batches, operations} of this rank).

    The completions are made up, with long-tailed lengths, most about a quarter of the longest: 64 on a GPU, 8 on a CPU.
    budget: tokens of a micro-batch. equal: the share of groups whose rewards are all the same.
    """
    prompts, group_size, prompt = (8, 8, 256) if here.gpu else (2, 4, 8)
    longest, budget = longest // here.shrink, (budget or grpo.Args().micro_batch_tokens) // here.shrink
    generator = torch.Generator().manual_seed(RANK)
    lengths = (longest / 4 * (0.8 * torch.randn(prompts * group_size, generator=generator)).exp()).long()
    lengths[0] = longest
    lengths = lengths.clamp(1, longest - prompt).tolist()
    vocabulary = here.config.vocab_size
    draw = lambda n: torch.randint(1, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    args = grpo.Args(group_size=group_size, prompts_per_step=prompts * WORLD, micro_batch_tokens=budget)
    policy = here.policy(compile=compile)
    policy.temperature = 100.0  # nearly uniform, so that a sampler can have reported -log V for each token
    optimizer, asked = with_optimizer(policy), [draw(prompt) for _ in range(prompts)]
    completions = [grpo.Completion(draw(n), "stop", [-math.log(vocabulary)] * n) for n in lengths]
    rewards = (torch.arange(len(lengths), device=here.device) % 2).float().view(prompts, group_size)
    rewards[: round(equal * prompts)] = 1.0
    totals = [prompt + length for length in lengths]
    plan = grpo.micro_batches(totals, [True] * len(totals), budget, here.device)
    work = {"tokens": sum(totals), "longest": max(totals), "micro_batches": len(plan)}
    work["operations"] = operations(here.config, totals)
    return lambda: grpo.train_step(policy, None, optimizer, args, asked, completions, rewards)[0], work


def operations(config, totals):
    """Of a forward and backward pass over sequences of so many tokens: 6·N per token, and attention. A layer's takes
    12·S²·hidden, and the causal mask leaves half of it. Recomputation by checkpointing is not counted."""
    attention = 6 * config.num_hidden_layers * config.hidden_size * sum(total**2 for total in totals)
    return 6 * parameters_of(config) * sum(totals) + attention


# The items: each returns its numbers, and (least, most) for those that have bounds -----------------------------------

def numerics(here):
    """bf16 against fp32, both from fp32 weights: log-probabilities and gradients."""
    batch = here.batch(4, 64, 448)
    fp32, bf16 = (here.second_pass(batch, bf16=way) for way in (False, True))
    gap = (bf16[0] - fp32[0])[batch[2]].abs()
    cosine, _, norms = compare(fp32[3], bf16[3])
    numbers = {"logp_mean": gap.mean().item(), "logp_max": gap.max().item(), "cosine": cosine, "ratio_of_norms": norms}
    bounds = {"logp_mean": (0, 0.02), "logp_max": (0, 0.2), "cosine": (0.99, 1.01), "ratio_of_norms": (0.98, 1.02)}
    return numbers, bounds


def on_and_off(on, off):
    """Numbers of two second passes: on / off."""
    return {"gradient_difference": compare(off[3], on[3])[1], "time": on[1] / off[1], "memory": on[2] / off[2]}


def checkpointing(here):
    """Gradient checkpointing on against off: the same gradient, less memory, more time."""
    batch = here.batch(2, 64, 960 // here.shrink)
    numbers = on_and_off(*(here.second_pass(batch, checkpointing=way) for way in (True, False)))
    return numbers, {"gradient_difference": (0, 0.02), "memory": (0, 1)}


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
    chunks = here.second_pass(batch)
    with patch.object(grpo, "Policy", FullLogits):
        full = here.second_pass(batch)
    numbers = on_and_off(chunks, full) | {"logp_max": (chunks[0] - full[0]).abs().max().item()}
    return numbers, {"logp_max": (0, 0.05), "gradient_difference": (0, 0.02)}


def step2k(here, longest=2048, compile=False):
    """A training step: tokens a second, share of the card's bf16 peak, memory."""
    one_step, work = training_step(here, longest, compile)
    metrics, first, _ = here.measured(one_step)
    seconds = statistics.median(here.measured(one_step)[1] for _ in range(3 if here.gpu else 1))
    peak = 1e12 * next((PEAKS[name] for name in PEAKS if name in here.card), math.nan)
    numbers = {**work, "seconds_first": first, "seconds": seconds, "tokens_per_second": work["tokens"] / seconds}
    numbers |= {"share_of_peak": work["operations"] / seconds / peak, "grad_norm": metrics["grad_norm"]}
    if here.gpu:
        unused = lambda: (torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / 1e9  # noqa: E731
        numbers |= {"gb_allocated": torch.cuda.max_memory_allocated() / 1e9, "gb_unused": unused()}
        torch.cuda.empty_cache()  # as before vLLM wakes up: can the allocator give back what AdamW's states lie between?
        numbers["gb_unused_after_empty_cache"] = unused()
    return numbers, {"grad_norm": (1e-6, math.inf)}


def step4k(here):
    """The same at 4096 tokens."""
    return step2k(here, 4096)


def compiled(here):
    """--compile: the same gradients, and the step at 4096 tokens once more; its first one pays for the compilation."""
    batch = here.batch(4, 64, 448)
    fp32, eager, fused = (here.second_pass(batch, **way)[3] for way in ({"bf16": False}, {}, {"compile": True}))
    numbers, bounds = step2k(here, 4096, compile=True)
    numbers |= {"cosine_eager": compare(fp32, eager)[0], "cosine": compare(fp32, fused)[0]}
    return numbers, {**bounds, "cosine": (0.99, 1.01)}


def micro(here):
    """Tokens a second with micro-batches of 8k, 16k and 32k tokens."""
    numbers = {}
    for thousands in (8, 16, 32):
        one_step, work = training_step(here, 4096, budget=thousands * 1024)
        one_step()
        numbers[f"tokens_per_second_{thousands}k"] = work["tokens"] / here.measured(one_step)[1]
        del one_step
        gc.collect()
    return numbers, {}


def equal(here):
    """A step in which half of the groups have equal rewards, and are left out, against one with all."""
    seconds = []
    for share in (0.0, 0.5):
        one_step, _ = training_step(here, 4096, equal=share)
        one_step()
        seconds.append(statistics.median(here.measured(one_step)[1] for _ in range(3 if here.gpu else 1)))
        del one_step
        gc.collect()
    return {"time": seconds[1] / seconds[0]}, {}


def same(here):
    """The tiny model in fp32, on this device against the CPU: log-probabilities."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    input_ids = torch.randint(1, 17, (8, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cpu, there = (model.to(device)(input_ids.to(device)).logits.log_softmax(-1).cpu() for device in ("cpu", here.device))
    return {"logp_max": (cpu - there).abs().max().item()}, {"logp_max": (0, 2e-3)}


def run_toy(here, *flags):
    """grpo.py as a user starts it, without vLLM: the rows of its metrics.jsonl. Not under torchrun."""
    if WORLD > 1:
        raise RuntimeError("only on one GPU")
    run = Path(flags[-1])
    command = [sys.executable, ROOT / "grpo.py", "--sampler", "hf", *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def toy(here):
    """The toy with a bf16 policy and sampler (two steps on a CPU): it has to learn, and the sampler to agree."""
    with tempfile.TemporaryDirectory() as folder:
        rows = run_toy(here, "--steps", 25 if here.gpu else 2, "--output_dir", f"{folder}/run")
    seconds = statistics.median(sum(row[key] for key in row if key.startswith("seconds_")) for row in rows)
    numbers = {"reward_first": rows[0]["reward"], "reward_last": rows[-1]["reward"], "seconds_per_step": seconds}
    numbers |= {"accuracy": rows[-1]["eval_accuracy"], "logp_diff": max(row["logp_diff"] for row in rows)}
    return numbers, {"logp_diff": (0, 0.02), **({"accuracy": (0.85, 1)} if here.gpu else {})}


def resume(here):
    """Four steps of the toy against two, and two more after --resume: the largest difference in reward."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--eval_dataset", "", "--save_every", 2)
        whole = run_toy(here, *flags, "--steps", 4, "--output_dir", f"{folder}/whole")
        run_toy(here, *flags, "--steps", 2, "--output_dir", f"{folder}/run")
        parts = run_toy(here, "--steps", 4, "--resume", f"{folder}/run")
    gaps = [abs(one["reward"] - other["reward"]) for one, other in zip(whole, parts, strict=True)]
    return {"reward_difference": max(gaps)}, {"reward_difference": (0, 0.05)}


def where(here):
    """How a step's time is spent: the share of it in which kernels run, and the shares of the twenty longest."""
    one_step, _ = training_step(here, 4096)
    one_step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if here.gpu else [])]) as profiler:
        _, seconds, _ = here.measured(one_step)
    totals = {}
    for event in profiler.key_averages():  # kernels; on a CPU operators, without those that they call
        if not here.gpu:
            totals[event.key] = event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA and not re.match("FSDP::|Optimizer", event.key):
            totals[event.key] = event.self_device_time_total  # without marks in the timeline
    numbers = {"busy": sum(totals.values()) / 1e6 / seconds}  # can be over 1, where streams overlap
    for name in sorted(totals, key=totals.get, reverse=True)[:20]:
        numbers[name[:80]] = totals[name] / sum(totals.values())
    return numbers, {}


def memory(here):
    """The peak of a step's second micro-batch at the default flags, GB: measured, and simulated as by --fits."""
    flags = grpo.Args()
    prompt, completion = flags.max_prompt_tokens // here.shrink, flags.max_new_tokens // here.shrink
    rows = flags.micro_batch_tokens // (flags.max_prompt_tokens + flags.max_new_tokens)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # it has a process group of its own
        simulated = pool.submit(simulate, here.config, WORLD, rows, prompt, completion).result()
    simulated = sum(simulated.values()) / 1e9
    policy, batch = here.policy(), full_rows(rows, prompt, completion, here.device)
    optimizer = with_optimizer(policy)
    make_states(policy, optimizer)
    before = torch.cuda.memory_allocated() / 1e9 if here.gpu else 0
    measured = before + here.measured(lambda: [micro_batch(policy, *batch) for _ in range(2)])[2]
    numbers = {"measured": measured, "simulated": simulated, "measured_to_simulated": measured / simulated}
    numbers["reserved"] = torch.cuda.max_memory_reserved() / 1e9 if here.gpu else math.nan
    return numbers, {"measured_to_simulated": (0.9, 1.1)}


def sampler(here):
    """vLLM as the scripts use it; without vLLM HFSampler makes the same calls. The last item, because vLLM stays."""
    kind, tokens = grpo.VLLMSampler if find_spec("vllm") else grpo.HFSampler, 512 // here.shrink
    tokenizer, clock = transformers.AutoTokenizer.from_pretrained(TINY), [time.perf_counter()]
    lap = lambda: clock.append(time.perf_counter()) or clock[-1] - clock[-2]  # noqa: E731  seconds since the last one
    used = lambda: -np.subtract(*torch.cuda.mem_get_info()) / 1e9 if here.gpu else 0.0  # noqa: E731  free, total
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)  # the first rank's, in which it saves the model
        if RANK == 0:
            random_model(here.config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        dist.barrier()
        args = grpo.Args(model=shared[0], prompts_per_step=16 * WORLD, max_prompt_tokens=64, max_new_tokens=tokens)
        numbers = {"vllm": kind is grpo.VLLMSampler, "logp_diff": 0.0, "gb_before": used()}
        lap()
        engine = kind(args, tokenizer, here.device)
        numbers |= {"seconds_start": lap(), "gb_asleep": used() - numbers["gb_before"]}
        policy = grpo.load_policy(args, here.device)
        dist.barrier()
    optimizer = with_optimizer(policy)
    prompts = torch.randint(1, 17, (16, 64), generator=torch.Generator().manual_seed(RANK)).tolist()
    for turn in ("first", "second"):
        lap()
        engine.load(grpo.full_weights(policy, engine.dtype))
        numbers |= {f"seconds_load_{turn}": lap(), f"gb_awake_{turn}": used()}
        completions = engine(prompts, args.group_size, 0, 1.0)
        numbers[f"tokens_per_second_{turn}"] = sum(len(completion.ids) for completion in completions) / lap()
        engine.sleep()
        rewards = (torch.arange(len(completions), device=here.device) % 2).float().view(len(prompts), -1)
        metrics, _ = grpo.train_step(policy, None, optimizer, args, prompts, completions, rewards)
        numbers["logp_diff"] = max(numbers["logp_diff"], metrics["logp_diff"])
    return numbers, {"logp_diff": (0, 0.05)}


# The table ------------------------------------------------------------------------------------------------------------

ITEMS = {
    toy: "grpo.py as it is, bf16", numerics: "bf16 against fp32", sampler: "sampling: start, sleep, load",
    step4k: "a training step of 4096 tokens", memory: "peak memory, GB", compiled: "the step with --compile",
    where: "how its time is spent", step2k: "a training step of 2048 tokens",
    checkpointing: "gradient checkpointing, on / off", head: "the head, chunks / full logits",
    equal: "half of the groups equal / none", micro: "micro-batches of 8k, 16k, 32k", same: "fp32 here / on the CPU",
    resume: "--resume / never stopped",
}


def judge(numbers, bounds):
    """Whether all numbers are within their bounds (nan, not measured, is), and both as a text."""
    holds = not any(numbers[name] < least or numbers[name] > most for name, (least, most) in bounds.items())
    shown = []
    for name, number in numbers.items():
        bound = " ({:g} to {:g})".format(*bounds[name]) if name in bounds else ""
        shown.append(f"{name} {number:.3g}{bound}")
    return holds, ", ".join(shown)


def outcome(here, item):
    """An item's row of the JSON file; of several ranks one where it does not hold, else the first."""
    start = time.perf_counter()
    try:
        numbers, bounds = item(here)
        holds, text = judge(numbers, bounds)
    except (Exception, SystemExit) as error:  # whatever it is, it is this item's answer, and the next may hold
        holds, numbers, text = False, {}, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    answers = [None] * WORLD
    dist.all_gather_object(answers, (holds, text))
    holds, text = next((answer for answer in answers if answer[0] is False), answers[0])
    if holds and not here.gpu:
        holds, text = None, f"no GPU; on this CPU it holds, nan is not measured: {text}"
    numbers = {key: None if number != number else number for key, number in numbers.items()}  # JSON has no nan
    verdict = {True: "holds", False: "does not hold", None: "not run"}[holds]
    machine = {"card": here.card, "ranks": WORLD, "size": here.size, "torch": torch.__version__,
               "transformers": transformers.__version__}
    return {"verdict": verdict, "text": text, "numbers": numbers, "seconds": time.perf_counter() - start, **machine}


def in_own_process(number, name, size):
    """The row of an item that runs in a process of its own, so that no error of the device reaches the next one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "row.json")
        environment = {**os.environ, "TORCHELASTIC_RESTART_COUNT": str(number)}  # torchrun's store holds the last item's keys
        command = [sys.executable, __file__, "--size", size, "--item", name, "--json", str(path)]
        code = subprocess.run(command, env=environment).returncode
        if path.exists():
            return json.loads(path.read_text())
    return {"verdict": "does not hold", "text": f"its process ended with code {code}", "numbers": {}, "seconds": math.nan,
            "size": size}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    names = {item.__name__: item for item in ITEMS}
    parser.add_argument("--size", default="0.5B", choices=SHAPES, help="the model's shape (0.5B; on a CPU tiny)")
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), help="items to run")
    parser.add_argument("--json", help="file to which the numbers are added (runs/gpu-<time>.json)")
    parser.add_argument("--item", choices=names, help=argparse.SUPPRESS)  # in this process, for the one that has the table
    parser.add_argument("--fits", metavar="RANKS", type=int, help="only simulate the memory of a step on so many GPUs")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.fits is not None:
        return print_memory(config_of(options.size), options.fits)
    file = Path(options.json or f"runs/gpu-{time.strftime('%Y%m%d-%H%M%S')}.json")
    if options.item:
        row = outcome(Here(options.size), names[options.item])
        if RANK == 0:
            file.write_text(json.dumps(row))
        return dist.destroy_process_group()
    rows, verdicts = json.loads(file.read_text()) if file.exists() else {}, []
    for number, name in enumerate(options.only, start=1):
        row = in_own_process(number, name, options.size)
        verdicts.append(row["verdict"])
        if RANK == 0:  # after each item: a later one may be killed
            print(f"{row['verdict']:13}  {name:13}  {ITEMS[names[name]]}, {row['seconds']:.0f} s: {row['text']}", flush=True)
            rows[f"{name} {row['size']}"] = row
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows, indent=1))
    if RANK == 0:
        counts = (f"{verdicts.count(verdict)} {verdict}," for verdict in ("holds", "does not hold", "not run"))
        print(*counts, f"written to {file}")
    sys.exit("does not hold" in verdicts)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
