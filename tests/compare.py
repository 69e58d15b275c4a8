"""The four scripts against each other: equal steps, prompts and seeds on two tasks; a table and a picture of curves.

    python tests/compare.py                 everything, about half an hour on a free CPU core; a second start goes on
    python tests/compare.py --draw          the table and tests/compare.png again, from the runs that are there

toy    what the scripts do without --model: long answers are right, because they show the steps of a sum.
chain  the problem "48216?" names five doors, and the largest is the right one. An answer names a door with its first
       token, wanders, and repeats the door in the box: 8=+;=;\\boxed{8}. The model was taught, on the fly and within
       a minute, to choose any of the five doors; behind the right one the way is short (4 to 8 random tokens), behind
       the others it is long (14 to 20). So one early token decides, what follows is noise, and short answers are right.

Both with only 4 prompts × 8 completions a step, so that noise plays its part; all else are the scripts' defaults.
Beside the four scripts run grpo.py --loss dapo, because that is what both λ-GRPO are without their λ, and the traces
without their clamp of negative advantages, to tell the two changes apart. Each of the six has the same tuning: a sweep
over --rates with seeds of its own (100, 101, ..), in which the rate with the highest mean reward over all steps and
seeds wins, and then seeds 0, 1, .. at that rate, which alone are in table and picture. Each run's metrics.jsonl is kept
in --output; finished runs are not repeated. The picture needs: pip install matplotlib
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import math
import random
import re
import shutil
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm, trange
from transformers import AutoModelForCausalLM, logging

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from eval import fail  # noqa: E402
from make_tiny import BOX, make_tokenizer  # noqa: E402
from reproduce_prm_table1 import interval  # noqa: E402

METHODS = {  # label: (script, flags of its own)
    "grpo.py": ("grpo", []),
    "grpo.py --loss dapo": ("grpo", ["--loss", "dapo"]),
    "grpo_lambda_traces.py": ("grpo_lambda_traces", []),
    "grpo_lambda_traces.py --min_advantage=-inf": ("grpo_lambda_traces", ["--min_advantage=-inf"]),
    "lambda_grpo_learnable.py": ("lambda_grpo_learnable", []),
    "lambda_grpo_prm.py": ("lambda_grpo_prm", []),
}
TASKS = {  # steps and flags; on the toy all else is the scripts' own TOY
    "toy": (15, ["--eval_dataset", ""]),
    "chain": (24, ["--max_new_tokens", "28", "--warmup_steps", "5"]),
}
TARGET, LAST = 0.7, 5  # the reward to reach, by a mean of three steps; the steps that "final" is the mean of


# The chain task -------------------------------------------------------------------------------------------------------


def doors(generator):
    """A problem of the chain task, and its answer: the first of five doors."""
    digits = [str(digit) for digit in generator.sample(range(10), 5)]
    return "".join(digits) + "?", max(digits)


def wander(problem, generator):
    """A demonstration: any of the five doors, a random walk that is short behind the right one, the door in the box."""
    door = problem[generator.randrange(5)]
    length = generator.randint(4, 8) if door == max(problem[:5]) else generator.randint(14, 20)
    return door + "".join(generator.choices("+=;", k=length)) + BOX + door + "}"


def make_chain(folder, steps, batch_size=32, lr=1e-3):
    """The chain's problems and its model: tests/tiny, taught to wander by supervised training on demonstrations."""
    generator, part = random.Random(0), folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rows = dict(doors(generator) for _ in range(4096))  # a dict drops repetitions
    lines = [json.dumps({"problem": problem, "answer": answer}) + "\n" for problem, answer in rows.items()]
    (part / "problems.jsonl").write_text("".join(lines))
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(HERE / "tiny", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in (bar := trange(steps, desc="teaching the chain's model")):
        problems = [doors(generator)[0] for _ in range(batch_size)]
        answers = [tokenizer.encode(wander(row, generator)) + [tokenizer.eos_token_id] for row in problems]
        longest = max(map(len, answers))
        prompts = torch.tensor([tokenizer.encode(row) for row in problems])  # [B, 6]
        inputs = torch.tensor([row + [0] * (longest - len(row)) for row in answers])  # [B, T]
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in answers])  # [B, T]
        labels = torch.cat([torch.full_like(prompts, -100), labels], 1)  # [B, 6 + T]: only answers are trained
        loss = model(input_ids=torch.cat([prompts, inputs], 1), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


# The runs -------------------------------------------------------------------------------------------------------------


def folder_of(output, task, method, rate, seed):
    return output / task / re.sub(r"\.py( --\w+[ =]-?)?", "-", method).rstrip("-") / f"lr{rate:g}-seed{seed}"


def read(folder):
    """The rows of a finished run's metrics.jsonl, or None."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None


def run(args, task, method, rate, seed):
    """Run a script's main in this process, as its command line would, which saves its start; keep metrics and log."""
    folder = folder_of(args.output, task, method, rate, seed)
    part = folder.with_name(folder.name + ".part")  # renamed when finished
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (name, own), (steps, flags) = METHODS[method], TASKS[task]
    steps = args.steps or steps
    if task == "chain":
        flags = [*flags, "--model", str(args.output / "chain-model")]
        flags += ["--dataset", str(args.output / "chain-model" / "problems.jsonl")]
    flags = [*flags, "--prompts_per_step", args.prompts_per_step]
    command = [f"{name}.py", *own, *flags, "--steps", steps, "--lr", rate, "--seed", seed]
    before, sys.argv = sys.argv, list(map(str, [*command, "--save_every", 0, "--output_dir", part]))
    try:
        with open(part / "log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            importlib.import_module(name).main()
    except SystemExit:
        fail(f"{' '.join(sys.argv)} stopped: {(part / 'log.txt').read_text().splitlines()[-1]}", 1)
    finally:
        sys.argv = before
        if dist.is_initialized():
            dist.destroy_process_group()
    shutil.rmtree(part / "checkpoints")
    shutil.rmtree(part / "final")
    part.rename(folder)


def mean(values):
    return sum(values) / len(values)


def mean_reward(rows):
    """The mean over all steps: high when the reward rises early and stays."""
    return mean([row["reward"] for row in rows])


def sweep_of(args, task, method):
    """{rate: mean reward over the sweep's steps and seeds}, of the rates whose runs are there."""
    found = {}
    for rate in args.rates:
        runs = [read(folder_of(args.output, task, method, rate, 100 + seed)) for seed in range(args.sweep_seeds)]
        if runs and None not in runs:
            found[rate] = mean([mean_reward(rows) for rows in runs])
    return found


def best_rate(args, task, method):
    found = sweep_of(args, task, method)
    return max(found, key=found.get) if found else args.rates[0]


def check_settings(args):
    """Keep runs of other lengths or batches out of a folder: they would be taken for finished ones."""
    settings = {"steps": args.steps, "prompts_per_step": args.prompts_per_step, "model_steps": args.model_steps}
    path = args.output / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        fail(f"--output {args.output} holds runs with {path.read_text()}: give the same, or choose another folder")
    if not args.draw:
        args.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))


