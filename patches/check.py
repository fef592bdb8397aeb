"""What ``make upstream`` runs: the series applied to the stock wheel, and all that has to hold
then.

1. The modules that the series adds are the plugin's, byte for byte.
2. Patch by patch, in a scratch tree: it applies without fuzz, the package imports without a
   warning, and the tests that the series has added so far pass.
3. Stock and patched ASDL agree to the last bit in everything that :mod:`dump` computes.
4. The plugin's own test suite passes against the patched ASDL, where it patches nothing at run
   time. (``make test`` runs it against the stock wheel.)
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import series
import torch

ROOT = series.HERE.parent
# Training of several minutes each; nothing in them depends on where ASDL comes from that the other
# tests do not see.
SLOW = ["examples"]


def run(*command: str, cwd: Path, path: list[Path]) -> None:
    """Run Python with these folders in front of everything. Exits with what it printed if it
    fails.
    """
    options = {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment = {**os.environ, **options}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        sys.exit(
            f"{' '.join(command)} failed in {cwd}:\n{done.stdout[-20000:]}\n{done.stderr[-5000:]}"
        )
    if lines := done.stdout.strip().splitlines():
        print(f"    {lines[-1]}", flush=True)


def run_tests(*arguments: str, cwd: Path, path: list[Path]) -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", *arguments, cwd=cwd, path=path)


def apply(tree: Path, patch: Path) -> None:
    """Apply one patch. Exits with what git said if it fails."""
    try:
        series.apply(tree, patch)
    except RuntimeError as error:
        sys.exit(f"{patch.name} does not apply:\n{error}")


def check_up_to_date(tree: Path) -> None:
    """Exit if the modules that the series adds are not the plugin's own as they are now."""
    series.make_tree(tree)
    for patch in series.patches():
        apply(tree, patch)
    wanted = {name for which in series.ADDED for name in series.added_by(which)}
    found = {file.stem for file in (tree / series.NATIVE).glob("*.py")}
    stale = [
        name
        for name in sorted(wanted & found)
        if not filecmp.cmp(
            series.PLUGIN / f"{name}.py", tree / series.NATIVE / f"{name}.py", shallow=False
        )
    ]
    if stale or wanted != found:
        sys.exit(
            f"The series is not up to date ({stale or sorted(wanted ^ found)}): run python "
            "patches/refresh.py"
        )


def apply_all(tree: Path) -> None:
    series.make_tree(tree)
    for patch in series.patches():
        print(patch.name, flush=True)
        apply(tree, patch)
        run("-W", "error::FutureWarning", "-c", "import asdl", cwd=tree, path=[tree])
        # ASDL has no configuration.
        run_tests("-c", os.devnull, "--rootdir", ".", "test", cwd=tree, path=[tree])


def compare_dumps(tree: Path, scratch: Path) -> None:
    files = {"stock": scratch / "stock.pt", "patched": scratch / "patched.pt"}
    for name, file in files.items():
        front = [tree, ROOT] if name == "patched" else [ROOT]
        run(str(series.HERE / "dump.py"), str(file), cwd=ROOT, path=front)
    stock, patched = (torch.load(file) for file in files.values())
    different = sorted(stock.keys() ^ patched.keys())
    different += [
        name
        for name in stock.keys() & patched.keys()
        if not torch.equal(stock[name], patched[name])
    ]
    if different:
        sys.exit(
            f"{len(different)} of {len(stock)} tensors are not the same, bit for bit: "
            f"{different[:10]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--without-suite", action="store_true", help="leave out the plugin's own test suite"
    )
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ["TMPDIR"] = folder  # so that what the tests leave goes with it
        check_up_to_date(scratch / "first")
        tree = scratch / "asdl"
        apply_all(tree)
        print("stock and patched ASDL, bit for bit", flush=True)
        compare_dumps(tree, scratch)
        if not options.without_suite:
            print("the plugin's test suite against the patched ASDL", flush=True)
            run_tests(
                "tests", *(f"--ignore=tests/{name}" for name in SLOW), cwd=ROOT, path=[tree, ROOT]
            )
    print(f"All is well, after {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
