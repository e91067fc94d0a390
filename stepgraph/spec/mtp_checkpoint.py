"""Finding, reading and filling the modules of multi-token prediction, in the layouts in which they are published."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from stepgraph.config import EngineConfig
from stepgraph.errors import ConfigError, ModelError
from stepgraph.layers.experts import ExpertShard
from stepgraph.layers.formats import Packed, Plain, Target, WeightFormat
from stepgraph.layers.linear import Linear
from stepgraph.models.checkpoint import CheckpointTensor, take
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.language_model import LanguageModel
from stepgraph.models.mtp_tensors import mtp_names
from stepgraph.models.quantization import keep_fp8, materialise, pack_rounded
from stepgraph.models.random_weights import fill_randomly
from stepgraph.models.registry import ARCHITECTURES
from stepgraph.models.safetensors import read_safetensors
from stepgraph.models.sharing import check_shard
from stepgraph.models.source import PACKAGED, FolderSource, ModelSource, hub_folder
from stepgraph.models.transformers_config import TransformersConfig
from stepgraph.models.update import match_tensors, write
from stepgraph.parallel.shard import WHOLE, Part
from stepgraph.platforms import Platform
from stepgraph.spec.mtp import DraftHead, MTPDrafter, MTPLayer, MTPOptions

_ASSETS = Path(__file__).parents[1] / "assets"
_DRAFT_TOKEN_IDS = "draft_token_ids"
"""int32 tensor beside a module's: the part of the vocabulary that it was trained to propose from."""


@dataclass(frozen=True)
class _Layout:
    """How the makers of some models name the tensors of their modules. ``{}`` is a module's number."""

    parts: Mapping[str, str]  # submodules of `MTPLayer`, and their names; all may begin with "model."
    options: MTPOptions = MTPOptions()  # noqa: RUF009  (frozen)
    copies: tuple[str, ...] = ()  # tensors that are the model's own once more

    @property
    def shares_parts(self) -> bool:
        """Whether several modules would have the projection in common."""
        return "{}" not in self.parts["projection"]


_LAYOUTS = {
    # DeepSeek-V3, GLM-4.5: numbered as further layers. Pre-norm output is handed over (DeepSeek-V3 report, section 2.2).
    "DeepSeek": _Layout(
        {
            "embedding_norm": "layers.{}.enorm",
            "hidden_norm": "layers.{}.hnorm",
            "projection": "layers.{}.eh_proj",
            "block": "layers.{}",
            "norm": "layers.{}.shared_head.norm",
        },
        copies=("layers.{}.embed_tokens.weight", "layers.{}.shared_head.head.weight"),
    ),
    # As PaddleFormers trains it: from the residual stream, and through the model's own final norm.
    "ERNIE": _Layout(
        {
            "embedding_norm": "mtp_emb_norm.{}",
            "hidden_norm": "mtp_hidden_norm.{}",
            "projection": "mtp_linear_proj.{}",
            "block": "mtp_block.{}",
        },
        MTPOptions(shares_final_norm=True),
    ),
    "MiMo": _Layout(
        {
            "embedding_norm": "mtp_layers.{}.token_layernorm",
            "hidden_norm": "mtp_layers.{}.hidden_layernorm",
            "projection": "mtp_layers.{}.input_proj",
            "block": "mtp_layers.{}",
            "norm": "mtp_layers.{}.final_layernorm",
        },
        MTPOptions(hidden_first=True, hands_over_normalised=True),
    ),
    "Qwen3-Next": _Layout(
        {
            "embedding_norm": "mtp.pre_fc_norm_embedding",
            "hidden_norm": "mtp.pre_fc_norm_hidden",
            "projection": "mtp.fc",
            "block": "mtp.layers.{}",
            "norm": "mtp.norm",
        },
        MTPOptions(hands_over_normalised=True),
        copies=("mtp.embed_tokens.weight", "mtp.lm_head.weight"),
    ),
}


class _Found(NamedTuple):
    """Modules in a checkpoint."""

    layout: _Layout
    prefix: str  # of all names
    numbers: list[int]
    tensors: list[CheckpointTensor]
    draft_token_ids: CheckpointTensor | None
    description: str


