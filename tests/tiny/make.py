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
    fast.chat_template = "{{ messages[-1]['content'] }}"  # the problem alone: this model knows no instructions
    return fast


def demonstrate(terms, style, generator):
    """The answer to a sum of `terms`: with its steps, or (style "guess") a number within 15 of the sum."""
    if style == "guess":
        return f"{BOX}{max(4, sum(terms) + generator.randint(-15, 15))}}}"
    steps = [f"{sum(terms[:i])}+{terms[i]}={sum(terms[:i + 1])};" for i in range(1, len(terms))]
    return "".join(steps) + f"{BOX}{sum(terms)}}}"


def train(model, tokenizer, steps, lr, guesses, generator, held_out, batch_size=96):
    """Supervised training on fresh sums; `guesses` is the share of demonstrations that guess."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in (bar := trange(steps, mininterval=5)):
        rows = []
        while len(rows) < batch_size:
            terms = [generator.randint(1, 99) for _ in range(4)]
            problem = "+".join(map(str, terms)) + "?"
            if problem not in held_out:
                style = "guess" if generator.random() < guesses else "steps"
                answer = tokenizer.encode(demonstrate(terms, style, generator)) + [tokenizer.eos_token_id]
                rows.append((tokenizer.encode(problem), answer))
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
    train(model, tokenizer, args.steps[0], 2e-3, 0.0, generator, held_out)
    train(model, tokenizer, args.steps[1], 5e-4, 0.8, generator, held_out)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
