"""GRPO in one file: group-relative policy optimisation, with the aggregations of DAPO and Dr. GRPO by flag.

For each of P prompts a group of G completions o_1..o_G is sampled from π_old, which is the policy π before this step's
updates, and rewarded with R_1..R_G. Maximised is

    J = sum over groups, completions i, tokens t of  w[i,t] · min(r[i,t]·A[i], clip(r[i,t], 1-ε_low, 1+ε_high)·A[i])
        - β · the same weighted sum of k3[i,t]
    r[i,t]  = π(token t of o_i) / π_old(token t of o_i)                        (GRPO eq. 3, per token)
    k3[i,t] = exp(d) - d - 1, d = log(π_ref/π) of that token                   (GRPO eq. 4; β = 0: no reference model)

    --loss     advantage A[i]                   weight w[i,t], each also times 1/P
    grpo       (R_i - mean) / (std + 1e-4)      1 / (G·|o_i|)        every completion counts the same (eq. 3)
    dapo       (R_i - mean) / (std + 1e-4)      1 / Σ_j |o_j|        every token counts the same (DAPO eq. 8)
    dr_grpo    R_i - mean                       1 / (G·L_max)        no division by the data's std or length

Papers: GRPO, DeepSeekMath (arXiv 2402.03300); DAPO (arXiv 2503.14476); Dr. GRPO (arXiv 2503.20783).
The weights hold every normaliser, and a group lives whole on one rank. So neither the micro-batches nor the number of
ranks can change the gradient. One update per batch is the default; then π_old = π, the ratio is 1 and the clip idle.
Deviations: std is the sample one (ddof 1); in a group of equal rewards all advantages are exactly 0; w is also times
min(π_old/π_sampler, --tis_cap), since the sampler computes π_old a little differently. DAPO's dynamic sampling and
overlong penalty are not here. The variants change section 2, Args and the lines marked "# λ:", and nothing else.

    python grpo.py                                                   laptop: a tiny model learns sums in half a minute
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k --prompts_per_step 16      one GPU
    torchrun --nproc_per_node=8 grpo.py --model Qwen/Qwen2.5-7B                                  eight GPUs
"""

import math
import os
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from eval import (  # check and fail end the program with one line; say prints on rank 0
    Grader, Seconds, check, checkpoints, ending, fail, join_ranks, load_prompts, load_tokenizer, log_accuracy, log_step,
    open_run, read_flags, say, say_end, say_start, start_vllm, stop_tokens, sum_over_ranks,
)

if __name__ == "__main__":  # before the imports that take seconds
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted: --resume goes on from the last checkpoint, if any", 130))

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as states
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.hf_argparser import HfArg
from transformers.modeling_layers import GradientCheckpointingLayer

SCRIPT = Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them


