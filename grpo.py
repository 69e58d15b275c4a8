"""GRPO in one file: group-relative policy optimisation, with the aggregations of DAPO and Dr. GRPO by flag.

Papers: GRPO, DeepSeekMath (arXiv 2402.03300); DAPO (arXiv 2503.14476); Dr. GRPO (arXiv 2503.20783).

For each of P prompts a group of G completions o_1..o_G is sampled and rewarded with R_1..R_G. Maximised is

    J = sum over groups, completions i, tokens t of  w[i,t] · min(r[i,t]·A[i], clip(r[i,t], 1-ε_low, 1+ε_high)·A[i])
        - β · the same weighted sum of k3[i,t]
    r[i,t]  = π(token t of o_i) / π_old(token t of o_i)                        (GRPO eq. 3, per token)
    k3[i,t] = exp(d) - d - 1, d = log(π_ref/π) of that token                   (GRPO eq. 4; β = 0: no reference model)

    --loss     advantage A[i]                   weight w[i,t], each also times 1/P
    grpo       (R_i - mean) / (std + 1e-4)      1 / (G·|o_i|)        every completion counts the same (eq. 3)
    dapo       (R_i - mean) / (std + 1e-4)      1 / Σ_j |o_j|        every token counts the same (DAPO eq. 8)
    dr_grpo    R_i - mean                       1 / (G·L_max)        no division by the data's std or length

The weights hold every normaliser, and a group lives whole on one rank. So neither the micro-batches nor the number of
ranks can change the gradient. One update per batch is the default; then π_old = π, the ratio is 1 and the clip idle.
Deviations: std is the sample one (ddof 1), and in a group of equal rewards all advantages are exactly 0; DAPO's token
mean is taken in each group; its dynamic sampling and overlong penalty, which concern data and reward, are not here.
The variants beside this file change its algorithm block and the lines that are marked "# λ:", and nothing else.

    python grpo.py                                                   laptop: a tiny model learns sums in a minute
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k --prompts_per_step 16      one GPU
    torchrun --nproc_per_node=8 grpo.py --model Qwen/Qwen2.5-7B                                  eight GPUs
"""

import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as states
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser, logging
from transformers.hf_argparser import HfArg
from transformers.modeling_layers import GradientCheckpointingLayer

from eval import Grader, encode_prompt, evaluate, fail, load_problems, load_tokenizer, say

SCRIPT = Path(__file__).stem
TOY = dict(  # what changes when no --model is given: a run of a minute on a laptop; explicit flags win over it
    model=str(Path(__file__).with_name("tests") / "tiny"), dataset="arithmetic", eval_dataset="arithmetic", steps=25,
    prompts_per_step=16, max_new_tokens=48, lr=1e-4, warmup_steps=5, save_every=10,
)


@dataclass
class Args:
    # The algorithm
    loss: Literal["grpo", "dapo", "dr_grpo"] = HfArg(default="grpo", help="how tokens are weighted: see the docstring")
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
    max_prompt_tokens: int = HfArg(default=1024, help="longer prompts are skipped, and counted")
    max_new_tokens: int = HfArg(default=2048, help="longest completion, in tokens (L_max)")
    temperature: float = HfArg(default=1.0, help="sampling temperature; the trainer's log-probabilities use it too")
    sampler: Literal["auto", "vllm", "hf"] = HfArg(default="auto", help="hf: transformers; auto: vllm if CUDA has it")
    gpu_memory_utilization: float = HfArg(default=0.5, help="vLLM's share of the GPU when it samples, with its weights")
    vllm_tp: int = HfArg(default=1, help="ranks that share a vLLM engine (tensor parallel); 1: an engine on every rank")
    enforce_eager: bool = HfArg(default=False, help="vLLM without CUDA graphs: starts sooner, samples more slowly")
    # Optimisation
    steps: int = HfArg(default=200, help="training steps: one batch of completions each")
    lr: float = HfArg(default=1e-6, help="AdamW's learning rate, after the warm-up")
    warmup_steps: int = HfArg(default=10, help="steps of linear warm-up")
    max_grad_norm: float = HfArg(default=1.0, help="the gradient is scaled down to this norm")
    tis_cap: float = HfArg(default=2.0, help="cap of the importance weights between trainer and sampler")
    micro_batch_tokens: int = HfArg(default=16384, help="tokens per forward pass: lower it when memory runs out")
    # The run
    eval_every: int = HfArg(default=0, help="evaluate every so many steps; 0: only at the end")
    save_every: int = HfArg(default=20, help="save a checkpoint every so many steps; 0: only at the end")
    seed: int = HfArg(default=0, help="decides prompts and samples")
    timeout_minutes: float = HfArg(default=60.0, help="ranks wait so long for another one, then the job ends")
    output_dir: str = HfArg(default=None, help="folder of the run (default: runs/<script>-<time>)")
    resume: str = HfArg(default=None, help="folder of a run to go on with, from its last checkpoint")
    wandb: str = HfArg(default=None, help="name of a Weights & Biases project to log to as well")


