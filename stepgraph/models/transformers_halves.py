"""A class of transformers in two halves: the layers, and what makes logits of their last hidden states.

Of a multimodal class, the layers are those of its decoder; what makes embeddings of images, sound or video is let go.

Shapes: T tokens, R rows, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import ModelOutput

from stepgraph.models.config import architecture_of
from stepgraph.models.text_part import is_multimodal
from stepgraph.models.transformers_interfaces import Attend, Relay
from stepgraph.models.transformers_own_attention import adapt, register


def class_of(hf_config: Any) -> tuple[Any, str]:
    """The class that runs a config's model, and the name of its method that builds one from a config."""
    register(str(hf_config.model_type))
    if is_multimodal(hf_config):
        return getattr(transformers, architecture_of(hf_config)), "_from_config"
    return AutoModelForCausalLM, "from_config"


def decoder_path(hf_model: Any) -> str:
    """Where a model has its layers, e.g. ``model`` or ``model.language_model``."""
    if not is_multimodal(hf_model.config):
        prefix = str(hf_model.base_model_prefix)
        return prefix if hasattr(hf_model, prefix) else "model"  # the former is that of a class around it, in Llama 4's
    decoder = hf_model.get_decoder()
    return next(path for path, module in hf_model.named_modules() if module is decoder)


def take_apart(hf_model: Any) -> tuple[nn.Module, nn.Module]:
    """The layers, and the class without them: hidden states in, logits out, scaled and capped as the class does."""
    path = decoder_path(hf_model)
    base = hf_model.get_submodule(path)
    base.warn_if_padding_and_no_attention_mask = _no_warning  # which looks for padding in the tokens, on the host
    setattr(hf_model, path.partition(".")[0], _PassThrough())
    Relay(base)
    adapt(base)
    return base, hf_model


def run_layers(base: nn.Module, token_ids_T: Tensor, positions_T: Tensor | None, attend: Attend) -> Tensor:
    """Last hidden states [T, E]. Runs inside the graph.

    Args:
        base: from `take_apart`.
        token_ids_T: of tokens, as one sequence.
        positions_T: of each; None: the class counts them itself.
        attend: answers the layers' calls of attention.
    """
    counted_T = torch.arange(len(token_ids_T), dtype=torch.int32, device=token_ids_T.device)
    with Relay.of(base).answered_by(attend, counted_T if positions_T is None else positions_T):
        output = base(
            input_ids=token_ids_T.unsqueeze(0),
            position_ids=None if positions_T is None else positions_T.unsqueeze(0),
            use_cache=False,
        )
    hidden_TE: Tensor = output.last_hidden_state.squeeze(0)
    return hidden_TE


def run_head(head: nn.Module, hidden_RE: Tensor) -> Tensor:
    """Logits [R, V] of last hidden states; `head` from `take_apart`. Runs inside the graph."""
    logits_RV: Tensor = head(inputs_embeds=hidden_RE.unsqueeze(0), use_cache=False).logits.squeeze(0)
    return logits_RV


@dataclass
class _Passed(ModelOutput):
    """What base models of any kind return, of which only the hidden states are known."""

    last_hidden_state: Tensor | None = None
    past_key_values = None  # no field: transformers has renamed it to `cache` and warns where it is one
    cache: None = None
    hidden_states: None = None
    attentions: None = None
    cross_attentions: None = None
    router_logits: None = None
    image_outputs: None = None
    video_outputs: None = None
    audio_outputs: None = None
    audio_hidden_states: None = None
    shared_kv_states: None = None


class _PassThrough(nn.Module):
    """In place of a class's base model: gives the embeddings it is given as the last hidden states."""

    @property
    def decoder(self) -> nn.Module:
        """Itself: some heads call the decoder that is all of their base model."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Passed:
        return _Passed(last_hidden_state=inputs_embeds)


def _no_warning(*_: Any) -> None:
    pass
