"""From settings to a LocalExecutor: the model, its memory, its drafter, its graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from stepgraph.config import EngineConfig
from stepgraph.errors import ConfigError
from stepgraph.executor.base import ExecutorSpecs
from stepgraph.executor.in_background import in_background
from stepgraph.executor.local import LocalExecutor
from stepgraph.executor.precision import describe, exact_tokens
from stepgraph.layers.inputs import DispatchTable
from stepgraph.models.adapters import AdapterStore
from stepgraph.models.decoder import Decoder
from stepgraph.models.language_model import LanguageModel
from stepgraph.models.loader import create_model, fill, fills_in_place
from stepgraph.models.source import ModelSource
from stepgraph.parallel.create import create_group
from stepgraph.parallel.exchange import Exchange, alone
from stepgraph.parallel.group import Group
from stepgraph.parallel.shard import WHOLE, Shard
from stepgraph.platforms import DeviceMemory, Platform, create_platform
from stepgraph.spec.create import create_drafter
from stepgraph.spec.depth import LEVELS, draft_levels
from stepgraph.spec.drafter import Drafter
from stepgraph.step.dispatch import ONE_WAY, choose_dispatch
from stepgraph.step.memory import place_weights
from stepgraph.step.runner import StepRunner, backend_name
from stepgraph.step.shape_policy import ShapePolicy

_FEW_LEVELS = (0, 3)
"""Numbers of proposals to choose from where a capture takes as long as many steps, so that few are worth one: on CPU, four tokens
cost little more than two."""


class Ranks(NamedTuple):
    """Those that share a model, as one of them sees the others."""

    shard: Shard = WHOLE
    """Which of them it is, and how many there are."""
    exchange: Exchange = alone
    time_limit_s: float = 30.0
    """How long a collective waits for the others."""


ALONE = Ranks()


def build_local_executor(
    config: EngineConfig,
    source: ModelSource,
    *,
    model: LanguageModel | None = None,
    drafter: Drafter | None = None,
    meanwhile: Callable[[], object] = lambda: None,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> LocalExecutor:
    """All that runs an engine's steps on one device of this process.

    Where graphs read weights where they lie, these are read while the graphs are captured; else before.

    Args:
        config: all settings.
        source: the model.
        model: the same, filled already; default: made and filled here.
        drafter: proposes tokens; default: the one that the settings ask for.
        meanwhile: called while weights are read, if they are.
        progress: show progress bars on stderr while loading and capturing.
        ranks: with which the model is shared; all of them build at the same time.

    Raises:
        ConfigError: settings that this model or machine cannot meet.
        ModelError: the model cannot be read or run.
    """
    shard = ranks.shard
    platform = create_platform(config.model.device, shard.rank if shard.size > 1 else None)
    if config.graph.graph_backend == "cuda" and platform.device.type != "cuda":
        raise ConfigError(
            f"graph_backend='cuda' captures what CUDA devices do, and device={platform.name!r} is none; leave it at auto, or use "
            "device='cuda'",
            param="graph_backend",
        )
    max_model_len = context_len(config, source)
    dtype = platform.default_dtype if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    group = None if shard.size == 1 else _create_group(config, source, platform, dtype, ranks)
    fills_late, is_empty = False, model is None
    if model is None:
        model = _create_model(config, source, platform, dtype, max_model_len, group, progress=progress)
    if config.transfer.moves_blocks and not all(spec.starts_from_blocks for spec in model.cache_specs(dtype)):
        raise ConfigError(
            f"{model.config.architecture} has layers that carry a state from token to token, which neither another engine nor "
            "host memory can give back: leave splitwise_role at mixed, and kv_host_cache_gib and what begins with kv_transfer "
            "out",
            param="splitwise_role" if config.transfer.is_connected else "kv_host_cache_gib",
        )
    if is_empty:
        in_place = fills_in_place(model, config.model.load_format)
        fills_late = platform.captures_addresses and in_place and not _drafts_with_the_model(config)
        if not fills_late:
            with _filling(model, config, source, platform, progress=progress):
                meanwhile()
    if drafter is None:
        drafter = create_drafter(config, source, model, platform, max_model_len=max_model_len, progress=progress)
    levels = draft_levels(config.speculative.max_drafts, _levels_to_choose_from(config, drafter, platform))
    parameters = [*model.parameters(), *(() if drafter is None else drafter.parameters())]
    weights = place_weights(parameters, config.cache, platform)
    adapters = _create_adapters(model, config)
    if fills_late:
        torch._foreach_zero_(list(model.parameters()))  # capturing runs programs on them, which must not meet NaN
    dispatch = choose_dispatch(
        model,
        config,
        platform,
        graph_backend=backend_name(config, platform),
        token_sizes=_expert_tokens(config),
        is_leader=shard.rank == 0,
        exchange=ranks.exchange,
    )
    with _filling(model, config, source, platform, progress=progress) if fills_late else nullcontext():
        if fills_late:
            meanwhile()
        runner = StepRunner(
            model,
            config,
            platform,
            max_model_len=max_model_len,
            adapters=adapters,
            drafter=drafter,
            draft_levels=levels,
            dispatch=dispatch or ONE_WAY,
            group=group,
            exchange=ranks.exchange,
        )
        if not runner.graphs.lazy:
            runner.graphs.capture_all(progress=progress)
    return LocalExecutor(runner, _specs(runner, config, weights, drafter, dispatch), weights, adapters, drafter, group)


def _specs(
    runner: StepRunner,
    config: EngineConfig,
    weights: DeviceMemory,
    drafter: Drafter | None,
    dispatch: DispatchTable | None,
) -> ExecutorSpecs:
    platform, policy = runner.platform, runner.policy
    return ExecutorSpecs(
        platform=platform.name,
        device=str(platform.device),
        dtype=str(runner.model.dtype).removeprefix("torch."),
        precision=describe(runner.model),
        graph_backend=runner.graphs.store.backend_name,
        vocab_size=runner.vocab_size,
        max_model_len=runner.max_model_len,
        num_kv_blocks=runner.num_kv_blocks,
        block_size=runner.block_size,
        max_tokens=policy.max_tokens,
        token_sizes=policy.token_sizes,
        run_ahead=platform.run_ahead,
        draft_levels=policy.draft_levels,
        dispatch=dispatch,
        lookahead=0 if drafter is None else drafter.lookahead,
        reuses_prefixes=runner.layout.reuses_prefixes,
        num_checkpoints=runner.num_checkpoints,
        groups=runner.layout.groups,
        drafts_cost_when_idle=drafter is None or drafter.costs_when_idle,
        max_adapters=config.lora.max_loras if config.lora.enable_lora else 0,
        can_sleep=weights.releasable,
        data_parallel_size=config.parallel.data_parallel_size,
        longest_step_s=_longest_step_s(runner),
    )


def context_len(config: EngineConfig, source: ModelSource) -> int:
    """Most tokens of a prompt and its answer; ConfigError if more are asked for than the model has positions."""
    wanted, limit = config.model.max_model_len, source.config.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"max_model_len={wanted} is above the {limit} positions {source.name} was made for; use {limit} or less"
        )
    return wanted or limit


def _create_model(
    config: EngineConfig,
    source: ModelSource,
    platform: Platform,
    dtype: torch.dtype,
    max_model_len: int,
    group: Group | None,
    *,
    progress: bool,
) -> LanguageModel:
    settings, has_own_requests = config.model, config.parallel.data_parallel_size > 1
    return create_model(
        source,
        dtype=dtype,
        device=platform.device,
        load_format=settings.load_format,
        quantization=settings.quantization,
        supports_fp8=platform.supports_fp8,
        max_model_len=max_model_len,
        deterministic=settings.deterministic,
        packed=settings.quantization == "auto" and dtype in platform.packed_dtypes,
        exact_tokens=exact_tokens(config),
        free_bytes=platform.free_memory_bytes(),
        group=None if has_own_requests else group,
        expert_group=group if has_own_requests else None,
        expert_parallel=config.parallel.enable_expert_parallel,
        progress=progress,
    )


def _create_group(
    config: EngineConfig, source: ModelSource, platform: Platform, dtype: torch.dtype, ranks: Ranks
) -> Group:
    max_shape = ShapePolicy.of(
        config.graph, config.scheduler, draft_levels=(0, config.speculative.max_drafts)
    ).max_shape
    return create_group(
        ranks.shard,
        ranks.exchange,
        platform,
        dtype=dtype,
        hidden_size=source.config.hidden_size,
        max_tokens=max_shape.num_tokens,
        vocab_size=source.config.vocab_size,
        max_samples=max_shape.num_samples,
        time_limit_s=ranks.time_limit_s,
    )


def _filling(
    model: LanguageModel, config: EngineConfig, source: ModelSource, platform: Platform, *, progress: bool
) -> AbstractContextManager[None]:
    """Inside, a thread reads weights to where the model's parameters lie now; leaving waits for its end."""
    return in_background(fill(model, source, load_format=config.model.load_format, progress=progress), platform)


