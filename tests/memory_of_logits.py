"""Peak memory of a forward and backward pass: log-probabilities in chunks (Policy) against full logits, V = 151,936.

    python tests/memory_of_logits.py [--tokens 8192]

Takes about two minutes and, for the full logits, 16 GB of memory at 8192 tokens (half of grpo.py's default micro-batch). Each
way runs in a process of its own; what the process needed before the pass is subtracted.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

VOCABULARY = 151_936  # Qwen2.5


def measure(way, tokens):
    """Print seconds and peak gigabytes of one pass, over what was in use before it."""
    import torch
    import transformers

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import grpo

    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    input_ids = torch.randint(VOCABULARY, (8, tokens // 8 + 1))
    mask = torch.ones(8, tokens // 8, dtype=torch.bool)
    policy = grpo.Policy(model, 1.0)
    policy(input_ids[:, :3], torch.ones(8, dtype=torch.long), mask[:, :2])[0].sum().backward()  # allocates the gradients
    before, start = peak(), time.perf_counter()
    if way == "chunks":
        logp, _ = policy(input_ids, torch.ones(8, dtype=torch.long), mask)
    else:
        logp = model(input_ids=input_ids).logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    logp.mean().backward()
    print(time.perf_counter() - start, peak() - before)


def peak():
    """The most memory this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--way", choices=("chunks", "full"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return measure(args.way, args.tokens)
    results = {}
    for way in ("chunks", "full"):
        command = [sys.executable, __file__, "--tokens", str(args.tokens), "--way", way]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results[way] = [float(value) for value in output.split()]
        print(f"{way:>6}: {results[way][1]:6.2f} GB, {results[way][0]:6.1f} s")
    print(f"chunks / full: {results['chunks'][1] / results['full'][1]:.3f} of the memory, "
          f"{results['chunks'][0] / results['full'][0]:.2f} of the time ({args.tokens} tokens)")


if __name__ == "__main__":
    main()
