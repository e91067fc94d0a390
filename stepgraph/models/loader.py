"""From a source to a model with its parameters filled, each exactly once."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from stepgraph.errors import ConfigError
from stepgraph.layers.norm import RMSNorm
from stepgraph.models.config import DecoderConfig
from stepgraph.models.language_model import LanguageModel
from stepgraph.models.mtp_tensors import without_mtp
from stepgraph.models.packing import pack
from stepgraph.models.registry import ARCHITECTURES
from stepgraph.models.source import ModelSource
from stepgraph.models.transformers_model import TransformersConfig, TransformersModel
from stepgraph.models.update import match_tensors, write


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    load_format: str = "auto",
    deterministic: bool = False,
    packed: bool = False,
    exact: bool = True,
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
        packed: keep the blocks of a quantised checkpoint where this machine has kernels for them; needs float32 on the CPU.
        exact: products with packed weights never round their operands, see `ops.packed_linear`.
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
        fill_randomly(model, device)
    else:
        tensors = list(without_mtp(source.tensors()))
        if packed:
            pack(model, tensors, merged=config.merged_projections, exact=exact)
        update = match_tensors(model.checkpoint_tensors(), tensors, source.description)
        write(tqdm(update, f"Loading {source.name}", unit=" tensors", disable=not progress, leave=False))
    if deterministic:
        model.make_deterministic()
    return model.eval()


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
