"""gpu.py runs on a CPU and says what it did not run; fits.py counts what torch's allocator hands out."""

import inspect
import json
import re

import fits
import gpu
import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import launch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.flop_counter import FlopCounterMode

import grpo

CASE = {"rows": 2, "prompt": 16, "completion": 800}  # more than a chunk of the head
WIDE = fits.config_of("tiny")  # so wide that the peak is in a layer's backward pass, and not in the head
WIDE.intermediate_size, WIDE.vocab_size = 1024, 512


@pytest.mark.long
def test_every_item_runs_on_a_cpu_as_far_as_it_can(tmp_path):
    done = launch(["tests/gpu.py", "--quick", "--json", tmp_path / "gpu.json"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    items = json.loads((tmp_path / "gpu.json").read_text())["items"]
    assert list(items) == [item.__name__ for item in gpu.ITEMS]
    for name, row in items.items():
        assert re.search(rf"^{row['verdict']} +{name} ", done.stdout, re.M)
        assert "--quick" in row["text"] if name in ("vllm", "compiled", "toy", "resume") else row["numbers"]
        if not torch.cuda.is_available():
            assert row["verdict"] == "not run" and ("no GPU" in row["text"] or "--quick" in row["text"])


def test_an_item_that_fails_is_a_row_and_the_next_one_runs(monkeypatch, capsys, tmp_path):
    ran = []

    def broken(here):
        raise RuntimeError("the card\nis on fire")

    def fails(here):
        grpo.fail("stopped")

    def fine(here):
        ran.append(here)
        return True, {"nan": float("nan")}, "as it should"

    monkeypatch.setattr(gpu, "ITEMS", {broken: "one", fails: "two", fine: "three"})
    monkeypatch.setattr("sys.argv", ["gpu.py", "--json", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 1 and ran
    items = json.loads((tmp_path / "gpu.json").read_text())["items"]
    assert [row["verdict"] for row in items.values()][:2] == ["does not hold", "does not hold"]
    assert items["broken"]["text"] == "RuntimeError: the card is on fire"
    assert items["fine"]["numbers"] == {"nan": None} and "2 does not hold" in capsys.readouterr().out


def test_time_that_kernels_cover():
    assert gpu.union([(0, 4, "a"), (1, 2, "b"), (3, 6, "c"), (8, 9, "d")]) == (7, 9)


def test_operations_are_those_of_the_matrix_products():
    """Against torch's count of a forward and backward pass, whose attention knows no causal half."""
    config, rows, length = fits.config_of("tiny"), 1, 512
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(rows, length, dtype=torch.long)).logits.sum().backward()
    masked = 6 * config.num_hidden_layers * config.hidden_size * length**2 * rows
    assert gpu.operations(config, [length] * rows) == pytest.approx(counter.get_total_flops() - masked, rel=0.02)
    assert masked > 0.1 * counter.get_total_flops()


@pytest.mark.parametrize("size", fits.SHAPES)
def test_parameters_are_counted(size):
    config = fits.config_of(size)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    total, root = fits.parameters_of(config)
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert total == sum(parameter.numel() for parameter in model.parameters()) == root + layers


def test_wrapped_as_load_policy_does_it():
    """Line by line, outside what fits.py's docstring says is done by hand."""
    def lines(function, first):
        body = [line.split("  #")[0].strip() for line in inspect.getsource(function).splitlines()]
        return body[next(n for n, line in enumerate(body) if line.startswith(first)) :]

    theirs, ours = lines(grpo.load_policy, "layers ="), lines(fits.wrap, "layers =")
    assert "fully_shard(module, mesh=mesh" in " ".join(ours)
    left = [line for line in theirs if line not in ours]
    assert [re.match(r"\w+", line)[0] for line in left] == ["if", "local", "mesh", "mesh", "precision"], left
    assert set(ours) - set(theirs) == {"if checkpointing:"}
    assert "MixedPrecisionPolicy(torch.bfloat16, torch.float32) if" in left[-1]


@pytest.fixture(scope="module")
def alone():
    """The simulation of one rank."""
    return fits.simulate(WIDE, 1, **CASE)


def test_simulated_peak_is_what_the_allocator_hands_out(alone):
    """The same two micro-batches on real tensors, every allocation counted by the profiler."""
    simulated, largest = alone
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = transformers.AutoModelForCausalLM.from_config(WIDE, dtype=torch.bfloat16)
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        policy = fits.wrap(model, fits.mesh_of("cpu", 1), precision)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            for _ in range(2):
                fits.micro_batch(policy, **CASE)
    finally:
        dist.destroy_process_group()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    states = sum(simulated[row] for row in ("parameters", "AdamW"))
    assert sum(simulated.values()) - states == pytest.approx(peak, rel=0.02)
    assert largest["bytes"] == 2 * 815 * 1024 * 2 and "bfloat16" in largest["what"]  # inside the MLP


@pytest.mark.parametrize("ranks", [8, pytest.param(16, marks=pytest.mark.long)])  # one node, two nodes
def test_each_rank_has_its_share(ranks, alone):
    parts, _ = fits.simulate(WIDE, ranks, **CASE)
    for row, size in (("parameters", 4), ("gradients", 4), ("AdamW", 8)):
        assert parts[row] == pytest.approx(size * fits.parameters_of(WIDE)[0] / 8, rel=0.01), row
        assert alone[0][row] == pytest.approx(8 * parts[row], rel=0.01)
    assert parts["activations and temporaries"] > 0 and parts["gathered layers"] > 0


def test_what_does_not_fit_is_named():
    config = fits.config_of("1.5B")
    parts = fits.arithmetic(config, 1, 15360)  # 6 + 6 + 12 GB of states, some 30 in all
    assert fits.fits(config, parts, 24, 0.5, 3072) == "no: states"
    assert fits.fits(config, parts, 30, 0.5, 3072) == "no: training"
    assert fits.fits(config, parts, 48, 0.9, 3072) == "no: sampling"
    assert fits.fits(config, parts, 48, 0.5, 3072) == "yes"
