"""What every benchmark prints and writes. Importing it does not import torch: a load generator has no use for it."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import stepgraph
from stepgraph.config import EngineConfig
from stepgraph.errors import ConfigError

_SECRET_FLAGS = ("--api-key", "--header")


class Named(Protocol):
    """A case of a benchmark."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


def choose(cases: Sequence[C], part: str | None) -> list[C]:
    """The cases whose name contains `part`; all if it is None.

    Raises:
        ConfigError: there is none.
    """
    chosen = [case for case in cases if part is None or part in case.name]
    if not chosen:
        raise ConfigError(f"cases={part!r} is in no case's name; there are {', '.join(case.name for case in cases)}")
    return chosen


def check_one_device(config: EngineConfig) -> None:
    """For benchmarks that run steps beside the engine, of which other ranks would know nothing.

    Raises:
        ConfigError: several devices are to share the model.
    """
    if config.parallel.num_ranks > 1:
        raise ConfigError(
            f"{config.parallel.size_setting}: this benchmark takes the steps of one device apart; leave it at 1, or run bench "
            "latency, throughput or start, which measure several"
        )


def machine(device: str) -> dict[str, Any]:
    """Where and with what a result was measured, on a device as torch names it."""
    import torch
    import transformers

    versions = {
        "stepgraph": stepgraph.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.device(device).type == "cuda":
        import triton

        versions |= {"triton": triton.__version__, "cuda": torch.version.cuda}
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, with the command that made it. Values of flags that may hold secrets are left out."""
    command = " ".join(["python", *_without_secrets(sys.orig_argv[1:])])
    path.write_text(json.dumps({"command": command, **result}, indent=2) + "\n")
    print(f"wrote {path}")


def check_outputs(arguments: argparse.Namespace) -> None:
    """Find out, before hours of measuring, whether the files of results can be written. Makes their folders.

    Raises:
        ConfigError: one cannot, or there is nothing to draw a picture with.
    """
    flags = vars(arguments)
    for flag in ("json", "plot"):
        if (path := flags.get(flag)) is not None:
            _require_writable(f"--{flag}", path)
    if flags.get("save_result"):
        folder = flags["result_dir"] or Path()
        _require_writable("--save-result", folder / (flags["result_filename"] or ".stepgraph-result"))
    if flags.get("plot") is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed; pip install 'stepgraph[plot]'")


def _require_writable(flag: str, path: Path) -> None:
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
            path.unlink()
        elif path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{flag}: {path} cannot be written: {error.strerror}; choose another file") from error


def pyplot() -> Any:
    """matplotlib's pyplot, for a picture in a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path, *, dpi: int = 110) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=dpi)
    print(f"wrote {path}")


def cpu_name() -> str:
    """The processor as its maker calls it, or at least its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for text in cpuinfo.read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _without_secrets(words: Sequence[str]) -> list[str]:
    shown, secret = [], False
    for word in words:
        flag, given, _ = word.partition("=")
        if word.startswith("--"):
            secret = flag in _SECRET_FLAGS
            shown.append(f"{flag}=***" if secret and given else word)
        else:
            shown.append("***" if secret else word)
    return shown