def _drafts_with_the_model(config: EngineConfig) -> bool:
    """Whether the drafter has modules that share weights with the model."""
    return config.speculative.speculative_method in ("mtp", "hybrid")


def _levels_to_choose_from(config: EngineConfig, drafter: Drafter | None, platform: Platform) -> tuple[int, ...]:
    """Numbers of proposals, beside the most there may be."""
    if drafter is None or not config.speculative.speculative_adaptive:
        return ()
    return LEVELS if platform.captures_all_by_default else _FEW_LEVELS


def _expert_tokens(config: EngineConfig) -> list[int]:
    """Numbers of tokens that experts see in captured steps: those of all devices that have requests of their own."""
    sizes = ShapePolicy.of(config.graph, config.scheduler).token_sizes
    return [config.parallel.data_parallel_size * size for size in sizes]


def _create_adapters(model: LanguageModel, config: EngineConfig) -> AdapterStore | None:
    if not config.lora.enable_lora:
        return None
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"enable_lora=True needs a native model, and {model.config.architecture} runs through transformers; choose a "
            "native model, or leave enable_lora off"
        )
    return AdapterStore(model, config.lora, max_tokens=config.scheduler.max_num_batched_tokens)


def _longest_step_s(runner: StepRunner) -> float:
    """What the largest step takes on the slowest machine of the platform: products with the weights and with all keys and values,
    two operations an entry."""
    num_weights = sum(parameter.numel() for parameter in runner.model.parameters())
    width = sum(spec.num_heads * (spec.head_dim + spec.value_dim) for spec in runner.model.attention_specs)
    num_attended = runner.max_model_len * width
    return 2 * runner.policy.max_tokens * (num_weights + num_attended) / runner.platform.slowest_flops
