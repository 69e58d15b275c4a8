"""λ-GRPO from process rewards, in one file: GRPO that counts a prefix shared by several completions once.

Maximize, with r, A and k3 as in grpo.py, and with λ(i,t) for the completions of the group that begin with o_i's first
t + 1 tokens, o_i included (a process set; a run of tokens that have the same one is a step),

    J = mean over groups of  1/Σ_j|o_j| · Σ_i Σ_t  (min(r[i,t]·A[i], clip(r[i,t])·A[i]) - β·k3[i,t]) / |λ(i,t)|

The idea. Reward a step with the mean reward of the completions that share it, normalized by the group:

    A[i,t] = (mean of R over λ(i,t) - mean(R)) / std(R)                     (for understanding: it is never computed)

Theorem 1: with the token-level loss and one update per batch, GRPO's loss is the one with these process advantages. But
GRPO counts a shared step once per completion in λ, that is |λ| times. λ-GRPO divides by |λ|.
Paper: GRPO is secretly a process reward model (arXiv 2509.21154, Sullivan, Koller). Other methods have similar names:
the λ-GRPO of lambda_grpo_learnable.py and GRPO-λ (grpo_lambda_traces.py). Here λ is a set of completions.
Differences from grpo.py: the weights are divided by process_set_sizes; --loss is removed; tree_statistics only computes
metrics. Without a shared prefix this is grpo.py --loss dapo.
Deviations: the way in which tree_statistics counts identical completions is our reading. With several updates per batch
the weight multiplies the clipped term, as in the authors' code. Σ_j|o_j| counts every copy of a shared token (paper).

    python lambda_grpo_prm.py     laptop: a tiny model, half a minute
    python lambda_grpo_prm.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k --prompts_per_step 16      one GPU
    torchrun --nproc_per_node=8 lambda_grpo_prm.py --model Qwen/Qwen2.5-7B      eight GPUs
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from collections import namedtuple
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, HfArgumentParser
from transformers.modeling_layers import GradientCheckpointingLayer

# fail ends the program with one line of error, and so does check unless its condition holds; say prints on rank 0
from eval import check, evaluate, fail, grade, load_prompts, load_tokenizer, say, stop_tokens

SCRIPT = Path(__file__).stem
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()  # torchrun sets all; one alone means nothing
RANK, WORLD = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")] if LAUNCHED else [0, 1]
flag = lambda default, help: field(default=default, metadata={"help": help})  # noqa: E731


@dataclass  # each field is a flag of the command line
class Args:
    # The algorithm
    clip_low: float = flag(0.2, "the ratio is clipped at 1 - clip_low")
    clip_high: float = flag(0.2, "and at 1 + clip_high (DAPO: 0.28)")
    beta: float = flag(0.0, "weight of the KL term; above 0 needs a reference model")
    updates_per_batch: int = flag(1, "updates per batch, each with all of it; 1 is on-policy")
    # Data and sampling
    model: str = flag(None, "folder or hub id of a causal LM; without it, a tiny one")
    dataset: str = flag("math", "training problems: a name, a file or a hub id")
    eval_dataset: str = flag(None, "problems for evaluation; without it, none")
    group_size: int = flag(8, "completions per prompt (G)")
    prompts_per_step: int = flag(128, "prompts per step (P), over all ranks")
    system_prompt: str = flag(None, "without it: asks for reasoning and a boxed answer")
    max_prompt_tokens: int = flag(1024, "longer prompts are skipped")
    max_new_tokens: int = flag(2048, "longest completion (L_max)")
    temperature: float = flag(1.0, "of the sampler and the trainer")
    sampler: Literal["auto", "vllm", "hf"] = flag("auto", "auto: vllm on a GPU, if installed")
    gpu_memory_utilization: float = flag(0.5, "vLLM's share of the GPU")
    # Optimization
    steps: int = flag(200, "training steps, one batch each")
    lr: float = flag(1e-6, "learning rate after the warm-up")
    warmup_steps: int = flag(10, "steps of linear warm-up")
    max_grad_norm: float = flag(1.0, "larger gradients are scaled down")
    tis_cap: float = flag(2.0, "upper bound of π_old/π_sampler")
    micro_batch_tokens: int = flag(16384, "tokens per forward pass; lower it to save memory")
    compile: bool = flag(False, "compile the layers: slow start, faster steps")
    # The run
    eval_every: int = flag(0, "steps between evaluations; 0: before and after only")
    save_every: int = flag(20, "steps between checkpoints; 0: only at the end")
    seed: int = flag(0, "decides prompts and samples")
    output_dir: str = flag(None, "folder of the run; without it, a new one in runs/")
    resume: str = flag(None, "folder of a run to continue")


# 1. Reward ------------------------------------------------------------------------------------------------------------

def rewards_of(texts, problems):
    """1 for a right answer, boxed or after "answer is", else 0. Put yours here: texts, their dataset rows -> floats."""
    verdicts = grade([(text, row["answer"]) for text, row in zip(texts, problems)])
    return [float(verdict["correct"]) for verdict in verdicts]


# 2. Advantage, weights, loss ------------------------------------------------------------------------------------------
# Pure functions of tensors, ready to be copied. Rewards [P, G] and masks [P, G, T] hold whole groups; policy_loss alone
# accepts any rows [B, T], also of different groups. Completions are right-padded: a mask is ones, then zeros, and its
# column 0 is the first completion token. Other values on padding do not matter, and a row of zeros (a dropped
# completion) has no weight (its reward still counts in its group). Results are float32, or float64 for float64 inputs
# (half precision stays what it is). token_weights already holds 1/P, of all ranks and micro-batches, so add up the
# losses of micro-batches, never average them; multiply them by the number of ranks where gradients are averaged over
# ranks (FSDP, DDP).

def group_advantages(rewards, normalize_std=True):
    """How much better each completion is than its group. rewards [P, G] -> advantages [P, G].

    (R - mean) / (std + 1e-4) with the sample standard deviation (ddof 1), or R - mean (Dr. GRPO). Exactly 0 where the
    rewards differ by less than 1e-6. Example: [[1, 0, 0, 1]] -> [[.866, -.866, -.866, .866]].
    """
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.get_default_dtype()))
    advantages = rewards - rewards.mean(-1, keepdim=True)  # [P, G]
    if normalize_std:
        advantages = advantages / (rewards.std(-1, keepdim=True) + 1e-4)
    spread = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True)  # [P, 1]
    return torch.where(spread < 1e-6, 0.0, advantages)


def token_weights(mask, loss="grpo", max_new_tokens=None, num_prompts=None):
    """The weight w of each token in the objective. mask [P, G, T] (1 on completion tokens) -> weights [P, G, T].

    The weights of the table in grpo.py, with 1/P; 0 on padding. num_prompts is P over all ranks (default: the mask's
    own). Example: lengths 1 and 3 give, with "grpo", [1/2, 0, 0] and [1/6, 1/6, 1/6]; with "dapo", 1/4 each.
    """
    num_groups, group_size, _ = mask.shape
    lengths = mask.sum(-1, keepdim=True)  # [P, G, 1]
    if loss == "grpo":
        normalizer = group_size * lengths  # [P, G, 1]
    elif loss == "dapo":
        normalizer = lengths.sum(1, keepdim=True)  # [P, 1, 1]
    elif loss == "dr_grpo":
        normalizer = torch.tensor(group_size * max_new_tokens)
    else:
        raise ValueError(f"loss must be grpo, dapo or dr_grpo, not {loss!r}")
    return mask / normalizer.clamp(min=1) / (num_prompts or num_groups)


def process_set_sizes(completion_ids, mask):
    """|λ(i,t)|: how many completions of the group begin with the same t + 1 tokens. [P, G, T], [P, G, T] -> [P, G, T].

    Two completions share a token when they agree on it and on all before it. 1 on padding. Memory grows as P·G·T: one
    completion at a time meets its group. Example: ABC, ABD, AE -> [3, 2, 1], [3, 2, 1], [3, 1, 1].
    """
    ids = torch.where(mask.bool(), completion_ids, -1)  # [P, G, T]
    sizes = torch.ones_like(ids)
    for i in range(ids.shape[1]):
        agree = ((ids == ids[:, i : i + 1]) & (ids >= 0)).cummin(-1).values  # [P, G, T]
        sizes[:, i] = agree.sum(1).clamp(min=1)  # [P, T]
    return sizes


def tree_statistics(sizes, mask):
    """The paper's measurements of the groups' prefix trees. sizes, mask [P, G, T] -> sums over the P groups.

    Inner nodes are runs of tokens whose set is neither the whole group nor the set of the completion's last token.
    Example: ABC, ABD, AE -> 1 group has some, depth (1 + 1 + 0) / 3, share of tokens (1/3 + 1/3 + 0) / 3, mean |λ| 2.
    """
    mask = mask.bool()
    leaf_size = torch.where(mask, sizes, sizes.shape[1]).amin(-1, keepdim=True)  # [P, G, 1]: sets shrink with t
    inner = (sizes > leaf_size) & (sizes < sizes.shape[1]) & mask  # [P, G, T]
    begins = inner & (sizes != F.pad(sizes[..., :-1], (1, 0)))  # a new size is a new set
    lengths = mask.sum(-1)  # [P, G]
    return {
        "nontrivial_trees": inner.any(-1).any(-1).sum(),
        "path_depth": begins.sum(-1).float().mean(-1).sum(),
        "intermediate_proportion": (inner.sum(-1) / lengths).mean(-1).sum(),
        "process_set_size": ((sizes * mask).sum((-1, -2)) / lengths.sum(-1)).sum(),
    }


def policy_loss(logp, old_logp, advantages, weights, clip_low=0.2, clip_high=0.2, ref_logp=None, beta=0.0):
    """The clipped surrogate, to be minimized: minus the J at the top of the file (GRPO eq. 3).

    logp, old_logp, weights (and ref_logp) [B, T], advantages [B] or [B, T] -> scalar, and sums over the tokens that
    have a weight: {"tokens", "clip_fraction" (tokens without a gradient, because of the clip), "kl" (k3 estimate of
    KL(old || new))}. Example: log-ratio 0.5, advantage 1, weight 1 -> loss -1.2, clipped; with advantage -1 -> 1.65.
    """
    counted = weights > 0  # [B, T]: not the padding, whose values may be anything
    log_ratio = torch.where(counted, logp - old_logp.detach(), 0.0).clamp(max=20)  # exp stays finite
    ratio = log_ratio.exp()
    advantages = torch.where(counted, advantages.view(len(logp), -1), 0.0)  # [B, T]
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -(weights * torch.minimum(unclipped, clipped)).sum()
    if beta > 0:
        log_ref = torch.where(counted, ref_logp - logp, 0.0).clamp(max=20)
        loss = loss + beta * (weights * (log_ref.exp() - log_ref - 1)).sum()
    with torch.no_grad():
        kl = ratio - 1 - log_ratio  # 0 on padding
        stats = {"tokens": counted.sum(), "clip_fraction": (clipped < unclipped).sum(), "kl": kl.sum()}
    return loss, stats


# 3. The training step -------------------------------------------------------------------------------------------------

def train_step(policy, reference, optimizer, args, prompts, completions, rewards):
    """Train on a rank's P prompts (lists of ids), completions [P·G], rewards [P, G] -> all ranks' metrics, advantages.

    A token has four log-probabilities: the policy's (logp, with gradient), that of the policy before the first update
    (old_logp, for the ratio), the reference's (ref_logp, for the KL term), and the sampler's (sampler_logp, for TIS).
    """
    device, group_size = rewards.device, rewards.shape[1]
    lengths = torch.tensor([len(completion.ids) for completion in completions], device=device).view(rewards.shape)
    mask = torch.arange(lengths.max(), device=device) < lengths[..., None]  # [P, G, T]
    advantages = group_advantages(rewards)  # λ: [P, G]
    completion_ids = pad_sequence([torch.tensor(c.ids) for c in completions], batch_first=True).view(mask.shape)  # λ:
    sizes = process_set_sizes(completion_ids.to(device), mask)  # λ: [P, G, T]
    weights = token_weights(mask, "dapo", num_prompts=args.prompts_per_step) / sizes  # λ: [P, G, T]

    # From here on a row is a completion, in the order of the sampler
    row_weights, row_advantages = weights.flatten(0, 1), advantages.flatten()  # [P·G, T], [P·G]
    teaches = (row_advantages != 0) | (args.beta > 0)  # [P·G]; the others have no gradient, and are left out
    row_mask = mask.flatten(0, 1) & teaches[:, None]  # [P·G, T]
    starts = torch.tensor([len(ids) for ids in prompts], device=device).repeat_interleave(group_size)  # [P·G]
    sequences = [torch.tensor(prompts[row // group_size] + c.ids) for row, c in enumerate(completions)]  # [P·G][S]
    sampler_logp = pad_sequence([torch.tensor(c.logps) for c in completions], batch_first=True).to(device)  # [P·G, T]
    old_logp, ref_logp = torch.zeros_like(sampler_logp), torch.zeros_like(sampler_logp)  # [P·G, T], filled below
    plan = micro_batches([len(ids) for ids in sequences], teaches.tolist(), args.micro_batch_tokens, device)
    for update in range(args.updates_per_batch):
        sums = {}  # each statistic, summed over the tokens of this rank that are trained on
        for rows in plan:
            width = max(len(completions[row].ids) for row in rows)  # T of this micro-batch
            is_token = row_mask[rows, :width]  # [B, T]
            input_ids = pad_sequence([sequences[row] for row in rows], batch_first=True).to(device)  # [B, S]
            logp, entropy = policy(input_ids, starts[rows], is_token)  # [B, T] each; entropy has no gradient
            if update == 0:  # π_old is the policy before the first optimizer.step(), for all updates of this batch
                old_logp[rows, :width] = logp.detach()
                if args.beta > 0:
                    with torch.no_grad():
                        ref_logp[rows, :width] = reference(input_ids, starts[rows], is_token)[0]
            # Truncated importance sampling: the sampler's distribution is not exactly the trainer's π_old
            gap = torch.where(is_token, old_logp[rows, :width] - sampler_logp[rows, :width], 0.0)  # [B, T]
            importance = gap.exp().clamp(max=args.tis_cap) * is_token  # [B, T]
            advantage, weight = row_advantages[rows], row_weights[rows, :width] * importance  # λ: [B], [B, T]
            loss, stats = policy_loss(
                logp, old_logp[rows, :width], advantage, weight, args.clip_low, args.clip_high,
                ref_logp[rows, :width], args.beta,
            )
            policy.set_requires_all_reduce(rows is plan[-1])  # FSDP's: gradients are reduced over nodes once per update
            (loss * WORLD).backward()  # FSDP averages gradients over ranks, but the objective is a sum
            stats |= {"loss": loss.detach(), "entropy": entropy.sum(), "logp_diff": gap.abs().sum(),
                      "tis_mean": importance.sum(), "tis_capped": (gap.exp() > args.tis_cap).sum()}
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value
        sums = sum_over_ranks(sums, device)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor().item()
        if not math.isfinite(sums["loss"] + norm):
            fail(f"stopped before the update: loss {sums['loss']}, gradient norm {norm}", 1)
        if sums["logp_diff"] > 0.5 * sums["tokens"]:
            fail("stopped before the update: mean |Δ log p| of sampler and trainer over 0.5: stale or wrong weights", 1)
        optimizer.step()
        optimizer.zero_grad()  # here, not before the backward pass, so that sampling can use the memory
        tokens, loss = max(1, sums.pop("tokens")), sums.pop("loss")  # metrics keeps the means of the last update
        metrics = {name: total / tokens for name, total in sums.items()} | {"loss": loss, "grad_norm": norm}

    equal = rewards.amax(-1) - rewards.amin(-1) < 1e-6  # [P]; below: sums over groups, then means over all P
    sums = {"reward": rewards.mean(-1).sum(), "zero_variance": equal.sum(), "length": lengths.sum() / group_size}
    sums["truncated"] = sum(completion.finish == "length" for completion in completions) / group_size
    sums |= tree_statistics(sizes, mask)  # λ:
    metrics |= {name: total / args.prompts_per_step for name, total in sum_over_ranks(sums, device).items()}
    return metrics, advantages


# 4. The run -----------------------------------------------------------------------------------------------------------

def main():
    # Phase 1: flags and data. Bad input ends the program here, before a model is loaded
    args = parse_args()
    tokenizer = load_tokenizer(args.model)
    data = load_prompts(args.dataset, "train", tokenizer, args)
    eval_problems = load_prompts(args.eval_dataset, "test", tokenizer, args) if args.eval_dataset else []
    epochs = range(math.ceil(args.steps * args.prompts_per_step / len(data)))  # each has its own order, from the seed
    order = [i for epoch in epochs for i in np.random.default_rng((args.seed, epoch)).permutation(len(data))]

    # Phase 2: policy, optimizer, sampler. A single process is a process group of one, and runs the same code
    device = join_ranks()
    policy = load_policy(args, device)
    reference = load_policy(args, device, trainable=False) if args.beta > 0 else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    vllm = args.sampler == "vllm" or (args.sampler == "auto" and device.type == "cuda" and find_spec("vllm"))
    sampler = (VLLMSampler if vllm else HFSampler)(args, tokenizer, device)
    done = load_checkpoint(policy, optimizer, args.resume) if args.resume else 0
    sampler.load(full_weights(policy, sampler.dtype))
    run = open_run(args, done)
    say(f"{SCRIPT}: {Path(args.model).name}, {policy.model.num_parameters() / 1e6:.1f}M parameters, "
        f"{WORLD} x {device.type}, {type(sampler).__name__}; steps {done + 1} to {args.steps}, written to {run}")

    # Phase 3: the loop. At SIGTERM, which clusters send, it saves a checkpoint after the current step and ends
    terminated, starts = [], {}  # SIGTERM was received; when each phase of the step began
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    share = args.prompts_per_step // WORLD  # prompts of a rank
    bar = tqdm(range(done + 1, args.steps + 1), SCRIPT, initial=done, total=args.steps, disable=RANK > 0 or None)

    def phase(name):
        bar.set_postfix_str(name)
        starts[name] = time.perf_counter()

    def accuracy():
        value = evaluate(sampler, tokenizer, eval_problems)["accuracy"]
        say(f"accuracy on {args.eval_dataset}: {value:.3f} ({len(eval_problems)} problems, greedy)")
        return value

    if eval_problems and not done:
        accuracy()
    say(" ".join(f"{column:>6}" for column in COLUMNS))
    for step in bar:
        phase("sampling")
        first = (step - 1) * args.prompts_per_step + RANK * share  # place of this rank's first prompt in the order
        rows = [data[i] for i in order[first : first + share]]
        prompts, seed = [row["prompt_ids"] for row in rows], args.seed * 1_000_000_007 + first
        completions = sampler(prompts, args.group_size, seed, args.temperature)  # [P·G], whatever the number of ranks
        sampler.sleep()
        phase("grading")
        texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
        problems = [row for row in rows for _ in range(args.group_size)]
        rewards = np.array(rewards_of(texts, problems), float)  # None becomes NaN
        if rewards.shape != (len(texts),) or not np.isfinite(rewards).all():
            fail("rewards_of must return one finite number per completion", 1)
        rewards = torch.tensor(rewards, device=device).float().view(share, -1)  # [P, G]
        phase("training")
        optimizer.param_groups[0]["lr"] = lr = args.lr * min(1.0, step / max(1, args.warmup_steps))
        metrics, advantages = train_step(policy, reference, optimizer, args, prompts, completions, rewards)
        phase("syncing")
        sampler.load(full_weights(policy, sampler.dtype))
        phase("logging")
        ending = sum_over_ranks({"terminated": len(terminated)}, device)["terminated"]
        metrics |= {"step": step, "lr": lr}
        due = step == args.steps or (args.eval_every and step % args.eval_every == 0)
        if eval_problems and due and not ending:
            metrics["eval_accuracy"] = accuracy()
        log_step(run, args, metrics, starts, tokenizer, rows[0], completions, rewards[0], advantages[0])
        if step == args.steps or ending or (args.save_every and step % args.save_every == 0):
            save_checkpoint(policy, optimizer, run, step)
        if ending and step < args.steps:
            say(f"SIGTERM: saved after step {step}; continue with --resume {run}")
            return

    save_final(policy, tokenizer, sampler.stops, run / "final")
    say(f"the trained model is in {run / 'final'}")


# ===== From here on: machinery, the same for every method =============================================================

# 5. Sampling ----------------------------------------------------------------------------------------------------------

Completion = namedtuple("Completion", "ids finish logps")  # ids with the stop token; "stop" or "length"; log p of each


class HFSampler:
    """Samples with a loop over the model's forward pass. Each rank has an unsharded copy of the model."""

    def __init__(self, args, tokenizer, device):
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=self.dtype, use_safetensors=True)
        self.model, self.max_new_tokens = model.to(device).eval(), args.max_new_tokens
        self.stops = stop_tokens(args.model, tokenizer)

    @torch.no_grad()
    def load(self, named_tensors):
        """Take over new weights: (name, full tensor) pairs."""
        own = self.model.state_dict()
        for name, tensor in named_tensors:
            own[name].copy_(tensor)

    def sleep(self):
        """vLLM frees GPU memory here. This copy stays."""

    @torch.inference_mode()
    def __call__(self, prompts, n, seed, temperature):
        """n Completions per prompt, B in all; temperature 0 is greedy. Number k of prompt i has seed (seed + i, k)."""
        device = self.model.device
        sequences = [torch.tensor(prompt) for prompt in prompts]
        ids = pad_sequence(sequences, batch_first=True, padding_value=-1, padding_side="left").to(device)  # [B/n, S]
        mask, ids = (ids >= 0).long(), ids.clamp(min=0)
        seeds = [(seed + i, k) for i in range(len(prompts)) for k in range(n)]
        uniform = np.stack([np.random.default_rng(own).random(self.max_new_tokens) for own in seeds])  # [B, T]
        uniform, stops = torch.tensor(uniform, device=device), torch.tensor(self.stops, device=device)
        cache, rows = DynamicCache(config=self.model.config), torch.arange(len(seeds), device=device)
        drawn = torch.zeros(len(seeds), self.max_new_tokens, dtype=torch.long, device=device)  # [B, T]
        logps, lengths = torch.zeros(drawn.shape, device=device), torch.zeros_like(rows)  # [B, T], [B]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # [B/n, S]: counted from the end of the padding
        for t in range(self.max_new_tokens):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            logits = self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            if t == 0:  # a prompt's keys and values are computed once, for all of its n completions
                cache.batch_repeat_interleave(n)
                logits, mask, positions = (x.repeat_interleave(n, 0) for x in (logits, mask, positions[:, -1:]))
            logp = (logits / (temperature or 1.0)).log_softmax(-1)  # [B, V]
            ids = logp.argmax(-1, keepdim=True)  # [B, 1]
            if temperature > 0:
                below = logp.double().exp().cumsum(-1)  # float32 would lose the tail of a large vocabulary
                ids = torch.searchsorted(below, uniform[rows, t, None] * below[:, -1:], right=True)
            drawn[rows, t], logps[rows, t], lengths[rows] = ids[:, 0], logp.gather(-1, ids)[:, 0], t + 1
            going = ~torch.isin(ids[:, 0], stops)  # [B]
            if not going.any():
                break
            if not going.all():  # finished rows leave the batch
                cache.batch_select_indices(going.nonzero()[:, 0])
                ids, mask, rows, positions = (x[going] for x in (ids, mask, rows, positions))
            mask, positions = F.pad(mask, (0, 1), value=1), positions + 1
        cut = [(ids[:end], own[:end]) for ids, own, end in zip(drawn.tolist(), logps.tolist(), lengths.tolist())]
        return [Completion(ids, "stop" if ids[-1] in self.stops else "length", own) for ids, own in cut]


