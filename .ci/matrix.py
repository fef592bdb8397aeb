"""The quick tests with the oldest and the newest PyTorch, each with both releases of ASDL.

``python .ci/matrix.py [--only TORCH,ASDL] [pytest arguments]``. Each pair gets an environment of
its own under ``build/matrix``, which later runs use again. Peers that need another PyTorch than the
pair's are left out, and with them the tests that import them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = ("2.5.1", "2.14.1")
ASDL = ("0.1a4", "0.1a5")
# What the quick tests import beside PyTorch, in the versions that go with the pair's: the pins of
# constraints.txt are for one PyTorch alone.
PEERS = (
    "pytest",
    "pytest-xdist",
    "numpy<2.3",
    "curvlinops-for-pytorch",
    "rich",
    "timm",
    "torch-geometric",
    "torchvision",
)
# Releases of transformers from 5 on find no PyTorch before 2.6.
TRANSFORMERS = {"2.5.1": "transformers<5"}
# These compare with peers that are not installed, or are about one release alone.
IGNORED = ("examples", "upstream/test_patches.py")


def environment(torch: str, asdl: str) -> Path:
    """The interpreter of an environment with these releases, made unless it is there."""
    folder = ROOT / "build" / "matrix" / f"torch-{torch}-asdl-{asdl}"
    python = folder / "bin" / "python"
    complete = folder / "complete"
    if complete.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    peers = [*PEERS, TRANSFORMERS.get(torch, "transformers")]
    subprocess.run([*pip, f"torch=={torch}", f"asdfghjkl=={asdl}", *peers], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
    complete.touch()
    return python


def main() -> int:
    """Run every pair; the exit status is the number of pairs that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="TORCH,ASDL", help="one pair, such as 2.5.1,0.1a4")
    options, arguments = parser.parse_known_args()
    pairs = [(torch, asdl) for torch in TORCH for asdl in ASDL]
    if options.only:
        pairs = [tuple(options.only.split(","))]
    failed = []
    for torch, asdl in pairs:
        print(f"torch {torch}, asdfghjkl {asdl}", flush=True)
        tests = [f"--ignore={ROOT / 'tests' / name}" for name in IGNORED]
        command = [str(environment(torch, asdl)), "-m", "pytest", "-q", "-m", "not slow", *tests]
        done = subprocess.run(
            [*command, *(arguments or ["-n", "2", "tests"])],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode:
            failed.append((torch, asdl))
    print("failed:", ", ".join(f"torch {t} with asdfghjkl {a}" for t, a in failed) or "none")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
