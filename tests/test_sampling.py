"""The scripts' own sampling loop: against transformers' generate, against the softmax, and alike whatever else is sampled."""

import argparse
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY
from test_policy import SMALL, make

import eval as evaluation
import grpo

CPU = torch.device("cpu")


def save(model, folder):
    model.save_pretrained(folder)
    return argparse.Namespace(model=str(folder), max_new_tokens=40, top_p=1.0)


def ends_with(token):
    """As much of a tokenizer as a sampler looks at."""
    return SimpleNamespace(eos_token_id=token, chat_template=None)


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 301, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3", "gpt2"])
def test_greedy_is_generates(name, tmp_path):
    """Token for token, from prompts of unequal length, with rows that stop early, and past a sliding window of 16 tokens."""
    args, prompts = save(make(name), tmp_path), prompts_of(1, 7, 30, 12, 3)
    never = ends_with(None)
    longest = grpo.HFSampler(args, never, CPU)(prompts, 1, 0, 0.0)
    assert all(len(completion.ids) == 40 and completion.finish == "length" for completion in longest)
    stops = ends_with(longest[1].ids[5])  # ends one after at most 6 tokens, and some others, perhaps
    for tokenizer in (never, stops):
        ours = grpo.HFSampler(args, tokenizer, CPU)(prompts, 1, 0, 0.0)
        theirs = evaluation.hf_sampler(args, tokenizer, CPU)(prompts, 1, 0, 0.0)
        assert [(one.ids, one.finish) for one in ours] == [(one.ids, one.finish) for one in theirs]
    assert ours[1].finish == "stop" and len(ours[1].ids) <= 6


def expected_logps(model, prompt, ids, temperature):
    """[T, V]: what each token is drawn from, by one forward pass over the whole text."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_log_probabilities(name, tmp_path):
    model = make(name)
    prompts = prompts_of(2, 25, 9)
    completions = grpo.HFSampler(save(model, tmp_path), ends_with(7), CPU)(prompts, 1, 5, 0.7)
    for completion, prompt in zip(completions, prompts, strict=True):
        logps = expected_logps(model, prompt, completion.ids, 0.7)
        told = torch.tensor(completion.logps, dtype=torch.float64)
        torch.testing.assert_close(told, logps[range(len(told)), completion.ids], rtol=1e-4, atol=1e-4)


def chi_square(counts, probabilities):
    """How many standard deviations the statistic lies above what it is for a fair draw (bins of 5 at least)."""
    total, order = counts.sum(), np.argsort(probabilities)
    rare = np.cumsum(probabilities[order]) * total < 5
    bins = [(counts[order[rare]].sum(), probabilities[order[rare]].sum() * total)] if rare.any() else []
    bins += [(counts[i], probabilities[i] * total) for i in order[~rare]]
    statistic = sum((seen - expected) ** 2 / max(expected, 1e-9) for seen, expected in bins)
    return (statistic - (len(bins) - 1)) / math.sqrt(2 * (len(bins) - 1))


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_samples_are_distributed_as_the_softmax(temperature, tmp_path):
    """The first token of 6000 completions, and the second one after the most frequent first."""
    model, (prompt,) = make("qwen2"), prompts_of(4)
    model.lm_head.weight.data *= 1.5  # entropies of 4 and 5 nats at these temperatures
    args = save(model, tmp_path)
    args.max_new_tokens = 2
    drawn = np.array([c.ids for c in grpo.HFSampler(args, ends_with(None), CPU)([prompt], 6000, 3, temperature)])
    common = np.bincount(drawn[:, 0]).argmax()
    for tokens, text in ((drawn[:, 0], prompt), (drawn[drawn[:, 0] == common, 1], [*prompt, int(common)])):
        probabilities = expected_logps(model, text, [0], temperature)[0].exp().numpy()
        counts = np.bincount(tokens, minlength=len(probabilities))
        assert len(tokens) > 100 and chi_square(counts, probabilities) < 4
        assert chi_square(np.roll(counts, 1), probabilities) > 10  # another distribution would be noticed


def test_a_large_vocabulary_keeps_its_tail(tmp_path):
    """The token that a uniform number stands for, exactly, among 200,000: sums in float32 would be hundreds off."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**{**SMALL, "vocab_size": 200_000}))
    args = save(model.float(), tmp_path)
    args.max_new_tokens = 1
    for k, completion in enumerate(grpo.HFSampler(args, ends_with(None), CPU)([[1, 2]], 20, 9, 1.0)):
        below = expected_logps(model, [1, 2], [0], 1.0)[0].exp().numpy().astype(np.longdouble).cumsum()
        expected = np.searchsorted(below, np.random.default_rng((9, k)).random(1)[0] * below[-1])
        assert abs(completion.ids[0] - expected) <= 1


def test_a_completion_depends_on_its_seed_alone(monkeypatch):
    """Sampled with others, alone, or by another rank: the same tokens. And its seeds and places differ from all others."""
    args = argparse.Namespace(model=str(TINY), max_new_tokens=48)
    tokenizer = evaluation.load_tokenizer(str(TINY))
    sampler = grpo.HFSampler(args, tokenizer, CPU)
    prompts = [tokenizer.encode(row["problem"]) for row in evaluation.load_problems("arithmetic")[:6]]
    whole = [completion.ids for completion in sampler(prompts, 4, 100, 1.0)]
    parts = [c.ids for i in range(6) for c in sampler(prompts[i : i + 1], 4, 100 + i, 1.0)]
    halves = [c.ids for i in (0, 3) for c in sampler(prompts[i : i + 3], 4, 100 + i, 1.0)]
    assert whole == parts == halves
    assert [c.ids for c in sampler(prompts, 2, 100, 1.0)] == [ids for i in range(0, 24, 4) for ids in whole[i : i + 2]]
    assert whole != [completion.ids for completion in sampler(prompts, 4, 101, 1.0)]
    same = sampler(prompts[:1] * 6, 4, 100, 1.0)  # six times one prompt
    assert len({tuple(completion.ids) for completion in same}) > 6


def test_stop_tokens(tmp_path):
    """The model's and the tokenizer's; test_eval.py has the chat templates'."""
    for own, other, expected in ((5, 7, [5, 7]), ([3, 5], 5, [3, 5]), (None, 2, [2]), (None, None, [-1])):
        transformers.GenerationConfig(eos_token_id=own).save_pretrained(tmp_path)
        assert evaluation.stop_tokens(tmp_path, ends_with(other)) == expected