# 1. The algorithm -----------------------------------------------------------------------------------------------------


def group_advantages(rewards, normalize_std=True):
    """How much better each completion is than its group. rewards [P, G] -> advantages [P, G].

    (R - mean) / (std + 1e-4) with the sample standard deviation (ddof 1), or R - mean (Dr. GRPO). Exactly 0 where the
    rewards differ by less than 1e-6. Example: [[1, 0, 0, 1]] -> [[.866, -.866, -.866, .866]].
    """
    centred = rewards - rewards.mean(-1, keepdim=True)  # [P, G]
    if normalize_std:
        centred = centred / (rewards.std(-1, keepdim=True) + 1e-4)
    spread = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True)  # [P, 1]
    return torch.where(spread < 1e-6, 0.0, centred)


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


def policy_loss(
    logp, old_logp, advantages, weights, clip_low=0.2, clip_high=0.2, ref_logp=None, beta=0.0,
):
    """The clipped surrogate, to be minimised: minus J of the top of the file (GRPO eq. 3).

    logp, old_logp, weights (and ref_logp) [B, T], advantages [B] -> scalar, and sums over the tokens with a weight:
    {"tokens", "clip_fraction" (where the clip stops the gradient), "kl" (k3 estimate of KL(old || new))}.
    Example: log-ratio 0.5, advantage 1, weight 1 -> loss -1.2, clipped; with advantage -1 -> loss 1.65.
    """
    counted = weights > 0  # padding is left out, whatever stands there
    log_ratio = torch.where(counted, logp - old_logp, 0.0)
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


# 2. Sampling ----------------------------------------------------------------------------------------------------------


class Completion(NamedTuple):
    ids: list  # token ids, the stop token kept
    finish: str  # "stop", or "length" when max_new_tokens cut it off
    logps: list | None = None  # the sampler's own log-probability of each token, if it reports them


class VLLMSampler:
    """Samples with vLLM: an engine on every rank (or one for --vllm_tp ranks), inside this process.

    While the policy trains the engine sleeps: its GPU memory is free, and its weights are gone until the next load.
    """

    def __init__(self, args, tokenizer, device):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where load can reach it
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        self.sampling_params, self.max_new_tokens, self.tp = vllm.SamplingParams, args.max_new_tokens, args.vllm_tp
        self.on_gpu, self.asleep = device.type == "cuda", False
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.peers, _ = dist.new_subgroups(args.vllm_tp)  # the ranks of my engine
        context = AutoConfig.from_pretrained(args.model).get_text_config().max_position_embeddings
        try:
            self.engine = vllm.LLM(
                args.model, dtype=self.dtype, seed=args.seed, tensor_parallel_size=args.vllm_tp,
                distributed_executor_backend="external_launcher" if dist.get_world_size() > 1 else None,
                max_model_len=min(context, args.max_prompt_tokens + args.max_new_tokens),
                gpu_memory_utilization=args.gpu_memory_utilization, enable_sleep_mode=self.on_gpu,
                enforce_eager=args.enforce_eager or not self.on_gpu,
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
            )
        except (ValueError, RuntimeError) as error:
            if "memory" not in str(error):
                raise
            fail(f"vLLM does not fit: {error} Here: --gpu_memory_utilization {args.gpu_memory_utilization}; shorter "
                 "--max_prompt_tokens and --max_new_tokens or a larger --vllm_tp need less", 1)

    @torch.no_grad()
    def load(self, named_tensors):
        """Take over new weights: (name, full tensor) pairs. Wakes the engine."""
        if self.asleep:
            torch.cuda.empty_cache()  # what the training has left, the engine needs
            self.engine.wake_up(tags=["weights"])
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
        if self.asleep:
            self.engine.wake_up(tags=["kv_cache"])
        self.engine.reset_prefix_cache()  # its keys and values are the old weights'
        self.asleep = False

    def sleep(self):
        """Give the GPU's memory back, until load."""
        if self.on_gpu:
            self.engine.sleep(level=2)
            self.asleep = True

    def __call__(self, prompt_ids, n, seed, temperature, top_p=1.0):
        """As HFSampler's, and with log-probabilities. Completion k of prompt i has the seed (seed + i)·n + k."""
        asked = [[(ids, (seed + i) * n) for i, ids in enumerate(prompt_ids)]] * self.tp
        dist.all_gather_object(asked, asked[0], group=self.peers)  # an engine's ranks all ask for the same
        how = dict(n=n, temperature=temperature, top_p=top_p, max_tokens=self.max_new_tokens, logprobs=0)
        params = [self.sampling_params(seed=own, detokenize=False, **how) for share in asked for _, own in share]
        prompts = [{"prompt_token_ids": ids} for share in asked for ids, _ in share]
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        first = sum(map(len, asked[: dist.get_rank(self.peers)]))
        return [
            Completion(
                list(output.token_ids), output.finish_reason,
                [scores[token].logprob for token, scores in zip(output.token_ids, output.logprobs)],
            )
            for request in outputs[first : first + len(prompt_ids)] for output in request.outputs
        ]


