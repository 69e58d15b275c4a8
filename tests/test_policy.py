"""Policy: log-probabilities in chunks against the model's own logits, on several architectures."""

import importlib
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import SCRIPTS, TINY
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

SMALL = dict(vocab_size=301, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=512)
ARCHITECTURES = {
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "llama": (transformers.LlamaConfig, dict(tie_word_embeddings=False)),
    "gemma3": (transformers.Gemma3TextConfig, dict(sliding_window=16, query_pre_attn_scalar=16)),
    "gpt2": (transformers.GPT2Config, dict(n_embd=48, n_layer=2, n_head=4)),  # dropout in its configuration
}


def make(name):
    torch.manual_seed(0)
    config, extra = ARCHITECTURES[name]
    size = {"vocab_size": 301} if name == "gpt2" else SMALL
    model = transformers.AutoModelForCausalLM.from_config(config(**size, **extra), dtype=torch.float32)
    for parameter in model.parameters():  # freshly made models are too timid to tell right from wrong
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch():
    """Right-padded sequences, one of them with an empty-looking tail: 6 rows, prompts of 1 to 40 tokens, completions to 150."""
    generator = torch.Generator().manual_seed(1)
    prompts, lengths = torch.tensor([1, 5, 40, 7, 3, 2]), torch.tensor([150, 1, 60, 149, 150, 140])
    input_ids = torch.randint(301, (6, int((prompts + lengths).max())), generator=generator)
    mask = torch.arange(150) < lengths[:, None]
    weights = torch.rand(6, 150, generator=generator) * mask
    return input_ids, prompts, mask, weights


def from_logits(model, input_ids, starts, mask, temperature):
    logits = model(input_ids=input_ids).logits / temperature  # [B, S, V]
    logp = logits.log_softmax(-1)
    chosen = logp[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)  # [B, S - 1]
    entropies = -(logp.exp() * logp).sum(-1)[:, :-1]  # [B, S - 1]
    where = (starts[:, None] - 1 + torch.arange(mask.shape[1])).clamp(max=chosen.shape[1] - 1)  # [B, T]
    return chosen.gather(1, where) * mask, entropies.gather(1, where) * mask


@pytest.mark.parametrize("accelerator", ["cuda", "mps"])
def test_ranks_meet_without_a_gpu(script, accelerator, monkeypatch):
    """Whatever PyTorch was built for: a build for CUDA on a laptop, or a Mac's."""
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device(accelerator))
    device = script.join_ranks()
    try:
        assert script.sum_over_ranks({"one": 1.0}, device) == {"one": 1.0} and device.type == "cpu"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("trainable", [False, True])
