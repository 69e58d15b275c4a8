"""Table 1 of "GRPO is secretly a process reward model" (arXiv 2509.21154): a toy tree, its best leaf among bad ones.

    python tests/measure/prm_table1.py [--seeds 5] [--steps 250]

This takes 2 to 3 minutes on one CPU core. README.md in this folder has the results beside the paper's.

A completion is 4 tokens of {L, R}. The target leaf L L R L earns +1, every other leaf that shares its first n tokens
r_neg, all others +0.7: the way to the best leaf leads through a bad neighborhood. There GRPO punishes the shared
prefix once for each completion that took it, and comes to avoid it; λ-GRPO punishes it once. The table has the share
of the sampled completions that are the target, over the last 50 steps (a uniform policy: 1/16).

Model and learning rate were chosen here: a random 2-layer, 64-wide Qwen2, and Adam at 1e-4 without clipping.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import mpmath  # of sympy, and so of math-verify
import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from grpo import group_advantages, policy_loss, token_weights  # noqa: E402
from lambda_grpo_prm import process_set_sizes  # noqa: E402

BOS, L, R = range(3)
LEAVES = torch.tensor(list(itertools.product((L, R), repeat=4)))  # [16, 4]: all there are
TARGET = torch.tensor([L, L, R, L])
GROUP_SIZE, WINDOW, LEARNING_RATE = 16, 50, 1e-4
CELLS = list(itertools.product((1, 2), (-0.5, -1.0, -1.5)))  # (n, r_neg)


def leaf_rewards(n, r_neg):
    """The reward of each leaf: [16]."""
    agree = (LEAVES == TARGET).cumprod(-1).sum(-1)  # [16]: how many of its first tokens are the target's
    rewards = torch.where(agree >= n, r_neg, 0.7)
    return torch.where(agree == 4, 1.0, rewards)


def train(divide, rewards, seed, steps):
    """One run of λ-GRPO (divide) or GRPO. rewards [16] -> share of target leaves in each step's group [steps]."""
    torch.manual_seed(seed)  # the same first weights for both algorithms
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=3, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=BOS, eos_token_id=None,
    ))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    inputs = torch.cat([torch.full((len(LEAVES), 1), BOS), LEAVES[:, :-1]], 1)  # [16, 4]
    mask = torch.ones(1, GROUP_SIZE, 4)  # [P, G, T], P = 1
    hits = []
    for _ in range(steps):
        logits = model(input_ids=inputs, use_cache=False).logits[..., L:]  # [16, 4, 2]: <bos> is masked
        leaf_logp = logits.log_softmax(-1).gather(-1, LEAVES[..., None] - L).squeeze(-1)  # [16, 4]
        # sampling token by token and drawing whole leaves are the same; this needs one forward pass, not five
        drawn = torch.multinomial(leaf_logp.detach().sum(-1).exp(), GROUP_SIZE, replacement=True)  # [G]
        logp = leaf_logp[drawn]  # [G, T]
        advantages = group_advantages(rewards[drawn][None])  # [1, G]
        weights = token_weights(mask, "dapo")  # [1, G, T]
        if divide:
            weights = weights / process_set_sizes(LEAVES[drawn][None], mask)
        loss, _ = policy_loss(logp, logp.detach(), advantages[0], weights[0])  # one update a batch: π_old is π
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits.append((LEAVES[drawn] == TARGET).all(-1).float().mean().item())
    return hits


def two_sided(t, freedom):
    """The chance that Student's t is beyond ±t."""
    return float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


def p_value(differences):
    """Of a paired t-test: the chance of a mean at least so far from 0 if there were no difference."""
    values = torch.tensor(differences, dtype=torch.float64)
    error = values.std() / len(values) ** 0.5
    return two_sided((values.mean() / error).item(), len(values) - 1) if error > 0 else 1.0


def interval(values):
    """Mean and half-width of its 95% interval over seeds: a rough one, seeds tend to find the target or to lose it."""
    values = torch.tensor(values)
    if len(values) == 1:
        return values.item(), math.nan
    t = mpmath.findroot(lambda t: two_sided(t, len(values) - 1) - 0.05, (1.9, 13), solver="anderson")
    return values.mean().item(), (float(t) * values.std() / len(values) ** 0.5).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(1)  # more only slow down a model this small
    found = {(*cell, divide): [] for cell in CELLS for divide in (False, True)}  # target frequency of each seed
    for (n, r_neg, divide), seed in tqdm(list(itertools.product(found, range(args.seeds))), "runs"):
        hits = train(divide, leaf_rewards(n, r_neg), seed, args.steps)[-WINDOW:]
        found[n, r_neg, divide].append(sum(hits) / len(hits))

    print(f"target frequency, last {min(WINDOW, args.steps)} of {args.steps} steps; mean ± 95% interval over "
          f"{args.seeds} seeds")
    print(f"{'n':>2} {'r_neg':>6} {'GRPO':>16} {'λ-GRPO':>16} {'λ-GRPO - GRPO':>16}")
    for n, r_neg in CELLS:
        plain, divided = found[n, r_neg, False], found[n, r_neg, True]
        differences = [b - a for a, b in zip(plain, divided)]  # seed by seed: they begin with the same weights
        columns = interval(plain), interval(divided), interval(differences)
        text = " ".join(f"{f'{center:.3f} ± {half:.3f}':>16}" for center, half in columns)
        print(f"{n:>2} {r_neg:>6} {text}")


if __name__ == "__main__":
    main()
