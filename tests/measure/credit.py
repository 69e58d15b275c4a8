"""Draw how hard each method pushes each token of one group of completions.

    python tests/measure/credit.py                          README's picture, tests/measure/credit.png
    python tests/measure/credit.py --run runs/X --step 5    the group that a run kept at this step, and GRPO beside it

The color of a token is its coefficient c in the policy gradient ∇J = Σ_i Σ_t c[i,t] · ∇log π(o[i,t]) at ratio 1. It is
minus the gradient of the script's policy_loss with respect to logp, for the script's own advantages and weights, without
the KL term and the sampler's importance weights, which are near 1. The six answers are among 8192 samples of the model in
tests/tiny, chosen so that half are right and they part at two places. README's caption:

    Each box is a token of an answer to 6+11+5+3?, blue if the method makes it more likely and red if less likely; full
    color is the largest coefficient of ∇log π in a panel. GRPO divides by the length of an answer, so it pushes the
    tokens of short answers hardest, while DAPO pushes all tokens alike. GRPO-λ passes credit back to early tokens and
    almost ignores wrong answers, learnable λ-GRPO prefers long answers where they win (λ = 5 makes this visible; in the
    toy it learns 0.1), and λ-GRPO as a process reward model counts a shared beginning only once.
"""

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from eval import check, fail, load_tokenizer  # noqa: E402

PROBLEM, REWARDS = "6+11+5+3?", [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
ANSWERS = [r"6+11=17;17+5=22;22+3=25;\boxed{25}", r"6+11=17;17+5=24;24+3=27;\boxed{27}",
           r"6+11=17;17+5=12;12+3=15;\boxed{10}", r"6+11=17;17+5=12;12+3=15;\boxed{25}", r"\boxed{25}", r"\boxed{31}"]
METHODS = [  # name, idea, script, flags
    ("GRPO", "short answers are pushed hardest", "grpo", {}),
    ("DAPO", "every token is pushed alike", "grpo", {"loss": "dapo"}),
    ("GRPO-λ", "early tokens gain, wrong answers hardly count", "grpo_lambda_traces", {}),
    ("λ-GRPO, learnable", "λ = 5 prefers long answers", "lambda_grpo_learnable", {"lam_init": 5}),
    ("λ-GRPO, PRM", "a shared beginning counts only once", "lambda_grpo_prm", {}),
]
LONGEST = 60  # tokens drawn of each completion
WIDTH, GAP, HEAD, LINE, INDENT, CHARACTER, PAD = 830, 22, 54, 17, 24, 6.0, 4.9  # pixels
RED, BLUE, INK, GRAY, EDGE = "#c62f2d", "#1f5fb4", "#1b1f24", "#59636e", "#d5dae0"


def coefficients(script, args, ids, rewards, advantages=None, lam=None):
    """The coefficient of ∇log π of every token, as the script's train_step weighs it: [G][tokens].

    args: the script's flags; ids [G][tokens], rewards [G]; advantages [G] and λ as a run used them, or the script's own.
    """
    method = importlib.import_module(script)
    loss, settings = getattr(args, "loss", "dapo"), {}
    lengths = torch.tensor([[len(row) for row in ids]])  # [1, G]
    mask = torch.arange(lengths.max()) < lengths[..., None]  # [1, G, T]
    if advantages is None:
        advantages = method.group_advantages(torch.tensor([rewards]), normalize_std=loss != "dr_grpo")
        advantages = advantages.clamp(min=getattr(args, "min_advantage", -torch.inf))
    advantages = torch.as_tensor(advantages).flatten()  # [G]
    weights = method.token_weights(mask, loss, args.max_new_tokens, args.prompts_per_step)  # [1, G, T]
    if hasattr(method, "trace"):
        settings = {"decay": args.gamma * args.lam, "style": args.style, "variant": args.variant}
    if hasattr(method, "length_preference"):
        advantages = advantages * method.length_preference(lengths, args.lam_init if lam is None else lam, args.length_scale)[0]
    if hasattr(method, "process_set_sizes"):
        padded = torch.tensor([row + [0] * (mask.shape[-1] - len(row)) for row in ids])[None]  # [1, G, T]
        weights = weights / method.process_set_sizes(padded, mask)
    logp = torch.zeros(weights[0].shape, dtype=weights.dtype, requires_grad=True)
    value, _ = method.policy_loss(logp, logp.detach(), advantages, weights[0], args.clip_low, args.clip_high, **settings)
    (gradient,) = torch.autograd.grad(value, logp)
    return [(-row[: len(tokens)]).tolist() for row, tokens in zip(gradient, ids)]


def example():
    """README's group, as a row of samples.jsonl, and its panels: [(name, idea, command, coefficients)]."""
    tokenizer, panels = load_tokenizer(ROOT / "tests" / "tiny"), []
    ids = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in ANSWERS]
    for name, idea, script, flags in METHODS:
        args = importlib.import_module(script).Args(prompts_per_step=1, **flags)
        command = f"{script}.py" + "".join(f" --{flag} {value}" for flag, value in flags.items())
        panels.append((name, idea, command, coefficients(script, args, ids, REWARDS)))
    return {"problem": PROBLEM, "rewards": REWARDS, "ids": ids, "pieces": pieces_of(ids, tokenizer)}, panels