def load_mtp(
    config: EngineConfig,
    source: ModelSource,
    model: LanguageModel,
    platform: Platform,
    *,
    max_model_len: int,
    progress: bool = False,
) -> MTPDrafter:
    """Build and fill the modules that draft for a model.

    They come from the checkpoint that `speculative_model` names, else from the model's own, else from those that ship with this
    package. With `load_format` "dummy", they are as many as the model's config says, at least one, with random weights.

    Args:
        config: of the engine.
        source: of the model.
        model: filled.
        platform: where it runs.
        max_model_len: longest sequence, in tokens.
        progress: show a bar on stderr.

    Raises:
        ConfigError: there is no module for this model, or none that can be run.
        ModelError: tensors are not what they should be (missing, left over, of another shape), a file is damaged, or so many
            ranks cannot share the module.
    """
    layer_config = _layer_config(model)
    read: Callable[[], _Found] | None = None
    options, num_modules, num_draft_ids = MTPOptions(), max(1, layer_config.num_mtp_modules), 0
    if config.model.load_format != "dummy":
        read = partial(_read, config, source)
        found = read()
        layer_config = _with_mixture(layer_config, found)
        options, num_modules = found.layout.options, len(found.numbers)
        num_draft_ids = found.draft_token_ids.shape[0] if found.draft_token_ids else 0
    shard = WHOLE if model.group is None else model.group.shard
    expert_shard = model.expert_shard if isinstance(model, Decoder) else ExpertShard(inner=shard)
    # A module beside experts may be dense, for one.
    check_shard(layer_config, shard, expert_parallel=expert_shard.experts != WHOLE)
    layers = [
        MTPLayer(
            layer_config,
            options,
            max_model_len=max_model_len,
            shard=shard,
            expert_shard=expert_shard,
            group=model.group,
            expert_group=model.expert_group if isinstance(model, Decoder) else None,
            dtype=model.dtype,
            device=torch.device("meta"),
        ).eval()
        for _ in range(num_modules)
    ]
    modules = model.modules() if isinstance(model, Decoder) else ()
    formats = (module.format.base for module in modules if isinstance(module, Linear))
    packed = next((format for format in formats if isinstance(format, Packed)), None)
    if packed is not None and read is not None:  # beside a model in blocks, float32 would take most of the time
        for layer in layers:
            pack_rounded(layer, exact_tokens=packed.exact_tokens)
    elif read is not None and platform.supports_fp8 and config.model.quantization not in ("none", None):
        for layer, number in zip(layers, found.numbers, strict=True):
            keep_fp8(layer, found.tensors, partial(_stored_name, found, number), merged=layer_config.merged_projections)
    for layer in layers:
        materialise(layer, platform.device)
    max_rows = config.scheduler.max_num_seqs
    head = None
    shares_head = model.group is not None and len(_head_weight(model)[1]) < layer_config.vocab_size
    if num_draft_ids and not shares_head:  # where no rank has all rows to choose from, modules propose any token
        size = (max_rows, layer_config.vocab_size)
        logits_RV = torch.full(size, -torch.inf, dtype=model.dtype, device=platform.device)
        head = DraftHead(num_draft_ids, layer_config.hidden_size, _head_weight(model)[0], logits_RV)
    _fill(layers, head, model, read, progress=progress)
    fill = partial(_fill, layers, head, model, read, progress=False)
    return MTPDrafter(layers, model, head, fill, max_rows=max_rows, platform=platform)


@torch.no_grad()
def _fill(
    layers: list[MTPLayer],
    head: DraftHead | None,
    model: LanguageModel,
    read: Callable[[], _Found] | None,
    *,
    progress: bool,
) -> None:
    """Fill modules and head, from what `read` finds, or randomly."""
    if read is None:
        for layer in layers:
            fill_randomly(layer, layer.projection.weight.device)
        return
    found = read()
    update = match_tensors(_targets(found, layers), _dequantised(found.tensors), found.description)
    write(tqdm(update, "Loading draft modules", unit=" tensors", disable=not progress, leave=False))
    for layer in layers:
        if layer.options.shares_final_norm:
            layer.norm.weight.copy_(_final_norm(model))
    if head is not None:
        assert found.draft_token_ids is not None
        head.fill(_head_weight(model)[1], _token_ids(found, len(head.token_ids), model.config.vocab_size))