def run_all(args):
    """The sweeps, then the seeds at each one's best rate; what is there already is skipped."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # more only slow down a model this small
    if "chain" in args.tasks and not (args.output / "chain-model").exists():
        make_chain(args.output / "chain-model", args.model_steps)
    each = len(args.tasks) * len(METHODS)
    bar = tqdm(total=each * (len(args.rates) * args.sweep_seeds + args.seeds), desc="runs", file=sys.stderr)
    for stage, numbers in (("sweep", args.sweep_seeds), ("seeds", args.seeds)):
        for number, task in itertools.product(range(numbers), args.tasks):
            for method in METHODS:  # interleaved, so that a busy hour of the machine meets all alike
                for rate in args.rates if stage == "sweep" else [best_rate(args, task, method)]:
                    seed = number + (100 if stage == "sweep" else 0)
                    bar.set_postfix_str(f"{task} {method} lr {rate:g} seed {seed}")
                    if read(folder_of(args.output, task, method, rate, seed)) is None:
                        run(args, task, method, rate, seed)
                    bar.update()
    bar.close()


# Table and picture ----------------------------------------------------------------------------------------------------


def results(args):
    """{task: {method: runs at its best rate, one a seed, each a list of rows}} of all that are finished."""
    found = {}
    for task, method in itertools.product(args.tasks, METHODS):
        rate = best_rate(args, task, method)
        runs = [read(folder_of(args.output, task, method, rate, seed)) for seed in range(args.seeds)]
        if None in runs:
            fail(f"{args.output}: the runs of {task}, {method} are not all there; run without --draw to make them")
        found.setdefault(task, {})[method] = runs
    return found


def steps_to_target(rows):
    """The first step at which the mean reward of it and the two before reaches TARGET; None if none does."""
    rewards = [row["reward"] for row in rows]
    return next((step for step in range(3, len(rewards) + 1) if mean(rewards[step - 3 : step]) >= TARGET), None)


def measures(runs):
    """{measure: a number for each seed} of a script's runs. Steps to target: None where it was not reached."""
    found = {f"final {key}": [mean([row[key] for row in rows[-LAST:]]) for rows in runs]
             for key in ("reward", "length", "entropy")}
    found["steps to target"] = [steps_to_target(rows) for rows in runs]
    found["mean reward"] = [mean_reward(rows) for rows in runs]
    times = [[sum(value for key, value in row.items() if key.startswith("seconds_")) for row in rows] for rows in runs]
    found["seconds"] = [len(row) * statistics.median(row) for row in times]  # the median: the machine may be shared
    return found