class HFSampler:
    """Samples with transformers' generate, on every rank from an unsharded copy of the model of its own."""

    def __init__(self, args, tokenizer, device):
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=self.dtype, use_safetensors=True)
        self.model, self.max_new_tokens = model.to(device).eval(), args.max_new_tokens
        stops = model.generation_config.eos_token_id
        stops = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id]
        self.stops = sorted({stop for stop in stops if stop is not None}) or [-1]  # no stop token: never the end
        model.generation_config = GenerationConfig()  # without the model's own top-k and penalties: they bias the ratio

    @torch.no_grad()
    def load(self, named_tensors):
        """Take over new weights: (name, full tensor) pairs."""
        own = self.model.state_dict()
        for name, tensor in named_tensors:
            own[name].copy_(tensor)

    def sleep(self):
        """Nothing to give back: the copy stays where it is."""

    def __call__(self, prompt_ids, n, seed, temperature, top_p=1.0):
        """n completions of each prompt, prompt by prompt: token ids in, Completions out. Temperature 0 is greedy."""
        how = {"do_sample": temperature > 0}
        if temperature > 0:
            how.update(temperature=temperature, top_k=0, top_p=top_p)
        how.update(max_new_tokens=self.max_new_tokens, eos_token_id=self.stops, pad_token_id=max(0, self.stops[0]))
        rows, completions = [ids for ids in prompt_ids for _ in range(n)], []
        torch.manual_seed(seed)
        for batch in (rows[i : i + 256] for i in range(0, len(rows), 256)):  # bounds the memory of the key-value cache
            backwards = [torch.tensor(ids[::-1]) for ids in batch]  # to pad on the left: all prompts end at one place
            input_ids = pad_sequence(backwards, batch_first=True, padding_value=-1).flip(1).to(self.model.device)
            inputs = {"input_ids": input_ids.clamp(min=0), "attention_mask": (input_ids >= 0).long()}  # [B, S]
            output = self.model.generate(**inputs, generation_config=GenerationConfig(**how))  # [B, S + T]
            for ids in output[:, input_ids.shape[1] :].tolist():
                stop = next((t for t, token in enumerate(ids) if token in self.stops), None)
                completions.append(Completion(ids, "length") if stop is None else Completion(ids[: stop + 1], "stop"))
        return completions


# 3. Reward ------------------------------------------------------------------------------------------------------------


def rewards_of(texts, problems, grader):
    """1 for a right answer in the last box, else 0. Yours goes here: completions and their problems in, floats out."""
    return [float(right) for right in grader.grade_all([(text, row["answer"]) for text, row in zip(texts, problems)])]


# 4. The policy and its training step ----------------------------------------------------------------------------------


