"""What several tests share: the scripts under test, a way to run them as a user does, and what is left out without --all."""

import contextlib
import importlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "tiny"
SCRIPTS = [name for name in ("grpo", "grpo_lambda_traces", "lambda_grpo_learnable", "lambda_grpo_prm")
           if (ROOT / f"{name}.py").exists()]
UNTIMED = ("seconds_",)  # what differs between two runs of the same thing

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "measure")]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and so would its children
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: bit for bit the same here and in the runs launched below
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests marked long: whole runs, kills, clusters (minutes)")
    parser.addoption("--script", metavar="SCRIPT", help="only test_variant.py, on a script of your own")


def pytest_ignore_collect(collection_path, config):
    """With --script all but its file, without it that file."""
    if collection_path.name.startswith("test_"):
        return (collection_path.name == "test_variant.py") != bool(config.option.script) or None


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes its time, and is run with --all only")


def pytest_collection_modifyitems(config, items):
    """Leave out what is long, unless --all; put what waits for the toys, which run beside the others, at the end."""
    left_out = [] if config.option.all else [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = sorted((item for item in items if item not in left_out), key=lambda item: "toys" in item.fixturenames)
    config.left_out = len(left_out)


def pytest_terminal_summary(terminalreporter, config):
    if getattr(config, "left_out", 0):
        terminalreporter.write_line(f"{config.left_out} long tests were left out (deselected): --all runs them, too")


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the scripts in turn, imported."""
    return importlib.import_module(request.param)


@pytest.fixture
def alone():
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


FIRST = [SCRIPTS[0], *(pytest.param(name, marks=pytest.mark.long) for name in SCRIPTS[1:])]


@pytest.fixture(params=FIRST)
def first_script(request):
    """grpo.py, which stands for all where they are the same; with --all each of the scripts in turn."""
    return importlib.import_module(request.param)


class Toys:
    """toys[script]: (folder, finished process) of its embedded default. They run one after the other, beside the tests."""

    def __init__(self, folder):
        self.folder, self.running, self.pool = folder, None, ThreadPoolExecutor(1)
        self.runs = {name: self.pool.submit(self.run, name) for name in SCRIPTS}

    def run(self, name):
        self.running = launch([f"{name}.py", "--output_dir", self.folder / name, "--seed", 1], wait=False)
        stdout, stderr = self.running.communicate()
        return subprocess.CompletedProcess(name, self.running.returncode, stdout, stderr)

    def __getitem__(self, name):
        return self.folder / name, self.runs[name].result()

    def close(self):
        """When the tests end before they have asked for all."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.running and self.running.poll() is None:
            self.running.kill()


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    toys = Toys(tmp_path_factory.mktemp("toys"))
    yield toys
    toys.close()


@pytest.fixture(scope="session", autouse=True)
def start_toys(request):
    """With the first test, if any test will ask for them."""
    if any("toys" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("toys")


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
