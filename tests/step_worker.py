"""Run under torchrun by test_step.py: one training step on the same rollouts, cut up in several ways.

    torchrun --nproc_per_node=2 tests/step_worker.py OUTPUT_FILE CASE...

A case is script/variant:micro_batch_tokens, with a variant of VARIANTS. Rank 0 saves {case: (metrics, parameters)}.
"""

import functools
import importlib
import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

TINY = Path(__file__).with_name("tiny")

PROMPTS, GROUP = 6, 4
IDLE = {"equal": PROMPTS // 2}  # equal rewards in the first half of the prompts: one of two ranks has nothing to train on
SEVERAL = {"updates_per_batch": 3, "lr": 3e-5, "clip_low": 0.002, "clip_high": 0.002}  # so that the clip acts
VARIANTS = {
    "grpo": {
        "grpo": {"loss": "grpo"},
        "dapo": {"loss": "dapo", "clip_high": 0.28},
        "dr_grpo": {"loss": "dr_grpo"},
        "clip": {"loss": "grpo", **SEVERAL},
        "beta": {"loss": "dapo", "updates_per_batch": 2, "beta": 0.1, "lr": 3e-5},
        "idle": IDLE,
        "equal": {"equal": PROMPTS},
    },
    "grpo_lambda_traces": {"trace": {}, "weight": {"variant": "weight", "style": "recent"}, "clip": {"style": "recent", **SEVERAL},
                           "idle": IDLE},
    "lambda_grpo_learnable": {"lam": {"lam_init": 0.5}, "clip": {"lam_init": -0.5, **SEVERAL}, "idle": {"lam_init": 0.5, **IDLE},
                              "equal": {"equal": PROMPTS}},
    "lambda_grpo_prm": {"prm": {}, "clip": SEVERAL, "idle": IDLE, "beta": {"updates_per_batch": 2, "beta": 0.1, "lr": 3e-5}},
    # The papers: test_papers.py puts their scripts into PYTHONPATH
    "gmpo": {"clip": SEVERAL},
    "gspo": {"clip": {**SEVERAL, "clip_low": 2e-4, "clip_high": 2e-4}},
    "cispo": {"clip": {**SEVERAL, "clip_low": 1.0}},
    "krpo": {"krpo": {}},
    "pods": {"pods": {"keep": 3}},
    "repo": {"clip": SEVERAL},
    "alpha_dpo": {"alpha": {}},
    "flowrl": {"flowrl": {}},
    "astar_po": {"astar": {"beta": 0.1}},
    "tw_grpo": {"tw": {}},
    "g2rpo_a": {"g2rpo": {}},
    "rc_grpo": {"rc": {}},
}


@functools.cache
def tiny():
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


@functools.cache
def logps_of(prompt, ids):
    """Log-probabilities of a completion's tokens by the tiny model's full logits: what an honest sampler reports."""
    with torch.no_grad():
        logp = tiny()(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1).tolist()


def rollouts(script, shared_prefixes=True):
    """Random prompts, completions and rewards [6, 4]: lengths differ a lot, the last prompts have the long ones."""
    generator = random.Random(0)
    prompts = [[generator.randint(1, 16) for _ in range(generator.randint(1, 12))] for _ in range(PROMPTS)]
    completions, rewards = [], []
    for prompt in range(PROMPTS):
        for i in range(GROUP):
            length = generator.randint(1, 4) if prompt < 4 else generator.randint(30, 60)
            stopped = i != 0  # the first of each group is cut off: it has no end-of-sequence token (0, which pads as well)
            ids = [i + 1] + [generator.randint(1, 16) for _ in range(length)] + [0] * stopped
            if shared_prefixes and i % 2:
                ids[: length // 2] = completions[-1].ids[: length // 2]
            logps = logps_of(tuple(prompts[prompt]), tuple(ids))
            completions.append(script.Completion(ids, "stop" if stopped else "length", logps))
            rewards.append(float(generator.random() < 0.5) if prompt != 1 else 1.0)  # prompt 1: all are right
    return prompts, completions, torch.tensor(rewards).view(PROMPTS, GROUP)


def train(script, steps=1, shared_prefixes=True, equal=0, **changes):
    """`steps` training steps on the rollouts, each rank with its share: (metrics of the last, full parameters).

    equal: the first so many prompts have equal rewards.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    prompts, completions, rewards = rollouts(script, shared_prefixes)
    rewards[:equal] = 1.0
    share = PROMPTS // world
    mine = slice(rank * share, (rank + 1) * share)
    args = script.Args(**{**script.TOY, "prompts_per_step": PROMPTS, "model": str(TINY), **changes})
    policy = script.load_policy(args, torch.device("cpu"))
    frozen = args.beta or script.SCRIPT == "alpha_dpo"
    reference = script.load_policy(args, torch.device("cpu"), trainable=False) if frozen else None
    if hasattr(args, "lam_init"):
        policy.register_buffer("lam", torch.tensor(args.lam_init))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    for _ in range(steps):
        metrics, advantages = script.train_step(
            policy, reference, optimizer, args, prompts[mine],
            completions[rank * share * GROUP : (rank + 1) * share * GROUP], rewards[mine],
        )
    assert advantages.shape == (share, GROUP)
    weights = {key: tensor.clone() for key, tensor in script.full_weights(policy, torch.float32)}
    own = {key: tensor.full_tensor().clone() for key, tensor in policy.named_parameters() if not key.startswith("model.")}
    return metrics, weights | own


def run_case(case):
    """What train returns for script/variant:micro_batch_tokens."""
    name, variant, budget = case.replace("/", ":").split(":")
    flags = VARIANTS[name][variant] if variant != "own" else {}  # of test_variant.py: a script's own defaults
    return train(importlib.import_module(name), micro_batch_tokens=int(budget), **flags)


def main():
    output, *cases = sys.argv[1:]
    dist.init_process_group("gloo")
    results = {case: run_case(case) for case in cases}
    import grpo

    policy = grpo.load_policy(grpo.Args(model=str(TINY)), torch.device("cpu"))
    grpo.save_final(policy, transformers.AutoTokenizer.from_pretrained(TINY), [0], Path(f"{output}-final"))
    if dist.get_rank() == 0:
        torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
