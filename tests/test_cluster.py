"""What clusters do to a run: notices, full disks, ranks that die or hang, several nodes, another number of ranks."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
import transformers
from conftest import ROOT, SCRIPTS, launch, metrics
from test_run import newest, quick, wait_for


pytestmark = pytest.mark.long


def ranks_of(process):
    """Process ids of the ranks that a torchrun started, by rank."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = dict(pair.partition(b"=")[::2] for pair in file.read().split(b"\0"))
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile
        if parent == process.pid and b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def left_over(run):
    """Processes that still belong to a run: it stands in their environment, which grader workers inherit."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if f"GRPO_TEST_RUN={run}\0".encode() in environment:
            found.append(int(pid))
    return found


def start(run, ranks=None, *more):
    arguments = quick("grpo", run, 10_000, *more)
    process = launch(arguments, ranks=ranks, wait=False, GRPO_TEST_RUN=str(run))
    wait_for(lambda: newest(run / "checkpoints") > 1, process)
    return process


def no_one_left(run):
    deadline = time.monotonic() + 30
    while left_over(run):
        assert time.monotonic() < deadline, f"orphans: {left_over(run)}"
        time.sleep(0.2)


@pytest.mark.parametrize("ranks", [None, 2])
def test_sigterm_saves_and_ends(ranks, tmp_path):
    """A notice: the step is finished and saved, the run ends with exit code 0 (torchrun has its own), and goes on."""
    run = tmp_path / "run"
    process = start(run, ranks, "--save_every", 2)
    if ranks:  # to one rank: all have to stop after the same step
        os.kill(ranks_of(process)[1], signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "SIGTERM: saved after step" in out, errors[-3000:]
    assert "Traceback" not in errors
    last = metrics(run)[-1]["step"]
    assert newest(run / "checkpoints") == last < 10_000
    no_one_left(run)
    done = launch(["grpo.py", "--resume", run, "--steps", last + 1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in metrics(run)] == list(range(1, last + 2))


def test_sigterm_to_torchrun(tmp_path):
    """torchrun passes the notice on, and gives the ranks --shutdown-timeout seconds (30) to finish their step."""
    run = tmp_path / "run"
    process = start(run, 2)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert "SIGTERM: saved after step" in out, errors[-3000:]
    assert newest(run / "checkpoints") == metrics(run)[-1]["step"]
    no_one_left(run)


def test_full_disk(tmp_path):
    """The checkpoint that no longer fits: a traceback; the ones before are whole, and resume once there is room."""
    python, folder = sys.executable, tmp_path / "disk"
    folder.mkdir()
    command = shlex.join(map(str, [python, *quick("grpo", folder / "run", 4)]))
    steps = f"""mount -t tmpfs -o size=24m tmpfs {folder} || exit 77
        {command}; echo "exit $?"; ls {folder}/run/checkpoints
        rm -r {folder}/run/checkpoints/step_000001
        {python} grpo.py --resume {folder}/run --steps 3; echo "exit $?"; ls {folder}/run/checkpoints {folder}/run/final"""
    done = subprocess.run(["unshare", "-rm", "bash", "-c", steps], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr.splitlines()[0]:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.splitlines()[0]}")
    assert "Traceback" in done.stderr and "save_checkpoint" in done.stderr
    assert "exit 1\nstep_000001\nstep_000002\nstep_000003.part\n" in done.stdout
    assert "exit 0" in done.stdout and "step_000002\nstep_000003\n" in done.stdout and "model.safetensors" in done.stdout


def test_killed_rank_ends_the_job(tmp_path):
    """SIGKILL to one of two ranks: torchrun says so and ends with an error, and nobody is left behind."""
    run = tmp_path / "run"
    process = start(run, 2)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0 and "exitcode: -9" in errors.replace(" : ", ": ").replace("exitcode  ", "exitcode")
    no_one_left(run)
    done = launch(["grpo.py", "--resume", run, "--steps", newest(run / "checkpoints") + 1])
    assert done.returncode == 0, done.stderr[-3000:]


def test_hung_rank_ends_the_job(tmp_path):
    """A rank that hangs, here in its reward: the other one waits for an hour, here 6 seconds, then the job ends in an error."""
    driver = tmp_path / "driver.py"
    driver.write_text("""import datetime, os, sys, time, grpo
grpo.timedelta = lambda hours: datetime.timedelta(seconds=6 * hours)
honest = grpo.rewards_of
def rewards_of(*arguments):
    while os.environ["RANK"] == "1":
        time.sleep(1)
    return honest(*arguments)