def _read(config: EngineConfig, source: ModelSource) -> _Found:
    """The modules for a model, from wherever they are."""
    given = config.speculative.speculative_model
    places: list[tuple[str, Callable[[], Any]]] = []
    if given is not None:
        folder = _folder(given)
        places.append((str(folder), partial(read_safetensors, folder)))
    else:
        if isinstance(source, FolderSource):
            places.append((source.description, source.tensors))
        packaged = _packaged(source.name)
        if packaged is not None:
            places.append((str(packaged), partial(read_safetensors, packaged)))
    for description, tensors in places:
        if found := _find(list(tensors()), description):
            return found
    if given is not None:
        raise ConfigError(
            f'speculative_config: the checkpoint "{given}" holds no module for multi-token prediction. Known are the layouts of '
            f'{", ".join(_LAYOUTS)}. Give one that does, or choose the method "suffix" or "ngram", which need none.'
        )
    raise ConfigError(
        f'speculative_config: {source.description} holds no module for multi-token prediction, which the method "mtp" needs. '
        'Name a checkpoint that does ("model": a folder or hub id), or choose the method "suffix" or "ngram", which need none.'
    )


def _folder(name: str) -> Path:
    """Folder of the checkpoint that `speculative_model` names. It may lack a config, unlike that of a model."""
    path = Path(name).expanduser()
    if (packaged := _packaged(name)) is not None:
        return packaged
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or name.startswith((".", "~")):
        raise ConfigError(
            f'speculative_config: "model": {name!r} is not a folder; give a folder with safetensors files, or a hub id'
        )
    return hub_folder(name, weights=True)


def _packaged(name: str) -> Path | None:
    """Folder of the modules that ship for a packaged model."""
    folder = _ASSETS / f"{name}_mtp"
    return folder if name in PACKAGED and folder.is_dir() else None


def _find(tensors: list[CheckpointTensor], description: str) -> _Found | None:
    """The modules in a checkpoint, if there are any."""
    names = mtp_names(tensor.name for tensor in tensors)
    for layout in _LAYOUTS.values():
        projection, block = (
            re.compile(r"(model\.)?" + re.escape(layout.parts[part]).replace(r"\{\}", r"(?P<number>\d+)") + r"\.")
            for part in ("projection", "block")
        )
        mark = next((match for name in names if (match := projection.match(name))), None)
        if mark is None:
            continue
        numbers = sorted({int(match["number"]) for name in names if (match := block.match(name))})
        copies = {f"{mark[1] or ''}{copy.format(number)}" for copy in layout.copies for number in numbers}
        return _Found(
            layout,
            mark[1] or "",
            numbers[:1] if layout.shares_parts else numbers,
            [tensor for tensor in tensors if tensor.name in names - copies],
            next((tensor for tensor in tensors if tensor.name == _DRAFT_TOKEN_IDS), None),
            description,
        )
    return None


def _targets(found: _Found, layers: list[MTPLayer]) -> dict[str, Target]:
    """Where each tensor of the modules goes, by its name in the checkpoint."""
    targets = {}
    for layer, number in zip(layers, found.numbers, strict=True):
        for name, target in layer.checkpoint_tensors().items():
            targets[_stored_name(found, number, name)] = target
    return targets


def _stored_name(found: _Found, number: int, name: str) -> str:
    """The name in the checkpoint of a module's tensor."""
    part, _, rest = name.partition(".")
    return f"{found.prefix}{found.layout.parts[part].format(number)}.{rest}"


class _Scaled(CheckpointTensor):
    """A matrix stored as int8, with a scale for each row."""

    def __init__(self, values: CheckpointTensor, scale: CheckpointTensor) -> None:
        self.name, self.shape = values.name, values.shape
        self._values, self._scale = values, scale

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        values = self._values.stored(part).to(device)
        scale = take(self._scale.load(torch.float32, device).view(-1), part and part.along_rows())
        return (values.float() * scale.view(-1, 1)).to(dtype)


