"""What a native decoder needs to know about itself, taken from a transformers config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch

from stepgraph.errors import ModelError
from stepgraph.layers.attention import OWN_KEYS_AND_VALUES, KeysAndValues, QueryScaling
from stepgraph.layers.experts import ExpertsSpec
from stepgraph.layers.gated_delta import DeltaSizes
from stepgraph.layers.inputs import AttentionSpec
from stepgraph.layers.latent_attention import LatentSizes
from stepgraph.layers.mamba2 import MambaSizes
from stepgraph.layers.mlp import Activation
from stepgraph.layers.per_layer_inputs import PerLayerSizes
from stepgraph.layers.rotary import RotaryFrequencies, rotary_frequencies
from stepgraph.layers.short_conv import ConvSizes
from stepgraph.models.fp8_checkpoint import READABLE, refusal

FULL, LINEAR = "full_attention", "linear_attention"
"""Types of layers, in transformers' words."""
_SLIDING, _CONV = "sliding_attention", "conv"
_WITH_STATES = {
    **dict.fromkeys(
        ("OlmoHybridForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"), LINEAR
    ),
    **dict.fromkeys(("Lfm2ForCausalLM", "Lfm2MoeForCausalLM"), _CONV),
}
"""Classes whose layers that carry a state are native, and the type of these: gated delta rules or short convolutions."""
_LISTING_KINDS = frozenset(
    ("BambaForCausalLM", "FalconH1ForCausalLM", "GraniteMoeHybridForCausalLM", "NemotronHForCausalLM")
)
"""Classes that check the types of their layers themselves."""
_LATENT = frozenset(
    (
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "MiniCPM3ForCausalLM",
        "YoutuForCausalLM",
    )
)
"""Classes whose multi-head latent attention is native."""
_SCALING_QUERIES = ("Ministral3ForCausalLM",)
"""Classes that multiply queries by a function of their position."""
_SCALED_QUERIES = "its queries are multiplied by a function of their position (llama_4_scaling_beta)"
_BESIDE_LATENTS = {
    "KimiLinearForCausalLM": "most of its layers are recurrent, with a decay for each dimension, and those with latent attention "
    "rotate nothing",
    "LongcatFlashForCausalLM": "its layers attend twice, its latents are multiplied, and some of its experts pass tokens through",
    "Mistral4ForCausalLM": _SCALED_QUERIES,
}
"""What, beside latents, has no native code in classes that transformers knows."""
_WITH_EXPERTS = frozenset(
    (
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Dots1ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "Gemma4ForCausalLM",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GptOssForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "Lfm2MoeForCausalLM",
        "MixtralForCausalLM",
        "NemotronHForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3_5MoeForCausalLM",
    )
)
"""Classes whose mixtures of experts are native."""
_CAPPING = ("Gemma2ForCausalLM", "VaultGemmaForCausalLM")
"""Classes that cap attention scores and logits."""
_GEMMA4 = ("Gemma4ForCausalLM", "Gemma4UnifiedForCausalLM")
"""Classes of which final logits may be capped, and whose configs say "vision" where images' tokens alone see later ones."""
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class PartMultipliers:
    """Of what parts of a layer add to the residual stream, beside that of all of them, and of what gates of feed-forward take."""

    attention: float = 1.0
    state: float = 1.0
    mlp: float = 1.0
    mlp_gate: float = 1.0