@dataclass  # each field is a flag, with its help
class Args:
    # The algorithm
    loss: Literal["grpo", "dapo", "dr_grpo"] = HfArg(default="grpo", help="weights 1/(G·|o_i|), 1/Σ|o_j|, 1/(G·L_max)")
    clip_low: float = HfArg(default=0.2, help="the ratio is clipped below at 1 - clip_low")
    clip_high: float = HfArg(default=0.2, help="and above at 1 + clip_high (DAPO's clip-higher: 0.28)")
    beta: float = HfArg(default=0.0, help="weight of the KL term; above 0 a frozen reference model is loaded")
    updates_per_batch: int = HfArg(default=1, help="updates made with each batch of completions; 1: exactly on-policy")
    # Data and sampling
    model: str = HfArg(default=None, help="folder or hub id of a causal LM; none: a tiny one that learns sums")
    dataset: str = HfArg(default="math", help="training problems: a name eval.py knows, a file or a hub id")
    eval_dataset: str = HfArg(default=None, help="problems to evaluate on; none: no evaluation")
    group_size: int = HfArg(default=8, help="completions per prompt (G)")
    prompts_per_step: int = HfArg(default=128, help="prompts per step (P), over all ranks")
    system_prompt: str = HfArg(default=None, help="what stands before each problem; none: asks for steps and a box")
    max_prompt_tokens: int = HfArg(default=1024, help="longer prompts are skipped, and counted")
    max_new_tokens: int = HfArg(default=2048, help="longest completion, in tokens (L_max)")
    temperature: float = HfArg(default=1.0, help="sampling temperature; the trainer's log-probabilities use it too")
    sampler: Literal["auto", "vllm", "hf"] = HfArg(default="auto", help="hf: transformers; auto: vllm on CUDA if there")
    gpu_memory_utilization: float = HfArg(default=0.5, help="vLLM's share of the GPU when it samples, with its weights")
    enforce_eager: bool = HfArg(default=False, help="vLLM without CUDA graphs: starts sooner, samples more slowly")
    # Optimisation
    steps: int = HfArg(default=200, help="training steps: one batch of completions each")
    lr: float = HfArg(default=1e-6, help="AdamW's learning rate, after the warm-up")
    warmup_steps: int = HfArg(default=10, help="steps of linear warm-up")
    max_grad_norm: float = HfArg(default=1.0, help="a gradient of a larger norm is scaled down to it")
    tis_cap: float = HfArg(default=2.0, help="importance weights π_old/π_sampler are cut off here; large: never")
    micro_batch_tokens: int = HfArg(default=16384, help="tokens per forward pass: lower it when memory runs out")
    compile: bool = HfArg(default=False, help="compile the layers: starts minutes later, steps may be faster on a GPU")
    # The run
    eval_every: int = HfArg(default=0, help="evaluate every so many steps; 0: only at the end")
    save_every: int = HfArg(default=20, help="save a checkpoint every so many steps; 0: only at the end")
    seed: int = HfArg(default=0, help="decides prompts and samples")
    timeout_minutes: float = HfArg(default=60.0, help="how long a rank waits for the others before the job ends")
    output_dir: str = HfArg(default=None, help="folder of the run (default: runs/<script>-<time>)")
    resume: str = HfArg(default=None, help="folder of a run to go on with, from its last checkpoint")
    wandb: str = HfArg(default=None, help="name of a Weights & Biases project to log to as well")


# 1. Reward ------------------------------------------------------------------------------------------------------------

def rewards_of(texts, problems, grader):
    """1 for a right answer, boxed or after "answer is", else 0. Yours goes here: texts, rows of the data -> floats."""
    return [float(right) for right in grader.grade_all([(text, row["answer"]) for text, row in zip(texts, problems)])]


# 2. Advantage, weights, loss ------------------------------------------------------------------------------------------

def group_advantages(rewards, normalize_std=True):
    """How much better each completion is than its group. rewards [P, G] -> advantages [P, G].

    (R - mean) / (std + 1e-4) with the sample standard deviation (ddof 1), or R - mean (Dr. GRPO). Exactly 0 where the
    rewards differ by less than 1e-6. Example: [[1, 0, 0, 1]] -> [[.866, -.866, -.866, .866]].
    """
    advantages = rewards - rewards.mean(-1, keepdim=True)  # [P, G]
    if normalize_std:
        advantages = advantages / (rewards.std(-1, keepdim=True) + 1e-4)
    spread = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True)  # [P, 1]
    return torch.where(spread < 1e-6, 0.0, advantages)


def token_weights(mask, loss="grpo", max_new_tokens=None, num_prompts=None):
    """What each token counts in the objective. mask [P, G, T] (1 on completion tokens) -> weights [P, G, T].

    The normalisers of the table at the top, 1/P included; 0 on padding. num_prompts is P over all ranks (default: the
    mask's own). Example: lengths 1 and 3 give, with "grpo", [1/2, 0, 0] and [1/6, 1/6, 1/6]; with "dapo", 1/4 each.
    """
    mask = mask.to(torch.get_default_dtype())  # float32; float64 where tests ask for it
    group_size = mask.shape[1]
    lengths = mask.sum(-1, keepdim=True)  # [P, G, 1]
    if loss == "grpo":
        normaliser = group_size * lengths
    elif loss == "dapo":
        normaliser = lengths.sum(1, keepdim=True)  # [P, 1, 1]
    else:  # dr_grpo
        normaliser = group_size * max_new_tokens
    return mask / normaliser / (num_prompts or mask.shape[0])


