"""What several tests share: the scripts under test, and a way to run them as a user does."""

import contextlib
import importlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "tiny"
SCRIPTS = [name for name in ("grpo", "grpo_lambda_traces", "lambda_grpo_learnable", "lambda_grpo_prm")
           if (ROOT / f"{name}.py").exists()]
UNTIMED = ("seconds_", "tokens_per_second", "memory_gb")  # what differs between two runs of the same thing

sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and so would its children
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: bit for bit the same here and in the runs launched below
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the scripts in turn, imported."""
    return importlib.import_module(request.param)


def launch(arguments, ranks=None, wait=True, cwd=ROOT, **environment):
    """Start `python ARGUMENTS` (or torchrun with that many ranks) in the repository; a CompletedProcess, or a Popen."""
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]  # a free port
    command += [str(argument) for argument in arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd, "env": environment}
    if not wait:
        return subprocess.Popen(command, **pipes)
    return subprocess.run(command, timeout=300, **pipes)


def on_a_terminal(arguments, cwd=ROOT, **environment):
    """`python ARGUMENTS` with a terminal for its stderr: (exit code, what the terminal got, as bytes)."""
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal, cwd=cwd, env={**os.environ, **environment})
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(screen, 1000):
            shown += part
    return process.wait(), shown


def metrics(run, timed=False):
    """The rows of a run's metrics.jsonl, without what depends on the clock."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if timed or not key.startswith(UNTIMED)} for row in rows]