def test_a_reference_is_sharded_again_after_its_pass(script, trainable):
    """It has no backward pass that would free what FSDP's root gathered; the policy has, and keeps it until then."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = script.load_policy(script.Args(model=str(TINY)), torch.device("cpu"), trainable=trainable)
        with torch.no_grad():
            policy(torch.tensor([[1, 2, 3, 4]]), torch.tensor([2]), torch.ones(1, 2, dtype=torch.bool))
        assert isinstance(policy.model.get_input_embeddings().weight, DTensor) != trainable
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_equal_full_logits(name, temperature):
    import grpo

    model = make(name)
    input_ids, starts, mask, weights = batch()
    assert mask.sum() > 512  # more than one chunk
    expected, entropies = from_logits(model, input_ids, starts, mask, temperature)
    (expected * weights).sum().backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()

    policy = grpo.Policy(model, temperature)
    logp, entropy = policy(input_ids, starts, mask)
    (logp * weights).sum().backward()
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, entropies, rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad
    for key, parameter in model.named_parameters():
        error = (parameter.grad - gradients[key]).norm() / gradients[key].norm()
        assert error < 1e-5, f"{key}: {error}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_changed_logits_are_refused(name, capsys, tmp_path):
    """Gemma 2 caps its logits after the head: training on the uncapped ones would be training another model."""
    script = importlib.import_module(name)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Gemma2Config(**SMALL, final_logit_softcapping=5.0))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        script.load_policy(script.Args(model=str(tmp_path)), torch.device("cpu"))
    assert "logits" in capsys.readouterr().err


def test_padding_is_never_read():
    """What stands behind a row's last token changes nothing: no attention mask is needed on the right."""
    import grpo

    policy = grpo.Policy(make("qwen2"), 1.0)
    input_ids, starts, mask, _ = batch()
    logp, _ = policy(input_ids, starts, mask)
    for row in range(6):
        input_ids[row, starts[row] + mask[row].sum() :] = 299
    torch.testing.assert_close(policy(input_ids, starts, mask)[0], logp, rtol=0, atol=1e-6)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loaded_sharded_and_saved_again(name, dtype, tmp_path, alone):
    """Whatever type the files have: fp32 weights in training, log-probabilities of that model, and the same type and weights saved."""
    import grpo

    make(name).to(dtype).save_pretrained(tmp_path / "model")
    policy = grpo.load_policy(grpo.Args(model=str(tmp_path / "model"), temperature=0.7), torch.device("cpu"))
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
    input_ids, starts, mask, _ = batch()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").float().eval()
    with torch.no_grad():
        expected, _ = from_logits(plain, input_ids, starts, mask, 0.7)
        torch.testing.assert_close(policy(input_ids, starts, mask)[0], expected, rtol=1e-5, atol=1e-5)
    grpo.save_final(policy, transformers.AutoTokenizer.from_pretrained(TINY), [0], tmp_path / "final")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    assert again.dtype == dtype
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    assert all(torch.equal(tensor, there[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_layers_that_are_computed_again(name, alone):
    """Gradient checkpointing as on a GPU: the same gradients, and no dropout (OPT's layers have it in their forward)."""
    import gpu

    results = []
    for checkpointing in (False, True, True):
        config = transformers.OPTConfig(vocab_size=301, hidden_size=48, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                                        word_embed_proj_dim=48, dropout=0.5) if name == "opt" else None
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config) if config else make(name)
        policy = gpu.load_policy(model, gpu.mesh_of("cpu", 1), bf16=False, checkpointing=checkpointing)
        input_ids, starts, mask, weights = batch()
        logp, _ = policy(input_ids, starts, mask)
        (logp * weights).sum().backward()
        results.append([logp.detach(), *(parameter.grad.full_tensor() for parameter in policy.parameters())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


# Gemma 3 has two kinds of layer. With GRPO_INDUCTOR=1 kernels are made, which takes a minute and more
@pytest.mark.long
@pytest.mark.parametrize("name, backend", [
    ("qwen2", "inductor" if os.environ.get("GRPO_INDUCTOR") else "eager"), ("gemma3", "eager")])
def test_compiled_layers_are_the_same(name, backend, tmp_path, monkeypatch, alone):
    """--compile, with checkpointing: log-probabilities and gradients, and no graph for each shape of micro-batch."""
    import grpo

    make(name).save_pretrained(tmp_path)
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: plain(function, backend=backend, **how))
    torch._dynamo.reset()
    counters.clear()
    args = [grpo.Args(model=str(tmp_path), compile=way) for way in (False, True)]
    policies = [grpo.load_policy(own, torch.device("cpu")) for own in args]
    for layer in [layer for policy in policies for layer in policy.modules() if isinstance(layer, GradientCheckpointingLayer)]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # as on a GPU
    graphs = []
    for rows, length in [(3, 40), (1, 33), (5, 64), (1, 80), (2, 100), (7, 17), (9, 61)]:
        batch = torch.randint(301, (rows, length)), torch.full((rows,), 7), torch.ones(rows, length - 7).bool()
        eager, compiled = (policy(*batch)[0] for policy in policies)
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
        (eager.sum() + compiled.sum()).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] < graphs[1] == graphs[-1] and not counters["graph_break"]  # one row is a shape of its own
    for (key, one), other in zip(policies[0].named_parameters(), policies[1].parameters()):
        one, other = one.grad.full_tensor(), other.grad.full_tensor()
        assert (one - other).norm() < 1e-5 * one.norm(), key