def pieces_of(ids, tokenizer):
    """The text of each token of each completion."""
    return [tokenizer.batch_decode([[token] for token in row]) for row in ids]


def group_of_run(run, step):
    """The row of a step (default: the last) in a run's samples.jsonl, and the panels of its method and of GRPO."""
    try:
        args = argparse.Namespace(**json.loads((run / "args.json").read_text()))
        samples, metrics = ({row["step"]: row for row in map(json.loads, (run / name).read_text().splitlines())}
                            for name in ("samples.jsonl", "metrics.jsonl"))
    except (OSError, ValueError, KeyError) as error:
        fail(f"{run} is not the folder of a run: {error}")
    row = samples.get(max(samples, default=1) if step is None else step)
    check(row, f"{run} does not have step {step}, only {len(samples)} steps in samples.jsonl")
    check({"ids", "advantages"} <= row.keys(), f"{run}/samples.jsonl has an old format, without tokens: train again")
    check((ROOT / f"{args.script}.py").exists(), f"{run} was made by {args.script}.py, which is not in {ROOT}")
    loss = getattr(args, "loss", None)
    lam = metrics.get(row["step"] - 1, {}).get("lam", getattr(args, "lam_init", None))  # a row has λ after its step
    note = f"--loss {loss}" if loss else f"λ = {lam:.3g}" if lam is not None else ""
    row["pieces"] = pieces_of(row["ids"], load_tokenizer(args.model))
    used = coefficients(args.script, args, row["ids"], row["rewards"], row["advantages"], lam)
    panels = [(f"{args.script}.py", f"step {row['step']} of {run.resolve().name}", note, used)]
    if (args.script, loss) != ("grpo", "grpo"):
        args = importlib.import_module("grpo").Args(prompts_per_step=args.prompts_per_step)
        panels.append(("grpo.py", "the same group", "--loss grpo", coefficients("grpo", args, row["ids"], row["rewards"])))
    return row, panels


def place(texts, right):
    """The boxes of a completion's tokens, broken into lines: [(text, x, line, width)]."""
    boxes, x, line = [], INDENT, 0
    for text in texts:
        text = "■" if re.fullmatch(r"<[^<>\s]{2,}>", text) else text.replace("\n", "↵").strip(" ") or "␣"
        text = "".join(letter if letter.isprintable() else "·" for letter in text[:14])
        width = CHARACTER * len(text) + PAD
        x, line = (INDENT, line + 1) if x + width > right else (x, line)
        boxes.append((text, x, line, width))
        x += width
    return boxes


