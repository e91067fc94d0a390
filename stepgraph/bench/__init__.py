"""Benchmarks: each is a command that prints a table, writes JSON with machine and versions, and never judges a time.

Runs with the core packages only (`serve` needs aiohttp too): ``python -m stepgraph.bench graphs MODEL``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from stepgraph.bench.report import check_outputs
from stepgraph.command_parser import CommandParser

_BENCHMARKS = (
    *(
        "graphs",
        "latency",
        "throughput",
        "start",
        "tokens",
        "sampling",
        "scheduler",
        "sizes",
        "serve",
        "front",
        "spec",
        "busy",
        "collectives",
        "transfer",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m stepgraph.bench`` and ``stepgraph bench``; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = CommandParser(prog="stepgraph bench", description="Measure stepgraph on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = argv[:1] if argv and argv[0] in _BENCHMARKS else _BENCHMARKS
    for name in asked:  # only what is asked for: a load generator should not wait for torch, nor carry it
        importlib.import_module(f"stepgraph.bench.{name}").add_parser(commands)
    arguments = parser.parse_args(argv)
    check_outputs(arguments)
    return int(arguments.run(arguments))