class VLLMSampler:
    """Samples with a vLLM engine on every rank. On a GPU it holds no weights and no cache while it sleeps."""

    def __init__(self, args, tokenizer, device):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where new weights can reach it
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm

        self.on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.stops = stop_tokens(args.model, tokenizer)
        self.params = partial(
            vllm.SamplingParams, max_tokens=args.max_new_tokens, stop_token_ids=self.stops, detokenize=False,
            logprobs=0, flat_logprobs=True,  # 0: of the drawn token alone
        )
        self.engine = vllm.LLM(
            args.model, dtype=self.dtype, max_model_len=args.max_prompt_tokens + args.max_new_tokens,
            distributed_executor_backend="external_launcher" if WORLD > 1 else None,
            gpu_memory_utilization=args.gpu_memory_utilization, enforce_eager=not self.on_gpu,
            enable_sleep_mode=self.on_gpu,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, with its temperature
        )
        self.sleep()

    @torch.no_grad()
    def load(self, named_tensors):
        """Take over new weights: (name, full tensor) pairs. Wakes the engine."""
        if self.on_gpu:
            torch.cuda.empty_cache()  # the engine needs the memory that training has freed
            self.engine.wake_up(tags=["weights"])
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
        if self.on_gpu:
            self.engine.wake_up(tags=["kv_cache"])
        self.engine.reset_prefix_cache()  # it holds keys and values of the old weights

    def sleep(self):
        """Free the GPU's memory until the next load."""
        if self.on_gpu:
            self.engine.sleep(level=2)

    def __call__(self, prompt_ids, n, seed, temperature):
        """Like HFSampler, with other random numbers: vLLM adds k to the seed of a prompt, (seed + i)·n."""
        seeds = [(seed + i) * n % 2**62 for i in range(len(prompt_ids))]
        params = [self.params(n=n, temperature=temperature, seed=own) for own in seeds]
        done = self.engine.generate([{"prompt_token_ids": ids} for ids in prompt_ids], params, use_tqdm=False)
        return [Completion(list(o.token_ids), o.finish_reason, o.logprobs.logprobs) for r in done for o in r.outputs]


