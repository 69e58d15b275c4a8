"""The four scripts and their variations against each other: equal steps, prompts and seeds on four small tasks.

    python tests/measure/compare.py                 everything: some 100 minutes on two idle cores; a second start goes on
    python tests/measure/compare.py --draw --picture tests/measure/compare.png             tables and picture again, from these runs
    python tests/measure/compare.py --draw runs/a runs/b --picture ab.png          the curves of any runs together
    python tests/measure/compare.py --methods "gspo.py --updates_per_batch 3" --tasks far --output runs/gspo       a paper's patch

toy    what the scripts do without --model: long answers are right, because they show the steps of a sum.
chain  the problem "48216?" names five doors, and the largest is the right one. An answer names a door with its first
       token, wanders, and repeats the door in the box: 8=+;=;\\boxed{8}. The way is short (4 to 8 random tokens) behind
       the right door, and long (14 to 20) behind the others. So short answers are right.
far    the same, but the way has 20 random tokens behind every door: no answer is longer than another, and only the
       first of its 25 tokens decides. Here the traces should pay: in GRPO the first token has 1/25 of all weight, in
       traces (both, γλ = .99) 1/12, and what follows is noise, or follows from the first.
tree   Table 1 of the PRM paper (n = 2, r_neg = -0.5) by the scripts themselves: an answer is four letters, ++=+ earns 1,
       others that begin with ++ earn -0.5, all others 0.7. The way to the best answer leads through a bad
       neighbourhood. Here process sets should pay: in a group of 32, eight share the first two letters; GRPO holds the
       bad neighbourhood against these letters eight times, λ-GRPO once.

The models of the last three were taught, on the fly, a minute each, to choose any of the five doors, or random letters.
What should pay was written down before the first run with seeds that count. (A tree of two doors was tried first, with
grpo.py alone and seeds of the sweep: too hard to learn in 60 steps.)
All have 4 prompts × 8 completions a step, so that noise plays its part (tree: 1 × 32); all else are the scripts'
defaults. The six methods of TUNED have the same tuning on each task: a sweep over --rates with seeds of its own (100,
101, ..), in which the rate with the highest mean reward over all steps and seeds wins. The others are their variations,
on tasks where they say something, at the rate of the script that they vary.
Then come the seeds that count, 300, 301, ..: they alone are in tables and pictures, and are compared seed by seed.

What 20 seeds can show: with five other seeds of an earlier version the paired differences in mean reward had a standard
deviation of some .035 on toy and .055 on chain. A paired t-test at 5 % with 20 seeds has 80 % power for an effect of
0.66 standard deviations: .023 and .036. Over all comparisons of a table Holm's correction is made.

Each run's metrics.jsonl is kept in --output; finished runs are not repeated. The picture needs: pip install matplotlib
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import random
import re
import shutil
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm, trange
from transformers import AutoModelForCausalLM, logging

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from eval import draw_curves, fail  # noqa: E402
from make_tiny import BOX, make_tokenizer  # noqa: E402
from patched import PAPERS, patched  # noqa: E402
from reproduce_prm_table1 import interval, p_value  # noqa: E402

TUNED = (
    "grpo.py", "grpo.py --loss dapo", "grpo_lambda_traces.py", "grpo_lambda_traces.py --min_advantage=-inf",
    "lambda_grpo_learnable.py", "lambda_grpo_prm.py",
)
TRACES3 = "grpo_lambda_traces.py --updates_per_batch 3"
VARIATIONS = {  # command: its tasks. With one update a batch ε-trace and ε-weight are the same
    "grpo.py --loss dr_grpo": ("toy", "chain"),
    "grpo_lambda_traces.py --style recent": ("toy", "far"),
    "grpo_lambda_traces.py --style recent --min_advantage=-inf": ("toy", "far"),
    "lambda_grpo_learnable.py --lam_lr 1": ("toy", "chain"),
    "lambda_grpo_learnable.py --lam_lr 10": ("toy", "chain"),
    "grpo.py --updates_per_batch 3": ("far",),
    TRACES3: ("far",),
    f"{TRACES3} --variant weight": ("far",),
    f"{TRACES3} --style recent": ("far",),
    f"{TRACES3} --style recent --variant weight": ("far",),
}
OWN_METRICS = {
    "grpo": ["grad_norm"],
    "grpo_lambda_traces": ["grad_norm", "trace_weight", "advantage_clamped"],
    "lambda_grpo_learnable": ["lam", "f_min", "f_max"],
    "lambda_grpo_prm": ["process_set_size", "nontrivial_trees", "path_depth"],
}
FIRST_SEED = {"sweep": 100, "seeds": 300}
LAST = 5  # the steps that "final" is the mean of


# The tasks ------------------------------------------------------------------------------------------------------------


def doors(generator):
    """A problem of the last three tasks, and its answer: the largest of five doors."""
    digits = [str(digit) for digit in generator.sample(range(10), 5)]
    return "".join(digits) + "?", max(digits)


def wander(problem, generator, short=(4, 8), long=(14, 20)):
    """An answer that the model is taught: any of the five doors, a random way, the door in the box."""
    door = problem[generator.randrange(5)]
    length = generator.randint(*short if door == max(problem[:5]) else long)
    return door + "".join(generator.choices("+=;", k=length)) + BOX + door + "}"


def wander_far(problem, generator):
    """The same with 20 random tokens, whatever the door."""
    return wander(problem, generator, short=(20, 20), long=(20, 20))


def letters(problem, generator):
    """An answer that the model is taught: four letters, whatever the problem."""
    return "".join(generator.choices("+=", k=4))


def tree_reward(text, problem):
    """What four letters earn."""
    if text == "++=+":
        return 1.0
    return -0.5 if text.startswith("++") else 0.7


class Task(NamedTuple):
    steps: int
    target: float  # the reward that "steps to" looks for
    flags: str  # all else are the script's own TOY, or with a model its defaults
    answer: Callable = None  # (problem, generator) -> an answer that the model is taught; none: the toy's model
    reward: Callable = None  # (text, problem) -> reward; none: the scripts' own


TASKS = {
    "toy": Task(15, 0.7, "--prompts_per_step 4"),
    "chain": Task(24, 0.7, "--prompts_per_step 4 --max_new_tokens 28 --warmup_steps 5", wander),
    "far": Task(24, 0.7, "--prompts_per_step 4 --max_new_tokens 28 --warmup_steps 5", wander_far),
    "tree": Task(60, 0.9, "--prompts_per_step 1 --group_size 32 --max_new_tokens 5 --warmup_steps 5", letters,
                 tree_reward),
}


def teach(folder, answer, steps, batch_size=32, lr=1e-3):
    """A task's problems and its model: tests/tiny, taught the answers by supervised training."""
    generator, part = random.Random(0), folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rows = dict(doors(generator) for _ in range(4096))  # a dict drops repetitions
    lines = [json.dumps({"problem": problem, "answer": gold}) + "\n" for problem, gold in rows.items()]
    (part / "problems.jsonl").write_text("".join(lines))
    torch.set_num_threads(1)  # more would round differently, and teach another model
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(HERE / "tiny", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in (bar := trange(steps, desc=f"teaching {folder.name}")):
        problems = [doors(generator)[0] for _ in range(batch_size)]
        answers = [tokenizer.encode(answer(row, generator)) + [tokenizer.eos_token_id] for row in problems]
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
    return output / task / re.sub(r"[ =-]+", "-", method.replace(".py", "")) / f"lr{rate:g}-seed{seed}"


def read(folder):
    """The rows of a finished run's metrics.jsonl with the length of wrong answers beside them, or None."""
    if not folder.exists():
        return None
    rows, more = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                  for name in ("metrics.jsonl", "wrong.jsonl"))
    return [{**row, **other} for row, other in zip(rows, more, strict=True)]


