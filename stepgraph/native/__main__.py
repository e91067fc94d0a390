"""``python -m stepgraph.native``: compile the CPU kernels ahead, for each kind of CPU, where they need no compiler afterwards."""

from __future__ import annotations

import sys

from stepgraph.native.library import compile_ahead


def main() -> int:
    """Print the libraries, which may have been there; returns 0, or 1 if one cannot be made."""
    found = compile_ahead()
    if isinstance(found, str):
        print(f"error: no CPU kernels can be compiled ahead: {found}", file=sys.stderr)
        return 1
    print(*found, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
