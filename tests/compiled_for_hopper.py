"""What a script prints that compiles kernels for a Hopper GPU, on any machine."""

import os
import subprocess
import sys

_BEGINNING = """
import re
import stepgraph
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from stepgraph.platforms import kernels, tuning
from stepgraph.platforms.compile_ahead import COMPILING

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Hopper())
kernels.kernel_tuning = lambda: tuning.SM_90
COMPILING.set(True)
"""
"""Kernels that are called are compiled, and not launched."""


def lines_of(script: str) -> list[str]:
    """Of a script that begins with the names above, in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _BEGINNING + script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