def recording(rewards_of, reward, path):
    """A script's rewards_of, or the task's own reward in its place, that also writes how long wrong answers are."""
    def rewards(texts, problems, grader):
        earned = rewards_of(texts, problems, grader) if reward is None else [
            reward(text, row["problem"]) for text, row in zip(texts, problems)]
        wrong = [len(text.replace(BOX, "{")) for text, value in zip(texts, earned) if value < 1]  # tokens, but the last
        with open(path, "a") as file:
            file.write(json.dumps({"wrong_length": mean(wrong) if wrong else None}) + "\n")
        return earned

    return rewards


def run(args, task, method, rate, seed):
    """Run a script's main in this process, as its command line would, which saves its start; keep metrics and log."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # more only slow down a model this small
    folder = folder_of(args.output, task, method, rate, seed)
    part = folder.with_name(folder.name + ".part")  # renamed when finished
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    name, *own = method.replace(".py", "").split()
    steps, _, flags, answer, reward = TASKS[task]
    model = args.output / f"{task}-model"
    data = ["--model", model, "--dataset", model / "problems.jsonl"] if answer else ["--eval_dataset", ""]
    command = [f"{name}.py", *own, *flags.split(), *data, "--steps", args.steps or steps, "--lr", rate, "--seed", seed]
    command += ["--save_every", 0, "--output_dir", part]
    if name in PAPERS:
        sys.path.append(str(args.output / "papers"))
    script = importlib.import_module(name)
    before = sys.argv, script.rewards_of
    sys.argv, script.rewards_of = list(map(str, command)), recording(script.rewards_of, reward, part / "wrong.jsonl")
    try:
        with open(part / "log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            script.main()
    except SystemExit:
        text = f"{' '.join(sys.argv)} stopped: {(part / 'log.txt').read_text().splitlines()[-1]}"
        raise RuntimeError(text) from None
    finally:
        sys.argv, script.rewards_of = before
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


def tuned(args):
    """The methods that have a sweep: TUNED, or grpo.py and those of --methods."""
    return ["grpo.py", *args.methods] if args.methods else list(TUNED)


def methods_of(args, task):
    return tuned(args) + ([] if args.methods else [method for method, tasks in VARIATIONS.items() if task in tasks])


def seeds_of(args, stage):
    return range(FIRST_SEED[stage], FIRST_SEED[stage] + (args.seeds if stage == "seeds" else args.sweep_seeds))


def sweep_of(args, task, method):
    """{rate: mean reward over the sweep's steps and seeds}, of the rates whose runs are there."""
    found = {}
    for rate in args.rates:
        runs = [read(folder_of(args.output, task, method, rate, seed)) for seed in seeds_of(args, "sweep")]
        if runs and None not in runs:
            found[rate] = mean([mean_reward(rows) for rows in runs])
    return found


def best_rate(args, task, method):
    found = sweep_of(args, task, method if method in tuned(args) else method.split()[0])
    return max(found, key=found.get) if found else args.rates[0]


def check_settings(args):
    """Keep runs of other lengths, or of a script in --methods before it changed, out of a folder of finished runs."""
    settings = {"steps": args.steps, "model_steps": args.model_steps}
    for name in sorted({method.partition(".py")[0] for method in args.methods or ()}):
        path = HERE / "papers" / f"{name}.diff" if name in PAPERS else HERE.parent / f"{name}.py"
        settings[name] = zlib.crc32(path.read_bytes())
    path = args.output / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        fail(f"--output {args.output} holds runs with {path.read_text()}: give the same, or choose another folder")
    if args.draw is None:
        args.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))


