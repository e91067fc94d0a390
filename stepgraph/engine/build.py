"""From settings to an engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import TYPE_CHECKING

from stepgraph.config import EngineConfig
from stepgraph.engine.adapters import AdapterTable
from stepgraph.engine.engine import Engine
from stepgraph.engine.exchange import Exchange
from stepgraph.engine.guidance import read_vocabulary
from stepgraph.engine.host_tier import HostTier
from stepgraph.engine.intake import RequestIntake
from stepgraph.engine.kv_events import KVEvents
from stepgraph.engine.lockstep import LockstepScheduler
from stepgraph.engine.masks import TokenMasks
from stepgraph.engine.model_defaults import end_tokens_of
from stepgraph.engine.prompts import require_tokenizer
from stepgraph.engine.scheduler import Scheduler
from stepgraph.engine.sink import Sink
from stepgraph.engine.source import Source
from stepgraph.errors import ConfigError
from stepgraph.executor.base import Executor, ExecutorSpecs
from stepgraph.executor.ranked import build_executor, start_workers
from stepgraph.models.identity import model_digest, unknown_model_digest
from stepgraph.models.source import ModelSource, resolve_configured
from stepgraph.spec.depth import DraftDepth
from stepgraph.transfer.base import Transfers
from stepgraph.transfer.create import create_transfers

if TYPE_CHECKING:
    from stepgraph.engine.kv_event_publisher import KVEventPublisher

logger = logging.getLogger(__name__)


def build_engine(
    config: EngineConfig,
    *,
    source: ModelSource | None = None,
    executor: Executor | None = None,
    transfers: Transfers | None = None,
    create_scheduler: Callable[..., Scheduler] = Scheduler,
    clock: Callable[[], float] = time.monotonic,
    needs_tokenizer: bool = False,
    progress: bool = False,
) -> Engine:
    """An engine, ready for requests.

    Args:
        config: all settings.
        source: the model, if it is resolved already.
        executor: what runs the steps; default: one device with the model on it, or as many as share it.
        transfers: with other engines; default: as the settings say.
        create_scheduler: makes what plans them; where ranks have requests of their own, those of each.
        clock: seconds, monotonic.
        needs_tokenizer: read the tokenizer now, while weights are loaded, rather than at its first use.
        progress: show progress bars on stderr while loading and capturing.

    Raises:
        ConfigError: settings that this model or machine cannot meet.
        ModelError: the model cannot be found, read or run.
    """
    with ExitStack() as on_failure:
        publishers = _publishers_of(config, on_failure)
        workers = None if executor is not None else start_workers(config)
        if workers is not None:
            on_failure.callback(workers.close, now=True)
        source = source or resolve_configured(config.model)
        end_token_ids = end_tokens_of(source)
        read_tokenizer = cache(source.tokenizer_if_any)
        executor = executor or build_executor(
            config,
            source,
            workers=workers,
            meanwhile=read_tokenizer if needs_tokenizer else lambda: None,
            progress=progress,
        )
        on_failure.pop_all()
    specs = executor.specs
    draft_depth = DraftDepth(specs.draft_levels[-1], specs.draft_levels, costs_when_idle=specs.drafts_cost_when_idle)
    create = partial(
        create_scheduler,
        config.scheduler,
        max_tokens=specs.max_tokens,
        num_kv_blocks=specs.num_kv_blocks,
        block_size=specs.block_size,
        token_sizes=specs.token_sizes,
        prefix_caching=config.cache.enable_prefix_caching and (specs.reuses_prefixes or specs.num_checkpoints > 0),
        pure_steps=config.graph.cudagraph_only_prefill and config.scheduler.insertion_policy == "gather",
        lookahead=specs.lookahead,
        groups=specs.groups,
        num_checkpoints=specs.num_checkpoints,
        table_width=-(-specs.max_model_len // specs.block_size),
        clock=clock,
    )
    scheduler = (
        create(choose_drafts=draft_depth.choose)
        if specs.data_parallel_size == 1
        else LockstepScheduler(
            specs.data_parallel_size, config.scheduler.max_num_seqs, create, choose_drafts=draft_depth.choose
        )
    )
    masks = TokenMasks(
        lambda: read_vocabulary(require_tokenizer(read_tokenizer()), specs.vocab_size, end_token_ids),
        specs.vocab_size,
        specs.draft_levels[-1],
        config.guidance,
        end_token_ids,
    )
    adapters = AdapterTable(executor.read_adapter, executor.write_adapter, specs.max_adapters)
    intake = RequestIntake(
        adapters if specs.max_adapters else None,
        vocab_size=specs.vocab_size,
        max_model_len=specs.max_model_len,
        media_token_ids=source.config.media_token_ids,
        end_token_ids=end_token_ids,
        read_tokenizer=lambda: require_tokenizer(read_tokenizer()),
        seed=config.model.seed,
    )
    try:
        exchange = _exchange_of(config, source, executor, scheduler, transfers, publishers, clock)
    except BaseException:
        executor.close()
        for publisher in publishers:
            publisher.close()
        raise
    _start_publishers(publishers, config, specs, scheduler, exchange)
    logger.info("%s on %s: %s", source.name, specs.platform, specs.precision)
    if specs.num_ranks > 1:
        what = "the model; sums are exchanged" if specs.data_parallel_size == 1 else "its experts; tokens are exchanged"
        logger.info("%d ranks share %s by %s", specs.num_ranks, what, specs.collectives)
    if config.cache.enable_prefix_caching and not specs.reuses_prefixes and not specs.num_checkpoints:
        logger.warning(
            "prefix caching is off: layers of this model carry a state from token to token, and no memory is left to keep "
            f"states of prefixes; lower max_num_seqs={config.scheduler.max_num_seqs} or max_model_len={specs.max_model_len}"
        )
    if config.speculative.max_drafts:
        logger.info("speculative decoding: %s", config.speculative)
    return Engine(
        config,
        source,
        executor,
        scheduler,
        draft_depth=draft_depth,
        masks=masks,
        intake=intake,
        exchange=exchange,
        end_token_ids=end_token_ids,
        read_tokenizer=read_tokenizer,
        clock=clock,
    )


def _exchange_of(
    config: EngineConfig,
    source: ModelSource,
    executor: Executor,
    scheduler: Scheduler | LockstepScheduler,
    transfers: Transfers | None,
    publishers: Sequence[KVEventPublisher],
    clock: Callable[[], float],
) -> Exchange:
    """What an engine of this role does with others, and with host memory."""
    settings, specs = config.transfer, executor.specs
    if not settings.is_connected and not settings.kv_host_cache_gib:
        return Exchange(publishers=publishers)
    assert isinstance(scheduler, Scheduler), scheduler

    def identify(weights: ModelSource | None) -> str:
        if weights is None:
            return unknown_model_digest()
        return model_digest(
            weights, config.model, dtype=specs.dtype, device_type=specs.platform, max_model_len=specs.max_model_len
        )

    model, giver, sink, tier = "", None, None, None
    if settings.is_connected:
        model = identify(source)
        transfers = transfers or create_transfers(settings, executor.export_cache, specs.platform, model)
        if settings.gives:
            giver = Source(transfers, scheduler.blocks, scheduler.prefixes, specs.num_ranks)
    if settings.kv_host_cache_gib:
        tier = HostTier(executor.keep_on_host(int(settings.kv_host_cache_gib * 2**30)), scheduler.blocks)
    if settings.takes or tier is not None:
        sink = Sink(
            transfers if settings.takes else None,
            tier,
            scheduler,
            max_num_seqs=config.scheduler.max_num_seqs,
            timeout_s=settings.kv_transfer_timeout,
            fails=settings.kv_load_failure == "fail",
            clock=clock,
        )
    return Exchange(
        transfers, giver, sink, blocks=scheduler.blocks, model=model, identify=identify, publishers=publishers
    )


def _publishers_of(config: EngineConfig, on_failure: ExitStack) -> list[KVEventPublisher]:
    """What tells others of the cache of each rank; none if nobody is to hear of it."""
    if not config.kv_events.enable_kv_cache_events:
        return []
    try:
        from stepgraph.engine.kv_event_publisher import KVEventPublisher
    except ImportError as error:
        raise ConfigError(
            f"enable_kv_cache_events needs pyzmq and msgspec, which cannot be imported ({error}); pip install "
            "'stepgraph[server]', or leave it out",
            param="enable_kv_cache_events",
        ) from error
    publishers = []
    for rank in range(config.parallel.data_parallel_size):
        publishers.append(KVEventPublisher(config.kv_events, rank))
        on_failure.callback(publishers[-1].close)
    return publishers


def _start_publishers(
    publishers: Sequence[KVEventPublisher],
    config: EngineConfig,
    specs: ExecutorSpecs,
    scheduler: Scheduler | LockstepScheduler,
    exchange: Exchange,
) -> None:
    """Have them told, from now on, what enters and leaves the caches."""
    if not publishers:
        return
    if not specs.reuses_prefixes:
        logger.warning(
            "enable_kv_cache_events has nothing to tell: layers of this model carry a state from token to token, and where "
            "prefixes can be found does not follow from blocks"
        )
    from stepgraph.engine.kv_event_wire import Wording

    window = 0 if specs.groups.num_full else specs.groups.window  # of the first group, the one that others hear of
    wording = Wording(specs.block_size, window, config.kv_events.kv_events_salts == "plain")
    ranks = scheduler.ranks if isinstance(scheduler, LockstepScheduler) else (scheduler,)
    for publisher, rank in zip(publishers, ranks, strict=True):
        events = KVEvents(config.kv_events.kv_events_max_queue_size)
        if specs.reuses_prefixes:
            rank.prefixes.tell(events)
        if exchange.sink is not None and exchange.sink.tier is not None:
            exchange.sink.tier.events = events
        publisher.start(events, wording)
