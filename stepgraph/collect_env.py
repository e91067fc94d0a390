"""What a report of a problem should say about the machine: ``stepgraph env``, or ``python -m stepgraph.collect_env``.

Imports nothing but the standard library before it runs, so that it works where an installation is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stepgraph import __version__
from stepgraph.devices import package_of, plugins
from stepgraph.version import commit

Report = dict[str, dict[str, str]]
"""Facts by section and name."""

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "gguf",
    "xgrammar",
    "cuda-bindings",
    "fastapi",
    "uvicorn",
)
_CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),  # x86
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),  # Arm
)
"""Those that decide which matrix products the CPU has."""
_VARIABLES = (
    *("ATEN_", "CUDA_", "GOMP_", "KMP_", "LD_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "PYTORCH_"),
    *("STEPGRAPH_NATIVE", "TORCH", "TRITON_"),
)
"""Beginnings of names; with those below, none holds a secret."""
_MORE_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE",
    "VIRTUAL_ENV",
)


def collect() -> Report:
    """Look at this process's installation and machine. Sections that do not apply are empty."""
    return {
        "stepgraph": _stepgraph(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": _system(),
        "platforms": {name: ", ".join(map(package_of, entries)) for name, entries in sorted(plugins().items())},
        **_torch(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) or name in _MORE_VARIABLES
        },
    }


def render(report: Report) -> str:
    """The report as text to paste into an issue."""
    width = max(len(name) for facts in report.values() for name in facts)
    sections = (
        "\n".join([section, *(f"  {name:<{width}}  {value}".rstrip() for name, value in facts.items())])
        for section, facts in report.items()
        if facts
    )
    return "\n\n".join(sections)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m stepgraph.collect_env", description="Print what a report of a problem should say."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    print_report(as_json=parser.parse_args(argv).json)
    return 0


def print_report(*, as_json: bool) -> None:
    """Print `collect`'s report to stdout."""
    report = collect()
    print(json.dumps(report, indent=2) if as_json else render(report))


def _stepgraph() -> dict[str, str]:
    facts = {"version": __version__, "python": sys.version.replace("\n", " "), "executable": sys.executable}
    return facts | {"commit": commit() or "unknown"}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _system() -> dict[str, str]:
    model, flags = _cpu()
    facts = {
        "platform": platform.platform(),
        "cpu": model,
        "cores": f"{os.cpu_count()}, {num_cores()} usable",
        "cpu flags": " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "unknown",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = _gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return facts


def _cpu() -> tuple[str, set[str]]:
    """Model and flags of the first core."""
    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags", facts.get("Features", ""))
    return facts.get("model name") or platform.processor() or platform.machine(), set(flags.split())


def _torch() -> Report:
    """What torch says of itself and of the GPUs."""
    try:
        import torch
    except Exception as error:  # a broken installation raises many types, and is what the report is for
        return {"torch": {"error": f"cannot be imported: {error!r}"}, "gpus": {}, "ranks": {}}
    facts = {
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "cpu kernels": _cpu_kernels(),
        "cuda build": torch.version.cuda or "none",
        "cuda available": str(torch.cuda.is_available()),
    }
    if driver := _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        facts["nvidia driver"] = driver.splitlines()[0]
    gpus, count = {}, torch.cuda.device_count()
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        gpus[str(index)] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"{_gib(gpu.total_memory)}"
        )
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = {(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)}
    return {"torch": facts, "gpus": gpus, "ranks": _ranks(count, apart)}


def _ranks(num_gpus: int, apart: Collection[tuple[int, int]]) -> dict[str, str]:
    """How many processes with a device each could run, and what is between their devices.

    Args:
        num_gpus: those that torch sees.
        apart: pairs of which the first cannot reach the second's memory.
    """
    if not num_gpus:
        cores = num_cores()
        return {
            "most": f"tensor_parallel_size x data_parallel_size = {cores}, one for each usable core; on CPU to try it out"
        }
    facts = {"most": f"tensor_parallel_size x data_parallel_size = {num_gpus}, one for each GPU"}
    if num_gpus > 1:
        facts["peer access"] = (
            "between all" if not apart else "not " + ", ".join(f"{a} to {b}" for a, b in sorted(apart))
        )
        facts["collectives"] = "nccl" if apart else "push"
        topology = re.sub(r"\x1b\[\d*m", "", _output("nvidia-smi", "topo", "-m") or "")
        rows = re.findall(r"^(GPU\d+)\s+(.*)", topology, re.MULTILINE)
        facts |= {f"{name} by nvidia-smi": " ".join(cells.split()[: len(rows)]) for name, cells in rows}
    return facts


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_kernels() -> str:
    """Which kernels steps on the CPU run."""
    try:
        from stepgraph.native import describe
    except Exception as error:  # as above
        return f"unknown: {error!r}"
    return describe()


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