def run_all(args):
    """The sweeps, then the seeds at each one's best rate, --jobs at a time; what is there already is skipped."""
    for task in args.tasks:
        folder = args.output / f"{task}-model"
        if TASKS[task].answer and not folder.exists():
            teach(folder, TASKS[task].answer, args.model_steps)
    for name in {method.partition(".py")[0] for method in args.methods or ()} & set(PAPERS):
        (args.output / "papers").mkdir(exist_ok=True)
        patched(name, args.output / "papers")
        if not (args.output / "papers" / "tests").exists():
            (args.output / "papers" / "tests").symlink_to(HERE)  # as in a checkout's root
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for stage in ("sweep", "seeds"):
            wanted = [  # seed by seed, so that a busy hour of the machine meets all alike, and what is done is whole
                (task, method, rate, seed)
                for seed, task in itertools.product(seeds_of(args, stage), args.tasks)
                for method in (tuned(args) if stage == "sweep" else methods_of(args, task))
                for rate in (args.rates if stage == "sweep" else [best_rate(args, task, method)])
            ]
            missing = [what for what in wanted if read(folder_of(args.output, *what)) is None]
            bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=stage, file=sys.stderr)
            running = [pool.submit(run, args, *what) for what in missing]
            try:
                for done in as_completed(running):
                    done.result()
                    bar.update()
            except (KeyboardInterrupt, RuntimeError) as error:
                pool.shutdown(wait=False, cancel_futures=True)
                fail(str(error) or "interrupted; the same command goes on", 1 if str(error) else 130)
            bar.close()


