"""From a source to a model with its parameters filled, each exactly once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tqdm import tqdm

from stepgraph.errors import ConfigError, ModelError
from stepgraph.layers.norm import RMSNorm
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.language_model import LanguageModel
from stepgraph.models.registry import ARCHITECTURES
from stepgraph.models.source import ModelSource
from stepgraph.models.transformers_model import TransformersConfig, TransformersModel


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    load_format: str = "auto",
    deterministic: bool = False,
    progress: bool = False,
) -> LanguageModel:
    """Build a model, native or transformers' as the source's config says, and fill it.

    Args:
        source: from `resolve`.
        dtype: of parameters and activations.
        device: of the parameters.
        max_model_len: longest sequence, in tokens.
        load_format: "auto" reads the checkpoint; "dummy" draws weights on the device, the same ones every time: in native
            models of standard deviation 0.02, with norms at one; in transformers' models as the class begins training.
        deterministic: a token's result may not depend, bit for bit, on the tokens beside it.
        progress: show a bar on stderr.

    Raises:
        ModelError: the checkpoint's tensors are not those of the model (missing, left over, of another shape), or a
            file is damaged.
        ConfigError: `deterministic` with a model that only transformers runs.
    """
    assert load_format in ("auto", "dummy"), load_format
    config = source.config
    if isinstance(config, TransformersConfig):
        if deterministic:
            raise ConfigError(
                f"deterministic=True needs a native model, and {config.architecture} would run through transformers, whose "
                "matrix products depend on the batch; choose a native model, or leave deterministic off"
            )
        if load_format == "dummy":
            return TransformersModel.with_random_weights(config, dtype=dtype, device=device)
        return TransformersModel.from_folder(config, source.folder, dtype=dtype, device=device, progress=progress)
    assert isinstance(config, DecoderConfig), config
    model = ARCHITECTURES[config.architecture](config, max_model_len=max_model_len, dtype=dtype, device=device)
    if load_format == "dummy":
        _fill_randomly(model, device)
    else:
        tensors = list(source.tensors())  # handles: nothing is read yet, and the bar knows its length
        bar = tqdm(tensors, f"Loading {source.name}", unit=" tensors", disable=not progress, leave=False)
        _fill(model, bar, source.description)
    if deterministic:
        model.make_deterministic()
    return model.eval()


def _fill(model: Decoder, tensors: Iterable[CheckpointTensor], description: str) -> None:
    missing = model.checkpoint_tensors()
    left_over = []
    for tensor in tensors:
        target = missing.pop(tensor.name, None)
        if target is None:
            if not _is_redundant(tensor.name, model):
                left_over.append(tensor.name)
            continue
        if tensor.shape != tuple(target.shape):
            raise ModelError(
                f"{tensor.name} has shape {list(tensor.shape)} in the checkpoint ({description}), but the model's "
                f"config says {list(target.shape)}; config and weights are not of one model."
            )
        target.copy_(tensor.load(target.dtype, target.device))
    if missing or left_over:
        raise ModelError(
            f"The checkpoint ({description}) does not fit the {model.config.architecture} that its config describes: "
            f"{_some(list(missing))} missing, {_some(left_over)} left over."
        )


def _is_redundant(name: str, model: Decoder) -> bool:
    """Whether older checkpoints store a tensor that follows from others."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tie_word_embeddings)


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} ({shown})"


def _fill_randomly(model: Decoder, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
