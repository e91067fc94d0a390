"""Is every answer right, and nothing left over, if one of two engines is killed while keys and values go from one to the other?

Each trial starts an engine in a process of its own, gives requests to it and to one that lives, and kills it (`kill -9`) at a
random moment: in turn the one that computes prompts, and the one that takes them over. `tests/transfer/kills.py` is what a trial
is.

    python scripts/kill_transfers.py --trials 300 --json benchmarks/results/cpu-kill-transfers.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "transfer")]

from engine_processes import EngineProcesses  # noqa: E402
from kills import Killing, Trial  # noqa: E402
from tiny import save_tiny_model  # noqa: E402
from transformers.utils import logging  # noqa: E402

from stepgraph.bench.report import check_outputs, machine, write_json  # noqa: E402


def summary(trials: list[Trial]) -> dict[str, Any]:
    """Sums, by who was killed, and every trial."""
    sums = {}
    for killed in ("source", "sink"):
        of_kind = [trial for trial in trials if trial.killed == killed]
        reasons: Counter[str] = Counter()
        for trial in of_kind:
            reasons.update(trial.failures)
        sums[killed] = {
            "trials": len(of_kind),
            "requests": sum(trial.requests for trial in of_kind),
            "answered_before": sum(trial.ended_before for trial in of_kind),
            "wrong": sum(trial.wrong for trial in of_kind),
            "leaks": sum(bool(trial.leaked) for trial in of_kind),
            "longest_s": max((trial.seconds for trial in of_kind), default=0.0),
            "reasons": dict(sorted(reasons.items())),
        }
    return {"killed": sums, "trials": [asdict(trial) for trial in trials]}


def write(options: argparse.Namespace, trials: list[Trial]) -> None:
    """What came of these."""
    if options.json:
        with contextlib.redirect_stdout(io.StringIO()):
            found = {"check": "killed engines", "machine": machine("cpu"), "seed": options.seed} | summary(trials)
            write_json(options.json, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="which (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of it")
    options = parser.parse_args()
    check_outputs(options)
    logging.disable_progress_bar()
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder))
        processes = EngineProcesses()
        killings = [Killing(processes, model, killed) for killed in ("source", "sink")]
        for index in range(options.trials):
            trials.append(killings[index % 2](options.seed * 1_000_000 + index))
            if trials[-1].wrong or trials[-1].leaked:
                print(f"FAILED {trials[-1]}", flush=True)
            if (index + 1) % 10 == 0:
                print(f"{index + 1} trials", flush=True)
                write(options, trials)  # it may take long
        for killing in killings:
            killing.close()
        processes.close()
    print(summary(trials)["killed"])
    write(options, trials)
    return 1 if any(trial.wrong or trial.leaked for trial in trials) else 0


if __name__ == "__main__":
    raise SystemExit(main())