def plus_minus(values, digits, sign=""):
    centre, half = interval([float(value) for value in values])
    return f"{centre:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def table(args, found):
    """The results and the sweep, in Markdown."""
    lines = [
        f"Mean ± 95 % interval (Student's t) over seeds 0 to {args.seeds - 1}. Steps to {TARGET}: the first at which",
        f"the mean reward of three steps reaches it. Final: mean of the last {LAST} steps. Mean reward: of all steps;",
        "against grpo.py: its difference, seed by seed. Seconds: number of steps times the median step.",
        "",
        f"| task | script | lr | steps to {TARGET} | final reward | mean reward | against grpo.py | final length |"
        " final entropy | seconds |",
        "|---" * 10 + "|",
    ]
    for task, methods in found.items():
        base = measures(methods["grpo.py"])["mean reward"]
        for method, runs in methods.items():
            own = measures(runs)
            reached = [step for step in own["steps to target"] if step]
            steps = plus_minus(reached, 1) if reached else f"not in {len(runs[0])}"
            steps += f" ({len(reached)} of {len(runs)} seeds)" if 0 < len(reached) < len(runs) else ""
            difference = plus_minus([a - b for a, b in zip(own["mean reward"], base)], 3, "+")
            cells = [task, f"`{method}`", f"{best_rate(args, task, method):g}", steps,
                     plus_minus(own["final reward"], 3), plus_minus(own["mean reward"], 3),
                     "" if method == "grpo.py" else difference, plus_minus(own["final length"], 1),
                     plus_minus(own["final entropy"], 3), plus_minus(own["seconds"], 0)]
            lines.append("| " + " | ".join(cells) + " |")
    if args.sweep_seeds:
        seeds = ", ".join(str(100 + seed) for seed in range(args.sweep_seeds))
        lines += ["", f"The sweep: mean reward over all steps, seeds {seeds}; the best is bold.", "",
                  "| task | script | " + " | ".join(f"lr {rate:g}" for rate in args.rates) + " |",
                  "|---" * (2 + len(args.rates)) + "|"]
        for task, method in itertools.product(args.tasks, METHODS):
            cells = [f"**{value:.3f}**" if rate == best_rate(args, task, method) else f"{value:.3f}"
                     for rate, value in sweep_of(args, task, method).items()]
            lines.append(f"| {task} | `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def curve(runs, key):
    """Mean and half-width of the 95 % interval of a metric at each step: two tuples."""
    return zip(*(interval([float(rows[step][key]) for rows in runs]) for step in range(len(runs[0]))))


def draw(args, found):
    """The curves, told apart by colour, lightness, line style and marker."""
    try:
        import matplotlib
    except ImportError:
        return tqdm.write("no picture: matplotlib is missing (pip install matplotlib); --draw makes it from these runs")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # comes with matplotlib

    looks = dict(zip(METHODS, (
        dict(color="#000000", linestyle="-", marker="o"),  # lightness differs, for greyscale
        dict(color="#a9a9a9", linestyle="--", marker="s"),
        dict(color="#a50f2a", linestyle="-", marker="^"),
        dict(color="#e08a9b", linestyle=(0, (4, 1)), marker="P"),
        dict(color="#2f7fc1", linestyle="-.", marker="D"),
        dict(color="#f5bd30", linestyle=(0, (1.2, 0.8)), marker="v"),
    )))
    titles = {"reward": "reward", "length": "length, tokens", "entropy": "entropy, nats a token"}
    plt.rcParams.update({"font.size": 12, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(len(found) + 1, 3, figsize=(14, 3.7 * (len(found) + 1)), layout="constrained")

    def line(axis, runs, key, first=0, **look):
        """Mean and interval of a metric; markers at every fifth step from `first`, so that they do not hide others."""
        centre, half = curve(runs, key)
        steps = range(1, len(centre) + 1)
        look = {"markeredgecolor": "black", "linewidth": 2.2, "markersize": 7, **look}
        axis.plot(steps, centre, markevery=(first, 5), **look)
        low, high = [a - b for a, b in zip(centre, half)], [a + b for a, b in zip(centre, half)]
        axis.fill_between(steps, low, high, color=look["color"], alpha=0.1, linewidth=0)  # nothing with a single seed

    for row, (task, methods) in zip(axes, found.items()):
        for axis, key in zip(row, titles):
            for first, (method, runs) in enumerate(methods.items()):
                line(axis, runs, key, first, label=method, **looks[method])
            axis.set_title(f"{task}: {titles[key]}")
        row[0].axhline(TARGET, color="black", linewidth=0.7, linestyle=(0, (2, 4)))
        row[0].set_ylim(0, 1.03)
    for axis, key, title, owners in (
        (axes[-1, 0], "lam", "learnable: λ", ["lambda_grpo_learnable.py"]),
        (axes[-1, 1], "path_depth", "PRM: inner nodes on a path of the tree", ["lambda_grpo_prm.py"]),
        (axes[-1, 2], "grad_norm", "traces: gradient norm before the clip at 1", ["grpo.py", "grpo_lambda_traces.py"]),
    ):
        for (first, method), (task, style) in itertools.product(enumerate(owners), zip(found, ("-", "--"))):
            face = "white" if style == "--" else looks[method]["color"]
            line(axis, found[task][method], key, 2 * first, label=f"{method}, {task}" if len(owners) > 1 else task,
                 **{**looks[method], "linestyle": style, "markerfacecolor": face})
        axis.set_title(title)
        axis.legend(frameon=False, fontsize=10 if len(owners) > 1 else 12)
    axes[-1, 0].axhline(0, color="black", linewidth=0.7)
    axes[-1, 2].set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  frameon=False, handlelength=3.5)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=80)
        Image.open(buffer).convert("RGB").quantize(96).save(args.picture, optimize=True)  # a third of the bytes
    plt.close(figure)
    print(f"the picture is {args.picture}, {args.picture.stat().st_size / 1e3:.0f} kB")


# The command line -----------------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for flag, kind, default, text in (
        ("--output", Path, HERE.parent / "runs" / "compare", "folder of the runs (default: runs/compare)"),
        ("--picture", Path, HERE / "compare.png", "PNG to write (default: tests/compare.png)"),
        ("--seeds", int, 5, "runs at the best rate (default: 5)"),
        ("--sweep_seeds", int, 2, "runs at each rate of the sweep (default: 2); 0: no sweep, with a single rate"),
        ("--steps", int, None, "steps of each run (default: 15 on the toy, 24 on the chain)"),
        ("--prompts_per_step", int, 4, "of each run (default: 4)"),
        ("--model_steps", int, 300, "steps of teaching the chain's model (default: 300)"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=text)
    rates = [1e-4, 3e-4, 1e-3]
    parser.add_argument("--rates", type=float, nargs="+", default=rates, help="of the sweep (default: 1e-4 3e-4 1e-3)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: both")
    parser.add_argument("--draw", action="store_true", help="train nothing: table and picture from --output")
    args = parser.parse_args()
    for name in ("seeds", "steps", "prompts_per_step", "model_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.sweep_seeds < 0 or min(args.rates) <= 0:
        fail("--sweep_seeds must be 0 or above, and --rates above 0")
    if args.sweep_seeds == 0 and len(args.rates) > 1:
        fail("--sweep_seeds 0 leaves no sweep to choose a rate: give a single one in --rates")
    check_settings(args)
    return args


def main():
    args = parse_args()
    if not args.draw:
        try:
            run_all(args)
        except KeyboardInterrupt:
            fail("interrupted; the same command goes on", 130)
    found = results(args)
    text = table(args, found)
    (args.output / "table.md").write_text(text)
    print(text)
    draw(args, found)


if __name__ == "__main__":
    main()