class Policy(torch.nn.Module):
    """A causal language model whose forward returns log-probabilities of given tokens, never the logits.

    The head runs in checkpointed chunks of 512 tokens: [B, T, vocabulary] logits would be the largest tensor by far.
    It is the root of FSDP, so that embeddings and head are gathered around this forward.
    """

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, input_ids, starts, mask):
        """input_ids [B, S], completions from starts [B] on, mask [B, T] -> log-probabilities and entropies [B, T]."""
        hidden = self.model.base_model(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state  # [B, S - 1, H]
        rows, steps = mask.nonzero(as_tuple=True)  # [N], [N]: an entry for each completion token
        positions = starts[rows] + steps  # a token is predicted from the position before it
        hidden, targets = hidden[rows, positions - 1], input_ids[rows, positions]  # [N, H], [N]
        head = self.model.get_output_embeddings()
        chunks = [
            checkpoint(self.score, chunk, target, head.weight, getattr(head, "bias", None), use_reentrant=False)
            for chunk, target in zip(hidden.split(512), targets.split(512))
        ]
        padded = torch.zeros(mask.shape, device=input_ids.device)  # [B, T]
        return tuple(padded.index_put((rows, steps), torch.cat(values)) for values in zip(*chunks))

    def score(self, hidden, targets, weight, bias):
        """hidden [N, H], targets [N] -> log-probabilities [N] in float32, entropies [N] without gradient."""
        logits = F.linear(hidden, weight, bias).float().div_(self.temperature)  # [N, V]
        logp = logits.log_softmax(-1)  # [N, V]
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(logp.exp(), logp)
        return logp.gather(-1, targets[:, None]).squeeze(-1), entropy

    @torch.no_grad()
    def check(self, ids):
        """Stop unless forward agrees with the model's own logits on one short text [S]. Before sharding."""
        input_ids = torch.tensor([(ids + ids)[:32]])  # [1, S]
        expected = (self.model(input_ids=input_ids).logits[:, :-1].float() / self.temperature).log_softmax(-1)
        expected = expected.gather(-1, input_ids[:, 1:, None]).squeeze(-1)  # [1, S - 1]
        logp, _ = self(input_ids, torch.tensor([1]), torch.ones_like(expected))
        if not torch.allclose(logp, expected, atol=1e-3):
            fail("this model changes its logits after the head (caps or scales them); Policy would train another one")


def load_policy(args, mesh, device, probe, trainable=True):
    """The sharded model: fp32 weights, bf16 compute on GPU. Only rank 0 reads it, the others get shards from it."""
    source = dist.get_rank() == 0
    if source:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, use_safetensors=True)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=torch.float32)
    policy = Policy(model.eval(), args.temperature).requires_grad_(trainable)  # eval: no dropout
    if source:
        policy.check(probe)
    # kept aside, because to_empty below drops what fully_shard leaves
    weights, buffers = policy.state_dict() if source else {}, [buffer.clone() for buffer in policy.buffers()]
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if device.type == "cuda" and trainable:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers:
            layer.training = True  # of the layer alone: checkpointing asks for it, the dropout inside stays off
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for module in [*layers, policy]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    policy.to_empty(device=device)
    model.tie_weights()  # to_empty has parted what was shared
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(policy, weights, options=options)
    for buffer, value in zip(policy.buffers(), buffers):  # rotary frequencies and the like are in no state dict
        if source:
            buffer.copy_(value)
        dist.broadcast(buffer, 0)
    return policy


def full_weights(policy, dtype):
    """(name, full tensor) of every parameter, one at a time, tied ones under each of their names. On all ranks."""
    for name, parameter in policy.model.named_parameters(remove_duplicate=False):
        yield name, parameter.detach().to(dtype).full_tensor()


def sum_over_ranks(values, device):
    """{name: number} -> {name: sum over all ranks}."""
    totals = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return dict(zip(values, totals.tolist()))