# 6. Policy, micro-batches, ranks --------------------------------------------------------------------------------------

class Policy(torch.nn.Module):
    """A causal language model whose forward pass returns log-probabilities of given tokens. [B, T, vocabulary] logits
    never exist: the head runs in checkpointed chunks of 512 tokens. No attention mask is needed, because the padding is
    on the right, where causal attention does not see it."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, input_ids, starts, mask):
        """input_ids [B, S], prompt lengths starts [B], mask [B, T] -> logp [B, T], entropies [B, T] (no gradient)."""
        hidden = self.model.base_model(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state  # [B, S - 1, H]
        rows, steps = mask.nonzero(as_tuple=True)  # [N], [N]: an entry for each completion token
        positions = starts[rows] + steps  # a token is predicted from the position before it
        hidden, targets = hidden[rows, positions - 1], input_ids[rows, positions]  # [N, H], [N]
        pieces = zip(hidden.split(512), targets.split(512))
        chunks = [checkpoint(self.score, *piece, use_reentrant=False) for piece in pieces]
        padded = torch.zeros(mask.shape, device=input_ids.device)  # [B, T]
        return tuple(padded.index_put((rows, steps), torch.cat(values)) for values in zip(*chunks))

    def score(self, hidden, targets):
        """hidden [N, H], targets [N] -> log-probabilities [N] in float32, entropies [N] without gradient."""
        logits = self.model.get_output_embeddings()(hidden).float().div_(self.temperature)  # [N, V]
        logp = logits.log_softmax(-1)  # [N, V]
        own = logp.gather(-1, targets[:, None]).squeeze(-1)
        with torch.no_grad():  # last, so that checkpointing does not compute it a second time
            entropy = -torch.linalg.vecdot(logp.exp(), logp)
        return own, entropy


def load_policy(args, device, trainable=True):
    """The sharded policy: fp32 weights (a rank maps the files, and only its own shards become fp32), bf16 on GPUs."""
    check(not hasattr(AutoConfig.from_pretrained(args.model), "quantization_config"), "cannot train a quantized model")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", use_safetensors=True)
    hybrid = model._is_stateful or "conv" in (getattr(model.config, "layer_types", None) or ())
    check(not hybrid, "cannot train a model that has layers without attention, like Mamba")
    policy = Policy(model.eval(), args.temperature).requires_grad_(trainable)  # eval: no dropout
    with torch.no_grad():
        hidden, logits = model.base_model(torch.tensor([[1, 2]]))[0], model(torch.tensor([[1, 2]])).logits
        fits = torch.allclose(model.get_output_embeddings()(hidden), logits, atol=1e-3)
    check(fits, "this model changes its logits after the head (caps or scales them); Policy would train another one")
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    compiled = partial(torch.compile, dynamic=True, disable=not args.compile)
    policy.score = compiled(policy.score)
    for layer in layers:
        layer.forward = compiled(layer.forward)
        if device.type == "cuda" and trainable:  # its activations are computed again in the backward pass
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))  # shards inside a node, replicas across nodes
    mesh = dist.init_device_mesh(device.type, (WORLD // local, local), mesh_dim_names=("replicate", "shard"))
    mesh = mesh["shard"] if WORLD == local else mesh  # one node: no second copy of the gradients to be all-reduced
    precision = MixedPrecisionPolicy(torch.bfloat16 if device.type == "cuda" else None, torch.float32)
    for module in [*layers, policy]:  # after a forward pass the root stays whole for the backward pass, if there is one
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=None if trainable else True)
    return policy.float()


def full_weights(policy, dtype):
    """(name, full tensor) of every weight, one at a time, tied ones under each of their names. All ranks take part."""
    for name, tensor in policy.model.state_dict().items():
        yield name, tensor.to(dtype).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def micro_batches(lengths, teaches, budget, device):
    """Sort the rows that teach by length; cut them into micro-batches [row, ...] of `budget` tokens, padding included.

    FSDP needs equally many micro-batches on every rank. So all ranks keep equally many rows (short ones without a
    gradient fill up), and cut them at the same places. There padding may take a sixteenth of the budget, counted with
    the longest k-th row of all ranks for each k; a rank with shorter rows pads more.
    """
    count = torch.tensor(max(1, sum(teaches)), device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    rows = sorted(range(len(lengths)), key=lambda row: (not teaches[row], lengths[row]))[:count]
    rows.sort(key=lengths.__getitem__)
    longest = torch.tensor([lengths[row] for row in rows], device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)  # the length of the longest k-th row of all ranks, for each k
    plan, widths = [], []  # widths: these lengths, of the last micro-batch
    for row, width in zip(rows, longest.tolist()):
        widths.append(width)
        size = len(widths) * width  # of the last micro-batch, with this row and padding
        if not plan or size > budget or size - sum(widths) > budget // 16:
            plan.append([])
            widths = [width]
        plan[-1].append(row)
    return plan


def join_ranks():
    """Join torchrun's process group, or make one of this process alone. Returns this rank's device."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if LAUNCHED else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1), **alone)  # how long ranks wait for each other
    return torch.device("cuda" if gpu else "cpu")