# Tables ---------------------------------------------------------------------------------------------------------------


def results(args):
    """{task: {method: runs at its best rate, one a seed, each a list of rows}} of all that are finished."""
    found = {}
    for task in args.tasks:
        for method in methods_of(args, task):
            rate = best_rate(args, task, method)
            runs = [read(folder_of(args.output, task, method, rate, seed)) for seed in seeds_of(args, "seeds")]
            if None in runs:
                fail(f"{args.output}: the runs of {task}, {method} are not all there; run without --draw to make them")
            found.setdefault(task, {})[method] = runs
    return found


def steps_to_target(rows, target):
    """The first step at which the mean reward of it and the two before reaches the target; None if none does."""
    rewards = [row["reward"] for row in rows]
    return next((step for step in range(3, len(rewards) + 1) if mean(rewards[step - 3 : step]) >= target), None)


def measures(runs, target):
    """{measure: a number for each seed} of a script's runs. Steps to target: None where it was not reached."""
    found = {f"final {key}": [mean([row[key] for row in rows[-LAST:]]) for rows in runs]
             for key in ("reward", "length", "entropy")}
    found["steps"] = [steps_to_target(rows, target) for rows in runs]
    found["mean reward"] = [mean_reward(rows) for rows in runs]
    wrong = [[row["wrong_length"] for row in rows if row["wrong_length"] is not None] for rows in runs]
    found["wrong length"] = [mean(lengths) if lengths else math.nan for lengths in wrong]
    return found


def plus_minus(values, digits, sign=""):
    centre, half = interval([float(value) for value in values])
    return f"{centre:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def comparisons(found):
    """[(task, method, base, differences in mean reward, in final reward), ..], seed by seed.

    Every method against grpo.py with as many updates a batch, and both λ-GRPO also against what they are without their λ.
    """
    rows = []
    for task, methods in found.items():
        own = {method: measures(runs, TASKS[task].target) for method, runs in methods.items()}
        for method in methods:
            base = "grpo.py --updates_per_batch 3" if "--updates_per_batch 3" in method else "grpo.py"
            base = base if base in methods else "grpo.py"
            for other in (base, "grpo.py --loss dapo") if method.startswith("lambda") else (base,):
                if other != method and other in methods:
                    rows.append((task, method, other, *(
                        [a - b for a, b in zip(own[method][key], own[other][key])]
                        for key in ("mean reward", "final reward"))))
    return rows


def holm(values):
    """p-values as they are after Holm's correction for their number."""
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        worst = max(worst, min(1.0, values[i] * (len(values) - rank)))
        adjusted[i] = worst
    return adjusted