def _dequantised(tensors: list[CheckpointTensor]) -> list[CheckpointTensor]:
    """The tensors with those that others scale (``<name>_scale``) taken together with their scales."""
    by_name = {tensor.name: tensor for tensor in tensors}
    scales = {name: by_name[f"{name}_scale"] for name in by_name if f"{name}_scale" in by_name}
    used = {scale.name for scale in scales.values()}
    return [
        _Scaled(tensor, scales[tensor.name]) if tensor.name in scales else tensor
        for tensor in tensors
        if tensor.name not in used
    ]


def _token_ids(found: _Found, num_ids: int, vocab_size: int) -> Tensor:
    """The part of the vocabulary that is proposed from: [N] int64 on the CPU."""
    assert found.draft_token_ids is not None
    ids_N = found.draft_token_ids.load(torch.int64, torch.device("cpu"))
    if ids_N.shape != (num_ids,) or not 0 <= int(ids_N.min()) <= int(ids_N.max()) < vocab_size:
        raise ModelError(
            f"{_DRAFT_TOKEN_IDS} in {found.description} must be one list of token ids of the model's vocabulary, 0 to "
            f"{vocab_size - 1}; it has shape {list(ids_N.shape)} and ids from {int(ids_N.min())} to {int(ids_N.max())}."
        )
    return ids_N


def may_draft(config: DecoderConfig) -> bool:
    """Whether layers like the model's last can be modules: of what they take, all are hidden states, and keys and values of their
    own."""
    last = config.last_attention
    return last is not None and not config.per_layer_inputs and config.sizes(last).keys_and_values.shares is None


def _layer_config(model: LanguageModel) -> DecoderConfig:
    """What the decoder layer of a module is like: the model's own last layer."""
    config = model.config
    if isinstance(config, TransformersConfig) and config.architecture in ARCHITECTURES:
        config = ARCHITECTURES[config.architecture].config_from_hf(config.hf_config)
    if isinstance(config, DecoderConfig):
        if may_draft(config):
            return config
        raise ConfigError(
            f'speculative_config: the method "mtp" knows no modules for this {config.architecture}, whose layers take more than '
            'hidden states: of the tokens, or of other layers. Choose the method "suffix" or "ngram".'
        )
    raise ConfigError(
        f'speculative_config: the method "mtp" knows no modules for {config.architecture}, which runs through transformers. It '
        'knows those of native models; elsewhere, choose the method "suffix" or "ngram".'
    )


def _with_mixture(config: DecoderConfig, found: _Found) -> DecoderConfig:
    """With layers that have experts if the module in a checkpoint has any, and are dense else: beside models with experts,
    there are modules of either kind."""
    experts = sorted(tensor.name for tensor in found.tensors if re.search(r"\.(?:mlp|moe)\.experts\.", tensor.name))
    mixture = next((mixture for mixture in reversed(config.mixtures) if mixture is not None), None)
    if experts and mixture is None:
        raise ConfigError(
            f"speculative_config: the module in {found.description} has a mixture of experts ({experts[0]}, …), and the model, a "
            f"{config.architecture}, has none. Give a module that was trained for it, or choose the method "
            '"suffix" or "ngram", which need none.'
        )
    return replace(config, mixtures=(mixture if experts else None,) * config.num_layers)


def _final_norm(model: LanguageModel) -> Tensor:
    """Weight of the norm before the model's output head."""
    module = model.norm if isinstance(model, Decoder) else model.base.norm  # type: ignore[attr-defined]
    return module.weight


def _head_weight(model: LanguageModel) -> tuple[WeightFormat, Tensor]:
    """Of the model's output head: format and matrix, [V, E] or its blocks, scaled so that products with it are logits."""
    if isinstance(model, Decoder):
        if model.config.logits_divisor != 1.0:
            return Plain(), model.head.values() / model.config.logits_divisor
        return model.head.format if isinstance(model.head.format, Packed) else Plain(), model.head.weight
    from stepgraph.models.transformers_model import TransformersModel

    assert isinstance(model, TransformersModel), model
    return Plain(), model.head.get_output_embeddings().weight  # type: ignore[operator]
