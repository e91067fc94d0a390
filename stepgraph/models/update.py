"""New weights for a model that is in use, written into its parameters: graphs captured over them stay valid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.layers.formats.target import Skipped, Target, part_of, quantization_of, takes_values, values_part_of
from stepgraph.models.checkpoint import CheckpointTensor, take
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.expert_tensors import split_experts
from stepgraph.models.joined_tensors import join_convolutions
from stepgraph.models.language_model import LanguageModel, LanguageModelConfig
from stepgraph.models.mtp_tensors import without_mtp
from stepgraph.models.output_head import fit_head, has_own_head
from stepgraph.models.source import ModelSource
from stepgraph.models.tensor_names import native_name
from stepgraph.models.text_part import is_of_media
from stepgraph.models.transformers_config import TransformersConfig
from stepgraph.parallel.shard import Part

Update = Iterable[tuple[Target, CheckpointTensor]]
"""Where each tensor goes; names and shapes are checked, values are not read yet."""


class TensorInMemory(CheckpointTensor):
    """A tensor that somebody else has read."""

    def __init__(self, name: str, values: Tensor) -> None:
        self.name, self.shape = name, tuple(values.shape)
        self._values = values

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        return take(self._values, part).to(device).to(dtype)

    def stored(self, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.stored`; where the values are."""
        return take(self._values, part)


def plan_update(model: LanguageModel, source: ModelSource | Iterable[tuple[str, Tensor]]) -> Update:
    """Check that new weights fit a model, all of them, before any is written.

    Args:
        model: in use.
        source: a checkpoint of the same model, or all of its tensors under their names in transformers' checkpoints.

    Raises:
        ModelError: the weights are of another model, incomplete or of other shapes, or cannot be read.
    """
    tied = isinstance(model, Decoder) and model.config.tie_word_embeddings
    if isinstance(source, ModelSource):
        if _without_ends(source.config) != _without_ends(model.config):
            raise ModelError(
                f"{source.description} is of another model than the one that runs ({model.config.architecture}): their "
                "configs differ. Start another engine for it."
            )
        description = source.description
        tied = isinstance(source.config, DecoderConfig) and source.config.tie_word_embeddings
        tensors = source.tensors() if isinstance(model, Decoder) else _read_with_transformers(model, source)
    else:
        description = "given as tensors"
        own = ((name, values) for name, values in source if not is_of_media(name))
        given = (TensorInMemory(native_name(name), values) for name, values in own)
        tensors = join_convolutions(split_experts(given))
        if not isinstance(model, Decoder):
            raise ModelError(
                f"{model.config.architecture} runs through transformers, which renames and merges tensors as it reads a "
                "checkpoint; save the weights with save_pretrained and give the folder."
            )
    tensors = without_mtp(tensors)
    if isinstance(model, Decoder):
        tensors = [tensor for tensor in tensors if model.reads(tensor.name)]
        in_model = model.lm_head is not None
        if not in_model and has_own_head(tensors, tied=tied):
            raise ModelError(
                f"The checkpoint ({description}) has an output head of its own, and the model that runs uses its embedding "
                "table; a head cannot be added to graphs that are captured. Start another engine for it."
            )
        tensors = fit_head(tensors, tied=tied, in_model=in_model, description=description)
    return match_tensors(targets_of(model), tensors, description)


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
            if isinstance(target, Skipped):
                pass
            elif tensor.quantization is not None and tensor.quantization == quantization_of(target):
                target.copy_(tensor.packed(part_of(target)).to(device))
            else:
                target.copy_(tensor.load(target.dtype, device, values_part_of(target)))
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
    """Whether checkpoints may store a tensor that follows from the config."""
    return name.endswith("rotary_emb.inv_freq")


def targets_of(model: LanguageModel) -> dict[str, Target]:
    """What is to be filled of a model that is in use, by the names of its tensors."""
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
        model.config, source.folder, dtype=dtype, device=torch.device("cpu"), part=model.part, progress=False
    )
    values = {**dict(new.named_parameters(remove_duplicate=False)), **dict(new.named_buffers())}
    known = targets_of(model).keys() & values.keys()
    taken = {
        id(values[name]) for name in known
    }  # a head that is the embedding has two names, of which either model may lack one
    return [TensorInMemory(name, v) for name, v in values.items() if name in known or id(v) not in taken]


def _without_ends(config: LanguageModelConfig) -> LanguageModelConfig:
    """What two checkpoints of one model have in common: trained further, a model may end its answers otherwise, and what its
    config says of the output head is what its tensors are asked about."""
    if isinstance(config, TransformersConfig):
        return replace(config, eos_token_ids=(), hf_config=None)  # which holds the folder's name, for one
    assert isinstance(config, DecoderConfig), config
    return replace(config, eos_token_ids=(), tie_word_embeddings=False)


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
