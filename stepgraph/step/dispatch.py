"""How the tokens of each step come to their experts: which of the operators' ways is faster, timed once on the device.

Shapes: T tokens, E hidden size, N experts, K of them for a token.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepgraph import ops
from stepgraph.config import EngineConfig
from stepgraph.graph import create_backend
from stepgraph.layers.experts import MixtureMLP
from stepgraph.layers.inputs import DispatchTable
from stepgraph.layers.norm import RMSNorm
from stepgraph.models.language_model import LanguageModel
from stepgraph.ops import ExpertDispatch
from stepgraph.parallel.exchange import Exchange
from stepgraph.platforms import Platform

logger = logging.getLogger(__name__)

ONE_WAY = DispatchTable()
"""All steps by `ExpertDispatch.TILES`, which reads an expert's weights about once however many tokens share it."""
_MOST_PAIRS_PER_EXPERT = 1
"""With more pairs than this for each expert, reading the weights once for each pair is no candidate: on an H200, tiles of 128
experts are faster from a quarter of it on."""
_MOST_LAYERS = 4
"""That are timed together, so that what one reads has left the caches when its turn comes again."""
_TURNS = 5
_REPLAYS = 8
"""That follow each other without a wait: one launch takes about as long as the kernels of a layer."""


def mixtures_of(model: LanguageModel) -> list[MixtureMLP]:
    """A model's layers with experts, in order."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [module for module in modules if isinstance(module, MixtureMLP)]


def choose_dispatch(
    model: LanguageModel,
    config: EngineConfig,
    platform: Platform,
    *,
    graph_backend: str,
    token_sizes: Sequence[int],
    is_leader: bool,
    exchange: Exchange,
) -> DispatchTable | None:
    """The table of an engine; None if its model has no experts. Called before any graph is captured, by all ranks.

    It is `ONE_WAY`, everywhere, with the settings `deterministic` (the ways add in different orders) or
    `expert_parallel_mixed` "off", and on CPUs: there, sorting the pairs of a step takes microseconds beside products of
    milliseconds. Else it is what rank 0 measures, or somebody has measured before; see `measured`.

    Args:
        model: with its parameters in place; what they hold makes no difference.
        config: all settings.
        platform: of the device.
        graph_backend: how steps are captured.
        token_sizes: numbers of tokens that experts see in captured steps, ascending.
        is_leader: whether this is rank 0.
        exchange: between the ranks.
    """
    mixtures = mixtures_of(model)
    if not mixtures:
        return None
    is_constant = config.model.deterministic or config.parallel.expert_parallel_mixed == "off"
    if is_constant or platform.device.type == "cpu":
        return ONE_WAY
    found = measured(mixtures, platform, graph_backend, token_sizes) if is_leader else ONE_WAY
    return DispatchTable(int(exchange(str(found.most_pairs_tokens).encode())[0]))


@torch.no_grad()
def measured(
    mixtures: Sequence[MixtureMLP], platform: Platform, graph_backend: str, token_sizes: Sequence[int]
) -> DispatchTable:
    """The table with which some of a model's layers take least time, as a file beside the compiled kernels says, if one does, so
    that all engines of these sizes on this kind of device have the same; else as timed now, in some hundred milliseconds.

    Timed is all of it, from the norm before the router to the sum over the experts that this rank keeps, in captured graphs, for
    tokens that choose each expert about equally often, at the token counts at which both ways may be faster. Of the tables, that
    one is taken whose times are, on average over these counts, least above the shorter of the two.

    Args:
        mixtures: the layers.
        platform: of the device.
        graph_backend: how the trials are captured.
        token_sizes: numbers of tokens to decide for, ascending.
    """
    gate = mixtures[0].gate
    sizes = [n for n in token_sizes if n * gate.routing.top <= _MOST_PAIRS_PER_EXPERT * gate.weight.shape[0]]
    file = _file(platform, mixtures, sizes)
    if file is not None and (known := _read(file)) is not None:
        return known
    started = time.perf_counter()
    layers = mixtures[:: -(-len(mixtures) // _MOST_LAYERS)]
    trials = {(size, way): _trial(layers, size, way) for size in sizes for way in ExpertDispatch}
    with _choosing_at_random(layers):
        platform.compile_ahead(trials.values())
        seconds = _time(trials, platform, graph_backend)
    platform.release_cached_memory()
    table = best_table(
        {size: (seconds[size, ExpertDispatch.PAIRS], seconds[size, ExpertDispatch.TILES]) for size in sizes}
    )
    logger.info(
        "experts: steps of up to %d tokens by pairs, others by tiles; timed in %.2f s: %s",
        table.most_pairs_tokens,
        time.perf_counter() - started,
        ", ".join(f"{size} {way} {1e6 * value / len(layers):.0f} us" for (size, way), value in seconds.items()),
    )
    return table if file is None else _keep(file, table)


def best_table(seconds: Mapping[int, tuple[float, float]]) -> DispatchTable:
    """The best threshold for some token counts.

    Args:
        seconds: by token count, ascending: by pairs, by tiles.
    """

    def loss(most: int) -> float:
        return sum(
            (by_pairs if size <= most else by_tiles) / min(by_pairs, by_tiles)
            for size, (by_pairs, by_tiles) in seconds.items()
        )

    return DispatchTable(min((0, *seconds), key=loss))


class _Output(NamedTuple):
    sums: Tensor


def _trial(layers: Sequence[MixtureMLP], num_tokens: int, way: ExpertDispatch) -> Callable[[], _Output]:
    """What some layers' experts make of other tokens each."""
    table = DispatchTable(num_tokens if way is ExpertDispatch.PAIRS else 0)
    device, dtype = layers[0].gate.weight.device, layers[0].experts.gate_up_proj.dtype
    hidden_size = layers[0].gate.weight.shape[1]
    norm = RMSNorm(hidden_size, 1e-6, dtype=dtype, device=device)
    norm.weight.fill_(1.0)
    x_LTE = torch.randn(len(layers), num_tokens, hidden_size, generator=torch.Generator().manual_seed(num_tokens))
    x_LTE = x_LTE.to(device, dtype)
    sums_LTE, counts_1 = torch.zeros_like(x_LTE), torch.tensor([num_tokens], dtype=torch.int32, device=device)

    def run() -> _Output:
        for layer, x_TE, sum_TE in zip(layers, x_LTE, sums_LTE, strict=True):
            layer.routed(norm, x_TE, counts_1, table, add_to=sum_TE)
        return _Output(sums_LTE)

    return run


