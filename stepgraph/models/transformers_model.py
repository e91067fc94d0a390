"""Any decoder-only model that transformers can run, as it stands, under the step program.

transformers' class gets all tokens of the step as one sequence. Its layers treat tokens apart, but for attention, which is ours
(`transformers_interfaces`): it alone knows of rows, caches and windows. The class's Python runs at capture only, or at every
step without graphs.

What a model needs is not read from its config, whose fields differ from class to class, but seen: the class is built and run
once on tensors of shapes without values, under the recorder that captures steps on a CPU, and its calls of attention are noted.
What cannot be captured or is not supported shows there, before any weight is read.

Shapes: T tokens, R rows, E hidden size, V vocabulary, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepgraph import ops
from stepgraph.errors import CaptureError, ModelError
from stepgraph.graph.cpu import CpuBackend
from stepgraph.layers.cache import PagedCache, PagedSpec
from stepgraph.layers.inputs import AttentionSpec, StepInputs
from stepgraph.models.config import architecture_of, as_token_ids, check_attention
from stepgraph.models.text_part import alone, end_token_ids, is_run_apart, media_token_ids, text_config
from stepgraph.models.transformers_checks import (
    check_class,
    check_fields,
    check_last,
    explain,
    longest_sequence,
    without_dynamic_rope,
)
from stepgraph.models.transformers_config import TransformersConfig
from stepgraph.models.transformers_halves import class_of, run_head, run_layers, take_apart
from stepgraph.models.transformers_interfaces import (
    IMPLEMENTATIONS,
    REQUIREMENTS,
    AttentionCall,
    RefusalError,
    refuse,
)
from stepgraph.models.transformers_loading import read_checkpoint
from stepgraph.models.transformers_parts import ShapesOnly, keep_part, refuse_to_share
from stepgraph.parallel.group import Group
from stepgraph.parallel.shard import WHOLE

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 3


def judge(hf_config: Any) -> TransformersConfig:
    """Judge a transformers config object by running its model on tensors without values.

    Raises:
        ModelError: transformers has no class for it, or the class cannot run here; says what, why and what works.
    """
    if is_run_apart(hf_config):
        return replace(judge(alone(hf_config)), media_token_ids=media_token_ids(hf_config))
    try:
        return _judge(without_dynamic_rope(hf_config))
    except RefusalError as error:
        raise error.of(architecture_of(hf_config)) from error


@dataclass(frozen=True)
class ModelPart:
    """What a rank keeps of a model, made by `judge_part`."""

    group: Group
    attention_specs: tuple[AttentionSpec, ...]
    num_parameters: int


def judge_part(config: TransformersConfig, group: Group) -> ModelPart:
    """Judge whether ranks can share a model, by running a part of it on tensors without values.

    Raises:
        ModelError: transformers has no plan for the class, or one that cannot be followed, or so many ranks cannot share it.
    """
    trial = ShapesOnly(group.shard)
    try:
        calls, _, _, num_parameters = _probe(config.hf_config, lambda hf_model: keep_part(hf_model, config, trial))
        _check_layers(config.hf_config, calls)
    except RefusalError as error:
        refuse_to_share(config, f"cut by transformers' plan, {error.what}")
    heads = [(call.query.shape[1], call.key.shape[1]) for call in calls]
    whole = config.attention_specs
    ways = tuple(spec.sharded(group.shard) for spec in whole), whole  # some plans cut what is around attention only
    specs = next((way for way in ways if heads == [(spec.num_heads, spec.num_kv_heads) for spec in way]), None)
    if specs is None:
        refuse_to_share(config, f"cut by transformers' plan, {heads[0][0]} queries would attend to {heads[0][1]} keys")
    return ModelPart(group, specs, num_parameters)


def _judge(hf_config: Any) -> TransformersConfig:
    check_class(hf_config, _runs)
    check_attention(text_config(hf_config))
    check_fields(text_config(hf_config))
    calls, hidden_size, vocab_size, num_parameters = _probe(hf_config)
    _check_layers(hf_config, calls)
    check_last(hf_config)
    return TransformersConfig(
        architecture=architecture_of(hf_config),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        attention_specs=tuple(_spec(hf_config, call) for call in calls),
        has_biased_keys=any(call.is_biased for call in calls),
        max_position_embeddings=longest_sequence(text_config(hf_config)),
        eos_token_ids=as_token_ids(end_token_ids(hf_config)),
        media_token_ids=media_token_ids(hf_config),
        num_parameters=num_parameters,
        hf_config=hf_config,
    )


def _runs(hf_config: Any) -> bool:
    try:
        _judge(hf_config)
    except ModelError:
        return False
    return True


class TransformersModel(nn.Module):
    """A transformers class taken apart: its base model runs the layers, the rest of it makes logits. See `LanguageModel`."""

    def __init__(
        self,
        config: TransformersConfig,
        hf_model: Any,
        part: ModelPart | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        """Args:
        config: of the model.
        hf_model: built with our attention, and filled; must not be used elsewhere afterwards.
        part: of it that `hf_model` is; None: it is whole.
        device: of the parameters; None: where they are.

        Raises:
            ModelError: tokens meet outside attention.
        """
        super().__init__()
        self.config, self.part = config, part
        self.attention_specs = config.attention_specs if part is None else part.attention_specs
        self.base, self.head = take_apart(hf_model)
        self.to(device)
        self.eval().requires_grad_(False)
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.clone())  # loading leaves views, whose base a record would not know
        with nullcontext() if part is None else part.group.loop_back():
            self._check_tokens_apart()

    @property
    def group(self) -> Group | None:
        """See `LanguageModel.group`."""
        return None if self.part is None else self.part.group

    @property
    def dtype(self) -> torch.dtype:
        """See `LanguageModel.dtype`."""
        return next(self.parameters()).dtype

    @classmethod
    def from_folder(
        cls,
        config: TransformersConfig,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        part: ModelPart | None = None,
        progress: bool,
    ) -> TransformersModel:
        """Load a checkpoint the way transformers does, see `read_checkpoint`.

        Args:
            config: read from the folder.
            folder: with safetensors files.
            dtype: of parameters and activations.
            device: of the parameters, which go there through host memory.
            part: that this rank keeps on the device; all of the model is in host memory meanwhile. None: all of it.
            progress: show a bar on stderr.

        Raises:
            ModelError: the checkpoint's tensors are not those of the model, or a file is damaged.
        """
        hf_model = read_checkpoint(config, folder, dtype=dtype, progress=progress)
        if part is not None:
            keep_part(hf_model, config, part.group)
        return cls(config, hf_model, part, device=device)

    @classmethod
    def with_random_weights(
        cls, config: TransformersConfig, *, dtype: torch.dtype, device: torch.device, part: ModelPart | None = None
    ) -> TransformersModel:
        """Build a model with the weights that transformers begins training with, the same ones every time: whole, on the device,
        of which a rank then keeps its part."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            hf_model = _build(copy.deepcopy(config.hf_config), dtype)
        if part is not None:
            keep_part(hf_model, config, part.group)
        return cls(config, hf_model, part, device=device)

    @torch.no_grad()
    def _check_tokens_apart(self) -> None:
        """Refuse a model whose convolution, recurrence or token shift would mix the requests of a step, and miss what earlier
        steps saw: with attention out of the way, a token's hidden state must not change with its neighbours. One that counts
        positions itself, whatever it is given: at the same position, it must not change with its place in the step either. And
        one that counts them otherwise than from 0: where it counts by itself, it must come to the same."""
        device = next(self.parameters()).device

        def hidden(token_ids: list[int], positions_T: Tensor | None, place: int = 1) -> Tensor:
            token_ids_T = torch.tensor(token_ids, dtype=torch.int32, device=device) % self.config.vocab_size
            attend = lambda call: _filled(call.query, call.value.shape[-1]).transpose(1, 2).contiguous()  # noqa: E731
            return run_layers(self.base, token_ids_T, positions_T, attend)[place].float()

        positions_T = torch.arange(3, dtype=torch.int32, device=device)
        hidden_E = hidden([1, 2, 3], positions_T)
        for other_E, tolerance, what, instead in (
            (
                hidden([4, 2, 5], positions_T),
                1e-2,
                "its tokens meet outside attention, as in a convolution or a recurrence",
                "What runs are layers of attention and feed-forward.",
            ),
            (
                hidden([2, 4, 5], positions_T + 1, place=0),
                1e-2,
                "it counts positions by itself, from the first token of a step",
                "What runs are classes that take them as they are given.",
            ),
            (
                hidden([1, 2, 3], None),
                1e-5,  # the same numbers, computed in the same way
                "it does not count positions from 0, as RoBERTa does not, which leaves some for padding",
                "What runs are classes that do.",
            ),
        ):
            if not (hidden_E - other_E).norm() <= tolerance * hidden_E.norm():  # not for NaN either
                raise RefusalError(what, instead).of(self.config.architecture)

    def cache_specs(self, dtype: torch.dtype) -> tuple[PagedSpec, ...]:
        """See `LanguageModel.cache_specs`. ModelError if keys would lose what `dtype` cannot hold."""
        if self.config.has_biased_keys and dtype.itemsize < 2:
            raise ModelError(
                f"{self.config.architecture} cannot keep its keys in 8 bits, as they hold what is added to their scores; leave "
                "kv_cache_dtype at auto."
            )
        whole, part = self.config.attention_specs, self.part
        shard = WHOLE if part is None or self.attention_specs == whole else part.group.shard
        return tuple(
            PagedSpec.of(spec, dtype, shard.heads(of_all.num_kv_heads))
            for spec, of_all in zip(self.attention_specs, whole, strict=True)
        )

    def forward(self, inputs: StepInputs) -> Tensor:
        """See `LanguageModel.__call__`."""
        tokens = inputs.tokens

        def attend(call: AttentionCall) -> Tensor:
            cache: PagedCache = inputs.caches[call.number]
            spec = self.attention_specs[call.number]
            work, group = inputs.attention[spec], inputs.groups[cache.group]
            q_THD, k_TGD, v_TGD = (
                _filled(x, spec.head_dim).squeeze(0).transpose(0, 1) for x in (call.query, call.key, call.value)
            )
            k_TGD, v_TGD = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_TGD, v_TGD))
            ops.write_kv(k_TGD, v_TGD, group.tokens.kv_slots, cache.keys, cache.values)
            inputs.wrote(call.number)
            attended_TF = ops.paged_attention(
                q_THD.contiguous(),
                cache.keys,
                cache.values,
                group.block_table,
                tokens.row_slot,
                tokens.query_start,
                tokens.kv_len,
                work.plan,
                work.geometry,
                call.scale,
                spec.window,
                None if call.sinks is None else call.sinks.float(),
                call.softcap,
            )
            return attended_TF.view(1, *q_THD.shape)[..., : call.value.shape[-1]]

        return run_layers(self.base, tokens.token_ids, tokens.positions, attend)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """See `LanguageModel.embed`."""
        embedding_TE: Tensor = self.base.get_input_embeddings()(token_ids_T)  # type: ignore[operator]
        return embedding_TE

    def logits(self, hidden_RE: Tensor, out: Tensor) -> Tensor:
        """See `LanguageModel.logits`."""
        return out.copy_(run_head(self.head, hidden_RE))


