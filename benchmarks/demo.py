"""`make demo`: the Vision Transformer of ``time_to_target.py`` on real handwriting, NAdamW beside
K-FAC-reduce on top of it.

    python benchmarks/demo.py            # under four minutes on two free cores
    python benchmarks/demo.py --quick    # a few steps of a small model

Both train for the same steps with the same settings of NAdamW, in alternating slices. The target is
what this very NAdamW has reached after 75 % of its steps. The table has steps and seconds to it,
and the figure the validation accuracy over both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from _contenders import BASELINE, CONTENDERS
from _race import Record, Store, race
from _workloads import Handwriting
from time_to_target import experiment_of, machine, show, target_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import _report

SEED = 1
LEARNING_RATES = {BASELINE: 4e-3, "K-FAC-reduce 5/20": 4e-3}


def main(arguments: list[str] | None = None) -> list[Record]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of a small model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    size = "tiny" if options.quick else "demo"
    workload, console = Handwriting(size), _report.console()
    console.print(machine(size, options.threads))
    path = options.out / "demo.jsonl"
    path.unlink(missing_ok=True)
    store = Store(path, experiment_of(workload))
    runs = [
        Record(name, {**CONTENDERS[name].defaults, "lr": lr}, SEED, "final")
        for name, lr in LEARNING_RATES.items()
    ]
    with _report.progress_bars(console, workload.metric, workload.form) as progress:
        race(workload, runs, store, progress)
    final = store.records("final")
    show(final, [], target_of(final, workload), workload, store, console)
    return final


if __name__ == "__main__":
    main()