@contextmanager
def _choosing_at_random(layers: Sequence[MixtureMLP]) -> Iterator[None]:
    """Inside, routers have weights by which tokens choose about all experts, whatever they have, and nothing is counted."""
    gates = [layer.gate for layer in layers]
    before = [(tensor, tensor.clone()) for gate in gates for tensor in (*gate.parameters(), gate.totals)]
    for number, gate in enumerate(gates):
        drawn_NE = torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(number))
        gate.weight.copy_(drawn_NE / gate.weight.shape[1] ** 0.5)
        if gate.bias is not None:
            gate.bias.zero_()
    try:
        yield
    finally:
        for tensor, content in before:
            tensor.copy_(content)


def _time(
    trials: Mapping[tuple[int, ExpertDispatch], Callable[[], _Output]], platform: Platform, graph_backend: str
) -> dict[tuple[int, ExpertDispatch], float]:
    """The shortest time of each trial, run in turn."""
    backend = create_backend(graph_backend)  # whose graphs go with it
    graphs = {key: backend.capture(trial, 1) for key, trial in trials.items()}
    seconds = dict.fromkeys(trials, float("inf"))
    for _ in range(_TURNS):
        for key, graph in graphs.items():
            platform.synchronize()
            started = time.perf_counter()
            for _ in range(_REPLAYS):
                graph.replay()
            platform.synchronize()
            seconds[key] = min(seconds[key], (time.perf_counter() - started) / _REPLAYS)
    return seconds


def _file(platform: Platform, mixtures: Sequence[MixtureMLP], sizes: Sequence[int]) -> Path | None:
    """Where the table for these layers is kept; None if the platform keeps nothing."""
    if platform.kernel_cache is None:
        return None
    experts = mixtures[0].experts
    device = platform.device
    is_about: dict[str, Any] = {
        "stepgraph": _version_of("stepgraph"),
        "kernels": _digest_of_kernels(),
        "tuning": repr(platform.tuning),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.name,
        "layers": len(mixtures),
        "top": mixtures[0].gate.routing.top,
        "experts": (mixtures[0].gate.weight.shape[0], experts.first, experts.count),
        "weights": [
            (name, tuple(parameter.shape), str(parameter.dtype)) for name, parameter in experts.named_parameters()
        ],
        "activations": str(experts.gate_up_proj.dtype),
        "sizes": list(sizes),
    }
    digest = hashlib.sha256(json.dumps(is_about, sort_keys=True).encode()).hexdigest()
    return platform.kernel_cache / f"stepgraph-dispatch-{digest[:32]}.json"


def _digest_of_kernels() -> str:
    """Of the source of the operators that are compared: whoever changes it shall not get what was measured before."""
    digest = hashlib.sha256()
    for operators in ("experts", "route"):
        for path in sorted((Path(ops.__file__).parent / operators).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _version_of(package: str) -> str:
    with suppress(ModuleNotFoundError):
        return version(package)
    return ""


def _read(file: Path) -> DispatchTable | None:
    """What the file says; None if there is none, or it is damaged."""
    try:
        most = json.loads(file.read_text())["most_pairs_tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return DispatchTable(most) if isinstance(most, int) else None


def _keep(file: Path, table: DispatchTable) -> DispatchTable:
    """Write the table, unless another process has written one meanwhile. Returns what is to be used: the one that lies there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent)
        try:
            with open(descriptor, "w") as opened:
                json.dump({"most_pairs_tokens": table.most_pairs_tokens}, opened)
            if _read(file) is None:  # missing or damaged
                file.unlink(missing_ok=True)
            with suppress(FileExistsError):
                os.link(name, file)
        finally:
            os.unlink(name)
    except OSError as error:
        logger.warning("what was timed cannot be kept in %s, so each start times anew: %s", file.parent, error)
    return _read(file) or table
