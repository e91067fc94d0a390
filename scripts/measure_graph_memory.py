"""What captured graphs hold of a GPU's memory, as they are counted and as the device sees it.

    python scripts/measure_graph_memory.py qwen3-0.6b [setting=value ...]

The device's figure counts everybody on it, so nothing else may use it meanwhile. What the driver holds for graphs is what the
device lost beside what torch's allocator took; divided by graphs and operators it is `graph_node_bytes` of
`stepgraph.platforms.cuda`.
"""

import argparse
import json
import time

import torch

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.step.shape import Variant


def used_bytes() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="of the engine; values are JSON")
    arguments = parser.parse_args()
    settings = {"max_model_len": 8192, "gpu_memory_utilization": 0.5}
    for pair in arguments.settings:
        name, _, value = pair.partition("=")
        settings[name] = json.loads(value)
    torch.zeros(1, device="cuda")
    engine = build_engine(
        EngineConfig.from_settings(model=arguments.model, load_format="dummy", capture="lazy", **settings),
        progress=True,
    )
    store, operators = engine.executor.runner.graphs.store, engine.executor.runner.graph_operators
    torch.cuda.empty_cache()
    print(f"{arguments.model} {settings}: {operators} operators a step")
    for variant in (Variant.PLAIN, Variant.EXTENDED):
        shapes = engine.executor.runner.policy.shapes(variant, engine.draft_levels[-1])
        used, reserved, counted, started = used_bytes(), torch.cuda.memory_reserved(), store.bytes, time.perf_counter()
        for shape in shapes:
            store.graph(shape)
        seconds = time.perf_counter() - started
        reserved = torch.cuda.memory_reserved() - reserved
        driver, counted = used_bytes() - used - reserved, store.bytes - counted
        print(
            f"{variant.name.lower()}: {len(shapes)} graphs in {seconds:.1f} s, {counted / 2**20:.0f} MiB as counted; the driver "
            f"took {driver / 2**20:.0f} MiB, {driver / len(shapes) / operators / 1024:.2f} KiB an operator, torch's allocator "
            f"{reserved / 2**20:.0f} MiB, warm-ups included"
        )


if __name__ == "__main__":
    main()
