"""How long torch's threads wait awake, which GNU OpenMP reads from the environment when torch loads it, and never again.

A step is some hundred products, each shared among threads that meet at its end. Left to itself, GNU OpenMP has a thread that
waits spin for some 3 ms. Where another program wants the core, that keeps the very thread that is waited for from it: answers
take several times as long. Threads that sleep at once (`OMP_WAIT_POLICY=passive`) have to be woken for each product, which
costs an idle machine a third of its speed. A short spin covers the gaps between products and little more; docs/cpu.md has
figures.
"""

from __future__ import annotations

import os
import sys

SPINS = 1000
"""Rounds of some 20 to 50 ns."""
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_briefly() -> None:
    """Have the OpenMP that torch will load spin for `SPINS` rounds, unless the user has said how it shall wait.

    Torch's packages for Linux bring GNU OpenMP. Those for macOS and Windows bring LLVM's or Intel's, which know no spins.
    """
    if "torch" not in sys.modules and not is_settled():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def is_settled() -> bool:
    """Whether the environment says how threads wait: by the user's will or by `wait_briefly`, unless torch was there before."""
    return any(name in os.environ for name in _SETTINGS)