@dataclass(frozen=True)
class LayerSizes:
    """What may differ from layer to layer."""

    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of what all tokens take
    keys_and_values: KeysAndValues = OWN_KEYS_AND_VALUES


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a Llama-like decoder; those with a default are as in Llama."""

    architecture: str  # class name in transformers, e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # with latent attention, of what is rotated
    rms_norm_eps: float
    ropes: tuple[RotaryFrequencies, ...]  # per layer
    max_position_embeddings: int  # longest sequence the model was made for, in tokens
    tie_word_embeddings: bool  # the output head is the embedding table
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm of each query and key head
    windows: tuple[int, ...]  # per layer: last keys a token sees, its own included; 0: all
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: torch.dtype  # of the checkpoint's matrices; bfloat16 for quantised ones
    activation: Activation = "silu"  # of the feed-forward gate
    attention_scale: float | None = None  # multiplies q·k; None: head_dim ** -0.5
    query_scaling: QueryScaling | None = None  # by position
    attention_softcap: float = 0.0  # of attention's scores, see `AttentionSpec`
    attention_sinks: bool = False  # see `AttentionSpec`
    norm_weight_offset: float = 0.0  # what the weights of norms lack in the checkpoint; see `RMSNorm`
    norms_round_once: bool = False  # see `RMSNorm`
    output_norms: bool = False  # RMS norm of what attention and feed-forward add to the residual stream
    mlp_norm: str = "post_attention_layernorm"
    """Without `output_norms`, what checkpoints call the norm before feed-forward."""
    only_output_norms: bool = False  # in layers with attention, in place of norms of what they read
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and feed-forward add to the residual stream
    logits_divisor: float = 1.0
    logits_softcap: float = 0.0  # logits x become softcap · tanh(x / softcap); 0: they stay
    layers: tuple[LayerSizes, ...] = ()  # per layer, where they differ; empty: they do not
    layer_scalars: bool = False  # the residual stream is multiplied by a number of each layer, after it
    per_layer_inputs: PerLayerSizes | None = None  # what each layer takes beside the residual stream
    interleaved_rope: bool = False  # the checkpoint rotates adjacent dimensions; see `rotary_order`
    merged_projections: bool = False  # the checkpoint stores qkv_proj and gate_up_proj as one matrix each
    mixtures: tuple[
        ExpertsSpec | None, ...
    ] = ()  # per layer: of its experts, None if it has none; empty: no layer has any
    joint_qk_norm: bool = False  # RMS norm of all queries together, and of all keys
    output_gate: bool = False  # what attention gives is gated, see `Attention`
    delta: DeltaSizes | None = None  # of layers with gated delta rules in place of attention
    short_conv: ConvSizes | None = None  # of layers with short convolutions in place of attention
    mamba: MambaSizes | None = None  # of layers with Mamba-2 in place of attention, or beside it
    is_recurrent: tuple[bool, ...] = ()  # per layer: whether it has one of these three; empty: none has
    attends: tuple[bool, ...] = ()  # per layer: whether it has attention; empty: those that are not recurrent have
    feeds_forward: tuple[bool, ...] = ()  # per layer: whether it has a feed-forward layer; empty: all have
    part_multipliers: PartMultipliers = PartMultipliers()
    latent: LatentSizes | None = None  # of multi-head latent attention, instead of grouped-query attention
    num_mtp_modules: int = (
        0  # modules for speculative decoding that the model was trained with, see `stepgraph.spec.mtp`
    )
    media_token_ids: tuple[int, ...] = ()  # see `LanguageModelConfig.media_token_ids`

    @property
    def kinds_of_mlp(self) -> set[ExpertsSpec | None]:
        """Mixtures of the layers; None among them if there are layers that all tokens take."""
        return {self.mixture(layer) for layer in range(self.num_layers) if self.has_mlp(layer)}

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """Of every layer that has attention."""
        return tuple(self.attention_spec(layer) for layer in range(self.num_layers) if self.has_attention(layer))

    def attention_spec(self, layer: int) -> AttentionSpec:
        """Of a layer that has attention."""
        if self.latent is not None:
            return self.latent.spec(self.num_heads)
        sizes = self.sizes(layer)
        return AttentionSpec(
            self.num_heads,
            sizes.num_kv_heads,
            sizes.head_dim,
            sizes.head_dim,
            self.windows[layer],
            self.attention_softcap,
            self.attention_sinks,
        )

    def sizes(self, layer: int) -> LayerSizes:
        """Of a layer."""
        if self.layers:
            return self.layers[layer]
        return LayerSizes(self.num_kv_heads, self.head_dim, self.intermediate_size)

    def has_state(self, layer: int) -> bool:
        """Whether a layer carries a state: of a gated delta rule, of short convolutions, or of Mamba-2."""
        return bool(self.is_recurrent) and self.is_recurrent[layer]

    def has_attention(self, layer: int) -> bool:
        """Whether a layer has attention."""
        return self.attends[layer] if self.attends else not self.has_state(layer)

    def has_mlp(self, layer: int) -> bool:
        """Whether a layer has a feed-forward layer, of experts or not."""
        return not self.feeds_forward or self.feeds_forward[layer]

    @property
    def last_attention(self) -> int | None:
        """The last layer that has attention, which draft modules are like; None: none has."""
        return next((layer for layer in reversed(range(self.num_layers)) if self.has_attention(layer)), None)

    def norms(self, layer: int) -> tuple[bool, bool]:
        """Whether a layer normalises what its parts read, and what they add."""
        if self.only_output_norms and not self.has_state(layer):
            return False, True
        return True, self.output_norms

    def mixture(self, layer: int) -> ExpertsSpec | None:
        """The experts of a layer; None of one that all tokens take."""
        return self.mixtures[layer] if self.mixtures else None

    @classmethod
    def from_hf(
        cls,
        hf_config: Any,
        *,
        qkv_bias: bool,
        output_bias: bool,
        qk_norm: bool = False,
        partial_rope: bool = False,
        layer_types: Sequence[str] | None = None,
        head_dims: Mapping[str, int] | None = None,
    ) -> DecoderConfig:
        """Read a transformers (>= 5.10) config object that passed `check_supported`.

        Args:
            hf_config: of the model.
            qkv_bias, output_bias, qk_norm: what follows from the model's class and not from fields of its config. Options
                that have a default are set by `dataclasses.replace`.
            partial_rope: whether the model's class rotates a part of each head where its config asks for it.
            layer_types: of the layers, in transformers' words; None: as the config says.
            head_dims: by type of layer, where heads differ in size.

        Raises:
            ModelError: the rope settings are unsupported.
        """
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
        layer_types = _layer_types_of(hf_config) if layer_types is None else layer_types
        one_rope = "rope_theta" in hf_config.rope_parameters  # else one for each type of layer
        dims = dict.fromkeys(layer_types, head_dim) if head_dims is None else head_dims
        ropes = {kind: rotary_frequencies(hf_config, D, None if one_rope else kind) for kind, D in dims.items()}
        if not partial_rope and any(2 * len(rope.inv_freq) != dims[kind] for kind, rope in ropes.items()):
            raise ModelError(
                f"The config asks to rotate only a part of each head (partial_rotary_factor in {hf_config.rope_parameters}); "
                f"a {architecture_of(hf_config)} rotates whole heads. Remove partial_rotary_factor from config.json."
            )
        window = getattr(hf_config, "sliding_window", None) or 0
        if window >= hf_config.max_position_embeddings:
            window = 0
        return cls(
            architecture=architecture_of(hf_config),
            vocab_size=hf_config.vocab_size,
            hidden_size=hf_config.hidden_size,
            intermediate_size=getattr(hf_config, "intermediate_size", 0),  # none where all layers have experts
            num_layers=hf_config.num_hidden_layers,
            num_heads=hf_config.num_attention_heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_dim=head_dim,
            rms_norm_eps=hf_config.rms_norm_eps,
            ropes=tuple(ropes[kind] for kind in layer_types),
            max_position_embeddings=hf_config.max_position_embeddings,
            tie_word_embeddings=hf_config.tie_word_embeddings,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            mlp_bias=getattr(hf_config, "mlp_bias", False),
            qk_norm=qk_norm,
            windows=tuple(window if kind == _SLIDING else 0 for kind in layer_types),
            is_recurrent=states if any(states := tuple(kind in (LINEAR, _CONV) for kind in layer_types)) else (),
            eos_token_ids=as_token_ids(hf_config.eos_token_id),
            bos_token_id=hf_config.bos_token_id,
            dtype=_as_dtype(getattr(hf_config, "dtype", None)),
            activation=_ACTIVATIONS[_activation_of(hf_config)],
            num_mtp_modules=getattr(hf_config, "num_nextn_predict_layers", None) or 0,
        )


class ConfigFileError(ModelError):
    """A config.json is wrong, whoever's code is to run its model."""


