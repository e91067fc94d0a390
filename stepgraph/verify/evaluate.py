"""`stepgraph eval`: what a dtype, a format of weights or of the cache costs in accuracy, against float32 on the same device."""

from __future__ import annotations

import hashlib
import platform
import pydoc_data.topics
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepgraph.bench.report import machine, table, write_json
from stepgraph.config import EngineConfig
from stepgraph.engine.prompts import encode_text
from stepgraph.errors import ConfigError, RequestError
from stepgraph.executor.build import build_local_executor, context_len
from stepgraph.executor.local import LocalExecutor
from stepgraph.models.source import ModelSource, resolve_configured
from stepgraph.verify.accuracy import Accuracy, compare, copy_weights

_WINDOW = 512
"""Tokens of a window, if the context has so many."""
_CHARACTERS = 16
"""Of the text per token that is wanted, before all of it is tokenised."""
_REFERENCE = {"dtype": "float32", "quantization": "none", "kv_cache_dtype": "auto"}
_PLAIN = {"speculative_method": "none", "graph_backend": "eager", "capture": "lazy", "enable_prefix_caching": False}
"""What changes no distribution, and would take memory or time."""


@dataclass(frozen=True)
class Text:
    """What is predicted."""

    description: str
    tokens: list[int]
    prefix: list[int]
    """Tokens that the model's tokenizer puts before a text."""

    @property
    def digest(self) -> str:
        """Figures of the same model and windows are comparable if this is the same."""
        return hashlib.sha256(repr((self.prefix, self.tokens)).encode()).hexdigest()[:12]


