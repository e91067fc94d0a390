"""New weights for a model that is in use, written into its parameters: graphs captured over them stay valid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.models.conversion import Target, quantization_of, takes_values
from stepgraph.models.decoder import Decoder
from stepgraph.models.language_model import LanguageModel, LanguageModelConfig
from stepgraph.models.mtp_tensors import without_mtp
from stepgraph.models.source import ModelSource
from stepgraph.models.transformers_config import TransformersConfig

Update = Iterable[tuple[Target, CheckpointTensor]]
"""Where each tensor goes; names and shapes are checked, values are not read yet."""


class TensorInMemory(CheckpointTensor):
    """A tensor that somebody else has read."""

    def __init__(self, name: str, values: Tensor) -> None:
        self.name, self.shape = name, tuple(values.shape)
        self._values = values

    def load(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `CheckpointTensor.load`."""
        return self._values.to(device).to(dtype)


def plan_update(model: LanguageModel, source: ModelSource | Iterable[tuple[str, Tensor]]) -> Update:
    """Check that new weights fit a model, all of them, before any is written.

    Args:
        model: in use.
        source: a checkpoint of the same model, or all of its tensors under their names in transformers' checkpoints.

    Raises:
        ModelError: the weights are of another model, incomplete or of other shapes, or cannot be read.
    """
    if isinstance(source, ModelSource):
        if _without_ends(source.config) != _without_ends(model.config):
            raise ModelError(
                f"{source.description} is of another model than the one that runs ({model.config.architecture}): their "
                "configs differ. Start another engine for it."
            )
        description = source.description
        tensors = source.tensors() if isinstance(model, Decoder) else _read_with_transformers(model, source)
    else:
        description = "given as tensors"
        tensors = (TensorInMemory(name, values) for name, values in source)
        if not isinstance(model, Decoder):
            raise ModelError(
                f"{model.config.architecture} runs through transformers, which renames and merges tensors as it reads a "
                "checkpoint; save the weights with save_pretrained and give the folder."
            )
    return match_tensors(_targets(model), without_mtp(tensors), description)


def write(update: Update) -> None:
    """Write checked weights. If it fails, the model holds some old weights and some new ones.

    Raises:
        ModelError: a file is damaged.
    """
    for _ in write_each(update):
        pass


def write_each(update: Update, *, on_host: bool = False) -> Iterator[None]:
    """`write`, a tensor at each step.

    Args:
        update: from `match_tensors`.
        on_host: convert tensors in host memory, so that the device needs none for them.
    """
    for target, tensor in update:
        device = torch.device("cpu") if on_host else target.device
        with torch.no_grad():
            if tensor.quantization is not None and tensor.quantization == quantization_of(target):
                target.copy_(tensor.packed().to(device))
            else:
                target.copy_(tensor.load(target.dtype, device))
        yield


def match_tensors(
    targets: Mapping[str, Target], tensors: Iterable[CheckpointTensor], description: str
) -> list[tuple[Target, CheckpointTensor]]:
    """Find the target of each tensor.

    Args:
        targets: all targets of a model, by the names of their tensors.
        tensors: of a checkpoint.
        description: of the checkpoint, for errors.

    Raises:
        ModelError: a tensor is missing, left over or of another shape.
    """
    missing = dict(targets)
    matches, left_over = [], []
    for tensor in tensors:
        target = missing.pop(tensor.name, None)
        if target is not None:
            matches.append((target, tensor))
        elif tensor.name in targets or not _is_redundant(tensor.name):
            left_over.append(tensor.name)
    if missing or left_over:
        raise ModelError(
            f"The checkpoint ({description}) does not fit the model, which needs each of its tensors once: "
            f"{_some(list(missing))} missing, {_some(left_over)} left over."
        )
    for target, tensor in matches:
        if tensor.shape != tuple(target.shape):
            raise ModelError(
                f"{tensor.name} has shape {list(tensor.shape)} in the checkpoint ({description}), and in the model "
                f"{list(target.shape)}; config and weights are not of one model."
            )
        if not takes_values(target) and tensor.quantization != quantization_of(target):
            raise ModelError(
                f"{tensor.name} is kept in the model as a GGUF file's {quantization_of(target)} blocks, and is "
                f"{tensor.quantization or 'plain numbers'} in the checkpoint ({description}). Start the engine with "
                "quantization none to be able to give it any weights."
            )
    return matches


def _is_redundant(name: str) -> bool:
    """Whether checkpoints may store a tensor that follows from others: a model without a head of its own uses its embedding."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _targets(model: LanguageModel) -> dict[str, Target]:
    if isinstance(model, Decoder):
        return model.checkpoint_tensors()
    from stepgraph.models.transformers_model import TransformersModel

    assert isinstance(model, TransformersModel), model
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _read_with_transformers(model: LanguageModel, source: ModelSource) -> list[CheckpointTensor]:
    """The tensors of another model of the same class, under its own names."""
    from stepgraph.models.transformers_model import TransformersModel

    assert isinstance(model, TransformersModel), model
    dtype = next(model.parameters()).dtype
    new = TransformersModel.from_folder(
        model.config, source.folder, dtype=dtype, device=torch.device("cpu"), progress=False
    )
    return [TensorInMemory(name, values) for name, values in (*new.named_parameters(), *new.named_buffers())]


def _without_ends(config: LanguageModelConfig) -> LanguageModelConfig:
    """What two checkpoints of one model have in common: trained further, a model may end its answers otherwise."""
    if isinstance(config, TransformersConfig):
        return replace(config, eos_token_ids=(), hf_config=None)  # which holds the folder's name, for one
    return replace(config, eos_token_ids=())  # type: ignore[type-var]  # both implementations are dataclasses


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
