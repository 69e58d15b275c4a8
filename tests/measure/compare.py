"""The four scripts and their variations against each other: equal steps, prompts and seeds on four small tasks.

    python tests/measure/compare.py            everything: some 100 minutes on two idle cores; a second start continues
    python tests/measure/compare.py --draw runs/a runs/b --picture ab.png    only the curves of any runs, together
    python tests/measure/compare.py --methods "gspo.py --updates_per_batch 3" --tasks far --output runs/gspo

README.md in this folder describes the tasks, the seeds and the tuning: a sweep over --rates for each method of TUNED, with
seeds of its own, and then the seeds that count at the best rate. VARIATIONS run at the rate of the script they vary.
Each run's metrics.jsonl is kept in --output. Finished runs are not repeated, so a second start makes table and picture
again (--picture tests/measure/compare.png). The picture needs: pip install matplotlib
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
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM, logging

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
sys.path[:0] = [str(ROOT), str(TESTS), str(TESTS / "measure")]
from eval import fail  # noqa: E402
from papers.make import PAPERS, patched  # noqa: E402
from prm_table1 import interval, p_value  # noqa: E402
from tiny.make import BOX, make_tokenizer, train  # noqa: E402

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
    "far": Task(24, 0.7, "--prompts_per_step 4 --max_new_tokens 28 --warmup_steps 5", partial(wander, short=(20, 20), long=(20, 20))),
    "tree": Task(60, 0.9, "--prompts_per_step 1 --group_size 32 --max_new_tokens 5 --warmup_steps 5", letters,
                 tree_reward),
}


def teach(folder, answer, steps):
    """A task's problems and its model: tests/tiny, taught the answers by supervised training."""
    generator, part = random.Random(0), folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rows = dict(doors(generator) for _ in range(4096))  # a dict drops repetitions
    lines = [json.dumps({"problem": problem, "answer": gold}) + "\n" for problem, gold in rows.items()]
    (part / "problems.jsonl").write_text("".join(lines))
    torch.set_num_threads(1)  # more would round differently, and teach another model
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(TESTS / "tiny", dtype=torch.float32)

    def batch():
        problems = [doors(generator)[0] for _ in range(32)]
        return [(problem, answer(problem, generator)) for problem in problems]

    train(model, tokenizer, batch, steps, 1e-3, f"teaching {folder.name}")
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
    if len(more) != len(rows):  # a method that asks for rewards several times per step
        more = [{"wrong_length": None}] * len(rows)
    return [{**row, **other} for row, other in zip(rows, more)]


def recording(rewards_of, reward, path):
    """A script's rewards_of, or the task's own reward in its place, that also writes how long wrong answers are."""
    def rewards(texts, problems):
        earned = rewards_of(texts, problems) if reward is None else [
            reward(text, row["problem"]) for text, row in zip(texts, problems)]
        wrong = [len(text.replace(BOX, "{")) for text, value in zip(texts, earned) if value < 1]  # tokens, but the last
        with open(path, "a") as file:
            file.write(json.dumps({"wrong_length": mean(wrong) if wrong else None}) + "\n")
        return earned

    return rewards