def evaluate(
    settings: Mapping[str, Any],
    *,
    num_tokens: int,
    window: int | None = None,
    stride: int | None = None,
    text_file: Path | None = None,
    progress: bool = False,
    json_file: Path | None = None,
) -> int:
    """Build the model twice, as `settings` say and in float32, compare them, print a table, and write it to `json_file`.

    Args:
        settings: of the engine.
        num_tokens: predictions to count, at most.
        window, stride: see `stepgraph.verify.accuracy.windows`; default: 512 or the context, if that is shorter, and half of it.
        text_file: UTF-8; default: the topics of Python's documentation that `help` shows.
        progress: show progress bars on stderr.
        json_file: where to write the result.

    Returns:
        Exit code.

    Raises:
        ConfigError: settings that do not go together, or several devices.
        ModelError: the model cannot be read or run, or has no tokenizer.
        RequestError: there is too little text.
    """
    config = EngineConfig.from_settings(**settings)
    if config.parallel.num_ranks > 1:
        raise ConfigError(
            f"{config.parallel.size_setting}: eval holds two models against each other on one device; leave it at 1"
        )
    if num_tokens < 1:
        raise ConfigError(f"tokens={num_tokens} counts nothing; use at least 1")
    source = resolve_configured(config.model)
    is_random = config.model.load_format == "dummy"
    if not is_random:
        source.check_tokenizer()
    text = (
        _random_text(source, num_tokens, config.model.seed) if is_random else _read_text(source, text_file, num_tokens)
    )
    size, stride = _sizes(window, stride, context_len(config, source) - len(text.prefix))
    length = len(text.prefix) + size
    blocks = -(-length // config.cache.block_size) + 1  # one is nobody's
    both = {**settings, **_PLAIN, "max_model_len": length, "num_kv_blocks": blocks}
    reference = build_local_executor(EngineConfig.from_settings(**both | _REFERENCE), source, progress=progress)
    candidate = build_local_executor(EngineConfig.from_settings(**both), source, progress=progress)
    if is_random:
        copy_weights(reference.runner.model, candidate.runner.model)
    accuracy = compare(
        reference.runner,
        candidate.runner,
        text.tokens,
        size=size,
        stride=stride,
        prefix=text.prefix,
        progress=progress,
    )
    specs = candidate.specs
    print(f"{source.name} on {specs.platform}: {specs.precision}")
    print(f"{text.description} ({text.digest}), {accuracy.tokens} tokens counted, windows of {size}, stride {stride}\n")
    names = _name(reference, both | _REFERENCE), _name(candidate, both)
    print(_table(names, (reference, candidate), accuracy, is_random=is_random))
    if is_random:
        print(
            "\nWeights and text are random: differences are those of the arithmetic, and there is no perplexity to speak of."
        )
    if json_file is not None:
        found = asdict(accuracy) | {"perplexity_ratio": accuracy.perplexity_ratio}
        if is_random:
            found = {name: value for name, value in found.items() if "perplexity" not in name}
        write_json(
            json_file,
            {
                "machine": machine(specs.device),
                "model": source.name,
                "settings": dict(settings),
                "precision": specs.precision,
                "text": text.description,
                "digest": text.digest,
                "window": size,
                "stride": stride,
                "weight_bytes": _weight_bytes(candidate),
                "reference_weight_bytes": _weight_bytes(reference),
                **found,
            },
        )
    return 0


def _sizes(window: int | None, stride: int | None, context: int) -> tuple[int, int]:
    """Of the windows, checked."""
    size = min(_WINDOW, context) if window is None else window
    if not 2 <= size <= context:
        raise ConfigError(
            f"window={size} must be between 2 and {context}, the context without what a tokenizer puts first"
        )
    stride = max(1, size // 2) if stride is None else stride
    if not 1 <= stride < size:
        raise ConfigError(f"stride={stride} must be between 1 and one less than the window, {size - 1}")
    return size, stride


def _read_text(source: ModelSource, file: Path | None, num_tokens: int) -> Text:
    if file is None:
        text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
        description = f"topics of Python {platform.python_version()}'s documentation"
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"--text {str(file)!r} cannot be read: {reason}") from error
        description = str(file)
    tokenizer = source.tokenizer()
    tokens = encode_text(text[: _CHARACTERS * num_tokens], tokenizer, add_special_tokens=False)
    if len(tokens) <= num_tokens < len(text):
        tokens = encode_text(text, tokenizer, add_special_tokens=False)
    if len(tokens) < 2:
        raise RequestError(f"{description} has {len(tokens)} tokens; give a text of at least two")
    return Text(description, tokens[: num_tokens + 1], encode_text("", tokenizer))


def _random_text(source: ModelSource, num_tokens: int, seed: int) -> Text:
    rng = random.Random(seed)
    tokens = [rng.randrange(source.config.vocab_size) for _ in range(num_tokens + 1)]
    return Text(f"random tokens of seed {seed}", tokens, [])


def _name(executor: LocalExecutor, settings: Mapping[str, Any]) -> str:
    """What tells a model from the other: dtype, and the settings beside it that change numbers."""
    config = EngineConfig.from_settings(**settings)
    parts = [executor.specs.dtype, f"quantization {config.model.quantization or 'none'}"]
    if config.cache.kv_cache_dtype != "auto":
        parts.append(f"{config.cache.kv_cache_dtype} cache")
    return ", ".join(parts)


def _weight_bytes(executor: LocalExecutor) -> int:
    return sum(parameter.nbytes for parameter in executor.runner.model.parameters())


def _table(
    names: tuple[str, str], executors: tuple[LocalExecutor, LocalExecutor], found: Accuracy, *, is_random: bool
) -> str:
    """A line for the reference and one for what is held against it."""
    sizes = [f"{_weight_bytes(executor) / 2**20:.0f}" for executor in executors]
    if is_random:
        middle: Sequence[str] = ("mean |d logits|", "max |d logit|")
        values = [("0", "0"), (f"{found.mean_logit_difference:.2g}", f"{found.max_logit_difference:.2g}")]
    else:
        middle = ("perplexity", "/ float32's")
        values = [
            (f"{found.reference_perplexity:.3f}", "1"),
            (f"{found.perplexity:.3f}", f"{found.perplexity_ratio:.4f}"),
        ]
    kl = [f"{value:.2g}" for value in (found.mean_kl, found.p99_kl, found.max_kl)]
    return table(
        ("", "weights MiB", *middle, "mean KL", "p99 KL", "max KL", "same top token"),
        [
            (names[0], sizes[0], *values[0], "0", "0", "0", "100.0%"),
            (names[1], sizes[1], *values[1], *kl, f"{found.same_top_token:.1%}"),
        ],
    )
