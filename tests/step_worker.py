"""Run under torchrun by test_step.py: one training step on the same rollouts, cut up in several ways.

    torchrun --nproc_per_node=2 tests/step_worker.py OUTPUT_FILE SCRIPT CASE...

A case is variant:micro_batch_tokens, where a variant is a name of VARIANTS. Rank 0 saves {case: (metrics, parameters)}.
"""

import importlib
import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

PROMPTS, GROUP = 6, 4
VARIANTS = {
    "grpo": {"loss": "grpo"},
    "dapo": {"loss": "dapo", "clip_high": 0.28},
    "dr_grpo": {"loss": "dr_grpo"},
    "clip": {"loss": "grpo", "updates_per_batch": 3, "lr": 3e-5, "clip_low": 0.002, "clip_high": 0.002},
    "beta": {"loss": "dapo", "updates_per_batch": 2, "beta": 0.1, "lr": 3e-5},
}


def rollouts(script):
    """Random prompts, completions and rewards [6, 4]: lengths differ a lot, the last prompts have the long ones."""
    generator = random.Random(0)
    prompts = [[generator.randint(1, 16) for _ in range(generator.randint(1, 12))] for _ in range(PROMPTS)]
    completions, rewards = [], []
    for prompt in range(PROMPTS):
        for i in range(GROUP):
            length = generator.randint(1, 4) if prompt < 4 else generator.randint(30, 60)
            stopped = i != 0  # the first of each group is cut off: it has no end-of-sequence token (0, which pads as well)
            ids = [generator.randint(1, 16) for _ in range(length)] + [0] * stopped
            completions.append(script.Completion(ids, "stop" if stopped else "length"))
            rewards.append(float(generator.random() < 0.5) if prompt != 1 else 1.0)  # prompt 1: all are right
    return prompts, completions, torch.tensor(rewards).view(PROMPTS, GROUP)


def main():
    output, name, *cases = sys.argv[1:]
    script = importlib.import_module(name)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    prompts, completions, rewards = rollouts(script)
    share = PROMPTS // world
    mine = slice(rank * share, (rank + 1) * share)
    results = {}
    for case in cases:
        variant, budget = case.split(":")
        args = script.Args(**{**script.TOY, "micro_batch_tokens": int(budget), "prompts_per_step": PROMPTS, "steps": 1,
                              "model": str(Path(__file__).with_name("tiny")), **VARIANTS[variant]})
        policy = script.load_policy(args, mesh, torch.device("cpu"), prompts[0])
        reference = script.load_policy(args, mesh, torch.device("cpu"), prompts[0], trainable=False) if args.beta else None
        optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
        metrics = script.train_step(
            policy, reference, optimizer, args, prompts[mine],
            completions[rank * share * GROUP : (rank + 1) * share * GROUP], rewards[mine],
        )
        weights = {key: tensor.clone() for key, tensor in script.full_weights(policy, torch.float32)}
        results[case] = (metrics, weights)
    if rank == 0:
        torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
