"""Whole runs, as a user starts them: learning and logging, bad input, kills, interruptions."""

import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, launch, metrics, on_a_terminal

KEYS = """step reward zero_variance length truncated loss entropy kl clip_fraction grad_norm lr tis_mean tis_capped logp_diff
seconds_sampling seconds_grading seconds_training seconds_syncing""".split()
OWN_KEYS = {
    "grpo": [],
    "grpo_lambda_traces": ["trace_weight", "advantage_clamped"],
    "lambda_grpo_learnable": ["lam", "lam_grad", "f_min", "f_max"],
    "lambda_grpo_prm": ["nontrivial_trees", "path_depth", "intermediate_proportion", "process_set_size"],
}
QUICK = ["--prompts_per_step", 4, "--group_size", 4, "--eval_dataset", ""]


@pytest.mark.parametrize("name", SCRIPTS)
def test_toy_run(name, toys):
    """The embedded default, all of it: the reward climbs, and everything that was promised is there."""
    import transformers

    run, done = toys[name]
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics(run, timed=True)
    assert [row["step"] for row in rows] == list(range(1, 26))
    for row in rows:
        assert set(row) - {"eval_accuracy"} == set(KEYS + OWN_KEYS[name])
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["logp_diff"] < 1e-5 and row["tis_mean"] == pytest.approx(1, abs=1e-5) and row["tis_capped"] == 0
    assert rows[0]["reward"] <= 0.3 and rows[-1]["reward"] >= 0.85
    assert rows[-1]["length"] > 2 * rows[0]["length"]
    assert rows[-1]["eval_accuracy"] >= 0.85 and "eval_accuracy" not in rows[0]
    assert rows[-1].get("lam", 1) > 0.05  # long answers were the right ones
    assert rows[-1].get("process_set_size", 9) > 1.5 * rows[0].get("process_set_size", 1)  # the groups grow alike
    assert rows[0].get("advantage_clamped", 1) > 0.3 and rows[-1].get("trace_weight", 99) > rows[0].get("trace_weight", 0)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000020", "step_000025"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "final")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == list(range(1, 26))
    for row in samples:  # one whole group per step
        assert len(row["completions"]) == len(row["ids"]) == len(row["rewards"]) == len(row["advantages"]) == 8
        assert tokenizer.batch_decode(row["ids"], skip_special_tokens=True) == row["completions"]
        least = min(row["advantages"])
        assert all(value == least for value, reward in zip(row["advantages"], row["rewards"]) if reward == min(row["rewards"]))
        assert least >= (-0.1 - 1e-6 if name == "grpo_lambda_traces" else -3)
    assert done.stdout.count("accuracy on arithmetic: 0.") == 2
    assert done.stderr == ""  # no progress bar where it would fill a log file
    lines = done.stdout.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:1] == ["step"])
    assert len(lines) < 35 and all(len(line) <= 80 for line in lines[head : head + 26])

    model = transformers.AutoModelForCausalLM.from_pretrained(run / "final")
    modes = {(run / name).stat().st_mode for name in ("args.json", "final/config.json", "final/model.safetensors")}
    assert len(modes) == 1, "others can read all of it, or nothing"
    inputs = tokenizer("37+5+81+26?", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
    assert "\\boxed{149}" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


# ------------------------------------------------------------------------------------------------- bad input


def bad_inputs(tmp_path, script):
    """{what is wrong: (arguments, what the message must name)}."""
    def data(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    good = '{"problem": "1+1?", "answer": "2"}\n'
    (tmp_path / "no_model").mkdir()
    for name, changes in (("other_script", {"script": "another"}), ("own", {}),
                          ("older", {"no_longer_a_flag": 1}), ("newer", {})):
        (tmp_path / name / "checkpoints" / "step_000025").mkdir(parents=True)
        own = {**vars(script.Args(**script.TOY)), "script": script.SCRIPT, "steps": 30, **changes}
        own.pop("seed" if name == "newer" else None, None)
        (tmp_path / name / "args.json").write_text(json.dumps(own))
    return {
        "unknown flag": (["--no_such_flag", "1"], "--no_such_flag"),
        "unknown data set": (["--dataset", "no_such_data"], "cannot load the data set no_such_data"),
        "unknown benchmark": (["--eval_dataset", "no_such_data"], "cannot load the data set no_such_data"),
        "missing model": (["--model", str(tmp_path / "nowhere")], "nowhere"),
        "folder without a model": (["--model", str(tmp_path / "no_model")], "no_model"),
        "a file for a model": (["--model", data("model.gguf", "GGUF")], "model.gguf"),
        "a context too short": (["--max_new_tokens", "250"], "0 of 4096 prompts have 1 to 6 tokens"),
        "prompts without a token": (["--dataset", data("foreign.jsonl", good.replace("1+1?", "one and one"))], "0 of 1 prompts have 1 to 208 tokens"),
        "a solution without a box": (["--dataset", data("solution.jsonl", '{"problem": "1+1?", "solution": "It is two."}\n')], "box"),
        "missing data": (["--dataset", str(tmp_path / "none.jsonl")], "none.jsonl"),
        "other columns": (["--dataset", data("columns.jsonl", '{"id": 1, "text": "x"}\n')], "['id', 'text']"),
        "broken line": (["--dataset", data("broken.jsonl", good + '{"problem": ')], "line 2"),
        "empty file": (["--dataset", data("empty.jsonl", "")], "it has []"),
        "long prompts": (["--dataset", data("long.jsonl", good.replace("1+1", "1+1" * 9)), "--max_prompt_tokens", "9"], "0 of 1 prompts have 1 to 9 tokens"),
        "negative seed": (["--seed", "-1"], "--seed"),
        "seed of nanoseconds": (["--seed", "1795730000000000000"], "--seed"),
        "no usable answer": (["--dataset", data("useless.jsonl", good.replace('"2"', '""'))], "answer"),
        "group of one": (["--group_size", "1"], "at least 2"),
        "prompts and ranks": (["--prompts_per_step", "7"], "multiple of the 2 ranks"),
        "temperature 0": (["--temperature", "0"], "--temperature"),
        "temperature nan": (["--temperature", "nan"], "--temperature"),
        "infinite temperature": (["--temperature", "inf"], "--temperature"),
        "negative steps": (["--steps", "-5"], "--steps"),
        "steps are no number": (["--steps", "many"], "--steps"),
        "unknown loss": (["--loss", "ppo"], "dr_grpo") if script.SCRIPT == "grpo" else (["--clip_high", "x"], "--clip_high"),
        "clip above 1": (["--clip_low", "1.5"], "--clip_low"),
        "negative learning rate": (["--lr", "-1e-6"], "--lr"),
        "sampler that is not there": (["--sampler", "vllm"], "vllm"),
        "folder of another run": (["--output_dir", str(tmp_path / "own")], "holds a run"),
        "resume without checkpoint": (["--resume", str(tmp_path / "no_model")], "checkpoint"),
        "resume another script": (["--resume", str(tmp_path / "other_script")], "another script or version"),
        "resume another model": (["--resume", str(tmp_path / "own"), "--model", "some/model"], "leave out --model"),
        "resume an older version": (["--resume", str(tmp_path / "older")], "another script or version"),
        "resume a version that lacks a flag": (["--resume", str(tmp_path / "newer")], "another script or version"),
        "resume with another seed": (["--resume", str(tmp_path / "own"), "--seed", "5"], "leave out --seed"),
        "resume with other data": (["--resume", str(tmp_path / "own"), "--dataset", "gsm8k"], "leave out --dataset"),
        "resume with another batch": (["--resume", str(tmp_path / "own"), "--group_size", "4"], "leave out --group_size"),
        "resume and output_dir": (["--resume", str(tmp_path / "own"), "--output_dir", "x"], "leave out --output_dir"),
    }


OWN_BAD_INPUTS = {
    "grpo": [],
    "grpo_lambda_traces": [["--lam", "1.5"], ["--lam", "-0.1"], ["--gamma", "2"], ["--min_advantage", "0.5"],
                           ["--min_advantage", "nan"], ["--style", "old"], ["--variant", "x"]],
    "lambda_grpo_learnable": [["--lam_init", "nan"], ["--lam_init", "11"], ["--lam_lr", "-1"], ["--length_scale", "nan"]],
    "lambda_grpo_prm": [["--loss", "grpo"]],
}


def test_bad_input(script, tmp_path, monkeypatch, capsys):
    """Every bad input ends with exit code 2 and one line that names it, before any model is loaded."""
    def forbidden(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(script.AutoModelForCausalLM, "from_pretrained", forbidden)
    monkeypatch.setattr(script.dist, "init_process_group", forbidden)
    monkeypatch.setattr(script, "WORLD", 2)
    monkeypatch.chdir(tmp_path)
    own = {" ".join(flags): (flags, flags[0]) for flags in OWN_BAD_INPUTS[script.SCRIPT]}
    for wrong, (arguments, names) in {**bad_inputs(tmp_path, script), **own}.items():
        monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            script.main()
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if not line.startswith(("encoding prompts", "\r"))]
        assert stop.value.code == 2, (wrong, stop.value.code, lines)
        assert len(lines) == 1 and names in lines[0], (wrong, lines)
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_bad_input_from_the_shell():
    done = launch(["grpo.py", "--group_size", 1])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_help_has_every_flag(script, monkeypatch, capsys):
    """Each flag, with its default and its meaning; and the toy's settings."""
    monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        script.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "arithmetic" in shown
    for field in script.Args.__dataclass_fields__.values():
        assert f"--{field.name} " in shown and f"{field.metadata['help']} (default: {field.default})" in shown


@pytest.mark.long
def test_importing_runs_nothing():
    done = launch(["-c", f"import {', '.join(SCRIPTS)}"])
    assert done.returncode == 0 and not done.stdout and not done.stderr


# ------------------------------------------------------------------------------------- runs that do not end well


def quick(name, run, steps, *more):
    return [f"{name}.py", *QUICK, "--steps", steps, "--save_every", 1, "--output_dir", run, *more]


def test_killed_and_resumed(first_script, tmp_path, monkeypatch, request):
    """SIGKILL while a checkpoint is written, then at random moments: the same metrics as never killed, bit for bit.

    grpo.py once, with --all three times and each variant once; GRPO_KILLS=10 makes it ten for each, the first three of
    them while a checkpoint is written.
    """
    script, name = first_script, first_script.SCRIPT
    kills = int(os.environ.get("GRPO_KILLS", 3 if name == "grpo" and request.config.option.all else 1))
    steps, in_the_act = 4 + 4 * kills, min(3, (kills + 1) // 2)
    run, generator = tmp_path / "killed", random.Random(name)
    checkpoints = run / "checkpoints"
    for kill in range(kills):
        process = launch([f"{name}.py", "--resume", run] if kill else quick(name, run, steps), wait=False)
        before = newest(checkpoints)
        wait_for(lambda: newest(checkpoints) > before, process)
        if kill < in_the_act:
            wait_for(lambda: any(checkpoints.glob("*.part")), process)
        else:
            time.sleep(generator.random() * 0.7)
        process.kill()
        process.communicate()
        if kill < in_the_act:
            assert any(checkpoints.glob("*.part"))  # it was caught in the act
    assert newest(checkpoints) < steps
    assert run_here(script, [f"{name}.py", "--resume", run], monkeypatch) == 0
    whole = tmp_path / "whole"
    assert run_here(script, quick(name, whole, steps), monkeypatch) == 0
    assert metrics(run) == metrics(whole)
    for file in ("samples.jsonl", "final/model.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted([f"step_{steps - 1:06}", f"step_{steps:06}"])


def newest(checkpoints):
    return max((int(path.name[5:]) for path in checkpoints.glob("step_*[0-9]")), default=0)


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def run_here(script, arguments, monkeypatch):
    """main() in this process, as far as it goes: its exit code."""
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    try:
        script.main()
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # main's handler would outlive it
        if script.dist.is_initialized():
            script.dist.destroy_process_group()


def test_nan_stops_before_the_update(first_script, tmp_path, monkeypatch, capsys):
    """A loss that turns NaN at step 3: a message, exit code 1, and the checkpoint of step 2 is good to go on from."""
    script = first_script
    honest, calls = script.policy_loss, []

    def broken(*arguments, **options):
        loss, stats = honest(*arguments, **options)
        calls.append(loss)
        return loss * (math.nan if len(calls) == 3 else 1), stats

    run, bar = tmp_path / "run", script.tqdm
    monkeypatch.setattr(script, "policy_loss", broken)
    monkeypatch.setattr(script, "tqdm", lambda *args, **how: bar(*args, **{**how, "disable": False}))  # as on a terminal
    assert run_here(script, quick(script.SCRIPT, run, 4), monkeypatch) == 1
    assert "\rerror: stopped before the update: loss nan" in capsys.readouterr().err  # below the bar, not behind it
    assert [row["step"] for row in metrics(run)] == [1, 2] and newest(run / "checkpoints") == 2
    monkeypatch.setattr(script, "policy_loss", honest)
    assert run_here(script, [f"{script.SCRIPT}.py", "--resume", run], monkeypatch) == 0
    assert run_here(script, quick(script.SCRIPT, tmp_path / "whole", 4), monkeypatch) == 0
    assert metrics(run) == metrics(tmp_path / "whole")


@pytest.mark.long
def test_sigterm_finishes_the_step_and_saves(tmp_path, monkeypatch, capsys):
    """A notice in the middle of step 2: that step is finished and saved, exit code 0; resumed it is a run never stopped."""
    grpo = importlib.import_module("grpo")
    honest, steps = grpo.rewards_of, []

    def noticed(*arguments):
        steps.append(True)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*arguments)

    monkeypatch.setattr(grpo, "rewards_of", noticed)
    arguments = [*quick("grpo", tmp_path / "run", 3), "--save_every", 0]
    assert run_here(grpo, arguments, monkeypatch) == 0
    assert "SIGTERM: saved after step 2" in capsys.readouterr().out and newest(tmp_path / "run" / "checkpoints") == 2
    assert not (tmp_path / "run" / "final").exists()
    assert run_here(grpo, ["grpo.py", "--resume", tmp_path / "run"], monkeypatch) == 0
    assert "steps 3 to 3" in capsys.readouterr().out
    assert run_here(grpo, ["grpo.py", "--resume", tmp_path / "run"], monkeypatch) == 0  # as if killed while writing final/
    assert run_here(grpo, quick("grpo", tmp_path / "whole", 3), monkeypatch) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.long
def test_evaluation_in_the_loop(tmp_path, monkeypatch, capsys):
    """Evaluate, log, save: a crash inside an evaluation costs the steps since the last checkpoint, and nothing else."""
    grpo = importlib.import_module("grpo")
    honest, calls = grpo.evaluate, []
    arguments = ["grpo.py", *QUICK[:4], "--dataset", "arithmetic", "--eval_dataset", short_problems(tmp_path), "--steps", 4,
                 "--eval_every", 2, "--save_every", 1]
    assert run_here(grpo, [*arguments, "--output_dir", tmp_path / "whole"], monkeypatch) == 0
    said = capsys.readouterr().out
    assert said.count("accuracy on") == 3  # before training, after steps 2 and 4

    def broken(*given, **how):
        calls.append(True)
        return sys.exit("broken") if len(calls) == 3 else honest(*given, **how)  # before training, step 2, step 4

    monkeypatch.setattr(grpo, "evaluate", broken)
    assert run_here(grpo, [*arguments, "--output_dir", tmp_path / "run"], monkeypatch) == "broken"
    assert newest(tmp_path / "run" / "checkpoints") == 3 == metrics(tmp_path / "run")[-1]["step"]
    assert run_here(grpo, ["grpo.py", "--resume", tmp_path / "run"], monkeypatch) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert ["eval_accuracy" in row for row in metrics(tmp_path / "run")] == [False, True, False, True]


def short_problems(tmp_path):
    """A file of two problems, one of which has no character that the tiny model knows: it is dropped, and evaluation goes on."""
    path = tmp_path / "short.jsonl"
    path.write_text('{"problem": "1+1+1+1?", "answer": "4"}\n{"problem": "one and one", "answer": "2"}\n')
    return path


def test_a_checkpoint_holds_tied_weights_once(first_script, tmp_path, monkeypatch):
    """The tiny model's head is its embedding: a checkpoint has as many weights as the final model, and two moments of each."""
    import safetensors.torch
    import torch.distributed.checkpoint as dcp

    assert run_here(first_script, quick(first_script.SCRIPT, tmp_path / "run", 1), monkeypatch) == 0
    numbers = sum(tensor.numel() for tensor in safetensors.torch.load_file(tmp_path / "run/final/model.safetensors").values())
    saved = dcp.FileSystemReader(tmp_path / "run" / "checkpoints" / "step_000001").read_metadata().state_dict_metadata
    sizes = {name: entry.size.numel() for name, entry in saved.items() if hasattr(entry, "size") and "inv_freq" not in name}
    for kind in ("model.model.", ".exp_avg", ".exp_avg_sq"):
        assert sum(size for name, size in sizes.items() if name.startswith(kind) or name.endswith(kind)) == numbers


@pytest.mark.long
def test_progress_bar_on_a_terminal(tmp_path):
    """Where stderr is a terminal there is a bar, with the phase that is on; elsewhere there is none (test_toy_run)."""
    code, shown = on_a_terminal(quick("grpo", tmp_path / "run", 2))
    assert code == 0 and b"2/2" in shown and b"sampling" in shown and b"training" in shown


@pytest.mark.long
def test_copied_elsewhere(first_script, tmp_path):
    """A script and eval.py are enough: in a folder of their own they train and evaluate, with --model given."""
    script = first_script
    for name in (f"{script.SCRIPT}.py", "eval.py"):
        shutil.copy(ROOT / name, tmp_path)
    arguments = quick(script.SCRIPT, "run", 1, "--model", TINY, "--dataset", "arithmetic", "--max_new_tokens", 20)
    done = launch(arguments, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr[-3000:]
    if script.SCRIPT == "lambda_grpo_prm":
        done = launch(["eval.py", "--model", "run/final", "--limit", 8], cwd=tmp_path, PYTHONPATH="")
        assert done.returncode == 0 and "arithmetic" in done.stdout, done.stderr[-3000:]


@pytest.mark.long
def test_flags_of_a_resumed_run(tmp_path, monkeypatch):
    """The number of steps may change, and holds for the next resume, too. The values in args.json count."""
    grpo, run = importlib.import_module("grpo"), tmp_path / "run"
    assert run_here(grpo, quick("grpo", run, 1), monkeypatch) == 0
    assert run_here(grpo, ["grpo.py", "--resume", run, "--steps", 2, "--seed", 0], monkeypatch) == 0
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**args, "lr": 0.001, "warmup_steps": 0, "steps": 3}))
    assert run_here(grpo, ["grpo.py", "--resume", run], monkeypatch) == 0
    assert [(row["step"], row["lr"] == 0.001) for row in metrics(run)] == [(1, False), (2, False), (3, True)]
    assert run_here(grpo, ["grpo.py", "--resume", run, "--steps", 4, "--lr", 0.1], monkeypatch) == 2


def test_folder_of_another_run(tmp_path, monkeypatch):
    """A second new run is refused, also if the first one has just begun."""
    grpo = importlib.import_module("grpo")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert run_here(grpo, quick("grpo", tmp_path / "run", 1), monkeypatch) == 2
    monkeypatch.setattr(grpo, "check", lambda *_: None)  # as if both had begun at the same time
    with pytest.raises(FileExistsError, match="checkpoints"):
        run_here(grpo, quick("grpo", tmp_path / "run", 1), monkeypatch)


@pytest.mark.parametrize("wrong, rewards", [
    ("None", lambda texts: [None] * len(texts)), ("NaN", lambda texts: [math.nan] * len(texts)),
    ("too few", lambda texts: [1.0]), ("infinite", lambda texts: [math.inf] * len(texts)),
    ("too many", lambda texts: [1.0, math.nan] * len(texts)),
])
def test_rewards_are_checked(tmp_path, monkeypatch, capsys, wrong, rewards):
    grpo = importlib.import_module("grpo")
    monkeypatch.setattr(grpo, "rewards_of", lambda texts, problems: rewards(texts))
    assert run_here(grpo, quick("grpo", tmp_path / "run", 2), monkeypatch) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: rewards_of must return one finite number")


def test_two_runs_in_one_new_folder(tmp_path, monkeypatch, alone):
    """Both have passed parse_args when the first makes the folder: the second ends, and the first one's files stay."""
    grpo = importlib.import_module("grpo")
    args = grpo.Args(**grpo.TOY, output_dir=str(tmp_path / "run"))
    run = grpo.open_run(args, 0)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(FileExistsError):
        grpo.open_run(args, 0)
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert grpo.open_run(grpo.Args(**grpo.TOY), 0) != run


@pytest.mark.parametrize("kind", ["mamba", "lfm2", "gguf", "fp8"])
def test_models_that_cannot_be_trained(tmp_path, monkeypatch, capsys, kind):
    """One line before the run's folder is made."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    small = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 0, "bos_token_id": 0}
    if kind == "mamba":
        config = transformers.MambaConfig(**small, state_size=4)
    elif kind == "lfm2":
        config = transformers.Lfm2Config(**small, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2,
                                         layer_types=["conv", "full_attention"])
    else:
        config = transformers.AutoConfig.from_pretrained(TINY)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder := tmp_path / "model")
    if kind in ("gguf", "fp8"):  # as from_config leaves it, of a checkpoint that was quantized
        text = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**text, "quantization_config": {"quant_method": kind}}))
    tokenizer.save_pretrained(folder)
    grpo = importlib.import_module("grpo")
    arguments = quick("grpo", tmp_path / "run", 1, "--model", folder, "--dataset", "arithmetic", "--max_new_tokens", 20)
    assert run_here(grpo, arguments, monkeypatch) == 2
    assert "cannot train a" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, left", [
    pytest.param(f"{name}.py", left, marks=pytest.mark.long)
    for name, left in zip(SCRIPTS, ({"WORLD_SIZE": "2"}, {"MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}))
])
def test_half_an_environment_of_torchrun(name, left, tmp_path):
    """It means nothing: torchrun sets them all."""
    done = launch([name, *quick("", tmp_path / "run", 1)[1:]], **left)
    assert done.returncode == 0 and "1 x cpu" in done.stdout, done.stderr[-2000:]


def test_no_group_tells_anything(tmp_path, monkeypatch):
    """All answers wrong in every group: no error, no gradient, parameters unchanged."""
    (tmp_path / "impossible.jsonl").write_text('{"problem": "1+1+1+1?", "answer": "5"}\n' * 4)
    arguments = quick("grpo", tmp_path / "run", 2, "--dataset", tmp_path / "impossible.jsonl")
    assert run_here(importlib.import_module("grpo"), arguments, monkeypatch) == 0
    for row in metrics(tmp_path / "run"):
        assert row["zero_variance"] == 1 and row["grad_norm"] == 0 and row["loss"] == 0
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    import safetensors.torch

    before = safetensors.torch.load_file(TINY / "model.safetensors")
    after = safetensors.torch.load(final)
    assert all((before[key] == after[key]).all() for key in before)


@pytest.mark.long
def test_two_ranks_from_the_shell(tmp_path):
    """torchrun, a whole short run, its checkpoint and its end; then on with one rank."""
    run = tmp_path / "run"
    done = launch(quick("grpo", run, 2, "--dataset", "arithmetic"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics(run)) == 2 and (run / "final" / "model.safetensors").exists()
    done = launch(["grpo.py", "--resume", run, "--steps", 3])
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    shutil.rmtree(run / "final")  # as if killed at the very end: resumed, the finished run writes it again
    done = launch(["grpo.py", "--resume", run, "--steps", 3])  # args.json keeps the run's first flags: 2 steps
    assert done.returncode == 0 and (run / "final" / "model.safetensors").exists()
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
