"""Whether so many devices can share a native model, and which part of its experts each keeps."""

from __future__ import annotations

from stepgraph.errors import ConfigError, ModelError
from stepgraph.layers.experts import ExpertShard
from stepgraph.models.config import DecoderConfig
from stepgraph.parallel.shard import Shard, sizes_that_divide


def shard_experts(config: DecoderConfig, shard: Shard, *, expert_parallel: bool) -> ExpertShard:
    """The part of the experts that a rank keeps.

    Args:
        config: of the model.
        shard: its part of the rest.
        expert_parallel: it keeps whole experts; else a part of every one.

    Raises:
        ConfigError: there are no experts that ranks could keep.
        ModelError: so many ranks cannot share the model evenly; names numbers that can.
    """
    if expert_parallel and not config.kinds_of_mlp - {None}:
        raise no_experts(config.architecture, "which has none")
    check_shard(config, shard, expert_parallel=expert_parallel)
    return ExpertShard(experts=shard) if expert_parallel else ExpertShard(inner=shard)


def check_shard(config: DecoderConfig, shard: Shard, *, expert_parallel: bool) -> None:
    """Raise ModelError, naming those that do, if so many ranks cannot share a model evenly; arguments as of `shard_experts`."""
    sizes = possible_sizes(config, expert_parallel=expert_parallel)
    if shard.size not in sizes:
        other_way = "without" if expert_parallel else "with"
        others = possible_sizes(config, expert_parallel=not expert_parallel)
        kv_heads = sorted({config.num_kv_heads, *(layer.num_kv_heads for layer in config.layers)})
        several = " or ".join(map(str, kv_heads))
        heads = f"{config.num_heads} query heads, {several} key/value heads, which may be repeated"
        if config.latent is not None:
            heads = f"{config.num_heads} heads, whose latents are whole on each"
        if config.delta is not None:
            heads += f", {config.delta.num_key_heads} key heads of gated delta rules"
        if config.short_conv is not None:
            heads += f", convolutions of {config.hidden_size} channels"
        if config.mamba is not None:
            heads += f", {config.mamba.num_groups} groups of heads of Mamba-2"
        raise ModelError(
            f"{shard.size} devices cannot share this {config.architecture} evenly: it has {heads}, {_widths(config)} and "
            f"{config.vocab_size} entries in its vocabulary. Numbers that can: {', '.join(map(str, sizes))}."
            + (f" {other_way.capitalize()} enable_expert_parallel, {shard.size} can." if shard.size in others else "")
        )


def spread_experts(config: DecoderConfig, shard: Shard) -> ExpertShard:
    """The part of the experts that a rank keeps which has all of the rest.

    Args:
        config: of the model.
        shard: which of the ranks it is.

    Raises:
        ConfigError: there are no experts that ranks could keep.
        ModelError: so many ranks cannot share them evenly; names numbers that can.
    """
    numbers = {mixture.num_experts for mixture in config.kinds_of_mlp if mixture is not None}
    if not numbers:
        raise no_experts(config.architecture, "which has none")
    sizes = [size for size in range(1, min(numbers) + 1) if all(number % size == 0 for number in numbers)]
    if shard.size not in sizes:
        raise ModelError(
            f"{shard.size} devices cannot share the {' and '.join(map(str, sorted(numbers)))} experts of this "
            f"{config.architecture} evenly. Numbers that can: {', '.join(map(str, sizes))}."
        )
    return ExpertShard(experts=shard)


def no_experts(architecture: str, why: str) -> ConfigError:
    """That a setting asks for what only models with experts can do."""
    return ConfigError(
        f"enable_expert_parallel=True needs a native model with experts, and this is a {architecture}, {why}; leave it off",
        param="enable_expert_parallel",
    )


def possible_sizes(config: DecoderConfig, *, expert_parallel: bool) -> list[int]:
    """Numbers of ranks that can share a model, if its format lets them; arguments as of `shard_experts`."""
    mixtures = config.kinds_of_mlp - {None}
    widths, kv_heads = _dense_widths(config), {config.num_kv_heads, *(sizes.num_kv_heads for sizes in config.layers)}
    for mixture in mixtures:
        assert mixture is not None
        widths += [mixture.num_experts if expert_parallel else mixture.intermediate_size]
        widths += [mixture.shared_intermediate_size]  # every number divides none
    widths += [config.delta.num_key_heads] if config.delta is not None else []
    widths += [config.hidden_size] if config.short_conv is not None else []
    widths += [config.mamba.num_groups] if config.mamba is not None else []
    sizes = set.intersection(*(set(sizes_that_divide(config.num_heads, number, *widths)) for number in kv_heads))
    return sorted(size for size in sizes if size**2 <= config.vocab_size)  # see `Shard.span`


def _dense_widths(config: DecoderConfig) -> list[int]:
    """Of the layers that all tokens take, beside experts too."""
    mixtures = enumerate(map(config.mixture, range(config.num_layers)))
    dense = (layer for layer, mixture in mixtures if mixture is None or mixture.is_beside_dense)
    return sorted({config.sizes(layer).intermediate_size for layer in dense})


def _widths(config: DecoderConfig) -> str:
    """What ranks share of the feed-forward layers."""
    texts = [f"{width} intermediate values" for width in _dense_widths(config)]
    for mixture in sorted(config.kinds_of_mlp - {None}, key=str):
        assert mixture is not None
        texts.append(f"{mixture.num_experts} experts of {mixture.intermediate_size} intermediate values")
        if mixture.shared_intermediate_size:
            texts.append(f"{mixture.shared_intermediate_size} of a shared expert")
    return ", ".join(texts)