def sum_over_ranks(values, device):
    """{name: number} -> {name: sum over all ranks}."""
    totals = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return dict(zip(values, totals.tolist()))


# 7. Flags, the run's folder, checkpoints ------------------------------------------------------------------------------

TOY = dict(  # what changes without --model: a run of half a minute on a laptop; explicit flags win over it
    model=str(Path(__file__).with_name("tests") / "tiny"), dataset="arithmetic", eval_dataset="arithmetic", steps=25,
    prompts_per_step=16, max_new_tokens=48, lr=1e-4, warmup_steps=5, save_every=10,
)
COLUMNS = ["step", "reward", "zero_variance", "length", "truncated", "entropy", "grad_norm"]  # of the table on screen
COLUMNS.append("process_set_size")  # λ:


def parse_args():
    """Checked flags: the user's come first, then TOY (without --model) or a resumed run's, then the defaults."""
    parser = HfArgumentParser(Args, description=f"{__doc__.splitlines()[0]} Without --model: {TOY}", allow_abbrev=False)
    parser.error = fail
    given = parser.parse_args()
    saved = {} if given.model else TOY
    if given.resume:
        check(checkpoints(given.resume), f"--resume {given.resume}: there is no checkpoint")
        saved = json.loads(Path(given.resume, "args.json").read_text())
        same = set(saved) == {"script", *vars(given)} and saved.pop("script") == SCRIPT
        check(same, "--resume: a run of another script or version")
    parser.set_defaults(**saved)
    args = Args(**vars(parser.parse_args()))
    if given.resume:
        changed = {name for name in saved if getattr(args, name) != saved[name]} - {"resume", "steps"}
        check(not changed, f"--resume keeps all flags but --steps: leave out --{' --'.join(changed)} or edit args.json")
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):  # λ: (a variant's own may be negative)
            check(0 <= value < 2**32, f"--{name} must be from 0 to 2**32, not {value}")
    check(args.group_size >= 2, "--group_size must be at least 2")
    check(args.clip_low < 1 <= args.tis_cap, "--clip_low must be below 1, --tis_cap at least 1")
    check(args.temperature > 0, "--temperature must be above 0")
    check(args.prompts_per_step % WORLD == 0, f"--prompts_per_step must be a multiple of the {WORLD} ranks")
    check(args.sampler != "vllm" or find_spec("vllm"), "--sampler vllm needs the package vllm")
    check(args.resume or not Path(args.output_dir or os.devnull, "checkpoints").exists(), "--output_dir holds a run")
    return args


