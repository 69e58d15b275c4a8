"""Kill a run on two ranks at random moments, one rank or all, go on with --resume each time, and compare with a run left alone.

    python tests/kill_many.py [--kills 20] [--seed 0]

Prints a line for each kill, and at the end whether metrics, samples and the model are those of the other run, bit for bit.
About half a minute a kill on two cores. It runs grpo.py: outside their algorithms the scripts are the same.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import launch, metrics  # noqa: E402
from test_cluster import left_over, no_one_left, ranks_of  # noqa: E402
from test_run import newest, quick  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator, steps = random.Random(args.seed), 8 * args.kills
    with tempfile.TemporaryDirectory() as folder:
        run, whole = Path(folder, "killed"), Path(folder, "whole")
        for kill in range(args.kills):
            before = newest(run / "checkpoints")
            arguments = ["grpo.py", "--resume", run] if before else quick("grpo", run, steps)
            process = launch(arguments, ranks=2, wait=False, GRPO_TEST_RUN=str(run))
            while not (before or newest(run / "checkpoints")) or len(ranks_of(process)) < 2:
                assert process.poll() is None, process.communicate()[1][-3000:]
                time.sleep(0.05)
            time.sleep(generator.random() * 20)  # in the start, a step, a checkpoint: wherever it is by then
            if process.poll() is not None:
                print(f"{kill + 1}: the run had ended: use more steps or fewer kills")
                break
            victims = [process.pid, *ranks_of(process)] if generator.random() < 0.5 else ranks_of(process)[:1]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            process.communicate()
            no_one_left(run)
            rows = (run / "metrics.jsonl").read_text().splitlines()
            part = any((run / "checkpoints").glob("*.part"))
            print(f"{kill + 1}: killed {'all' if len(victims) > 1 else 'rank 0'} after step {len(rows)}, "
                  f"last whole checkpoint {newest(run / 'checkpoints')}{', in the midst of the next' if part else ''}", flush=True)
        for arguments in (["grpo.py", "--resume", run], quick("grpo", whole, steps)):
            process = launch(arguments, ranks=2, wait=False)
            _, errors = process.communicate()
            assert process.returncode == 0, errors[-3000:]
        assert not left_over(run)
        same = [metrics(run) == metrics(whole)]
        same += [(run / file).read_bytes() == (whole / file).read_bytes()
                 for file in ("samples.jsonl", "final/model.safetensors")]
        print("metrics, samples and model equal those of a run left alone, bit for bit:", *same)
        sys.exit(not all(same))


if __name__ == "__main__":
    main()
