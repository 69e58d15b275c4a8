"""The related papers as scripts: tests/papers/NAME.diff is a patch of grpo.py, and this writes what it makes of it.

    python tests/papers/make.py              all of them into this folder: gmpo.py, gspo.py, .. run where grpo.py does
    python tests/papers/make.py --remake     grpo.py has changed: apply each patch as far as it fits, and write it anew

After --remake look at `git diff tests/papers`: only line numbers may have moved. A patch that no longer fits is named;
write its script by hand, then: diff -U1 --label grpo.py --label NAME.py grpo.py NAME.py > tests/papers/NAME.diff
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BASE = HERE.parents[1] / "grpo.py"
PAPERS = sorted(path.stem for path in HERE.glob("*.diff"))


def patched(name, folder, exact=True):
    """Write NAME.py, which is grpo.py with tests/papers/NAME.diff applied, into the folder: its path.

    exact: every hunk at its own line, with all of its context. A patch that does not fit ends the program with a line.
    """
    if not shutil.which("patch"):
        sys.exit("error: the papers are patches of grpo.py: this needs the program patch (apt install patch)")
    path, diff = Path(folder, f"{name}.py"), HERE / f"{name}.diff"
    command = ["patch", str(BASE), str(diff), "-o", str(path), "-r", "-", *["--fuzz=0"] * exact]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if done.returncode or exact and "offset" in done.stdout:
        path.unlink(missing_ok=True)  # it may be half of it
        sys.exit(f"error: {diff.name} does not fit grpo.py any more (python tests/papers/make.py --remake, and look at the "
                 f"diff): {' '.join(done.stdout.split())}")
    return path


def remake(name):
    """Write tests/papers/NAME.diff anew, for grpo.py as it is now."""
    with tempfile.TemporaryDirectory() as folder:
        path = patched(name, folder, exact=False)
        labels = ["--label", "grpo.py", "--label", f"{name}.py"]
        done = subprocess.run(["diff", "-U1", *labels, str(BASE), str(path)], capture_output=True, text=True)
    (HERE / f"{name}.diff").write_text(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--remake", action="store_true", help="write the patches anew, after a change of grpo.py")
    args = parser.parse_args()
    for name in PAPERS:
        if args.remake:
            remake(name)
        else:
            print(patched(name, Path()))


if __name__ == "__main__":
    main()
