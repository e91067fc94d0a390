"""`stepgraph graphs warm`: leave in Triton's cache on disk whatever an engine of some settings would compile."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from tqdm import tqdm

from stepgraph.config import EngineConfig
from stepgraph.executor.local import runner_of
from stepgraph.executor.ranked import build_executor
from stepgraph.models.source import resolve_configured
from stepgraph.platforms import create_platform
from stepgraph.step.shape import Variant


def main_warm(config: EngineConfig, *, progress: bool) -> int:
    """Compile the kernels of every graph that an engine may capture, now or later, and print what that took. No weights are
    read: kernels depend on their sizes only.

    Returns:
        Exit code 0.
    """
    platform = create_platform(config.model.device)
    if platform.kernel_cache is None:
        print(f"nothing to compile: operators on {platform.name} come compiled")
        return 0
    started = time.perf_counter()
    source = resolve_configured(config.model)
    executor = build_executor(
        replace(
            config,
            model=replace(config.model, load_format="dummy"),
            graph=replace(config.graph, capture="lazy"),
        ),
        source,
        progress=progress,
    )
    runner = runner_of(executor)  # other ranks' kernels are of the same sizes
    shapes = [
        shape
        for num_drafts in sorted({0, *executor.specs.draft_levels})
        for variant in Variant
        for shape in runner.policy.shapes(variant, num_drafts)
    ]
    runner.compile_kernels(
        tqdm(shapes, desc="finding kernels", unit="graph", disable=not progress, leave=False, file=sys.stderr)
    )
    folder = platform.kernel_cache
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        f"{source.name}: {runner.kernels.compiled} kernels compiled, {runner.kernels.from_disk} were there, for "
        f"{len(shapes)} graphs, in {time.perf_counter() - started:.1f} s; {folder} holds {num_bytes / 2**20:.1f} MiB"
    )
    return 0