def micro_batches(lengths, budget, device):
    """Cut sequences into micro-batches of rows × longest ≤ budget tokens, or of one longer row: [(rows, 1.0), ...].

    Sorted by length, and cut where padding would pass a sixteenth of the budget. All ranks get the same number, or FSDP
    would wait for ever: a rank that is short of them repeats its shortest row, with factor 0.0.
    """
    batches = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        padding = sum(lengths[row] - lengths[other] for other in batches[-1])  # that this row would bring
        if batches[-1] and ((len(batches[-1]) + 1) * lengths[row] > budget or padding > budget // 16):
            batches.append([])
        batches[-1].append(row)
    count = torch.tensor(len(batches), device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return [(rows, 1.0) for rows in batches] + [(batches[0][:1], 0.0)] * (count.item() - len(batches))


def train_step(policy, reference, optimizer, args, prompts, completions, rewards):
    """Update the policy with this rank's prompts [P][ids], completions [P·G], rewards [P, G]. Metrics of all ranks."""
    device, group_size = rewards.device, rewards.shape[1]
    lengths = torch.tensor([len(completion.ids) for completion in completions], device=device).view(rewards.shape)
    mask = torch.arange(lengths.max().item(), device=device) < lengths[..., None]  # [P, G, T]
    advantages = group_advantages(rewards, normalize_std=args.loss != "dr_grpo")  # λ: [P, G]
    weights = token_weights(mask, args.loss, args.max_new_tokens, args.prompts_per_step)  # λ: [P, G, T]
    mask, advantages, weights = mask.flatten(0, 1), advantages.flatten(), weights.flatten(0, 1)  # [P·G, ...]
    starts = torch.tensor([len(ids) for ids in prompts], device=device).repeat_interleave(group_size)  # [P·G]
    sequences = [torch.tensor(prompts[i // group_size] + c.ids) for i, c in enumerate(completions)]  # [P·G][S]
    plan = micro_batches([len(ids) for ids in sequences], args.micro_batch_tokens, device)
    old_logp, ref_logp = {}, {}  # of each micro-batch, from before the first update
    metrics = Counter()
    for _ in range(args.updates_per_batch):
        sums = Counter()  # adds up, over micro-batches
        for k, (rows, factor) in enumerate(plan):
            input_ids = pad_sequence([sequences[row] for row in rows], batch_first=True).to(device)  # [B, S]
            longest = max(len(completions[row].ids) for row in rows)
            counted, weight = mask[rows, :longest] & (factor > 0), weights[rows, :longest] * factor  # [B, T], [B, T]
            logp, entropy = policy(input_ids, starts[rows], mask[rows, :longest])  # [B, T], [B, T]
            old_logp.setdefault(k, logp.detach())
            if reference is not None and k not in ref_logp:
                with torch.no_grad():
                    ref_logp[k], _ = reference(input_ids, starts[rows], mask[rows, :longest])
            if completions[0].logps is not None:  # truncated importance sampling: the sampler is not quite π_old
                sampled = pad_sequence([torch.tensor(completions[row].logps) for row in rows], batch_first=True)
                gap = torch.where(counted, old_logp[k] - sampled.to(device), 0.0)  # [B, T]
                importance = gap.exp().clamp(max=args.tis_cap)
                weight = weight * importance
                sums["tis_mean"] += (importance * counted).sum()
                sums["tis_capped"] += (gap.exp() > args.tis_cap).sum()
                sums["logp_diff"] += gap.abs().sum()
            advantage = advantages[rows]  # λ: [B]
            loss, stats = policy_loss(
                logp, old_logp[k], advantage, weight, args.clip_low, args.clip_high, ref_logp.get(k), args.beta,
            )
            (loss * dist.get_world_size()).backward()  # FSDP averages over ranks, the objective is a sum
            sums.update({**stats, "loss": loss.detach(), "entropy": (entropy * counted).sum()})
        sums = sum_over_ranks(sums, device)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor().item()
        if not math.isfinite(sums["loss"] + norm):
            fail(f"stopped before the update: loss {sums['loss']}, gradient norm {norm}; the checkpoints are good", 1)
        if sums.get("logp_diff", 0) > 0.5 * sums["tokens"]:
            fail("stopped before the update: mean |Δ log p| of sampler and trainer over 0.5: stale or wrong weights", 1)
        optimizer.step()
        optimizer.zero_grad()  # here, not before: the sampler can use that memory
        metrics.update({**sums, "grad_norm": norm})
    spread = rewards.amax(-1) - rewards.amin(-1)  # [P]
    cut_off = sum(completion.finish == "length" for completion in completions) / group_size
    sums = {"reward": rewards.mean(-1).sum(), "zero_variance": (spread < 1e-6).sum(), "truncated": cut_off}
    sums["length"] = lengths.float().mean(-1).sum()
    tokens = metrics.pop("tokens")
    counts = {"loss": args.updates_per_batch, "grad_norm": args.updates_per_batch}  # the others are means over tokens
    return {
        **{name: total / args.prompts_per_step for name, total in sum_over_ranks(sums, device).items()},
        "tis_mean": None, "tis_capped": None, "logp_diff": None,  # unless the sampler reports its log-probabilities
        **{name: total / counts.get(name, tokens) for name, total in metrics.items()},
    }


# 5. Checkpoints and arguments -----------------------------------------------------------------------------------------


def write(path, text):
    """Write a file so that, killed at any moment, it is the old or the new one."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    aside.replace(path)


def checkpoints(run):
    """The whole checkpoints of a run's folder, oldest first."""
    return sorted(Path(run, "checkpoints").glob("step_*[0-9]"), key=lambda path: int(path.name[5:]))


def save_checkpoint(policy, optimizer, run, step):
    """Write checkpoints/step_N: aside, then renamed, so that a folder of that name is whole. The last two are kept."""
    aside = run / "checkpoints" / f"step_{step}.part"
    model_state, optimizer_state = states.get_state_dict(policy, optimizer)
    try:
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=aside)  # every rank its shards
    except dcp.CheckpointException as error:  # all ranks get it, whichever of them could not write
        reason, free = next(iter(error.failures.values()))[0], shutil.disk_usage(run).free / 1e9
        fail(f"checkpoint step_{step} was not written ({free:.2f} GB free; {reason}); the one before is whole: make "
             f"room, then --resume {run}", 1)
    if dist.get_rank() == 0:
        aside.rename(aside.with_suffix(""))
        for old in checkpoints(run)[:-2]:
            shutil.rmtree(old)


def save_final(policy, tokenizer, folder):
    """The model in the format of transformers, in the type it came in. Rank 0 holds it whole for a moment."""
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = states.get_model_state_dict(policy.model, options=options)
    if dist.get_rank() == 0:
        config = AutoConfig.from_pretrained(tokenizer.name_or_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        model.generation_config = policy.model.generation_config
        once = {name for name, _ in [*policy.model.named_parameters(), *policy.model.named_buffers()]}  # tied: once
        whole = {name: tensor.to(model.dtype) for name, tensor in whole.items() if name in once}
        model.save_pretrained(folder, state_dict=whole)
        tokenizer.save_pretrained(folder)


def parse_args():
    """Args from the command line, over those of the resumed run or of TOY, over the defaults. Ends at bad ones."""
    parser = HfArgumentParser(Args, prog=f"{SCRIPT}.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    args, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        fail(f"unknown argument {unknown[0]}: --help lists them all")
    if args.resume:
        if not checkpoints(args.resume):
            fail(f"--resume {args.resume}: no checkpoint there; the folder of a run has checkpoints/step_N in it")
        saved = json.loads(Path(args.resume, "args.json").read_text())
        if saved.pop("script") != SCRIPT or args.model not in (None, saved["model"]):
            fail(f"--resume {args.resume}: that run is of another script or model; start a new run without --resume")
        parser.set_defaults(**saved)
    elif args.model is None:
        parser.set_defaults(**TOY)
    args = parser.parse_args_into_dataclasses(look_for_args_file=False)[0]
    args.output_dir = args.resume or args.output_dir or f"runs/{SCRIPT}-{time.strftime('%Y%m%d-%H%M%S')}"
    world, done = int(os.environ.get("WORLD_SIZE", 1)), checkpoints(args.output_dir)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    for name, value in asdict(args).items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:  # λ: (a number of theirs may be negative)
            fail(f"--{name} {value}: must be a number, 0 or above")
        if name in ("steps", "prompts_per_step", "updates_per_batch", "max_new_tokens", "vllm_tp") and value < 1:
            fail(f"--{name} {value}: must be at least 1")
    for right, message in (
        (args.group_size >= 2, "--group_size must be at least 2: an advantage compares completions of one prompt"),
        (args.temperature > 0, "--temperature must be above 0: greedy completions of a prompt are all alike"),
        (args.clip_low < 1, "--clip_low must be below 1"),
        (args.prompts_per_step % world == 0, f"--prompts_per_step must be a multiple of the {world} ranks"),
        (args.sampler != "vllm" or find_spec("vllm"), "--sampler vllm needs its package: see requirements.txt"),
        (local % args.vllm_tp == 0, f"--vllm_tp must divide the {local} ranks of a node"),
        (0 < args.gpu_memory_utilization < 1, "--gpu_memory_utilization must be between 0 and 1"),
        (args.resume or not done, f"--output_dir {args.output_dir} holds a run: choose another, or --resume it"),
        (not done or int(done[-1].name[5:]) <= args.steps, f"--resume {args.resume}: it is past --steps {args.steps}"),
        (args.max_grad_norm > 0, "--max_grad_norm must be above 0"),
        (args.timeout_minutes > 0, "--timeout_minutes must be above 0"),
        (not args.wandb or find_spec("wandb"), "--wandb needs its package: pip install wandb"),
    ):
        if not right:
            fail(message)
    return args


# 6. The run -----------------------------------------------------------------------------------------------------------


def prompts_of_step(step, args, size):
    """Indices of a step's prompts, on all ranks: a function of (seed, step), so that a resumed run meets the same."""
    indices = []
    for place in range((step - 1) * args.prompts_per_step, step * args.prompts_per_step):
        if not indices or place % size == 0:  # every epoch is a new permutation
            generator = torch.Generator().manual_seed(args.seed * 100_003 + place // size)
            order = torch.randperm(size, generator=generator).tolist()
        indices.append(order[place % size])
    return indices


def main():
    # 1. Arguments and data: what can be wrong is found here, before a model is loaded
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(args.model)
    problems = load_problems(args.dataset, "train")
    eval_problems = load_problems(args.eval_dataset, "test") if args.eval_dataset else []
    for row in tqdm(problems, "encoding prompts", disable=rank > 0, delay=1, leave=False):
        row["prompt"] = encode_prompt(tokenizer, row["problem"])
    data = [row for row in problems if 0 < len(row["prompt"]) <= args.max_prompt_tokens]
    skipped = len(problems) - len(data)
    if not data:
        fail(f"--dataset {args.dataset}: all prompts are longer than --max_prompt_tokens {args.max_prompt_tokens}")

    # 2. Process group, policy, optimizer, sampler. A single process is a group of one: there is no other path
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=args.timeout_minutes), **alone)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # shards inside a node, replicates across nodes
    mesh = init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    policy = load_policy(args, mesh, device, data[0]["prompt"])
    reference = load_policy(args, mesh, device, data[0]["prompt"], trainable=False) if args.beta > 0 else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    vllm = args.sampler == "vllm" or args.sampler == "auto" and device.type == "cuda" and find_spec("vllm")
    sampler = (VLLMSampler if vllm else HFSampler)(args, tokenizer, device)

    # 3. The folder of the run: new, or cut back to the last whole checkpoint
    where, first = [args.output_dir], 0
    dist.broadcast_object_list(where)  # the clocks of the ranks may differ
    run = Path(where[0])
    if args.resume:
        first = int(checkpoints(run)[-1].name[5:])
        model_state, optimizer_state = states.get_state_dict(policy, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=checkpoints(run)[-1])  # in place
        states.set_state_dict(policy, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        for part in (run / "checkpoints").glob("*.part"):  # left by a run that was killed while saving
            shutil.rmtree(part)
        write(run / "args.json", json.dumps({"script": SCRIPT, **asdict(args), "resume": None}, indent=1))
        for path in (run / "metrics.jsonl", run / "samples.jsonl"):
            rows = path.read_text().splitlines(keepends=True) if args.resume else []
            write(path, "".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= first))
        if args.wandb:
            import wandb
            wandb.init(project=args.wandb, name=run.name, config=asdict(args))
    sampler.load(full_weights(policy, sampler.dtype))
    size = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    say(f"{SCRIPT}: {Path(args.model).name}, {size:.1f} M parameters, {world} x {device.type}, "
        f"sampler: {'vllm' if vllm else 'transformers'}")
    say(f"{args.dataset}: {len(data)} prompts, {skipped} skipped; steps {first + 1} to {args.steps}, written to {run}")
    stops = []  # SIGTERM, a cluster's notice: finish the step, save, end
    signal.signal(signal.SIGTERM, lambda *_: stops.append(True))
    columns = ["step", "reward", "length", "truncated", "entropy", "grad_norm", "loss", "lr", "tokens_per_second"]
    say(" ".join(f"{column:>9}" for column in columns))

    # 4. The steps
    share = args.prompts_per_step // world
    bar = tqdm(range(first + 1, args.steps + 1), SCRIPT, initial=first, total=args.steps, disable=rank > 0)
    with Grader() as grader:
        for step in bar:
            clock, timeouts = [time.perf_counter()], grader.timeouts
            bar.set_postfix_str("sampling")
            chosen = [data[i] for i in prompts_of_step(step, args, len(data))[rank * share : (rank + 1) * share]]
            prompts = [row["prompt"] for row in chosen]
            seed = (args.seed * 1_000_003 + step) * args.prompts_per_step + rank * share  # of this rank's first prompt
            completions = sampler(prompts, args.group_size, seed, args.temperature)
            sampler.sleep()
            clock.append(time.perf_counter())

            bar.set_postfix_str("grading")
            texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
            asked = [row for row in chosen for _ in range(args.group_size)]
            rewards = torch.tensor(rewards_of(texts, asked, grader), device=device).view(share, -1)  # [P, G]
            clock.append(time.perf_counter())

            bar.set_postfix_str("training")
            lr = args.lr * min(1.0, step / max(1, args.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            metrics = train_step(policy, reference, optimizer, args, prompts, completions, rewards)
            clock.append(time.perf_counter())

            bar.set_postfix_str("syncing")
            sampler.load(full_weights(policy, sampler.dtype))
            clock.append(time.perf_counter())

            phases = ("seconds_sampling", "seconds_grading", "seconds_training", "seconds_syncing")
            seconds = dict(zip(phases, (after - before for before, after in zip(clock, clock[1:]))))
            counts = {"grader_timeouts": grader.timeouts - timeouts, "stop": len(stops)}
            counts = sum_over_ranks(counts, device)  # a notice to one rank is for all
            total = args.prompts_per_step * args.group_size
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
            metrics = {
                "step": step, **metrics, "lr": lr, "skipped": skipped, **seconds,
                "grader_timeouts": int(counts["grader_timeouts"]),
                "tokens_per_second": metrics["length"] * total / sum(seconds.values()),
                "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else peak,
            }
            if eval_problems and (step == args.steps or args.eval_every and step % args.eval_every == 0):
                metrics["eval_accuracy"] = accuracy = evaluate(sampler, tokenizer, eval_problems, grader)["accuracy"]
                say(f"accuracy on {args.eval_dataset}: {accuracy:.3f} ({len(eval_problems)} problems, greedy)")
            if rank == 0:
                say(" ".join(f"{metrics[column]:{max(9, len(column))}.4g}" for column in columns))
                with open(run / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(metrics) + "\n")
                with open(run / "samples.jsonl", "a") as file:
                    for row, text, reward in list(zip(asked, texts, rewards.flatten().tolist()))[:4]:
                        row = {"problem": row["problem"], "answer": row["answer"], "completion": text, "reward": reward}
                        file.write(json.dumps({"step": step, **row}) + "\n")
                if args.wandb:
                    wandb.log(metrics, step=step)
            if step == args.steps or counts["stop"] or args.save_every and step % args.save_every == 0:
                save_checkpoint(policy, optimizer, run, step)
            if counts["stop"] and step < args.steps:
                say(f"SIGTERM: saved after step {step}; go on with --resume {run}")
                return

    # 5. The end: a model that everything else can load
    save_final(policy, tokenizer, run / "final")
    say(f"the model is in {run / 'final'}, the metrics of every step are in {run / 'metrics.jsonl'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted: --resume goes on from the last checkpoint (see --save_every)", 130)
    except torch.OutOfMemoryError as error:
        rank = os.environ.get("RANK", 0)
        sys.exit(f"error: rank {rank}: {error} Lower --micro_batch_tokens (training), --gpu_memory_utilization (vLLM)")
    finally:
        if dist.is_initialized() and "vllm" not in sys.modules:  # vLLM does it at its own end
            dist.destroy_process_group()