def _filled(x: Tensor, size: int) -> Tensor:
    """With zeros behind the values of a head, or without its last values."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


class _Probed(NamedTuple):
    hidden: Tensor  # [T, E]
    logits: Tensor  # [T, V]


def _build(hf_config: Any, dtype: torch.dtype) -> Any:
    hf_class, method = class_of(hf_config)
    return getattr(hf_class, method)(hf_config, dtype=dtype, **IMPLEMENTATIONS)


def _probe(
    hf_config: Any, prepare: Callable[[Any], object] = lambda hf_model: None
) -> tuple[list[AttentionCall], int, int, int]:
    """Build the model and capture it on tensors without values: its calls of attention in the order of its layers, E, V and the
    number of its parameters. Reads no weights and takes no memory. Fake tensors would not do: where transformers' code sees one,
    it leaves out what it does with values.

    Args:
        hf_config: transformers' config object.
        prepare: changes the model first.
    """
    calls: list[AttentionCall] = []
    probed: list[_Probed] = []

    def record(call: AttentionCall) -> Tensor:
        calls.append(call)
        _, H, T, _ = call.query.shape
        return call.query.new_empty(1, T, H, call.value.shape[-1])

    try:
        with torch.device("meta"), torch.no_grad():
            plain = copy.deepcopy(hf_config)
            plain.__dict__.pop("quantization_config", None)
            hf_model = _build(plain, torch.bfloat16).eval()
            prepare(hf_model)
            base, head = take_apart(hf_model)
            parameters = {id(parameter): parameter for half in (base, head) for parameter in half.parameters()}
            num_parameters = sum(parameter.numel() for parameter in parameters.values())
            token_ids_T = torch.zeros(_PROBE_TOKENS, dtype=torch.int32)

            def run() -> _Probed:
                hidden_TE = run_layers(base, token_ids_T, token_ids_T, record)
                probed.append(_Probed(hidden_TE, run_head(head, hidden_TE)))
                return probed[-1]

            CpuBackend().capture(run, warmups=1)
    except ModelError:
        raise
    except CaptureError as error:
        raise RefusalError(f"its steps cannot be captured in graphs with this config: {error}", REQUIREMENTS) from error
    except Exception as error:  # code of some hundred models, not written for this
        logger.debug("%s cannot be probed", architecture_of(hf_config), exc_info=error)
        raise explain(error) from error
    return calls, probed[0].hidden.shape[-1], probed[0].logits.shape[-1], num_parameters


def _check_layers(hf_config: Any, calls: list[AttentionCall]) -> None:
    """Refuse a model whose layers are not all alike, or not all made of our attention."""
    num_layers = text_config(hf_config).num_hidden_layers
    if not calls:
        refuse(
            "its layers do not call transformers' AttentionInterface: they have attention of their own, or none, as recurrent "
            "layers do",
        )
    if len(calls) < num_layers or [call.number for call in calls] != list(range(len(calls))):
        refuse(f"{len(calls)} calls of attention came from its {num_layers} layers, where each must make one at least")
    for call in calls:
        (_, H, T, D), (_, G, _, _) = call.query.shape, call.key.shape
        if H % G or call.key.shape != (1, G, T, D) or call.value.shape[:3] != (1, G, T):
            refuse(
                f"a layer's queries, keys and values of {T} tokens are of shapes {tuple(call.query.shape)}, "
                f"{tuple(call.key.shape)} and {tuple(call.value.shape)}",
                "What runs is multi-head and grouped-query attention of tokens to themselves and earlier ones.",
            )
        if call.sinks is not None and call.sinks.shape != (H,):
            refuse(f"its sinks, of shape {tuple(call.sinks.shape)}, are not one for each of {H} query heads")


def _spec(hf_config: Any, call: AttentionCall) -> AttentionSpec:
    """Of a call. Where keys and values differ in size, the smaller are filled up with zeros."""
    size = max(call.query.shape[-1], call.value.shape[-1])
    heads, window = (call.query.shape[1], call.key.shape[1]), _window(hf_config, call)
    return AttentionSpec(*heads, size, size, window, call.softcap, call.sinks is not None)


def _window(hf_config: Any, call: AttentionCall) -> int:
    """Sliding window of a layer; 0 if it attends to all tokens. ModelError if layer and config disagree."""
    hf_config = text_config(hf_config)
    layer_types = getattr(hf_config, "layer_types", None)
    configured = getattr(hf_config, "sliding_window", None) or 0
    if layer_types and layer_types[call.layer] != "sliding_attention":
        configured = 0
    if not hasattr(hf_config, "sliding_window"):  # its name is another one, or its layers have none
        configured = call.window
    declared, configured = (
        window if window < longest_sequence(hf_config) else 0 for window in (call.window, configured)
    )
    if declared != configured and (declared or not layer_types):  # some layers leave their window to the mask
        refuse(
            f"layer {call.layer} attends over a window of {declared} tokens, but its config says {configured} (0: no window)",
            "Correct sliding_window or layer_types in config.json.",
        )
    return configured