def open_run(args, done):
    """Make the run's folder, or cut a resumed one back to its first `done` steps. Returns its path, on all ranks."""
    name = [args.resume or args.output_dir or f"runs/{SCRIPT}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"]
    dist.broadcast_object_list(name)  # the clocks of the ranks may differ
    run = Path(name[0])
    if RANK == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=done > 0)  # a second new run in the same folder fails here
        for path in (run / "metrics.jsonl", run / "samples.jsonl"):
            with open(path, "ab+") as file:
                file.seek(0)
                file.truncate(sum(map(len, file.readlines()[:done])))  # a row per step
        (run / "args.part").write_text(json.dumps({"script": SCRIPT, **vars(args)}, indent=1))
        (run / "args.part").rename(run / "args.json")  # so that the file is whole or not there
    return run


def log_step(run, args, metrics, starts, tokenizer, problem, completions, rewards, advantages):
    """Print a step's row of the table; append its metrics, and its first group, to the files of the run."""
    times = list(starts.values())  # when each phase began
    metrics |= {f"seconds_{name}": end - start for name, start, end in zip(starts, times, times[1:])}
    say(" ".join(f"{metrics[name]:{max(6, len(name))}{'' if name == 'step' else '.3g'}}" for name in COLUMNS))
    if metrics["step"] == 1 and metrics["zero_variance"] == 1:
        say("every group has equal rewards, which teaches nothing: see samples.jsonl")
    if RANK == 0:
        group = [completion.ids for completion in completions[: args.group_size]]
        sample = {
            "step": metrics["step"], "problem": problem["problem"], "answer": problem["answer"], "ids": group,
            "completions": tokenizer.batch_decode(group, skip_special_tokens=True),
            "rewards": rewards.tolist(), "advantages": advantages.tolist(),
        }
        for name, row in (("metrics.jsonl", metrics), ("samples.jsonl", sample)):
            with open(run / name, "a") as file:
                file.write(json.dumps(row) + "\n")