def policy_loss(logp, old_logp, advantages, weights, clip_low=0.2, clip_high=0.2, ref_logp=None, beta=0.0):
    """The clipped surrogate, to be minimised: minus J of the top of the file (GRPO eq. 3).

    logp, old_logp, weights (and ref_logp) [B, T], advantages [B] -> scalar, and sums over the tokens with a weight:
    {"tokens", "clip_fraction" (where the clip stops the gradient), "kl" (k3 estimate of KL(old || new))}.
    Example: log-ratio 0.5, advantage 1, weight 1 -> loss -1.2, clipped; with advantage -1 -> loss 1.65.
    """
    counted = weights > 0  # padding is left out, whatever stands there
    log_ratio = torch.where(counted, logp - old_logp, 0.0).clamp(max=20)  # exp stays finite
    ratio = log_ratio.exp()
    advantages = advantages[:, None]  # [B, 1]
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -(weights * torch.minimum(unclipped, clipped)).sum()
    if beta > 0:
        log_ref = torch.where(counted, ref_logp - logp, 0.0)
        loss = loss + beta * (weights * (log_ref.exp() - log_ref - 1)).sum()
    with torch.no_grad():
        kl = ratio - 1 - log_ratio  # 0 on padding
        stats = {"tokens": counted.sum(), "clip_fraction": (clipped < unclipped).sum(), "kl": kl.sum()}
    return loss, stats


# 3. The training step -------------------------------------------------------------------------------------------------

