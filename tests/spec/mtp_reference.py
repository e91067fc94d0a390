"""What multi-token prediction proposes, by its definition: plain torch in float32 over the whole text, without a cache.

Reads the tensors of a module under DeepSeek's names. Shapes: T tokens, E hidden size, H query heads, G key/value heads, D head
size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Reference:
    """A transformers model, and modules that draft for it."""

    hf_model: Any
    modules: tuple[dict[str, Tensor], ...]
    """By names without the layer's: ``enorm.weight``, ``self_attn.q_proj.weight``, … Without ``shared_head.norm.weight``, a
    module ends with the model's final norm and the first starts before it."""
    hidden_first: bool = False
    hands_over_normalised: bool = False
    draft_token_ids: tuple[int, ...] = ()
    interleaved_rope: bool = False
    mixture: Callable[[Tensor], Tensor] | None = None
    """Feed-forward layer of all modules, [1, T, E] of a normalised stream, if it is not dense."""
    layer: Callable[[Tensor], Tensor] | None = None
    """Decoder layer of all modules over tokens at positions 0, 1, …, [T, E], if its attention is of another kind."""

    @torch.no_grad()
    def drafts(self, tokens: list[int], num_drafts: int) -> list[int]:
        """Proposals after these tokens, of which the model has computed all but the last; greedy."""
        tokens, num_computed = list(tokens), len(tokens) - 1
        hidden_TE = self._model_hidden(tokens[:-1])
        drafts: list[int] = []
        combined: list[Tensor] = []  # inputs of the last module, by position
        for k in range(1, num_drafts + 1):
            module = self.modules[min(k, len(self.modules)) - 1]
            if k <= len(self.modules):
                embedding_TE = self._embed(tokens[k : k + num_computed])
                combined = [self._combine(module, embedding_TE, hidden_TE)]
            else:
                combined.append(self._combine(module, self._embed(tokens[-1:]), hidden_TE[-1:]))
            output_TE = self._layer(module, torch.cat(combined))
            normalised_TE = self._norm(
                module.get("shared_head.norm.weight", self.hf_model.model.norm.weight), output_TE
            )
            hidden_TE = normalised_TE if self.hands_over_normalised else output_TE
            drafts.append(self._choose(normalised_TE[-1]))
            tokens.append(drafts[-1])
        return drafts

    def _model_hidden(self, tokens: list[int]) -> Tensor:
        before: list[Tensor] = []
        norm = self.hf_model.model.norm
        handle = norm.register_forward_hook(lambda _, inputs, __: before.append(inputs[0]))
        try:
            after_TE = self.hf_model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        finally:
            handle.remove()
        return after_TE if "shared_head.norm.weight" in self.modules[0] else before[0][0]

    def _embed(self, tokens: list[int]) -> Tensor:
        return self.hf_model.get_input_embeddings()(torch.tensor(tokens))

    def _choose(self, hidden_E: Tensor) -> int:
        logits_V = self.hf_model.get_output_embeddings()(hidden_E)
        if not self.draft_token_ids:
            return int(logits_V.argmax())
        return self.draft_token_ids[int(logits_V[list(self.draft_token_ids)].argmax())]

    def _norm(self, weight_E: Tensor, x_TE: Tensor) -> Tensor:
        eps = self.hf_model.config.rms_norm_eps
        return x_TE * torch.rsqrt(x_TE.square().mean(-1, keepdim=True) + eps) * weight_E

    def _combine(self, module: dict[str, Tensor], embedding_TE: Tensor, hidden_TE: Tensor) -> Tensor:
        parts = [self._norm(module["enorm.weight"], embedding_TE), self._norm(module["hnorm.weight"], hidden_TE)]
        return torch.cat(parts[::-1] if self.hidden_first else parts, dim=-1) @ module["eh_proj.weight"].T

    def _layer(self, module: dict[str, Tensor], x_TE: Tensor) -> Tensor:
        """A decoder layer over tokens at positions 0, 1, …"""
        if self.layer is not None:
            return self.layer(x_TE)

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, module[f"{name}.weight"], module.get(f"{name}.bias"))

        num_tokens, config = len(x_TE), self.hf_model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        normalised_TE = self._norm(module["input_layernorm.weight"], x_TE)
        q_HTD, k_GTD, v_GTD = (
            linear(f"self_attn.{part}_proj", normalised_TE).view(num_tokens, -1, head_dim).transpose(0, 1)
            for part in "qkv"
        )
        if "self_attn.q_norm.weight" in module:
            q_HTD, k_GTD = (
                self._norm(module[f"self_attn.{part}_norm.weight"], x) for part, x in (("q", q_HTD), ("k", k_GTD))
            )
        q_HTD, k_GTD = (self._rotate(x) for x in (q_HTD, k_GTD))
        group = len(q_HTD) // len(k_GTD)
        k_HTD, v_HTD = (x.repeat_interleave(group, dim=0) for x in (k_GTD, v_GTD))
        attended_HTD = F.scaled_dot_product_attention(q_HTD, k_HTD, v_HTD, is_causal=True)
        x_TE = x_TE + linear("self_attn.o_proj", attended_HTD.transpose(0, 1).reshape(num_tokens, -1))
        normalised_TE = self._norm(module["post_attention_layernorm.weight"], x_TE)
        if self.mixture is not None:
            return x_TE + self.mixture(normalised_TE[None])[0]
        gate_TM, up_TM = linear("mlp.gate_proj", normalised_TE), linear("mlp.up_proj", normalised_TE)
        return x_TE + linear("mlp.down_proj", F.silu(gate_TM) * up_TM)

    def _rotate(self, x_HTD: Tensor) -> Tensor:
        rope = self.hf_model.config.rope_parameters
        head_dim = x_HTD.shape[-1]
        num_rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        rotated, rest = x_HTD.split([num_rotated, head_dim - num_rotated], dim=-1)
        frequencies = rope["rope_theta"] ** (-torch.arange(0, num_rotated, 2).float() / num_rotated)
        angles = torch.outer(torch.arange(x_HTD.shape[1]).float(), frequencies)
        pairs = rotated.unflatten(-1, (-1, 2)) if self.interleaved_rope else rotated.unflatten(-1, (2, -1)).mT
        turned = torch.view_as_real(
            torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
        )
        turned = turned.flatten(-2) if self.interleaved_rope else turned.mT.flatten(-2)
        return torch.cat((turned, rest), dim=-1)