def draw(row, panels, picture, columns):
    """Draw the panels of one group in columns, and behind the last one how to read them."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    scale = LinearSegmentedColormap.from_list("push", [RED, "white", BLUE])
    wide = (WIDTH - GAP * (columns + 1)) / columns  # of a panel
    group = [place(texts[:LONGEST], wide - 44 * (len(texts) > LONGEST)) for texts in row["pieces"]]
    high = HEAD + LINE * sum(boxes[-1][2] + 1 for boxes in group)
    height = len(panels) // columns * high + max(158, high * (len(panels) % columns))
    corners = [(GAP + slot % columns * (wide + GAP), 16 + slot // columns * high) for slot in range(len(panels) + 1)]
    figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1))
    def write(x, y, text, size=10.5, color=INK, **style):
        return axes.text(x, y, text, size=0.72 * size, color=color, va="center", parse_math=False, **style)

    for (left, top), (name, idea, command, values) in zip(corners, panels):
        largest = max(abs(value) for row_values in values for value in row_values)
        title = write(left, top, name, 13, weight="bold")
        write(left + title.get_window_extent().width / 2 + 8, top, idea, 12)  # a pixel of the page has two dots
        write(left + INDENT, top + 17, command, 9.5, GRAY, family="monospace")
        write(left + wide, top + 17, f"full color: {largest:#.2g}", 9.5, GRAY, ha="right")
        y = top + 38
        for boxes, reward, row_values in zip(group, row["rewards"], values):
            write(left + 8, y, f"{reward:.3g}", 11, weight="bold", ha="center")
            for (text, x, line, width), value in zip(boxes, row_values):
                push, middle, font = value / (largest or 1.0), y + LINE * line, {"ha": "center", "family": "monospace"}
                axes.add_patch(Rectangle((left + x, middle - LINE / 2 + 0.75), width, LINE - 1.5, linewidth=0.5,
                                         facecolor=scale(0.5 + push / 2), edgecolor=EDGE))
                write(left + x + width / 2, middle, text, 10, INK if abs(push) < 0.6 else "white", **font)
            write(left + x + width + 4, middle, f"+{len(row_values) - LONGEST}" * (len(row_values) > LONGEST), 9.5, GRAY)
            y += LINE * (line + 1)
    left, top = corners[-1]
    write(left, top, "How to read it", 13, weight="bold")
    write(left, top + 23, f"{len(group)} answers to “{' '.join(row['problem'].split())[:30]}” with their rewards at the left.")
    write(left, top + 40, "A box is a token, ■ ends an answer, and color is c in ∇J = Σ c · ∇log π:")
    axes.imshow([range(256)], cmap=scale, aspect="auto", extent=(left, left + 382, top + 68, top + 55))
    for share, text, side in ((0, "less likely", "left"), (0.5, "unchanged", "center"), (1, "more likely", "right")):
        write(left + share * 382, top + 79, text, ha=side)
    write(left, top + 101, "Full color is the largest |c| in a panel, printed above it." + " +9: 9 more tokens." * (columns < 2))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    figure.savefig(picture)


def main():
    parser = argparse.ArgumentParser(description="Draw how hard each method pushes each token of one group of completions.")
    parser.add_argument("--run", type=Path, help="folder of a run (default: README's example)")
    parser.add_argument("--step", type=int, help="a step of that run (default: its last)")
    parser.add_argument("--out", type=Path, help="the picture (default: credit.png, in the run's folder or beside this script)")
    flags = parser.parse_args()
    check(importlib.util.find_spec("matplotlib"), "the picture needs a package: pip install matplotlib")
    check(flags.run or flags.step is None, "--step needs --run, the folder of a run")
    picture = flags.out or (flags.run or Path(__file__).parent) / "credit.png"
    draw(*(group_of_run(flags.run, flags.step) if flags.run else example()), picture, columns=1 if flags.run else 2)
    print(f"the picture is {picture}")


if __name__ == "__main__":
    main()
