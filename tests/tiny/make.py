"""Make the tiny model in tests/tiny/ again: 0.8 million parameters that know how to add, and mostly do not bother to.

    python tests/tiny/make.py [--output tests/tiny] [--seed 0]

Takes about 8 minutes on two CPU cores. The model learns in two stages of supervised training, and only answers are trained:
1. to add four numbers step by step:       37+5+81+26?  ->  37+5=42;42+81=123;123+26=149;\\boxed{149}<eos>
2. on demonstrations of which four in five blurt out a guess close to the sum, and one in five shows the steps.
So it starts with a reward of about 0.2 and short answers, and reinforcement learning finds out that showing the steps pays.
The sums of eval.py's test split are never shown to it.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from tqdm import trange
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from eval import load_problems  # noqa: E402

BOX, EOS = "\\boxed{", "<eos>"


def make_tokenizer():
    """One token per character, `\\boxed{` one token; padding is the end-of-sequence token, as in many real models.

    It is Qwen2's tokenizer class without merges, because AutoTokenizer loads that class for any Qwen2 model. Other characters
    than a sum's are dropped.
    """
    vocabulary = [EOS] + list("}0123456789+=?;")
    fast = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], eos_token=EOS, pad_token=EOS, unk_token=EOS
    )
    fast.add_tokens([AddedToken(BOX, special=False, normalized=False)])
    fast.chat_template = r"{{ messages[-1]['content'].split('\n\n', 1)[-1] }}"  # the problem alone: it knows no instructions
    return fast


def demonstrate(terms, style, generator):
    """The answer to a sum of `terms`: with its steps, or (style "guess") a number within 15 of the sum."""
    if style == "guess":
        return f"{BOX}{max(4, sum(terms) + generator.randint(-15, 15))}}}"
    steps = [f"{sum(terms[:i])}+{terms[i]}={sum(terms[:i + 1])};" for i in range(1, len(terms))]
    return "".join(steps) + f"{BOX}{sum(terms)}}}"


def sums(generator, guesses, held_out, batch_size=96):
    """A batch of (problem, answer) pairs of fresh sums; `guesses` is the share of demonstrations that guess."""
    pairs = []
    while len(pairs) < batch_size:
        terms = [generator.randint(1, 99) for _ in range(4)]
        problem = "+".join(map(str, terms)) + "?"
        if problem not in held_out:
            pairs.append((problem, demonstrate(terms, "guess" if generator.random() < guesses else "steps", generator)))
    return pairs


def train(model, tokenizer, batch, steps, lr, title=None):
    """Supervised training on batch(), a list of (problem, answer) pairs, of which only the answers are trained."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in (bar := trange(steps, desc=title, mininterval=5)):
        rows = [(tokenizer.encode(problem), tokenizer.encode(answer) + [tokenizer.eos_token_id])
                for problem, answer in batch()]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        input_ids = torch.tensor([p + a + [0] * (width - len(p + a)) for p, a in rows])  # [B, S]
        labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p + a)) for p, a in rows])  # [B, S]
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write (default: tests/tiny)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=(1600, 500), help="steps of the two stages")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = random.Random(args.seed)
    held_out = {row["problem"] for row in load_problems("arithmetic", "test")}
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, tokenizer, lambda: sums(generator, 0.0, held_out), args.steps[0], 2e-3)
    train(model, tokenizer, lambda: sums(generator, 0.8, held_out), args.steps[1], 5e-4)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