def run_script(name, flags, rewards_of, log):
    """Run a script's main in this process, as its command line would, with our reward; its output goes into a log."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # more only slow down a model this small
    script, command = importlib.import_module(name), [f"{name}.py", *map(str, flags)]
    try:
        with (open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file),
              patch.object(sys, "argv", command), patch.object(script, "rewards_of", rewards_of)):
            script.main()
    except SystemExit:
        raise RuntimeError(f"{' '.join(command)} stopped: {log.read_text().splitlines()[-1]}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(args, task, method, rate, seed):
    """One run, whose metrics and log are kept."""
    folder = folder_of(args.output, task, method, rate, seed)
    part = folder.with_name(folder.name + ".part")  # renamed when finished
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    name, *own = method.replace(".py", "").split()
    steps, _, flags, answer, reward = TASKS[task]
    model = args.output / f"{task}-model"
    data = ["--model", model, "--dataset", model / "problems.jsonl"] if answer else ["--eval_dataset", ""]
    flags = [*own, *flags.split(), *data, "--steps", args.steps or steps, "--lr", rate, "--seed", seed]
    if name in PAPERS:
        sys.path.append(str(args.output / "papers"))
    rewards_of = recording(importlib.import_module(name).rewards_of, reward, part / "wrong.jsonl")
    run_script(name, [*flags, "--save_every", 0, "--output_dir", part], rewards_of, part / "log.txt")
    shutil.rmtree(part / "checkpoints")
    shutil.rmtree(part / "final")
    part.rename(folder)


def run_cases(function, cases, jobs, title, done=0):
    """function(*case) for each case, so many at a time, each in a process of its own."""
    bar = tqdm(total=done + len(cases), initial=done, desc=title, file=sys.stderr)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(function, *case) for case in cases]
        try:
            for finished in as_completed(running):
                finished.result()
                bar.update()
        except (KeyboardInterrupt, RuntimeError) as error:
            pool.shutdown(wait=False, cancel_futures=True)
            fail(str(error) or "interrupted; the same command continues", 1 if str(error) else 130)
    bar.close()


def mean(values):
    return sum(values) / len(values)


def tuned(args):
    """The methods that have a sweep: TUNED, or grpo.py and those of --methods."""
    return ["grpo.py", *args.methods] if args.methods else list(TUNED)


def methods_of(args, task):
    return tuned(args) + ([] if args.methods else [method for method, tasks in VARIATIONS.items() if task in tasks])


def seeds_of(args, stage):
    return range(FIRST_SEED[stage], FIRST_SEED[stage] + (args.seeds if stage == "seeds" else args.sweep_seeds))


def best_rate(args, task, method):
    """The rate with the highest mean reward over steps and seeds of the sweep. A variation has that of the script it varies."""
    method = method if method in tuned(args) else method.split()[0]

    def score(rate):
        return mean([mean([row["reward"] for row in read(folder_of(args.output, task, method, rate, seed))])
                     for seed in seeds_of(args, "sweep")])

    return max(args.rates, key=score) if args.sweep_seeds else args.rates[0]


def keep_settings(folder, settings):
    """Keep runs with other settings out of a folder of finished runs."""
    path = folder / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        fail(f"--output {folder} holds runs with {path.read_text()}: give the same, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def settings_of(args):
    """Runs of other lengths, or of a script in --methods before it changed, are other runs."""
    settings = {"steps": args.steps, "model_steps": args.model_steps}
    for name in sorted({method.partition(".py")[0] for method in args.methods or ()}):
        path = TESTS / "papers" / f"{name}.diff" if name in PAPERS else ROOT / f"{name}.py"
        settings[name] = zlib.crc32(path.read_bytes())
    return settings


def run_all(args):
    """The sweeps, then the seeds at each one's best rate, --jobs at a time; finished runs are skipped."""
    for task in args.tasks:
        folder = args.output / f"{task}-model"
        if TASKS[task].answer and not folder.exists():
            teach(folder, TASKS[task].answer, args.model_steps)
    for name in {method.partition(".py")[0] for method in args.methods or ()} & set(PAPERS):
        (args.output / "papers").mkdir(exist_ok=True)
        patched(name, args.output / "papers")
        if not (args.output / "papers" / "tests").exists():
            (args.output / "papers" / "tests").symlink_to(TESTS)  # as in a checkout's root
    for stage in ("sweep", "seeds"):
        wanted = [  # seed by seed, so that a busy hour of the machine meets all alike
            (task, method, rate, seed)
            for seed, task in itertools.product(seeds_of(args, stage), args.tasks)
            for method in (tuned(args) if stage == "sweep" else methods_of(args, task))
            for rate in (args.rates if stage == "sweep" else [best_rate(args, task, method)])
        ]
        missing = [(args, *case) for case in wanted if read(folder_of(args.output, *case)) is None]
        run_cases(run, missing, args.jobs, stage, len(wanted) - len(missing))


# Tables ---------------------------------------------------------------------------------------------------------------

def results(args):
    """{task: {method: runs at its best rate, one per seed, each a list of rows}}."""
    def runs(task, method):
        rate = best_rate(args, task, method)
        return [read(folder_of(args.output, task, method, rate, seed)) for seed in seeds_of(args, "seeds")]

    return {task: {method: runs(task, method) for method in methods_of(args, task)} for task in args.tasks}


def steps_to_target(rows, target):
    """The first step at which the mean reward of it and the two before reaches the target; None if none does."""
    rewards = [row["reward"] for row in rows]
    return next((step for step in range(3, len(rewards) + 1) if mean(rewards[step - 3 : step]) >= target), None)


def measures(runs, target):
    """{measure: a number for each seed} of a script's runs. Steps to target: None where it was not reached."""
    found = {f"final {key}": [mean([row[key] for row in rows[-LAST:]]) for rows in runs] for key in ("reward", "length")}
    found["steps"] = [steps_to_target(rows, target) for rows in runs]
    found["mean reward"] = [mean([row["reward"] for row in rows]) for rows in runs]
    wrong = [[row["wrong_length"] for row in rows if row["wrong_length"] is not None] for rows in runs]
    found["wrong length"] = [mean(lengths) if lengths else math.nan for lengths in wrong]
    return found


