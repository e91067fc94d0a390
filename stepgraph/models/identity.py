"""Whether two engines run the same model, so that one's keys and values are the other's: a digest of its weights and of all
settings that change what they compute.

Weights are sampled: files are as large as memory, and a checkpoint that was trained further differs nearly everywhere. Two whose
files differ in fewer places than samples see are told apart by their sizes, headers and names alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stepgraph.config import ModelConfig
from stepgraph.errors import ModelError
from stepgraph.layers.rotary import RotaryFrequencies
from stepgraph.models.config import DecoderConfig
from stepgraph.models.language_model import LanguageModelConfig
from stepgraph.models.source import ModelSource
from stepgraph.models.transformers_config import TransformersConfig

_SAMPLE_BYTES = 4096
_MAX_SAMPLES = 1024
"""Of a file; one of up to 4 MiB is read whole, and of a checkpoint's usual 5 GB every matrix of a layer is met."""
_OF_THE_FOLDER = ("_name_or_path", "transformers_version")
"""Fields of transformers' configs that say where a checkpoint was found."""


def model_digest(
    source: ModelSource, settings: ModelConfig, *, dtype: str, device_type: str, max_model_len: int
) -> str:
    """Names what an engine computes: equal of engines whose keys and values of the same tokens are each other's.

    Reads some MiB of each file of weights.

    Args:
        source: of the weights that the engine has now.
        settings: how it runs them.
        dtype: of weights and activations, as `ExecutorSpecs.dtype` says.
        device_type: on whose devices it runs; random weights depend on it.
        max_model_len: tokens; some models rotate keys otherwise where it is longer than they were trained for.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    computed: dict[str, Any] = {
        "model": _computed_by(source.config, max_model_len),
        "dtype": dtype,
        "quantization": settings.quantization or "none",
        "load_format": settings.load_format,
    }
    if settings.load_format == "dummy":
        computed["drawn_on"] = device_type
    digest.update(json.dumps(computed, sort_keys=True, default=str).encode())
    if settings.load_format != "dummy":
        for path in source.weight_files():
            digest.update(_sampled(path))
    return digest.hexdigest()


def unknown_model_digest() -> str:
    """Of an engine whose weights nobody else can be known to have: another one at each call."""
    return secrets.token_hex(hashlib.sha256().digest_size)


def _computed_by(config: LanguageModelConfig, max_model_len: int) -> Any:
    """All of a config that keys and values depend on, in plain values."""
    if isinstance(config, TransformersConfig):
        fields = {name: value for name, value in config.hf_config.to_dict().items() if name not in _OF_THE_FOLDER}
        return ["transformers", config.architecture, fields]
    assert isinstance(config, DecoderConfig), config
    ropes = tuple(_used(rope, max_model_len) for rope in config.ropes)
    return ["native", asdict(replace(config, ropes=ropes, eos_token_ids=(), bos_token_id=None, num_mtp_modules=0))]


def _used(rope: RotaryFrequencies, max_model_len: int) -> RotaryFrequencies:
    """What is used of a rope's frequencies, see `stepgraph.layers.rotary.cos_sin_table`."""
    is_long = bool(rope.long_inv_freq) and max_model_len > rope.original_length
    return RotaryFrequencies(rope.long_inv_freq if is_long else rope.inv_freq, rope.scale)


def _sampled(path: Path) -> bytes:
    """Digest of a file's size and of pieces of it, evenly spread from its first byte to its last."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            count = min(_MAX_SAMPLES, -(-size // _SAMPLE_BYTES))
            last = max(0, size - _SAMPLE_BYTES)
            for index in range(count):
                file.seek(last * index // max(1, count - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error}), and other engines are told what model this is by it"
        ) from error
    return digest.digest()