def train_step(policy, reference, optimizer, args, prompts, completions, rewards):
    """Step on a rank's prompts [P][ids], completions [P·G], rewards [P, G]: all ranks' metrics. λ: variants differ."""
    device, group_size = rewards.device, rewards.shape[1]
    lengths = torch.tensor([len(completion.ids) for completion in completions], device=device).view(rewards.shape)
    mask = torch.arange(lengths.max().item(), device=device) < lengths[..., None]  # [P, G, T]
    advantages = group_advantages(rewards, normalize_std=args.loss != "dr_grpo")  # λ: [P, G]
    weights = token_weights(mask, args.loss, args.max_new_tokens, args.prompts_per_step)  # λ: [P, G, T]
    mask, advantages, weights = mask.flatten(0, 1), advantages.flatten(), weights.flatten(0, 1)  # [P·G, ...]

    starts = torch.tensor([len(ids) for ids in prompts], device=device).repeat_interleave(group_size)  # [P·G]
    sequences = [torch.tensor(prompts[i // group_size] + c.ids) for i, c in enumerate(completions)]  # [P·G][S]
    sampler_logp = pad_sequence([torch.tensor(c.logps) for c in completions], batch_first=True).to(device)  # [P·G, T]
    old_logp, ref_logp = torch.zeros_like(sampler_logp), torch.zeros_like(sampler_logp)  # [P·G, T], filled below
    plan, totals = micro_batches([len(ids) for ids in sequences], args.micro_batch_tokens, device), Counter()
    for update in range(args.updates_per_batch):
        sums = Counter()  # over this rank's tokens (Counter.update adds), named after the means that they become
        for rows in plan:
            part = rows, slice(max(len(completions[row].ids) for row in rows))  # x[part]: B rows, to their longest
            input_ids = pad_sequence([sequences[row] for row in rows], batch_first=True).to(device)  # [B, S]
            logp, entropy = policy(input_ids, starts[rows], mask[part])  # [B, T], [B, T] (without gradient)
            if update == 0:
                old_logp[part] = logp.detach()
                with torch.no_grad():
                    ref_logp[part] = reference(input_ids, starts[rows], mask[part])[0] if reference else 0.0
            # Truncated importance sampling: what the sampler drew from is not quite the trainer's π_old
            gap = torch.where(mask[part], old_logp[part] - sampler_logp[part], 0.0)  # [B, T]
            importance = gap.exp().clamp(max=args.tis_cap) * mask[part]  # [B, T]
            advantage, weight = advantages[rows], weights[part] * importance  # λ: [B], [B, T]
            loss, stats = policy_loss(
                logp, old_logp[part], advantage, weight, args.clip_low, args.clip_high, ref_logp[part], args.beta,
            )
            policy.set_requires_all_reduce(rows is plan[-1])  # over nodes: once an update, not in every micro-batch
            (loss * WORLD).backward()  # FSDP averages over ranks, the objective is a sum
            sums.update({**stats, "loss": loss.detach(), "entropy": entropy.sum(), "logp_diff": gap.abs().sum()})
            sums.update({"tis_mean": importance.sum(), "tis_capped": (gap.exp() > args.tis_cap).sum()})
        sums = sum_over_ranks(sums, device)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor().item()
        if not math.isfinite(sums["loss"] + norm):
            fail(f"stopped before the update: loss {sums['loss']}, gradient norm {norm}; the checkpoints are good", 1)
        if sums["logp_diff"] > 0.5 * sums["tokens"]:
            fail("stopped before the update: mean |Δ log p| of sampler and trainer over 0.5: stale or wrong weights", 1)
        optimizer.step()
        optimizer.zero_grad()  # here, not before: the sampler can use that memory
        totals.update({**sums, "grad_norm": norm})

    equal = rewards.amax(-1) - rewards.amin(-1) < 1e-6  # [P]; below: sums over groups, then means over all P
    sums = {"reward": rewards.mean(-1).sum(), "zero_variance": equal.sum(), "length": lengths.sum() / group_size}
    sums["truncated"] = sum(completion.finish == "length" for completion in completions) / group_size
    metrics = {name: total / args.prompts_per_step for name, total in sum_over_ranks(sums, device).items()}
    tokens = totals.pop("tokens")
    for name, total in totals.items():  # means over updates, or over all tokens of all updates
        metrics[name] = total / (args.updates_per_batch if name in ("loss", "grad_norm") else tokens)
    return metrics


# 4. The run -----------------------------------------------------------------------------------------------------------

def main():
    # Flags and data: what can be wrong is found here, before a model is loaded
    args = read_flags(Args, SCRIPT, TOY)
    check_args(args)
    tokenizer = load_tokenizer(args.model)
    data, skipped = load_prompts(args.dataset, "train", tokenizer, args)
    eval_problems = load_prompts(args.eval_dataset, "test", tokenizer, args)[0] if args.eval_dataset else []
    epochs = range(math.ceil(args.steps * args.prompts_per_step / len(data)))  # each has its own order, by the seed
    order = [i for epoch in epochs for i in np.random.default_rng((args.seed, epoch)).permutation(len(data))]

    # Policy, optimizer, sampler. A single process is a process group of one: there is no other path
    device = join_ranks(args.timeout_minutes)
    policy = load_policy(args, device)
    reference = load_policy(args, device, trainable=False) if args.beta > 0 else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    vllm = args.sampler == "vllm" or (args.sampler == "auto" and device.type == "cuda" and find_spec("vllm"))
    sampler = (VLLMSampler if vllm else HFSampler)(args, tokenizer, device)
    done = load_checkpoint(policy, optimizer, args.resume) if args.resume else 0
    sampler.load(full_weights(policy, sampler.dtype))

    say_start(SCRIPT, args, policy, sampler, device)
    columns = ["step", "reward", "length", "truncated", "entropy", "grad_norm", "loss", "lr", "tokens_per_second"]
    run = open_run(args, SCRIPT, done, columns)
    notices = []  # SIGTERM, from a cluster: finish the step, save, end
    signal.signal(signal.SIGTERM, lambda *_: notices.append(True))
    share = args.prompts_per_step // WORLD  # prompts of a rank
    bar = tqdm(range(done + 1, args.steps + 1), SCRIPT, initial=done, total=args.steps, disable=RANK > 0 or None)

    with Grader() as grader:
        log_accuracy(run, args, done, sampler, tokenizer, eval_problems, grader)  # on resume: if a kill lost it
        for step in bar:
            clock, timeouts = Seconds(bar), grader.timeouts
            clock.start("sampling")
            place = (step - 1) * args.prompts_per_step + RANK * share  # of this rank's first prompt
            chosen = [data[i] for i in order[place : place + share]]
            prompts, seed = [row["prompt_ids"] for row in chosen], args.seed * 1_000_000_007 + place
            completions = sampler(prompts, args.group_size, seed, args.temperature)  # [P·G], the same on any ranks
            sampler.sleep()

            clock.start("grading")
            texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
            asked = [row for row in chosen for _ in range(args.group_size)]
            rewards = torch.tensor(rewards_of(texts, asked, grader), device=device).float().view(share, -1)  # [P, G]

            clock.start("training")
            optimizer.param_groups[0]["lr"] = lr = args.lr * min(1.0, step / max(1, args.warmup_steps))
            metrics = train_step(policy, reference, optimizer, args, prompts, completions, rewards)

            clock.start("syncing")
            sampler.load(full_weights(policy, sampler.dtype))

            clock.start("logging")
            counts = sum_over_ranks({"timeouts": grader.timeouts - timeouts, "notices": len(notices)}, device)
            metrics |= {"step": step, "lr": lr, "skipped": skipped, "grader_timeouts": int(counts["timeouts"])}
            metrics |= clock.metrics(tokens=metrics["length"] * args.prompts_per_step * args.group_size)
            log_step(run, args, metrics, columns, zip(asked, texts, rewards.flatten().tolist()))
            if step == args.steps or counts["notices"] or (args.save_every and step % args.save_every == 0):
                save_checkpoint(policy, optimizer, run, step)
            if counts["notices"] and step < args.steps:
                say(f"SIGTERM: saved after step {step}; go on with --resume {run}")
                return
            log_accuracy(run, args, step, sampler, tokenizer, eval_problems, grader)  # the checkpoint is safe

    save_final(policy, tokenizer, run / "final")
    say_end(run)


# ===== From here on: machinery, the same for every method =============================================================

# 5. Sampling ----------------------------------------------------------------------------------------------------------

class Completion(NamedTuple):
    ids: list  # token ids, the stop token kept
    finish: str  # "stop", or "length" when max_new_tokens cut it off
    logps: list  # the sampler's own log-probability of each token


class HFSampler:
    """Samples with a loop over transformers' forward, on every rank from an unsharded copy of the model of its own."""

    def __init__(self, args, tokenizer, device):
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=self.dtype, use_safetensors=True)
        self.model, self.max_new_tokens = model.to(device).eval(), args.max_new_tokens
        self.stops = stop_tokens(model, tokenizer)

    @torch.no_grad()
    def load(self, named_tensors):
        """Take over new weights: (name, full tensor) pairs."""
        own = self.model.state_dict()
        for name, tensor in named_tensors:
            own[name].copy_(tensor)

    def sleep(self):
        """Nothing to give back: the copy stays where it is."""

    def __call__(self, prompt_ids, n, seed, temperature):
        """n Completions of each prompt, prompt by prompt. Number k of prompt i depends on seed + i and k alone, up to
        rounding, not on what else is sampled with it. Temperature 0 is greedy."""
        size = max(1, 256 // n)  # prompts at a time: bounds the memory of the cache
        starts = range(0, len(prompt_ids), size)
        return [c for i in starts for c in self.sample(prompt_ids[i : i + size], n, seed + i, temperature)]

    @torch.inference_mode()
    def sample(self, prompts, n, seed, temperature):
        """B = len(prompts) · n completions, drawn by inverse transform from a uniform number for each token."""
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # [B / n, S]
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        seeds = [(seed + i, k) for i in range(len(prompts)) for k in range(n)]
        uniform = np.stack([np.random.default_rng(own).random(self.max_new_tokens) for own in seeds])  # [B, T]
        uniform, stops = torch.tensor(uniform, device=device), torch.tensor(self.stops, device=device)
        cache, rows = DynamicCache(config=self.model.config), torch.arange(len(seeds), device=device)
        drawn = torch.zeros(len(seeds), self.max_new_tokens, dtype=torch.long, device=device)  # [B, T]
        logps, lengths = torch.zeros(drawn.shape, device=device), torch.zeros_like(rows)  # [B, T], [B]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # [B / n, S]: they count from behind the padding
        for t in range(self.max_new_tokens):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            logits = self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            if t == 0:  # a prompt's keys and values are computed once, and serve its n completions
                cache.batch_repeat_interleave(n)
                logits, mask, positions = (x.repeat_interleave(n, 0) for x in (logits, mask, positions[:, -1:]))
            logp = (logits / (temperature or 1.0)).log_softmax(-1)  # [B, V]
            ids = logp.argmax(-1, keepdim=True)  # [B, 1]
            if temperature > 0:
                below = logp.double().exp().cumsum(-1)  # in float32 the tail of a large vocabulary would be lost
                ids = torch.searchsorted(below, uniform[rows, t, None] * below[:, -1:], right=True)
            drawn[rows, t], logps[rows, t], lengths[rows] = ids[:, 0], logp.gather(-1, ids)[:, 0], t + 1
            going = ~torch.isin(ids[:, 0], stops)  # [B]
            if not going.any():
                break
            if not going.all():  # finished rows leave
                cache.batch_select_indices(going.nonzero()[:, 0])
                ids, mask, rows, positions = (x[going] for x in (ids, mask, rows, positions))
            mask, positions = F.pad(mask, (0, 1), value=1), positions + 1
        cut = [(ids[:end], own[:end]) for ids, own, end in zip(drawn.tolist(), logps.tolist(), lengths.tolist())]
        return [Completion(ids, "stop" if ids[-1] in self.stops else "length", own) for ids, own in cut]


class VLLMSampler:
    """Samples with vLLM, an engine on every rank. Between sleep and the next load it holds no GPU memory."""

    def __init__(self, args, tokenizer, device):
        self.on_gpu, self.max_new_tokens = device.type == "cuda", args.max_new_tokens
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.engine = start_vllm(
            args.model, args, self.dtype, args.max_prompt_tokens + args.max_new_tokens, enable_sleep_mode=self.on_gpu,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
        )
        self.sleep()

    @torch.no_grad()
    def load(self, named_tensors):
        """Take over new weights: (name, full tensor) pairs. Wakes the engine."""
        if self.on_gpu:
            torch.cuda.empty_cache()  # what the training has left, the engine needs
            self.engine.wake_up(tags=["weights"])
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
        if self.on_gpu:
            self.engine.wake_up(tags=["kv_cache"])
        self.engine.reset_prefix_cache()  # its keys and values are the old weights'

    def sleep(self):
        """Give the GPU's memory back, until load."""
        if self.on_gpu:
            self.engine.sleep(level=2)

    def __call__(self, prompt_ids, n, seed, temperature):
        """As HFSampler's, from other random numbers: completion k of prompt i has the seed (seed + i)·n + k."""
        from vllm import SamplingParams

        how = dict(n=n, temperature=temperature, max_tokens=self.max_new_tokens, detokenize=False)
        how |= dict(logprobs=0, flat_logprobs=True)  # of the drawn token alone, in one list
        params = [SamplingParams(seed=(seed + i) * n, **how) for i in range(len(prompt_ids))]
        done = self.engine.generate([{"prompt_token_ids": ids} for ids in prompt_ids], params, use_tqdm=False)
        return [Completion(list(o.token_ids), o.finish_reason, o.logprobs.logprobs) for r in done for o in r.outputs]


# 6. Policy, micro-batches, ranks --------------------------------------------------------------------------------------

class Policy(torch.nn.Module):
    """A causal language model whose forward returns log-probabilities of given tokens, never the logits.

    The head runs in checkpointed chunks of 512 tokens: [B, T, vocabulary] logits would be the largest tensor by far.
    It is the root of FSDP, so that embeddings and head are gathered around this forward. No attention mask is needed:
    the padding is on the right, where causal attention never sees it.
    """

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, input_ids, starts, mask):
        """input_ids [B, S], completions from starts [B], mask [B, T] -> logp [B, T], entropies [B, T] (no gradient)."""
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
        chosen = logp.gather(-1, targets[:, None]).squeeze(-1)
        with torch.no_grad():  # behind all that needs a gradient: so the backward pass does not compute it again
            entropy = -torch.linalg.vecdot(logp.exp(), logp)
        return chosen, entropy


def load_policy(args, device, trainable=True):
    """The sharded policy: fp32 weights (a rank maps the files, and only its own shards become fp32), bf16 on GPUs."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", use_safetensors=True)
    policy = Policy(model.eval(), args.temperature).requires_grad_(trainable)  # eval: no dropout
    with torch.no_grad():
        hidden, logits = model.base_model(torch.tensor([[1, 2]]))[0], model(torch.tensor([[1, 2]])).logits
        fits = torch.allclose(model.get_output_embeddings()(hidden), logits, atol=1e-3)
    check(fits, "this model changes its logits after the head (caps or scales them); Policy would train another one")
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        if args.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if device.type == "cuda" and trainable:  # its activations are computed again in the backward pass
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))  # shards inside a node, replicas across nodes
    mesh = init_device_mesh(device.type, (WORLD // local, local), mesh_dim_names=("replicate", "shard"))
    mesh = mesh["shard"] if WORLD == local else mesh  # FSDP would keep all gradients twice, for replicas not there
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for module in [*layers, policy]:  # after a forward pass the root stays whole for the backward pass, if there is one
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=None if trainable else True)
    return policy.float()


def full_weights(policy, dtype):
    """(name, full tensor) of every weight, one at a time, tied ones under each of their names. On all ranks."""
    for name, tensor in policy.model.state_dict().items():
        yield name, tensor.to(dtype).full_tensor() if isinstance(tensor, DTensor) else tensor


def micro_batches(lengths, budget, device):
    """Cut sequences into micro-batches [row, ...] of rows × longest ≤ budget tokens, or of one longer row.

    Sorted by length, and cut where padding would pass a sixteenth of the budget. All ranks get the same number, or FSDP
    would wait for ever: a rank that is short of them halves its largest.
    """
    plan = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        padding = sum(lengths[row] - lengths[other] for other in plan[-1])  # in all, with this row
        if plan[-1] and ((len(plan[-1]) + 1) * lengths[row] > budget or padding > budget // 16):
            plan.append([])
        plan[-1].append(row)
    count = torch.tensor(len(plan), device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    while len(plan) < count:  # all ranks have equally many rows, so there is one to halve
        plan.sort(key=len)
        rows = plan.pop()
        plan += [rows[::2], rows[1::2]]
    return plan


# 7. Checkpoints and flags ---------------------------------------------------------------------------------------------

TOY = dict(  # what changes when no --model is given: a run of a minute on a laptop; explicit flags win over it
    model=str(Path(__file__).with_name("tests") / "tiny"), dataset="arithmetic", eval_dataset="arithmetic", steps=25,
    prompts_per_step=16, max_new_tokens=48, lr=1e-4, warmup_steps=5, save_every=10,
)


def weights_once(module):
    """Weights and buffers by name, tied ones under their first name alone, as a file should hold them."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def state_of(policy, optimizer):
    """What a checkpoint holds."""
    return {"model": weights_once(policy), "optimizer": states.get_optimizer_state_dict(policy, optimizer)}


def save_checkpoint(policy, optimizer, run, step):
    """Write checkpoints/step_N: aside, then renamed, so that a folder of that name is whole. The last two are kept."""
    aside = run / "checkpoints" / f"step_{step}.part"
    try:
        dcp.save(state_of(policy, optimizer), checkpoint_id=aside)  # every rank its shards
    except dcp.CheckpointException as error:  # all ranks get it, whichever of them could not write
        reason, free = next(iter(error.failures.values()))[0], shutil.disk_usage(run).free / 1e9
        fail(f"checkpoint step_{step} was not written ({free:.2f} GB free; {reason}); what was saved before is whole: "
             f"make room, then --resume {run}", 1)
    if RANK == 0:
        aside.rename(aside.with_suffix(""))
        for old in checkpoints(run)[:-2]:
            shutil.rmtree(old)


def load_checkpoint(policy, optimizer, run):
    """Restore the last whole checkpoint, by whatever number of ranks it was saved. Returns its step."""
    newest, state = checkpoints(run)[-1], state_of(policy, optimizer)
    dcp.load(state, checkpoint_id=newest)  # in place, as far as the weights go
    states.set_optimizer_state_dict(policy, optimizer, state["optimizer"])
    return int(newest.name[5:])


def save_final(policy, tokenizer, folder):
    """The model as transformers and vLLM load it, in the type it came in. Rank 0 holds it whole for a moment."""
    policy.to(policy.model.config.dtype)
    once, gathered = weights_once(policy.model), full_weights(policy, policy.model.config.dtype)  # on all ranks
    weights = {name: tensor.cpu() for name, tensor in gathered if RANK == 0 and name in once}
    if RANK == 0:
        policy.model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def check_args(args):
    """End the program with one line where a flag's value makes no sense."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):  # λ: (a variant's own may be negative)
            least = int(name in ("steps", "prompts_per_step", "updates_per_batch", "max_new_tokens"))
            check(least <= value < math.inf, f"--{name} {value}: must be a number, {least} or above")
    for name in ("temperature", "max_grad_norm", "timeout_minutes", "gpu_memory_utilization"):
        check(getattr(args, name) > 0, f"--{name} must be above 0")
    check(args.gpu_memory_utilization < 1, "--gpu_memory_utilization must be below 1")
    check(args.group_size >= 2, "--group_size must be at least 2: an advantage compares completions of one prompt")
    check(args.clip_low < 1 <= args.tis_cap, "--clip_low must be below 1, --tis_cap at least 1")
    check(args.prompts_per_step % WORLD == 0, f"--prompts_per_step must be a multiple of the {WORLD} ranks")
    check(args.sampler != "vllm" or find_spec("vllm"), "--sampler vllm needs its package: see requirements.txt")
    check(not args.wandb or find_spec("wandb"), "--wandb needs its package: pip install wandb")


if __name__ == "__main__":
    with ending():
        main()
