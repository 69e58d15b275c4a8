"""What a step costs the host: seconds of Python on a rank, with a model, an engine and a policy that compute nothing.

    OMP_NUM_THREADS=1 python tests/host_cost.py [--prompts 128 --group_size 8 --tokens 2048]

A rank's share is 1024 completions of 2048 tokens by default: all of the default step on one GPU, eight times its share
on eight. What is over 2 % of a step of 60 s is marked. Seconds are of this process on a core, but by the clock for
grading, which is done in other processes. Tensors are on the CPU: what a GPU computes instead stands in brackets.
"""

import argparse
import cProfile
import os
import pstats
import random
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

import grpo  # noqa: E402
from eval import Grader, fail, join_ranks, load_tokenizer, log_step  # noqa: E402
from lambda_grpo_prm import process_set_sizes  # noqa: E402

VOCABULARY, STEP = 18, 60.0  # tests/tiny's tokens; seconds


class StubPolicy(torch.nn.Module):
    """One parameter for the log-probability of every token."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, starts, mask):
        logp = self.weight * mask  # [B, T]
        return logp, logp.detach()


class StubModel:
    """All tokens alike, but the end of the sequence never comes."""

    device, config = torch.device("cpu"), None

    def __call__(self, input_ids, **_):
        logits = torch.zeros(len(input_ids), 1, VOCABULARY)
        logits[..., 0] = -1e9
        return SimpleNamespace(logits=logits)


def stub_sampler(kind, **attributes):
    """A sampler with these attributes, that no model's file was read for."""
    sampler = kind.__new__(kind)
    vars(sampler).update(attributes)
    return sampler


def stub_engine(completions, group_size):
    """An engine of vLLM that has its answers ready, in the form of flat_logprobs=True."""
    sys.modules["vllm"] = ModuleType("vllm")
    sys.modules["vllm"].SamplingParams = dict
    outputs = []
    for ids, finish, logps in completions:
        outputs.append(SimpleNamespace(token_ids=ids, finish_reason=finish, logprobs=SimpleNamespace(logprobs=logps)))
    requests = [SimpleNamespace(outputs=outputs[i : i + group_size]) for i in range(0, len(outputs), group_size)]
    return SimpleNamespace(generate=lambda *_, **__: requests)


def row(what, function, clock=time.process_time):
    """Run and print a row; returns what the function returns."""
    start = clock()
    result = function()
    taken = clock() - start
    print(f"{what:75} {taken:8.2f} s {taken / STEP:6.1%}{'  over 2 %' if taken > 0.02 * STEP else ''}", flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--prompts", type=int, default=128, help="of the rank (128)")
    parser.add_argument("--group_size", type=int, default=8, help="completions of a prompt (8)")
    parser.add_argument("--tokens", type=int, default=2048, help="of a completion (2048)")
    options = parser.parse_args()
    device, generator, size = join_ranks(10), random.Random(0), options.group_size
    draw = lambda length: [generator.randrange(1, VOCABULARY) for _ in range(length)]  # noqa: E731
    prompts, count = [draw(256) for _ in range(options.prompts)], options.prompts * size
    completions = [grpo.Completion(draw(options.tokens), "length", [0.0] * options.tokens) for _ in range(count)]
    args = grpo.Args(prompts_per_step=options.prompts, group_size=size, max_new_tokens=options.tokens)
    print(f"{count} completions of {options.tokens} tokens, torch {torch.__version__}")

    seeds = [(i, k) for i in range(options.prompts) for k in range(size)]
    row("sampling: uniform random numbers of HFSampler",
        lambda: np.stack([np.random.default_rng(own).random(options.tokens) for own in seeds]))
    grpo.DynamicCache = lambda config: SimpleNamespace(batch_repeat_interleave=lambda n: None)
    hf = stub_sampler(grpo.HFSampler, model=StubModel(), max_new_tokens=options.tokens, stops=[0])
    row("sampling: all of HFSampler but the model [masks, softmax, draws]", lambda: hf(prompts, size, 0, 1.0))
    vllm = stub_sampler(grpo.VLLMSampler, engine=stub_engine(completions, size), max_new_tokens=options.tokens)
    row("sampling: VLLMSampler's reading of log-probabilities", lambda: vllm(prompts, size, 0, 1.0))

    tokenizer = load_tokenizer(str(ROOT / "tests" / "tiny"))
    row("decoding (the tokenizer of tests/tiny)",
        lambda: tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True))
    prose = "so we have 2x + 3 = 11, " * (options.tokens // 8)  # about three characters a token
    asked = [{"problem": "?", "answer": "197"} for _ in range(count)]
    texts = [f"{prose} \\boxed{{{i}}}" for i in range(count)]
    with Grader() as grader:
        grader.grade("\\boxed{x}", "x+0")  # starts a worker
        row("grading: answers that are numbers", lambda: grpo.rewards_of(texts, asked, grader), time.perf_counter)
        asked = [{"problem": "?", "answer": "\\frac{x}{3}+1"} for _ in range(count)]
        texts = [f"{prose} \\boxed{{\\frac{{x}}{{3}}+{i}}}" for i in range(count)]
        row(f"grading: each by math-verify, all different, {grader.threads._max_workers} workers",
            lambda: grpo.rewards_of(texts, asked, grader), time.perf_counter)

    rewards = torch.tensor([generator.randrange(2) for _ in completions]).float().view(-1, size)
    policy = fully_shard(StubPolicy())
    optimizer, profiler = torch.optim.AdamW(policy.parameters(), lr=0.0), cProfile.Profile()
    metrics = row("train_step [loss, weights, padding]", lambda: profiler.runcall(
        grpo.train_step, policy, None, optimizer, args, prompts, completions, rewards))
    stats = pstats.Stats(profiler).stats  # {(file, line, name): (calls, all calls, seconds in itself, in all, callers)}
    for (_, _, name), (_, calls, own, _, _) in sorted(stats.items(), key=lambda item: -item[1][2])[:6]:
        print(f"    {own:6.2f} s in {calls} × {name}")
    lengths = [generator.randrange(options.tokens) for _ in completions]
    row("    micro_batches, of random lengths", lambda: grpo.micro_batches(lengths, args.micro_batch_tokens, device))
    ids = torch.tensor([c.ids for c in completions]).view(options.prompts, size, -1)  # [P, G, T]
    row("process sets of lambda_grpo_prm.py [all of it]", lambda: process_set_sizes(ids, torch.ones_like(ids).bool()))
    with tempfile.TemporaryDirectory() as folder:
        samples = zip(asked, texts, rewards.flatten().tolist())
        row("writing metrics and samples", lambda: log_step(Path(folder), args, {"step": 1, **metrics}, ["step"], samples))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
