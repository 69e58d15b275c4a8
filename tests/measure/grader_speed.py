"""How many completions a second the grader grades, with one worker and with two, in alternation.

    python tests/grader_speed.py ../shared/bench/math500.jsonl

Every gold is answered eight times: by itself, by other spellings of it and by other golds. Prints the time that all of
them take, and the median (least and most) of the ratios of neighbouring runs over a quarter of them, with and without
the answers that need no worker.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval as ev  # noqa: E402


def completions(problems):
    """(completion, gold) pairs, eight a problem."""
    golds = [row["answer"] for row in problems]
    ways = ["{}", "{}.", " {} ", "x = {}", "0 + {}", "{} + 0"]
    pairs = [(f"so \\boxed{{{way.format(gold)}}}", gold) for gold in golds for way in ways]
    return pairs + [(f"so \\boxed{{{golds[i - step]}}}", gold) for i, gold in enumerate(golds) for step in (1, 2)]


def rate(workers, pairs):
    """Gradings a second, of workers that have started."""
    with ev.Grader(workers=workers) as grader:
        list(grader.threads.map(grader.ask, [(f"{i} + x", f"x + {i}") for i in range(4 * workers)]))
        start = time.perf_counter()
        grader.judge_all(pairs)
        return len(pairs) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = ev.fail
    parser.add_argument("problems", help="a .jsonl or .parquet file, or a data set by name, as of eval.py")
    pairs = completions(ev.load_problems(parser.parse_args().problems))
    with ev.Grader() as grader:
        start = time.perf_counter()
        verdicts = grader.judge_all(pairs)
        seconds = time.perf_counter() - start
        print(f"{len(pairs)} completions in {seconds:.1f} s, {grader.timeouts} time-outs, "
              f"{sum(verdict['why'] == 'text' for verdict in verdicts)} decided without a worker", flush=True)
    asked = [pair for pair, verdict in zip(pairs, verdicts) if verdict["why"] == "math-verify"]
    for what, chosen in (("all", pairs[::4]), ("those for a worker", asked[::4])):
        rates = [(rate(1, chosen), rate(2, chosen)) for _ in range(11)]
        one, two = (statistics.median(column) for column in zip(*rates))
        ratios = sorted(pair[1] / pair[0] for pair in rates)
        print(f"{what}, every fourth, {len(chosen)}: {one:.0f} a second with one worker, {two:.0f} with two, "
              f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