def architecture_of(hf_config: Any) -> str:
    """Name of the transformers class that a config belongs to; ModelError if it names none."""
    if not hf_config.architectures:
        raise ModelError('The model\'s config.json has no "architectures", so its class is unknown.')
    return str(hf_config.architectures[0])


def as_token_ids(value: Any, where: object = "config.json") -> tuple[int, ...]:
    """The eos_token_id of a file, which may be absent, one id, or a list; ModelError if it is something else."""
    if value is None:
        return ()
    values = value if isinstance(value, list | tuple) else (value,)
    if all(isinstance(v, int | float) and not isinstance(v, bool) and v == v // 1 for v in values):
        return tuple(map(int, values))
    raise ModelError(
        f"eos_token_id is {value!r:.80} in {where}; it must be a token id, a whole number, or a list of them."
    )


def check_attention(hf_config: Any) -> None:
    """Raise ModelError if a model's attention is of a kind that has no cache here."""
    native = ", ".join(sorted(_LATENT))
    if number := getattr(hf_config, "index_topk", None):
        _refuse(
            hf_config,
            f"its attention is indexed: an indexer with keys of its own chooses the {number} keys that a query attends to "
            "(index_topk), and here queries attend to all keys",
            f"Models of the classes {native} run, DeepSeek-V3, R1 and V3.1 among them.",
        )


def _refuse(hf_config: Any, what: str, instead: str) -> NoReturn:
    raise ModelError(f"{getattr(hf_config, 'model_type', None) or 'This'} model cannot run: {what}. {instead}")


def check_supported(hf_config: Any) -> None:
    """Raise ModelError, saying what, why and what works instead, if native decoders cannot run this model."""

    def field(name: str) -> Any:
        return getattr(hf_config, name, None)

    refuse = partial(_refuse, hf_config)
    if field("vision_config") or field("audio_config") or field("text_config"):
        refuse(
            "it is multimodal",
            "Text-only decoders are supported, and the text parts of classes that docs/models.md lists.",
        )
    check_attention(hf_config)  # before experts, which are not what is in the way
    if field("kv_lora_rank") and architecture_of(hf_config) not in _LATENT:
        refuse(
            f"its attention is multi-head latent attention (kv_lora_rank = {field('kv_lora_rank')}), and "
            f"{_BESIDE_LATENTS.get(architecture_of(hf_config), f'no native model is a {architecture_of(hf_config)}')}",
            f"Latent attention is native in {', '.join(sorted(_LATENT))}. To add a model, see docs/adding-a-model.md.",
        )
    scales_queries = architecture_of(hf_config) in _SCALING_QUERIES
    if (field("rope_parameters") or {}).get("llama_4_scaling_beta") and not scales_queries:
        refuse(_SCALED_QUERIES, f"Models that do not scale them are supported, and {', '.join(_SCALING_QUERIES)}.")
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if field(name) and architecture_of(hf_config) not in _WITH_EXPERTS:
            refuse(
                f"it is a mixture of experts ({name} = {field(name)}), and {architecture_of(hf_config)} is none of the classes "
                "whose experts native models have",
                f"Dense decoders are supported, and {', '.join(sorted(_WITH_EXPERTS))}.",
            )
    sees_ahead = field("use_bidirectional_attention")
    if architecture_of(hf_config) in _GEMMA4 and sees_ahead == "vision":
        sees_ahead = None
    if field("is_encoder_decoder") or sees_ahead or field("is_causal") is False:
        refuse("its attention is not causal", "Decoder-only causal models are supported.")
    recurrent = _WITH_STATES.get(architecture_of(hf_config))
    known, listed = {FULL, recurrent or _SLIDING}, set(field("layer_types") or ())
    if architecture_of(hf_config) in _LISTING_KINDS:
        listed = set()
    if odd := sorted(listed - known):
        refuse(
            f"it has layers of type {', '.join(odd)}", f"Layers of type {' and '.join(sorted(known))} are supported."
        )
    if listed == {recurrent}:
        refuse(
            f"all its layers are of type {recurrent}, and at least one must be {FULL}",
            "Correct config.json, or download it again.",
        )
    if _SLIDING in listed and not field("sliding_window"):
        refuse(
            f"it has layers of type {_SLIDING}, but its sliding_window is {field('sliding_window')}",
            'Give "sliding_window" a number of tokens in config.json, or make all layers full_attention.',
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        capping = _CAPPING if name == "attn_logit_softcapping" else _CAPPING + _GEMMA4
        if field(name) and architecture_of(hf_config) not in capping:
            refuse(
                f"it caps logits ({name} = {field(name)})",
                f"Models without soft-capping are supported, and {' and '.join(capping)}.",
            )
    if _activation_of(hf_config) not in _ACTIVATIONS:
        refuse(
            f'its feed-forward activation is "{_activation_of(hf_config)}"',
            f"{' and '.join(_ACTIVATIONS)} are supported.",
        )


def check_mixtures(config: DecoderConfig) -> None:
    """Raise ConfigFileError, naming the number of config.json that is wrong, if experts cannot be chosen as it says."""
    for spec in filter(None, dict.fromkeys(config.mixtures)):
        routing, size = spec.routing, spec.num_experts // max(1, spec.routing.groups)
        limits = {
            "the number of experts": (spec.num_experts, 1, None),
            "the number of groups of experts": (routing.groups, 1, spec.num_experts),
            "the number of groups that a token's experts are of": (routing.kept_groups, 1, routing.groups),
            "the number of experts per token": (
                routing.top,
                1,
                spec.num_experts if routing.groups == 1 else size * routing.kept_groups,
            ),
            "the width of an expert": (spec.intermediate_size, 1, None),
            "the width of what experts take": (spec.latent_size, 0, None),
            "the width of the experts that all tokens take": (spec.shared_intermediate_size, 0, None),
        }
        for what, (number, least, most) in limits.items():
            if number < least or (most is not None and number > most):
                raise ConfigFileError(
                    f"{what[0].upper()}{what[1:]} is {number} in the config of this {config.architecture}, and must be at least "
                    f"{least}{'' if most is None else f' and at most {most}'}. Correct config.json, or download it again."
                )
        if routing.groups > 1 and (spec.num_experts % routing.groups or size < routing.group_top):
            raise ConfigFileError(
                f"The {spec.num_experts} experts of this {config.architecture} cannot be split into {routing.groups} groups: "
                f"groups must be equal, of at least {routing.group_top}. Correct config.json, or download it again."
            )


def check_quantization(hf_config: Any) -> None:
    """Raise ModelError, saying what is read instead, if a native model's weights are stored in a way that is not."""
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization and (reason := refusal(quantization)):
        raise ModelError(f"The weights of this {architecture_of(hf_config)} cannot be read: {reason}. {READABLE}")


def _layer_types_of(hf_config: Any) -> list[str]:
    """Whether each layer attends to all tokens or to a window, in transformers' words.

    Where the config does not list it, all layers are alike: windowed if there is a window (Mistral, Phi-3).
    """
    kind = _SLIDING if getattr(hf_config, "sliding_window", None) else FULL
    return getattr(hf_config, "layer_types", None) or [kind] * hf_config.num_hidden_layers


def _activation_of(hf_config: Any) -> str:
    """Name of the feed-forward activation; Gemma has a field of its own for it."""
    return getattr(hf_config, "hidden_activation", None) or getattr(hf_config, "hidden_act", None) or "silu"


def _as_dtype(value: torch.dtype | str | None) -> torch.dtype:
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), None)
    return value if isinstance(value, torch.dtype) else torch.float32
