"""Does it fit? A training step's memory on each GPU, simulated: no GPU, no network, no weights, half a minute a model.

    python tests/fits.py                                  the table: three sizes, one GPU, eight, and two nodes of eight
    python tests/fits.py --cases 1.5B:1,7B:4 --micro_batch_tokens 8192 --max_prompt_tokens 512
    python tests/fits.py --json FILE                      the same numbers in bytes

A case is size:ranks. torch runs the step on fake tensors (FakeTensorMode: shapes and storages without memory), in a
fake process group of that many ranks, and counts what is alive (FSDPMemTracker). Real are Policy, policy_loss, FSDP2,
checkpointing and autograd. By hand are: load_policy, which reads files (`wrap` has its lines; test_gpu.py holds the two
against each other), the two micro-batches, and mask.nonzero, whose size a fake tensor cannot know. Where it ends:

- The device is "cpu" with a GPU's settings (bf16, checkpointing). A build without CUDA has no streams, and FSDP2 asks
  for them; and attention would fall back to its T × T form, where a GPU has, as the CPU has here, a flash kernel.
- AdamW's step is left out: its fused kernel works in place on a GPU, but on fake tensors it counts as a copy of
  everything. Its states are there from the start, so the micro-batches are those of a run's second step.
- Not counted: CUDA's context, NCCL's buffers, vLLM, what the allocator cuts up and cannot use: OUTSIDE stands for them.
"""

import argparse
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402

import grpo  # noqa: E402
from eval import check, fail  # noqa: E402

SHAPES = {  # of Qwen2.5: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
    "tiny": (128, 256, 2, 4, 2, 4096, True),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False),
}
CARDS = (24, 48, 80)  # GB
NODE = 8  # GPUs
OUTSIDE = 2.0  # GB of CUDA's context, NCCL and vLLM asleep: README's row, not measured
ROWS = {  # a row of the table: the tracker's kinds that belong to it
    "parameters": ("Sharded Param",),
    "gradients": ("Sharded Grad",),
    "AdamW": ("OptState",),
    "gathered layers": ("Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter"),
    "activations and temporaries": ("Activation", "Temp", "Buffer", "Inputs"),
}


def config_of(size, positions=4096):
    """transformers' configuration of a model in the shape of Qwen2.5."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[size]
    return Qwen2Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, rope_theta=1e6,
        max_position_embeddings=positions, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )


def parameters_of(config):
    """Numbers of parameters: (all, of them those of FSDP's root: embedding, head, last norm)."""
    hidden, kv = config.hidden_size, config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    attention = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv  # with the biases of queries, keys, values
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    root = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2) + hidden
    return root + config.num_hidden_layers * layer, root


def arithmetic(config, shards, tokens):
    """README's arithmetic for a micro-batch of so many tokens: {row: bytes}, all of it as if at one time."""
    total, root = parameters_of(config)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    recomputed = (8 * hidden + 4 * config.intermediate_size) * 2  # bytes a token, of one layer
    return {
        "parameters": 4 * total / shards,
        "gradients": 4 * total / shards,
        "AdamW": 8 * total / shards,
        "gathered layers": (2 + 2 + 4) * root + 2 * 2 * (total - root) / layers,
        "activations and temporaries": tokens * (2 * hidden * layers + recomputed) + 3 * 512 * 4 * config.vocab_size,
    }


def wrap(model, mesh, precision, trainable=True, checkpointing=True, args=grpo.Args()):
    """load_policy of a model that is there already, as on a GPU: checkpointing, sharding, fp32 weights."""
    policy = grpo.Policy(model.eval(), 1.0)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        if args.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for module in [*layers, policy]:
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=None if trainable else True)
    return policy.float()


