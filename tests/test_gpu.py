"""gpu.py runs on a CPU and names the items that it did not run; --fits counts what torch's allocator hands out.

And the scripts take their ways for CUDA on a CPU: a policy and a sampler in bf16, and layers that are checkpointed.
"""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import gpu
import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import launch, metrics
from torch.utils.flop_counter import FlopCounterMode

import grpo

CASE = 2, 16, 800  # rows, prompt, completion: more than a chunk of the head
WIDE = gpu.config_of("tiny")  # so wide that the peak is in a layer's backward pass, and not in the head
WIDE.intermediate_size, WIDE.vocab_size = 1024, 512


def peak_memory(function):
    """The bytes of tensors that a call holds at most above those before it, counted by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.long
def test_items_run_on_a_cpu_as_far_as_they_can(tmp_path):
    """Four of them; all with GRPO_ITEMS=1, which takes minutes."""
    every = [item.__name__ for item in gpu.ITEMS]
    names = every if os.environ.get("GRPO_ITEMS") else ["toy", "numerics", "sampler", "equal"]
    done = launch(["tests/measure/gpu.py", "--only", *names, "--json", tmp_path / "gpu.json"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert [key.split()[0] for key in rows] == names
    for name, row in zip(names, rows.values()):
        assert re.search(rf"^{row['verdict']} +{name} ", done.stdout, re.M) and row["numbers"]
        if not torch.cuda.is_available():
            assert row["verdict"] == "not run" and row["text"].startswith("no GPU; on this CPU it holds")


def test_an_item_that_fails_is_a_row(alone_here):
    """Whatever it raises; and one that is out of its bounds."""
    def broken(here):
        raise RuntimeError("the card\nis on fire")

    def fails(here):
        grpo.fail("stopped")

    def outside(here):
        return {"a": 1.0, "b": 3.0}, {"b": (0, 2)}

    def fine(here):
        return {"not_measured": float("nan")}, {"not_measured": (0, 1)}

    rows = [gpu.outcome(alone_here, item) for item in (broken, fails, outside, fine)]
    assert [row["verdict"] for row in rows][:3] == ["does not hold"] * 3 and rows[3]["verdict"] != "does not hold"
    assert rows[0]["text"] == "RuntimeError: the card is on fire" and rows[2]["text"] == "a 1, b 3 (0 to 2)"
    assert rows[3]["numbers"] == {"not_measured": None}


@pytest.fixture
def alone_here():
    """This machine, in a process group of its own."""
    yield gpu.Here("tiny")
    dist.destroy_process_group()


def test_an_item_that_kills_its_process_is_a_row_and_the_next_one_runs(monkeypatch, capsys, tmp_path):
    """The numbers are in the file after each item, beside those of an earlier command."""
    file, asked = tmp_path / "new" / "gpu.json", []
    file.parent.mkdir()
    file.write_text('{"toy 0.5B": {}}')

    def run(command, env):
        asked.append(command[command.index("--item") + 1])
        assert len(json.loads(file.read_text())) == len(asked)
        if asked[-1] == "head":
            row = {"verdict": "holds", "text": "", "numbers": {}, "seconds": 1, "size": "7B/4"}
            Path(command[-1]).write_text(json.dumps(row))
        return SimpleNamespace(returncode=-9)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--only", "where", "head", "--size", "7B/4", "--json", str(file)])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 1 and "its process ended with code -9" in capsys.readouterr().out
    assert list(json.loads(file.read_text())) == ["toy 0.5B", "where 7B/4", "head 7B/4"]


def test_the_three_commands_are_all_items():
    named = re.findall(r"--only ([a-z0-9 ]+)$", gpu.__doc__, re.M)
    assert {name for names in named for name in names.split()} == {item.__name__ for item in gpu.ITEMS} and len(named) == 3


def test_operations_are_those_of_the_matrix_products():
    """Against torch's count of a forward and backward pass, whose attention knows no causal half."""
    config, rows, length = gpu.config_of("tiny"), 1, 512
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(rows, length, dtype=torch.long)).logits.sum().backward()
    masked = 6 * config.num_hidden_layers * config.hidden_size * length**2 * rows
    assert gpu.operations(config, [length] * rows) == pytest.approx(counter.get_total_flops() - masked, rel=0.02)
    assert masked > 0.1 * counter.get_total_flops()


@pytest.fixture(scope="module")
def alone():
    """The simulation of one rank."""
    return gpu.simulate(WIDE, 1, *CASE)


def test_simulated_peak_is_what_the_allocator_hands_out(alone):
    """The same two micro-batches on real tensors, every allocation counted by the profiler."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = gpu.load_policy(gpu.random_model(WIDE), gpu.mesh_of("cpu", 1))
        peak = peak_memory(lambda: [gpu.micro_batch(policy, *gpu.full_rows(*CASE)) for _ in range(2)])
    finally:
        dist.destroy_process_group()
    states = sum(alone[row] for row in ("parameters", "AdamW"))
    assert sum(alone.values()) - states == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("ranks", [8, pytest.param(16, marks=pytest.mark.long)])  # one node, two nodes
def test_each_rank_has_its_share(ranks, alone):
    parts = gpu.simulate(WIDE, ranks, *CASE)
    for row, size in (("parameters", 4), ("gradients", 4), ("AdamW", 8)):
        assert parts[row] == pytest.approx(size * gpu.parameters_of(WIDE) / 8, rel=0.01), row
        assert alone[row] == pytest.approx(8 * parts[row], rel=0.01)
    assert parts["activations and temporaries"] > 0 and parts["gathered layers"] > 0


def test_the_simulated_table(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "simulate", lambda config, ranks, *shape: {"parameters": 4e9 / ranks, "AdamW": 8e9 / ranks})
    monkeypatch.setattr("sys.argv", ["gpu.py", "--size", "7B", "--fits", "8"])
    gpu.main()
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == ["0.5", "1.0", "1.5"]
    monkeypatch.setattr("sys.argv", ["gpu.py", "--fits", "12"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: --fits 12")


CARD = """import sys
import torch
import {script} as script
sys.argv[0] = "{script}.py"
class Card(str):  # to torch it is the CPU, to the script a GPU
    type = "cuda"
join, mesh = script.join_ranks, script.dist.init_device_mesh
script.join_ranks = lambda: Card(join())
script.dist.init_device_mesh = lambda kind, *shape, **names: mesh("cpu", *shape, **names)
if {stale}:
    load, done = script.HFSampler.load, []
    script.HFSampler.load = lambda self, tensors: [*tensors] if done else done.append(load(self, tensors))
script.main()
"""


@pytest.mark.long
@pytest.mark.parametrize("script, ranks, steps, stale", [
    ("grpo", None, 10, False), ("grpo", None, 4, True), ("grpo_lambda_traces", 2, 2, False),
])
def test_a_run_as_on_a_gpu(script, ranks, steps, stale, tmp_path):
    """The toy learns, and sampler and trainer agree as bf16 does; a sampler with stale weights is seen."""
    driver = tmp_path / "driver.py"
    driver.write_text(CARD.format(script=script, stale=stale))
    done = launch([driver, "--steps", steps, "--eval_dataset", "", "--output_dir", tmp_path / "run"], ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics(tmp_path / "run")
    assert "x cuda, HFSampler" in done.stdout
    assert 1e-5 < rows[0]["logp_diff"] < 0.005  # bf16 against bf16, in other orders
    assert (max(row["logp_diff"] for row in rows) < 0.005) != stale
    assert steps == 2 or stale or rows[-1]["reward"] > rows[0]["reward"] + 0.3
    import safetensors.torch
    weights = safetensors.torch.load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