def checkpoints(run):
    """The whole checkpoints in a run's folder, oldest first."""
    return sorted(Path(run, "checkpoints").glob("step_*[0-9]"))


def weights_once(module):
    """Weights and buffers by name, tied ones under their first name only, as a file should hold them."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def save_checkpoint(policy, optimizer, run, step):
    """Write checkpoints/step_N: aside, then renamed, so that a folder of that name is whole. The last two are kept."""
    aside = run / "checkpoints" / f"step_{step:06}.part"
    state = {"model": weights_once(policy), "optimizer": states.get_optimizer_state_dict(policy, optimizer)}
    dcp.save(state, checkpoint_id=aside)  # every rank its shards
    if RANK == 0:
        aside.rename(aside.with_suffix(""))
        for old in checkpoints(run)[:-2]:
            shutil.rmtree(old)


def load_checkpoint(policy, optimizer, run):
    """Restore the last whole checkpoint, whatever the number of ranks that saved it. Returns its step."""
    newest = checkpoints(run)[-1]
    state = {"model": weights_once(policy), "optimizer": states.get_optimizer_state_dict(policy, optimizer)}
    dcp.load(state, checkpoint_id=newest)  # the weights in place
    states.set_optimizer_state_dict(policy, optimizer, state["optimizer"])
    return int(newest.name[5:])


def save_final(policy, tokenizer, stops, folder):
    """Save the model as transformers and vLLM load it, in its original dtype. Rank 0 holds it whole for a moment."""
    model, dtype = policy.model, policy.model.config.dtype
    policy.to(dtype)
    once, weights = weights_once(model), {}
    for name, tensor in full_weights(policy, dtype):  # all ranks take part
        if RANK == 0 and name in once:
            weights[name] = tensor.cpu()
    dist.barrier()  # no rank ends while rank 0 still gathers
    if RANK == 0:
        model.generation_config = GenerationConfig(eos_token_id=stops)  # not the old model's top-p, top-k, penalties
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # safetensors lets only their owner read them
            file.chmod((folder / "config.json").stat().st_mode)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        if torch.cuda.is_initialized():  # the teardown on a GPU would wait for ranks that may never come
            if not isinstance(error, SystemExit):
                sys.excepthook(*sys.exc_info())
            os._exit(error.code if isinstance(error, SystemExit) else 1)
        raise
