"""One multi-token-prediction (MTP) layer over a Llama, in plain torch: the form in which it is trained.

The layer drafts tokens for a target model, whose embedding and output head it shares. Where the target has hidden state h_i
(after its final norm) at position i, and the next token t_{i+1} is known,

    x_i = eh_proj [ enorm(embed(t_{i+1})) ; hnorm(h_i) ]
    y_i = one decoder layer over x, at position i
    draft of t_{i+2} = argmax over the draft vocabulary of shared_head.norm(y_i) · output head

For further drafts the layer is repeated: y_i takes the place of the next hidden state, the draft that of the next token.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 2.2; repeating the layer and unrolling the repetition in
training: Li et al., "EAGLE-3" (2025).

Shapes: B sequences, T positions, E hidden size, H query heads, G key heads, D head size, S steps, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepgraph.errors import ModelError
from stepgraph.layers.rotary import cos_sin_table
from stepgraph.models.config import DecoderConfig
from stepgraph.models.mtp_tensors import without_mtp
from stepgraph.models.source import ModelSource

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""Two of [B, G, T, D]; keys are rotated."""
DRAFT_TOKEN_IDS = "draft_token_ids"
_SCALE = "_scale"
_RESIDUAL_RMS = (
    6.0  # with 1, what the layer adds drowns what it is given, and the first gradients are five times as large
)


class DecoderLayer(nn.Module):
    """A Llama's decoder layer, its parameters named as in transformers' checkpoints."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        E, D, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.head_dim, self.group_size = D, config.num_heads // config.num_kv_heads
        sizes = {"q_proj": config.num_heads * D, "k_proj": config.num_kv_heads * D, "v_proj": config.num_kv_heads * D}
        self.input_layernorm = nn.RMSNorm(E, eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(E, size, bias=False) for name, size in sizes.items()})
        self.self_attn["o_proj"] = nn.Linear(config.num_heads * D, E, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(E, eps)
        inner = config.intermediate_size
        self.mlp = nn.ModuleDict({name: nn.Linear(E, inner, bias=False) for name in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = nn.Linear(inner, E, bias=False)

    def forward(
        self, x_BTE: Tensor, angles_TD: Tensor, earlier: Sequence[KeysValues] = (), mask: Tensor | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Run the layer.

        Args:
            x_BTE: its input.
            angles_TD: cosines and sines of the positions, from `cos_sin_table`.
            earlier: keys and values that precede those of `x_BTE`.
            mask: [T, positions of all keys] bool, true where a query sees a key; None, without `earlier`: causal.

        Returns:
            The layer's output [B, T, E], and its own keys and values.
        """
        B, T, _ = x_BTE.shape
        normed = self.input_layernorm(x_BTE)
        q, k, v = (
            self.self_attn[name](normed).view(B, T, -1, self.head_dim).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = _rotate(q, angles_TD).to(v.dtype), _rotate(k, angles_TD).to(v.dtype)
        keys, values = (torch.cat([*before, own], dim=2) for *before, own in zip(*earlier, (k, v), strict=True))
        keys, values = (part.repeat_interleave(self.group_size, dim=1) for part in (keys, values))
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None)
        x_BTE = x_BTE + self.self_attn["o_proj"](attended.transpose(1, 2).reshape(B, T, -1))
        normed = self.post_attention_layernorm(x_BTE)
        gated = F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        return x_BTE + self.mlp["down_proj"](gated), (k, v)


