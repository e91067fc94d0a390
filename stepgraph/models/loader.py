"""From a source to a model with its parameters filled, each exactly once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from tqdm import tqdm

from stepgraph.errors import ConfigError
from stepgraph.layers.experts import ALL_EXPERTS
from stepgraph.layers.formats import FP8, FourBit, Target, WeightFormat
from stepgraph.layers.matrix import Matrix
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.language_model import LanguageModel
from stepgraph.models.memory import check_fits, tell_of_dequantised
from stepgraph.models.mtp_tensors import without_mtp
from stepgraph.models.output_head import fit_head, has_own_head
from stepgraph.models.quantization import choose_formats, materialise, names_of_numbers
from stepgraph.models.random_weights import fill_randomly
from stepgraph.models.registry import ARCHITECTURES
from stepgraph.models.sharing import no_experts, shard_experts, spread_experts
from stepgraph.models.source import ModelSource
from stepgraph.models.transformers_config import TransformersConfig
from stepgraph.models.update import match_tensors, write_each
from stepgraph.parallel.group import Group
from stepgraph.parallel.shard import WHOLE, Shard

logger = logging.getLogger(__name__)


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    load_format: str = "auto",
    quantization: str | None = "auto",
    supports_fp8: bool = True,
    deterministic: bool = False,
    packed: bool = False,
    shard: Shard = WHOLE,
    group: Group | None = None,
    expert_group: Group | None = None,
    expert_parallel: bool = False,
    progress: bool = False,
) -> LanguageModel:
    """Build a model and fill it; see `create_model` and `fill` for arguments and errors."""
    model = create_model(
        source,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        load_format=load_format,
        quantization=quantization,
        supports_fp8=supports_fp8,
        deterministic=deterministic,
        packed=packed,
        shard=shard,
        group=group,
        expert_group=expert_group,
        expert_parallel=expert_parallel,
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
    quantization: str | None = "auto",
    supports_fp8: bool = True,
    deterministic: bool = False,
    packed: bool = False,
    shard: Shard = WHOLE,
    group: Group | None = None,
    expert_group: Group | None = None,
    expert_parallel: bool = False,
    exact_tokens: int | None = None,
    free_bytes: int | None = None,
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
        quantization: see `stepgraph.config.ModelConfig`.
        supports_fp8: whether the device can.
        deterministic: a token's result may not depend, bit for bit, on the tokens beside it.
        packed: keep the blocks of a quantised checkpoint where this machine has kernels for them; needs float32 on the CPU.
        shard: the part of the model to keep. To run a part takes a group.
        group: the ranks that share the model, whose `shard` says which part this one keeps.
        expert_group: ranks that share experts only, each with tokens of its own and all other weights; without `group`.
        expert_parallel: ranks keep whole experts each; else a part of every one.
        exact_tokens: products of more tokens with packed weights may round their operands, see `ops.packed_linear`.
        free_bytes: of memory on the device, which the weights must fit in; None: not known.
        progress: show a bar on stderr.

    Raises:
        DeviceMemoryError: the weights take more than that.
        ModelError: a model that transformers loads does not fit its checkpoint, or a file is damaged; or so many ranks cannot
            share the model.
        ConfigError: `deterministic`, `expert_parallel` or quantization "fp8" or "int4" of a model that only transformers runs,
            weights of 8 bits on a device that has none, or `expert_parallel` of a model without experts.
    """
    assert load_format in ("auto", "dummy"), load_format
    shard = shard if group is None else group.shard
    config = source.config
    if isinstance(config, TransformersConfig):
        if deterministic:
            raise ConfigError(
                f"deterministic=True needs a native model, and {config.architecture} would run through transformers, whose "
                "matrix products depend on the batch; choose a native model, or leave deterministic off"
            )
        if quantization in ("fp8", "int4"):
            raise ConfigError(
                f"quantization={quantization!r} needs a native model, and {config.architecture} would run through transformers, "
                "whose layers keep their weights; choose a native model, or leave quantization at auto"
            )
        if expert_parallel or expert_group is not None:
            raise no_experts(config.architecture, "which would run through transformers")
        assert group is not None or shard == WHOLE, "the trial of a part takes its group"
        from stepgraph.models.transformers_model import TransformersModel, judge_part

        dummy = load_format == "dummy"
        part = None if group is None else judge_part(config, group)
        num_parameters = config.num_parameters if part is None or dummy else part.num_parameters
        check_fits(num_parameters, num_parameters * dtype.itemsize, free_bytes, dtype=dtype, source=source)
        if dummy:
            return TransformersModel.with_random_weights(config, dtype=dtype, device=device, part=part)
        folder = source.folder
        return TransformersModel.from_folder(config, folder, dtype=dtype, device=device, part=part, progress=progress)
    assert isinstance(config, DecoderConfig), config
    tensors = [] if load_format == "dummy" else without_mtp(source.tensors())
    if config.tie_word_embeddings and has_own_head(tensors, tied=True):
        logger.warning(
            "%s: config.json says that the output head is the embedding table (tie_word_embeddings), but the checkpoint holds an "
            "lm_head.weight that differs from it, which is kept. Set tie_word_embeddings to false to say so.",
            source.description,
        )
        config = replace(config, tie_word_embeddings=False)
    if expert_group is None:
        expert_shard = shard_experts(config, shard, expert_parallel=expert_parallel)
    else:
        expert_shard = spread_experts(config, expert_group.shard)
    meta = torch.device("meta")
    model = ARCHITECTURES[config.architecture](
        config,
        max_model_len=max_model_len,
        shard=shard,
        expert_shard=expert_shard,
        group=group,
        expert_group=expert_group,
        dtype=dtype,
        device=meta,
    )
    choose_formats(
        model,
        tensors,
        keep=quantization not in ("none", None),
        round_to=quantization if quantization in ("fp8", "int4") else None,
        packed=packed,
        repacked=quantization == "auto" and device.type != "cpu",
        deterministic=deterministic,
        exact_tokens=exact_tokens,
    )
    if quantization == "int4":
        logger.warning(
            "%s: weights are rounded to 4 bits as they are read (quantization int4), with nothing to make up for it, which costs "
            "accuracy; a checkpoint that was quantised with calibration (AWQ, GPTQ) costs less.",
            source.description,
        )
    if not supports_fp8 and any(_has_e4m3(matrix.format) for matrix in _matrices(model)):
        raise ConfigError(
            f"weights or scales of 8 bits ({source.description}, quantization={quantization!r}) need a GPU of compute capability "
            "8.9 or later; use quantization='none', which keeps them in 16 bits"
        )
    if load_format != "dummy":
        matches = _match(model, tensors, source)  # before memory is taken for sizes that may be damaged
        numbers = names_of_numbers(model)
        tell_of_dequantised([match for match in matches if match[1].name not in numbers], source, warn=packed)
    parameters = list(model.parameters())
    nbytes = sum(parameter.nbytes for parameter in parameters)
    check_fits(sum(parameter.numel() for parameter in parameters), nbytes, free_bytes, dtype=dtype, source=source)
    materialise(model, device)
    return model.eval()