def mesh_of(device, ranks):
    """load_policy's mesh: shards inside a node, replicas across nodes, if there are several."""
    shards = min(ranks, NODE)
    mesh = init_device_mesh(device, (ranks // shards, shards), mesh_dim_names=("replicate", "shard"))
    return mesh["shard"] if ranks == shards else mesh


class KnownMask(TorchFunctionMode):
    """Answers mask.nonzero(as_tuple=True) for a mask [B, T] of ones: fake tensors hold no values to count."""

    def __init__(self, rows, length):
        super().__init__()
        self.rows, self.length = rows, length

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.nonzero:
            places = torch.arange(self.rows * self.length)
            return places // self.length, places % self.length
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The largest storage that any operation returned: its bytes; the operation, its output's shape and type."""

    def __init__(self):
        super().__init__()
        self.bytes, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # DTensor turns it into operations on its shards, and those come here
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > self.bytes:
                self.bytes = tensor.untyped_storage().nbytes()
                self.what = f"{func} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        return result


def micro_batch(policy, rows, prompt, completion):
    """Forward and backward of rows × (prompt + completion) tokens, as train_step does it."""
    input_ids, starts = torch.zeros(rows, prompt + completion, dtype=torch.long), torch.full((rows,), prompt)
    mask, advantages = torch.ones(rows, completion, dtype=torch.bool), torch.zeros(rows)
    # transformers looks for packed sequences among the positions, and makes no mask if there are none; fake ones have
    # no values, and it would make one
    unpacked = patch("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    with KnownMask(rows, completion), unpacked:
        logp, _ = policy(input_ids, starts, mask)  # [B, T]
    loss, _ = grpo.policy_loss(logp, logp.detach(), advantages, mask.float())
    loss.backward()


def simulate(config, ranks, rows, prompt, completion):
    """Peak of the second of two micro-batches on rank 0: ({row: bytes}, {"bytes", "what"} of the largest tensor)."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = mesh_of("cpu", ranks)  # before FakeTensorMode: it makes real tensors
    try:
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            policy = wrap(model, mesh, MixedPrecisionPolicy(torch.bfloat16, torch.float32))
            optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
            for parameter in policy.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes its states
            optimizer.zero_grad()
            tracker, largest = FSDPMemTracker(policy, optimizer), Largest()
            with tracker, largest:
                for _ in range(2):  # the second beside the gradients of the first
                    micro_batch(policy, rows, prompt, completion)
                    tracker.reset_mod_stats()
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    finally:
        dist.destroy_process_group()
    peak = {getattr(kind, "value", kind): number for kind, number in peak.items()}
    parts = {row: sum(peak[kind] for kind in kinds) for row, kinds in ROWS.items()}
    check(sum(parts.values()) == peak["Total"], f"fits.py does not know all kinds of torch's tracker: {list(peak)}")
    return parts, {"bytes": largest.bytes, "what": largest.what}


def fits(config, parts, card, utilization, longest):
    """Whether it fits a card of so many GB: "yes", or what does not. Sampling is arithmetic: with vLLM at its share."""
    states = parts["parameters"] + parts["AdamW"]
    if states + parts["gradients"] > (card - OUTSIDE) * 1e9:
        return "no: states"  # parameters, gradients and AdamW alone: a smaller micro-batch does not help
    if sum(parts.values()) > (card - OUTSIDE) * 1e9:
        return "no: training"
    head_size = config.hidden_size // config.num_attention_heads
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * longest  # bytes of a sequence
    weights = 2 * parameters_of(config)[0]
    if weights + cache > utilization * card * 1e9 or states > (card * (1 - utilization) - OUTSIDE) * 1e9:
        return "no: sampling"
    return "yes"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--cases", default="0.5B:1,1.5B:1,7B:8,7B:16", help="size:ranks, with commas between")
    for flag in ("micro_batch_tokens", "max_prompt_tokens", "max_new_tokens", "gpu_memory_utilization"):
        default = getattr(grpo.Args(), flag)
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=f"as the scripts' ({default})")
    parser.add_argument("--json", help="file to write the numbers to, in bytes")
    options = parser.parse_args()
    cases = [case.partition(":")[::2] for case in options.cases.split(",")]
    for size, ranks in cases:
        known = size in SHAPES and ranks.isdigit() and int(ranks) > 0
        check(known and (int(ranks) < NODE or int(ranks) % NODE == 0),
              f"--cases {options.cases}: size:ranks; sizes {', '.join(SHAPES)}; below {NODE} ranks, or whole nodes")
    warnings.filterwarnings("ignore")
    longest = options.max_prompt_tokens + options.max_new_tokens
    rows = max(1, options.micro_batch_tokens // longest)
    print(f"GB on each GPU at the peak of a training step; micro-batches of {rows} × {longest} tokens; torch "
          f"{torch.__version__}\n{'':27}", *(f"{f'{size} on {ranks}':>22}" for size, ranks in cases), flush=True)
    results, columns = [], []
    for size, ranks in cases:
        config = config_of(size)
        parts, largest = simulate(config, int(ranks), rows, options.max_prompt_tokens, options.max_new_tokens)
        expected = arithmetic(config, min(int(ranks), NODE), rows * longest)
        cards = {card: fits(config, parts, card, options.gpu_memory_utilization, longest) for card in CARDS}
        results.append({"size": size, "ranks": int(ranks), "rows": rows, "longest": longest, "simulated": parts,
                        "arithmetic": expected, "largest": largest, "fits": cards})
        totals = parts | {"together": sum(parts.values())}, expected | {"together": sum(expected.values())}
        column = {row: f"{totals[0][row] / 1e9:.1f} | {totals[1][row] / 1e9:.1f}" for row in totals[0]}
        column["largest single tensor"] = f"{largest['bytes'] / 1e9:.1f}" + " " * 6
        column |= {f"fits {card} GB, with vLLM": answer for card, answer in cards.items()}
        columns.append(column)
    for row in columns[0]:
        print(f"{row:27}", *(f"{column[row]:>22}" for column in columns))
    print("simulated | README's arithmetic, which adds up what is not there at one time; both without the "
          f"{OUTSIDE:.0f} GB of CUDA's context,\nNCCL and vLLM asleep, which `fits` adds. Largest:")
    for result in results:
        print(f"  {result['size']} on {result['ranks']}: {result['largest']['what']}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
