"""Benchmarks: each is a command that prints a table, writes JSON with machine and versions, and never judges a time.

Runs with the core packages only: ``python -m stepgraph.bench graphs MODEL``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m stepgraph.bench`` and ``stepgraph bench``; returns the exit code."""
    from stepgraph.bench import graphs, sampling, scheduler, tokens

    parser = argparse.ArgumentParser(prog="stepgraph bench", description="Measure stepgraph on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    graphs.add_parser(commands)
    tokens.add_parser(commands)
    sampling.add_parser(commands)
    scheduler.add_parser(commands)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))