def plus_minus(values, digits, sign=""):
    center, half = interval([float(value) for value in values])
    return f"{center:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


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
        f"Mean ± 95% interval (Student's t) over {args.seeds} seeds. Steps: the first at which the mean reward of three",
        "steps reaches 0.7 (tree: 0.9). Mean reward: of all steps. Final: the last 5 steps. Wrong length: tokens of answers",
        "that do not earn 1, over all steps.",
        "",
        "| task | script | lr | steps | mean reward | final reward | final length | wrong length |",
        "|---" * 8 + "|",
    ]
    for task, methods in found.items():
        for method, runs in methods.items():
            own = measures(runs, TASKS[task].target)
            reached = [step for step in own["steps"] if step]
            steps = plus_minus(reached, 1) if reached else f"not in {len(runs[0])}"
            steps += f" ({len(reached)} of {len(runs)})" if 0 < len(reached) < len(runs) else ""
            cells = [task, f"`{method}`", f"{best_rate(args, task, method):g}", steps,
                     plus_minus(own["mean reward"], 3), plus_minus(own["final reward"], 3),
                     plus_minus(own["final length"], 1), plus_minus(own["wrong length"], 1)]
            lines.append("| " + " | ".join(cells) + " |")
    pairs = comparisons(found)
    if args.seeds > 1:
        chances = [p_value(early) for *_, early, _ in pairs]
        lines += ["", f"Paired differences; p of a paired t-test on the mean reward, and after Holm's correction for these "
                  f"{len(pairs)}.", "", "| task | script | against | mean reward | final reward | p | corrected |",
                  "|---" * 7 + "|"]
        for (task, method, other, early, late), p, corrected in zip(pairs, chances, holm(chances)):
            shown = f"**{corrected:.4f}**" if corrected < 0.05 else f"{corrected:.4f}"
            lines.append(f"| {task} | `{method}` | `{other}` | {plus_minus(early, 3, '+')} | {plus_minus(late, 3, '+')} | "
                         f"{p:.4f} | {shown} |")
    lines += ["", "The methods' own metrics: means over seeds of first and last step; in parentheses the least and the",
              "most in all steps and seeds.", "",
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
    return "\n".join(lines) + "\n"


# Picture --------------------------------------------------------------------------------------------------------------

LOOKS = (  # color, lightness, line style and marker all differ: the picture works in gray, too
    dict(color="#000000", linestyle="-", marker="o"),
    dict(color="#a9a9a9", linestyle="--", marker="s"),
    dict(color="#a50f2a", linestyle="-", marker="^"),
    dict(color="#e08a9b", linestyle=(0, (4, 1)), marker="P"),
    dict(color="#2f7fc1", linestyle="-.", marker="D"),
    dict(color="#f5bd30", linestyle=(0, (1.2, 0.8)), marker="v"),
)


def pyplot():
    """matplotlib.pyplot, which draws into files; without matplotlib the program ends with one line."""
    try:
        import matplotlib
    except ImportError:
        fail("a picture needs a package: pip install matplotlib; then --draw makes it from finished runs", 1)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save_picture(figure, path, dpi=80, colors=96):
    """A PNG with few colors: a third of the bytes."""
    from PIL import Image  # comes with matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=dpi)
        Image.open(buffer).convert("RGB").quantize(colors).save(path, optimize=True)
    print(f"the picture is {path}, {path.stat().st_size / 1e3:.0f} kB")


def draw_curves(runs, picture):
    """Reward, length and entropy of each step of some runs, as their metrics.jsonl have them."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for run, style in zip(runs, itertools.cycle(("-", "--", "-.", ":"))):
        if not (Path(run) / "metrics.jsonl").exists():
            fail(f"--draw {run}: there is no metrics.jsonl in it")
        rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        for axis, key, unit in zip(axes, ("reward", "length", "entropy"), ("", ", tokens", ", nats per token")):
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], style, label=Path(run).name)
            axis.set(title=key + unit, xlabel="step")
            axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axes[0].legend()
    save_picture(figure, picture)


def curve(runs, key):
    """Mean and half-width of the 95 % interval of a metric at each step: two tuples."""
    return zip(*(interval([float(rows[step][key]) for rows in runs]) for step in range(len(runs[0]))))


def draw(args, found):
    """Above the curves of reward, below the paired differences in mean reward to grpo.py, with their intervals."""
    plt, shown, looks = pyplot(), tuned(args), dict(zip(tuned(args), itertools.cycle(LOOKS)))
    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found) + 1, 7), layout="constrained", squeeze=False,
                                height_ratios=(3, 2))
    for (task, methods), (above, below) in zip(found.items(), axes.T):
        for place, method in enumerate(shown):
            center, half = curve(methods[method], "reward")
            steps = range(1, len(center) + 1)
            every = max(1, len(steps) // 4)
            look = {"markeredgecolor": "black", "markersize": 7, **looks[method]}
            above.plot(steps, center, linewidth=2.2, markevery=(place * every // len(shown), every), label=method, **look)
            low, high = [a - b for a, b in zip(center, half)], [a + b for a, b in zip(center, half)]
            above.fill_between(steps, low, high, color=look["color"], alpha=0.1, linewidth=0)  # nothing with one seed
        above.set(title=f"{task}: reward", xlabel="step", ylim=(None, 1.03))
        above.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        pairs = [(method, early) for name, method, base, early, _ in comparisons({task: methods})
                 if base == "grpo.py" and method in shown]
        for place, (method, early) in enumerate(pairs):
            center, half = interval(early)
            look = {key: value for key, value in looks[method].items() if key != "linestyle"}
            below.errorbar(center, -place, xerr=None if math.isnan(half) else half, capsize=4, markersize=8,
                           markeredgecolor="black", elinewidth=2.2, **look)
        below.axvline(0, color="black", linewidth=0.8)
        below.set(title="mean reward minus grpo.py's", yticks=[], ylim=(0.6 - len(pairs), 0.6))
        below.xaxis.set_major_locator(plt.MaxNLocator(4))
        below.spines["left"].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  frameon=False, handlelength=3.5)
    save_picture(figure, args.picture)


def draw_differences(args, found):
    """Of many methods only the paired differences in mean reward, a line each; beyond 0.2 they are not shown."""
    plt, pairs = pyplot(), comparisons(found)
    methods = list(dict.fromkeys(method for _, method, *_ in pairs))
    figure, axes = plt.subplots(1, len(found), figsize=(3 * len(found) + 3, 0.3 * len(methods) + 1), layout="constrained",
                                sharey=True, squeeze=False)
    for task, axis in zip(found, axes[0]):
        own = [(method, *interval(early)) for name, method, _, early, _ in pairs if name == task]
        for method, center, half in own:
            axis.errorbar(center, methods.index(method), xerr=half, fmt="o", color=LOOKS[4]["color"], capsize=3, clip_on=True)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=f"{task}: mean reward minus grpo.py", yticks=range(len(methods)), yticklabels=methods, xlim=(-0.2, 0.2))
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].invert_yaxis()
    save_picture(figure, args.picture)


# The command line -----------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for flag, kind, default, text in (
        ("--output", Path, ROOT / "runs" / "compare", "folder of the runs (default: runs/compare)"),
        ("--picture", Path, None, "PNG to write (default: compare.png in --output)"),
        ("--seeds", int, 20, "runs at the best rate (default: 20)"),
        ("--sweep_seeds", int, 2, "runs at each rate of the sweep (default: 2); 0: no sweep, with a single rate"),
        ("--steps", int, None, "steps of each run (default: 15 on toy, 24 on chain and far, 60 on tree)"),
        ("--model_steps", int, 300, "steps of teaching each model (default: 300)"),
        ("--jobs", int, 2, "runs at a time, a core each (default: 2)"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=text)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="default: 1e-4 3e-4 1e-3")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all four")
    parser.add_argument("--methods", nargs="+", metavar="COMMAND", help="only grpo.py and these, each tuned: a script "
                        "beside it, your own as well, or a paper's patch in tests/papers, with its flags")
    parser.add_argument("--draw", nargs="+", metavar="RUN", help="train nothing: curves of these runs, into --picture")
    args = parser.parse_args()
    args.picture = args.picture or args.output / "compare.png"
    if args.draw:
        return args
    if args.sweep_seeds == 0 and len(args.rates) > 1:
        fail("--sweep_seeds 0 leaves no sweep to choose a rate: give a single one in --rates")
    for method in args.methods or ():
        name, is_script, _ = method.partition(".py")
        known = is_script and (name in PAPERS or (ROOT / f"{name}.py").exists()) and name.isidentifier()
        if not known or method == "grpo.py":
            fail(f"--methods {method!r}: a script beside grpo.py, or one of {', '.join(PAPERS)} and .py; with flags in "
                 "the same quotation marks, such as 'gspo.py --updates_per_batch 3'")
    keep_settings(args.output, settings_of(args))
    return args


def main():
    args = parse_args()
    if args.draw:
        return draw_curves(args.draw, args.picture)
    run_all(args)
    found = results(args)
    text = table(args, found)
    (args.output / "table.md").write_text(text)
    print(text)
    if find_spec("matplotlib"):
        (draw if len(tuned(args)) <= len(LOOKS) else draw_differences)(args, found)
    else:
        print("no picture was drawn, because matplotlib is missing: install it, and start the same command again")


if __name__ == "__main__":
    main()