grpo.rewards_of = rewards_of
grpo.main()
""")
    arguments = [driver, *quick("grpo", tmp_path / "run", 2)[1:]]
    done = launch(arguments, ranks=2, GRPO_TEST_RUN=str(tmp_path / "run"))
    assert done.returncode != 0 and "Timed out waiting 6000ms" in done.stderr, done.stderr[-3000:]
    no_one_left(tmp_path / "run")


def test_killed_grader_worker(tmp_path):
    """A grader's worker that is killed from outside costs one answer, and another goes on: the run does, too."""
    run, workers = tmp_path / "run", set()
    (tmp_path / "fractions.jsonl").write_text('{"problem": "1+1+1+1?", "answer": "2\\\\sqrt{3}"}\n' * 4)  # not for free
    process = start(run, None, "--dataset", tmp_path / "fractions.jsonl")
    wait_for(lambda: workers.update(set(left_over(run)) - {process.pid}) or workers, process)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    step = newest(run / "checkpoints")
    wait_for(lambda: newest(run / "checkpoints") > step + 2, process)
    wait_for(lambda: set(left_over(run)) - {process.pid, *workers}, process)
    process.kill()
    process.communicate()
    no_one_left(run)


def test_ranks_draw_the_same(tmp_path):
    """1 and 2 ranks: the same completions and rewards in three steps, although each has other prompts and batches."""
    rows = {}
    for ranks in (None, 2):
        run = tmp_path / str(ranks)
        done = launch(["grpo.py", "--prompts_per_step", 12, "--steps", 3, "--eval_dataset", "", "--output_dir", run], ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        samples = [line for line in (run / "samples.jsonl").read_text().splitlines()]  # of rank 0: its first four
        rows[ranks] = samples, [(row["reward"], row["length"]) for row in metrics(run)]
    assert rows[None] == rows[2]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Folders of runs with 6 prompts on 2 ranks, and with 4 on 4, one node each: what other layouts must repeat."""
    folder = tmp_path_factory.mktemp("nodes")
    for ranks in (2, 4):
        done = launch([*quick("grpo", folder / str(ranks), 2), "--prompts_per_step", 12], ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_nodes(ranks, tmp_path, two_steps):
    """Two torchrun agents stand for two nodes: replicas across them, shards inside, and the same numbers as one node's."""
    def node(number):
        agent = ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={number}", f"--nproc_per_node={ranks}",
                 "--rdzv_id=test", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
        return launch([*agent, *quick("grpo", tmp_path / "run", 2), "--prompts_per_step", 12])

    port = 20_000 + os.getpid() % 10_000 + ranks
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(node, range(2)):
            assert done.returncode == 0, done.stderr[-3000:]
    one_node = metrics(two_steps / str(2 * ranks))
    for row, expected in zip(metrics(tmp_path / "run"), one_node, strict=True):
        assert row.pop("logp_diff") < 1e-5 > expected.pop("logp_diff")  # it is rounding itself
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-7)
    here, there = (safetensors.torch.load_file(run / "final" / "model.safetensors")
                   for run in (tmp_path / "run", two_steps / str(2 * ranks)))
    assert all(torch.allclose(here[name], there[name], rtol=1e-4, atol=1e-7) for name in there)


@pytest.mark.parametrize("ranks", [None, 3])
def test_checkpoint_at_another_number_of_ranks(ranks, tmp_path, two_steps):
    """Saved by two ranks, loaded by one and by three: with a learning rate of 0 the model stays what it was, bit for bit."""
    run = tmp_path / "run"
    shutil.copytree(two_steps / "2", run)
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**args, "lr": 0.0}))
    done = launch(["grpo.py", "--resume", run, "--steps", 3], ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["grad_norm"] > 0
    here, there = (safetensors.torch.load_file(folder / "final" / "model.safetensors") for folder in (run, two_steps / "2"))
    assert all(torch.equal(here[name], there[name]) for name in there)


def test_scripts_are_all_there():
    assert len(SCRIPTS) == 4  # they are copies outside their algorithm (test_drift.py), so grpo.py stands for all here


LOADING = """
import json, sys, threading
import torch, torch.distributed as dist
import grpo

def memory():  # of this process, in bytes; pages that processes share are divided among them
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/smaps_rollup") if line.startswith("Pss:"))

dist.init_process_group("gloo")
seen, done = [memory()], threading.Event()
watch = lambda: [seen.append(memory()) for _ in iter(lambda: done.wait(0.02), True)]
dist.barrier()
thread = threading.Thread(target=watch)
thread.start()
policy = grpo.load_policy(grpo.Args(model=sys.argv[1]), torch.device("cpu"))
dist.barrier()
done.set()
thread.join()
model = policy.model
tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
with open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w") as file:
    json.dump({"growth": max(seen) - seen[0], "tied": tied}, file)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of memory")
def test_memory_while_a_model_is_loaded(tmp_path):
    """In all, two ranks hold far less than two copies of the model in fp32; and tied weights stay tied."""
    config = transformers.Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=6, num_attention_heads=14,
                                      num_key_value_heads=2, vocab_size=60_000, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    (tmp_path / "load.py").write_text(LOADING)
    done = launch([tmp_path / "load.py", tmp_path], ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert all(report["tied"] for report in reports)
    assert size < sum(report["growth"] for report in reports) < 1.6 * size