def table(args, found):
    """The results, the comparisons and the sweep, in Markdown."""
    lines = [
        f"Mean ± 95 % interval (Student's t) over {args.seeds} seeds. Steps: the first at which the mean reward of three",
        "steps reaches .7 (tree: .9). Mean reward: of all steps. Final: the last 5 steps. Wrong length: tokens of answers",
        "that do not earn 1, over all steps.",
        "",
        "| task | script | lr | steps | mean reward | final reward | final length | wrong length | final entropy |",
        "|---" * 9 + "|",
    ]
    for task, methods in found.items():
        for method, runs in methods.items():
            own = measures(runs, TASKS[task].target)
            reached = [step for step in own["steps"] if step]
            steps = plus_minus(reached, 1) if reached else f"not in {len(runs[0])}"
            steps += f" ({len(reached)} of {len(runs)})" if 0 < len(reached) < len(runs) else ""
            cells = [task, f"`{method}`", f"{best_rate(args, task, method):g}", steps,
                     plus_minus(own["mean reward"], 3), plus_minus(own["final reward"], 3),
                     plus_minus(own["final length"], 1), plus_minus(own["wrong length"], 1),
                     plus_minus(own["final entropy"], 3)]
            lines.append("| " + " | ".join(cells) + " |")
    pairs = comparisons(found)
    if args.seeds > 1:
        chances = [p_value(mean_reward) for *_, mean_reward, _ in pairs]
        lines += ["", f"Paired differences; p of a paired t-test on the mean reward, and after Holm's correction for these "
                  f"{len(pairs)}.", "", "| task | script | against | mean reward | final reward | p | corrected |",
                  "|---" * 7 + "|"]
        for (task, method, other, early, late), p, corrected in zip(pairs, chances, holm(chances)):
            shown = f"**{corrected:.4f}**" if corrected < 0.05 else f"{corrected:.4f}"
            lines.append(f"| {task} | `{method}` | `{other}` | {plus_minus(early, 3, '+')} | {plus_minus(late, 3, '+')} | "
                         f"{p:.4f} | {shown} |")
    lines += ["", "What the methods say of themselves: means over seeds of first and last step; in brackets the least and",
              "the most in all steps and seeds.", "",
              "| task | script | its metrics |", "|---|---|---|"]
    for task, methods in found.items():
        for method, runs in methods.items():
            keys = OWN_METRICS.get(method.split(".py")[0], OWN_METRICS["grpo"])
            cells = []
            for key in keys:
                first, last = (mean([rows[step][key] for rows in runs]) for step in (0, -1))
                every = [row[key] for rows in runs for row in rows]
                cells.append(f"{key} {first:.3g} → {last:.3g} ({min(every):.3g} to {max(every):.3g})")
            lines.append(f"| {task} | `{method}` | {', '.join(cells)} |")
    if args.sweep_seeds:
        seeds = ", ".join(map(str, seeds_of(args, "sweep")))
        lines += ["", f"The sweep: mean reward over all steps, seeds {seeds}; the best is bold.", "",
                  "| task | script | " + " | ".join(f"lr {rate:g}" for rate in args.rates) + " |",
                  "|---" * (2 + len(args.rates)) + "|"]
        for task, method in itertools.product(args.tasks, tuned(args)):
            cells = [f"**{value:.3f}**" if rate == best_rate(args, task, method) else f"{value:.3f}"
                     for rate, value in sweep_of(args, task, method).items()]
            lines.append(f"| {task} | `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# Picture --------------------------------------------------------------------------------------------------------------

LOOKS = (  # colour, lightness, line style and marker all differ: the picture works in grey, too
    dict(color="#000000", linestyle="-", marker="o"),
    dict(color="#a9a9a9", linestyle="--", marker="s"),
    dict(color="#a50f2a", linestyle="-", marker="^"),
    dict(color="#e08a9b", linestyle=(0, (4, 1)), marker="P"),
    dict(color="#2f7fc1", linestyle="-.", marker="D"),
    dict(color="#f5bd30", linestyle=(0, (1.2, 0.8)), marker="v"),
)


def curve(runs, key):
    """Mean and half-width of the 95 % interval of a metric at each step: two tuples."""
    return zip(*(interval([float(rows[step][key]) for rows in runs]) for step in range(len(runs[0]))))


def draw(args, found):
    """Above the curves of reward, below the paired differences in mean reward to grpo.py, with their intervals."""
    try:
        import matplotlib
    except ImportError:
        return tqdm.write("no picture: matplotlib is missing (pip install matplotlib); --draw makes it from these runs")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # comes with matplotlib

    shown, looks = tuned(args), dict(zip(tuned(args), itertools.cycle(LOOKS)))
    plt.rcParams.update({"font.size": 12, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found) + 1, 7), layout="constrained", squeeze=False,
                                height_ratios=(3, 2))
    for (task, methods), (above, below) in zip(found.items(), axes.T):
        for place, method in enumerate(shown):
            centre, half = curve(methods[method], "reward")
            steps = range(1, len(centre) + 1)
            every = max(1, len(steps) // 4)
            look = {"markeredgecolor": "black", "markersize": 7, **looks[method]}
            above.plot(steps, centre, linewidth=2.2, markevery=(place * every // len(shown), every), label=method, **look)
            low, high = [a - b for a, b in zip(centre, half)], [a + b for a, b in zip(centre, half)]
            above.fill_between(steps, low, high, color=look["color"], alpha=0.1, linewidth=0)  # nothing with one seed
        above.set(title=f"{task}: reward", xlabel="step", ylim=(None, 1.03))
        above.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        pairs = [(method, early) for name, method, base, early, _ in comparisons({task: methods})
                 if base == "grpo.py" and method in shown]
        for place, (method, early) in enumerate(pairs):
            centre, half = interval(early)
            look = {key: value for key, value in looks[method].items() if key != "linestyle"}
            below.errorbar(centre, -place, xerr=None if math.isnan(half) else half, capsize=4, markersize=8,
                           markeredgecolor="black", elinewidth=2.2, **look)
        below.axvline(0, color="black", linewidth=0.8)
        below.set(title="mean reward minus grpo.py's", yticks=[], ylim=(0.6 - len(pairs), 0.6))
        below.xaxis.set_major_locator(plt.MaxNLocator(4))
        below.spines["left"].set_visible(False)
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
        ("--picture", Path, None, "PNG to write (default: compare.png in --output)"),
        ("--seeds", int, 20, "runs at the best rate (default: 20)"),
        ("--sweep_seeds", int, 2, "runs at each rate of the sweep (default: 2); 0: no sweep, with a single rate"),
        ("--steps", int, None, "steps of each run (default: 15 on toy, 24 on chain and far, 60 on tree)"),
        ("--model_steps", int, 300, "steps of teaching each model (default: 300)"),
        ("--jobs", int, 2, "runs at a time, a core each (default: 2)"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=text)
    rates = [1e-4, 3e-4, 1e-3]
    parser.add_argument("--rates", type=float, nargs="+", default=rates, help="of the sweep (default: 1e-4 3e-4 1e-3)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all four")
    parser.add_argument("--methods", nargs="+", metavar="COMMAND", help="only grpo.py and these, each tuned: a script "
                        "beside it, your own as well, or a paper's patch in tests/papers, with its flags")
    parser.add_argument("--draw", nargs="*", metavar="RUN", help="train nothing: tables and picture from --output; with "
                        "folders of runs, whatever they are: their curves together, into --picture")
    args = parser.parse_args()
    args.picture = args.picture or args.output / "compare.png"
    for run in args.draw or ():
        if not (Path(run) / "metrics.jsonl").exists():
            fail(f"--draw {run}: there is no metrics.jsonl in it")
    if args.draw:
        return args
    for name in ("seeds", "steps", "model_steps", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.sweep_seeds < 0 or min(args.rates) <= 0:
        fail("--sweep_seeds must be 0 or above, and --rates above 0")
    if args.sweep_seeds == 0 and len(args.rates) > 1:
        fail("--sweep_seeds 0 leaves no sweep to choose a rate: give a single one in --rates")
    for method in args.methods or ():
        name, is_script, _ = method.partition(".py")
        known = is_script and (name in PAPERS or (HERE.parent / f"{name}.py").exists()) and name.isidentifier()
        if not known or method == "grpo.py":
            fail(f"--methods {method!r}: a script beside grpo.py, or one of {', '.join(PAPERS)} and .py; with flags in "
                 "the same quotation marks, such as 'gspo.py --updates_per_batch 3'")
    check_settings(args)
    return args


def main():
    args = parse_args()
    if args.draw:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(args.draw, args.picture)
        return print(f"the picture is {args.picture}")
    if args.draw is None:
        run_all(args)
    found = results(args)
    text = table(args, found)
    (args.output / "table.md").write_text(text)
    print(text)
    draw(args, found)


if __name__ == "__main__":
    main()
