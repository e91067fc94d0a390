"""From a source to a model with its parameters filled, each exactly once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from tqdm import tqdm

from stepgraph.errors import ConfigError
from stepgraph.layers.norm import RMSNorm
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.language_model import LanguageModel
from stepgraph.models.mtp_tensors import without_mtp
from stepgraph.models.registry import ARCHITECTURES
from stepgraph.models.source import ModelSource
from stepgraph.models.transformers_config import TransformersConfig
from stepgraph.models.update import match_tensors, write_each


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
    """Build a model and fill it; see `create_model` and `fill` for arguments and errors."""
    model = create_model(
        source,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        load_format=load_format,
        deterministic=deterministic,
        progress=progress,
    )
    for _ in fill(model, source, load_format=load_format, progress=progress):
        pass
    return model


def create_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    load_format: str = "auto",
    deterministic: bool = False,
    progress: bool = False,
) -> LanguageModel:
    """Build a model, native or transformers' as the source's config says. A native one is not filled yet: its parameters are
    where they will be, uninitialised.

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
        ModelError: a model that transformers loads does not fit its checkpoint, or a file is damaged.
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
        from stepgraph.models.transformers_model import TransformersModel

        if load_format == "dummy":
            return TransformersModel.with_random_weights(config, dtype=dtype, device=device)
        return TransformersModel.from_folder(config, source.folder, dtype=dtype, device=device, progress=progress)
    assert isinstance(config, DecoderConfig), config
    model = ARCHITECTURES[config.architecture](config, max_model_len=max_model_len, dtype=dtype, device=device)
    if deterministic:
        model.make_deterministic()
    return model.eval()


def fill(
    model: LanguageModel, source: ModelSource, *, load_format: str = "auto", progress: bool = False
) -> Iterator[None]:
    """Check that a checkpoint's tensors are those of a model from `create_model`, each once, and return an iterator that writes
    them, one at each step. It allocates nothing on the device of a native model's parameters, so that graphs may be captured
    and memory be shared out meanwhile.

    Raises:
        ModelError: tensors are missing, left over or of another shape; or, while they are written, a file is damaged.
    """
    if not isinstance(model, Decoder):
        return iter(())  # filled as it was built
    if load_format == "dummy":
        return _fill_randomly(model)
    update = match_tensors(model.checkpoint_tensors(), without_mtp(source.tensors()), source.description)
    return write_each(tqdm(update, f"Loading {source.name}", unit=" tensors", disable=not progress, leave=False))


def _fill_randomly(model: Decoder) -> Iterator[None]:
    fill_randomly(model, model.embed_tokens.weight.device)
    yield


@torch.no_grad()
def fill_randomly(model: nn.Module, device: torch.device) -> None:
    """Fill a native model's parameters as `load_format` "dummy" says, the same way every time."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
