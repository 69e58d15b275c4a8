"""Host memory while the policy is loaded and sharded, on 1, 2 and 4 ranks: it must not grow as ranks × the fp32 model.

    python tests/memory_of_loading.py [--ranks 1 2 4] [--layers 24]

Writes a model with random weights in the shape of Qwen2.5-0.5B (494 M parameters, tied embeddings, bf16 on disk) into a
temporary folder, and runs load_policy of grpo.py under torchrun. Peaks are of the proportional set size (shared pages are
divided among those who share them), sampled every 50 ms. About three minutes on two cores, and 1 GB on the disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]


def memory():
    """This process's proportional set size in bytes."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))


def worker(folder):
    """One rank: load, and report {before, peak, after} in bytes to the file <folder>/<rank>.json."""
    sys.path.insert(0, str(ROOT))
    import torch
    import torch.distributed as dist
    import transformers

    import grpo

    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    seen, done = [memory()], threading.Event()

    def watch():
        while not done.wait(0.05):
            seen.append(memory())

    thread = threading.Thread(target=watch)
    dist.barrier()
    thread.start()
    policy = grpo.load_policy(grpo.Args(model=folder), torch.device("cpu"))
    dist.barrier()
    done.set()
    thread.join()
    tied = policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight
    report = {"before": seen[0], "peak": max(seen), "after": memory(), "tied": tied}
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=24, help="fewer make a smaller model (24)")
    args = parser.parse_args()
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = Qwen2ForCausalLM(Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=args.layers, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True, dtype=torch.bfloat16,
        ))
        size = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e9
        model.to(torch.bfloat16).save_pretrained(folder)
        del model
        print(f"the model: {size:.2f} GB in fp32; peaks above what each rank held before loading, GB")
        print(f"{'ranks':>5}{'rank 0':>9}{'others':>9}{'sum':>9}{'in models':>11}{'sum after':>11}{'tied':>6}")
        for ranks in args.ranks:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
                       "--rdzv_endpoint=localhost:0", __file__, "--worker", folder]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            reports = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
            peaks = [(report["peak"] - report["before"]) / 1e9 for report in reports]
            after = sum(report["after"] - report["before"] for report in reports) / 1e9
            others = sum(peaks[1:]) / (ranks - 1) if ranks > 1 else 0
            print(f"{ranks:>5}{peaks[0]:>9.2f}{others:>9.2f}{sum(peaks):>9.2f}{sum(peaks) / size:>11.2f}{after:>11.2f}"
                  f"{'yes' if all(report['tied'] for report in reports) else 'NO':>6}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        main()
