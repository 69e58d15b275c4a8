"""What the variants cost: eligibility traces against a T × T matrix, and a training step of each script against grpo.py's.

    python tests/cost_of_variants.py [--device cpu|cuda]

Takes about three minutes on one CPU core. Ratios are between medians of interleaved repetitions in this run; the traces' memory
is measured in processes of their own (on a CPU: Linux only).
"""

import argparse
import importlib
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import grpo_lambda_traces as traces  # noqa: E402

BATCH, LENGTH, DECAY = 16, 4096, 0.99
SCRIPTS = ("grpo", "grpo_lambda_traces", "lambda_grpo_learnable", "lambda_grpo_prm")


def by_matrix(x, decay, style):
    """The trace by a [T, T] matrix of weights, built once for the whole batch: the plain way, at its best."""
    t = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
    lag = t[:, None] - t  # [T, T]: the place of row t's token k, l = t - k
    weights = decay ** lag.clamp(min=0)
    if style == "both":
        weights = torch.maximum(weights, decay ** t.expand_as(lag))
    return x @ (weights * (lag >= 0)).T


def seconds(function, device):
    """One call's time, the device's work included."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(functions, device, repetitions):
    """{name: median seconds}, after a call of each to warm up."""
    times = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            took = seconds(function, device)
            if repetition:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def both_ways(trace, style, device):
    """Forward and backward of a trace of [16, 4096]."""
    x = torch.randn(BATCH, LENGTH, device=device, requires_grad=True)
    trace(x, DECAY, style).square().sum().backward()


def peak_megabytes(way, style, device):
    """The most that forward and backward held, over what was there before."""
    function = traces.trace if way == "trace" else by_matrix
    if device == "cuda":
        both_ways(function, style, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_ways(function, style, device)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    x = torch.randn(BATCH, 64, requires_grad=True)
    function(x, DECAY, style).square().sum().backward()  # what torch itself needs the first time
    Path("/proc/self/clear_refs").write_text("5")  # Linux: starts the peak anew
    before = resident("VmRSS")
    both_ways(function, style, device)
    return (resident("VmHWM") - before) / 1e3


def resident(what):
    """A line of Linux's account of this process's memory, in kB."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))


def compare_traces(device):
    for style in ("recent", "both"):
        ways = {"trace": lambda: both_ways(traces.trace, style, device), "matrix": lambda: both_ways(by_matrix, style, device)}
        times = interleaved(ways, device, 7)
        memory = {}
        for way in ways:
            command = [sys.executable, __file__, "--peak", way, "--style", style, "--device", device]
            memory[way] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{style:>7}: trace {times['trace'] * 1e3:8.1f} ms, {memory['trace']:7.1f} MB;  matrix {times['matrix'] * 1e3:8.1f} ms, "
              f"{memory['matrix']:7.1f} MB;  {times['matrix'] / times['trace']:5.1f} times as fast, "
              f"{memory['trace'] / memory['matrix']:.3f} of the memory")


def compare_steps(repetitions):
    """A training step on the tiny model: 16 prompts, 8 completions of 10 to 40 tokens each, the toy's own settings."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 16, (12,), generator=generator).tolist() for _ in range(16)]
    lengths = torch.randint(10, 41, (128,), generator=generator).tolist()
    ids = [torch.randint(1, 16, (length,), generator=generator).tolist() for length in lengths]
    rewards = torch.randint(0, 2, (16, 8), generator=generator).float()
    steps = {}
    for name in SCRIPTS:
        script = importlib.import_module(name)
        args = script.Args(**script.TOY)
        policy = script.load_policy(args, mesh, torch.device("cpu"), prompts[0])
        if hasattr(args, "lam_init"):
            policy.register_buffer("lam", torch.tensor(args.lam_init))
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
        completions = [script.Completion(row, "stop") for row in ids]
        steps[name] = lambda s=script, p=policy, o=optimizer, a=args, c=completions: s.train_step(p, None, o, a, prompts, c, rewards)
    times = interleaved(steps, "cpu", repetitions)
    for name in SCRIPTS:
        print(f"{name:>22}: {times[name]:6.3f} s a training step, {times[name] / times['grpo']:.3f} of grpo.py's")
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repetitions", type=int, default=25, help="of the training steps")
    parser.add_argument("--peak", choices=("trace", "matrix"), help=argparse.SUPPRESS)
    parser.add_argument("--style", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print(peak_megabytes(args.peak, args.style, args.device))
    print(f"traces of [{BATCH}, {LENGTH}], forward and backward, on {args.device}:")
    compare_traces(args.device)
    print("training steps at the same rollouts, on cpu:")
    compare_steps(args.repetitions)


if __name__ == "__main__":
    main()