def fill(
    model: LanguageModel, source: ModelSource, *, load_format: str = "auto", progress: bool = False
) -> Iterator[None]:
    """Check that a checkpoint's tensors are those of a model from `create_model`, each once, and return an iterator that writes
    them, one at each step.

    Raises:
        ModelError: tensors are missing, left over or of another shape; or, while they are written, a file is damaged.
    """
    if not isinstance(model, Decoder):
        return iter(())  # filled as it was built
    if load_format == "dummy":
        return _fill_randomly(model)
    update = _match(model, without_mtp(source.tensors()), source)
    bar = tqdm(update, f"Loading {source.name}", unit=" tensors", disable=not progress, leave=False)
    return write_each(bar, on_host=fills_in_place(model))


def _match(
    model: Decoder, tensors: list[CheckpointTensor], source: ModelSource
) -> list[tuple[Target, CheckpointTensor]]:
    """Where each of a checkpoint's tensors goes in a model made for them; ModelError if they are not those of the model."""
    tied, in_model = model.config.tie_word_embeddings, model.lm_head is not None
    tensors = [tensor for tensor in tensors if model.reads(tensor.name)]
    fitting = fit_head(tensors, tied=tied, in_model=in_model, description=source.description)
    return match_tensors(model.checkpoint_tensors(), fitting, source.description)


def fills_in_place(model: LanguageModel, load_format: str = "auto") -> bool:
    """Whether `fill` allocates nothing on the device, so that graphs may be captured and memory be shared out meanwhile: so it
    is for native models whose weights are not rounded to 8 bits there, nor drawn there of which only a part is kept. Nor may it
    launch kernels of Triton, which are not run while others compile them ahead."""
    if not isinstance(model, Decoder):
        return False
    if load_format == "dummy" and (model.shard, model.expert_shard) != (WHOLE, ALL_EXPERTS):
        return False
    return all(matrix.format.base.fills_in_place for matrix in _matrices(model))


def _has_e4m3(format: WeightFormat) -> bool:
    return isinstance(format, FP8) or (isinstance(format, FourBit) and format.scale_dtype == torch.float8_e4m3fn)


def _matrices(model: Decoder) -> Iterator[Matrix]:
    return (module for module in model.modules() if isinstance(module, Matrix))


def _fill_randomly(model: Decoder) -> Iterator[None]:
    fill_randomly(model, model.embed_tokens.weight.device)
    yield