class Target(nn.Module):
    """The model that is drafted for, frozen: all that training needs of it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def load(cls, source: ModelSource, dtype: torch.dtype, device: torch.device) -> Target:
        """Read the model.

        Raises:
            ModelError: it is not a plain Llama, or its checkpoint cannot be read.
        """
        config = source.config
        biased = getattr(config, "qkv_bias", False) or getattr(config, "mlp_bias", False)
        if not isinstance(config, DecoderConfig) or config.architecture != "LlamaForCausalLM" or biased:
            raise ModelError(
                f"{source.description} is a {config.architecture}{' with biases' if biased else ''}; a head is trained here "
                "for a LlamaForCausalLM without biases. Add what the model has more to DecoderLayer in mtp_head.py."
            )
        with torch.device("meta"):
            target = cls(config)
        weights = {t.name.removeprefix("model."): t.load(dtype, device) for t in without_mtp(source.tensors())}
        weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])
        target.load_state_dict(weights, assign=True)
        return target.eval().requires_grad_(False)

    def forward(self, ids_BT: Tensor, angles_TD: Tensor) -> Tensor:
        """Hidden states after the final norm, [B, T, E]."""
        x_BTE = self.embed_tokens(ids_BT)
        for layer in self.layers:
            x_BTE, _ = layer(x_BTE, angles_TD)
        return self.norm(x_BTE)


class MTPHead(DecoderLayer):
    """The layer that is trained, with the norms and the projection around it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        E, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = nn.RMSNorm(E, eps), nn.RMSNorm(E, eps)
        self.eh_proj = nn.Linear(2 * E, E, bias=False)
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(E, eps)})

    @classmethod
    def beginning_at(cls, target: Target, config: DecoderConfig) -> MTPHead:
        """A head to train, float32: the target's last layer, run once more on the target's own result.

        The projection passes the hidden state on, scaled as residual streams are by then, and takes next to nothing from the
        token; the last norm is the target's, so that the first logits have about the target's scale.
        """
        head = cls(config)
        E = config.hidden_size
        head.load_state_dict(target.layers[-1].state_dict(), strict=False)
        head.shared_head["norm"].load_state_dict(target.norm.state_dict())
        with torch.no_grad():
            nn.init.normal_(head.eh_proj.weight, std=0.02)[:, E:] += _RESIDUAL_RMS * torch.eye(E)
        return head

    def first_input(self, embeds_BTE: Tensor, hidden_BTE: Tensor) -> Tensor:
        """x above: [B, T, E] in the dtype of the parameters."""
        dtype = self.eh_proj.weight.dtype
        both = torch.cat((self.enorm(embeds_BTE.to(dtype)), self.hnorm(hidden_BTE.to(dtype))), dim=-1)
        return self.eh_proj(both).to(dtype)

    def forward_chains(self, embeds_BTE: Tensor, hidden_BTE: Tensor, angles_TD: Tensor, num_steps: int) -> list[Tensor]:
        """Draft from every position at once, with the text's own tokens as the drafts.

        A chain begins at each position b: its step 1 is at b, its step s at b + s - 1. Step s sees what it would see when it
        drafts with a KV cache: the step-1 keys of positions up to b, which come from true hidden states, and of its own
        chain one key per later step.

        Args:
            embeds_BTE: embedding of t_{i+1} at each position i.
            hidden_BTE: the target's hidden states.
            angles_TD: cosines and sines of the positions.
            num_steps: S.

        Returns:
            For each step, shared_head.norm(y) [B, T, E]. At position i < s - 1 there is no step s: what is there is
            finite and meaningless.
        """
        T = embeds_BTE.shape[1]
        earlier: list[KeysValues] = []
        results = []
        for step in range(1, num_steps + 1):
            mask = chain_mask(T, step, embeds_BTE.device) if step > 1 else None
            y_BTE, own = self(self.first_input(embeds_BTE, hidden_BTE), angles_TD, earlier, mask)
            earlier.append(own)
            results.append(self.shared_head["norm"](y_BTE))
            hidden_BTE = F.pad(y_BTE, (0, 0, 1, 0))[:, :-1]  # step s + 1 is one position to the right
        return results


def chain_mask(num_positions: int, step: int, device: torch.device) -> Tensor:
    """Which keys step `step` sees, [T, step · T] bool: T keys of step 1, then of step 2, and so on to its own.

    The chain that is at position i in this step began at i - step + 1, and was at i - step + m in its step m.
    """
    i, j = (torch.arange(num_positions, device=device).view(shape) for shape in ((-1, 1), (1, -1)))
    return torch.cat([j <= i - step + 1, *(j == i - step + m for m in range(2, step + 1))], dim=1)


def angles(config: DecoderConfig, num_positions: int, device: torch.device) -> Tensor:
    """[T, D] float32: cosines and sines of the first positions, for every layer."""
    return cos_sin_table(config.ropes[-1], config.head_dim, num_positions, device)


def write_head(path: Path, head: MTPHead, draft_token_ids: Tensor, layer: int, base: str) -> None:
    """Store a head under the names of a DeepSeek-V3 checkpoint, in which it is layer `layer`, of so many in the model `base`.

    Matrices [N, M] become int8 codes with one float32 scale per row in `<name>_scale` [N]; the rest is float32, the draft
    vocabulary [V] int32.
    """
    tensors = {DRAFT_TOKEN_IDS: draft_token_ids.to("cpu", torch.int32).contiguous()}
    for name, weight in head.state_dict().items():
        stored, full_name = weight.detach().to("cpu", torch.float32).contiguous(), f"model.layers.{layer}.{name}"
        if stored.dim() == 2:
            scale_N = stored.abs().amax(dim=1).clamp_min(1e-12) / 127
            tensors[full_name + _SCALE] = scale_N
            stored = (stored / scale_N[:, None]).round().to(torch.int8)
        tensors[full_name] = stored
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt", "base": base, "layout": "deepseek-v3"})


def read_head(path: Path, config: DecoderConfig) -> tuple[MTPHead, Tensor]:
    """The head in a file of `write_head`, float32, and its draft vocabulary [V] int64."""
    with safe_open(path, framework="pt") as file:
        stored: Mapping[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    prefix = f"model.layers.{config.num_layers}."
    head = MTPHead(config)
    head.load_state_dict(
        {
            name.removeprefix(prefix): tensor.float() * stored[name + _SCALE][:, None] if tensor.dim() == 2 else tensor
            for name, tensor in stored.items()
            if name.startswith(prefix) and not name.endswith(_SCALE)
        }
    )
    return head.eval().requires_grad_(False), stored[DRAFT_TOKEN_IDS].long()


def _rotate(x_BHTD: Tensor, angles_TD: Tensor) -> Tensor:
    """Rotary embedding of the pairs (d, d + D/2)."""
    (cos, sin), (first, second) = angles_TD.chunk(2, dim=-1), x_BHTD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
