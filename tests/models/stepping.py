"""Runs a Decoder on one sequence without an engine: identity block table, plain zero caches, inputs built by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from stepgraph.layers.inputs import AttentionWork, GroupInputs, LineRows, StepInputs
from stepgraph.models import Decoder
from stepgraph.ops import StepTokens, attention_geometry

BLOCK_SIZE = 16


class Stepper:
    """One sequence in slot 1, whose KV block i is block i + 1."""

    def __init__(self, model: Decoder, max_len: int) -> None:
        num_blocks = -(-max_len // BLOCK_SIZE)
        self.model = model
        caches = []
        for spec in model.cache_specs(model.dtype):
            if spec.shares is not None:
                caches.append(caches[spec.shares])
                continue
            blocks, lines = spec.per_block(BLOCK_SIZE), spec.per_line(num_drafts=0)
            caches.append(
                spec.cache(
                    [torch.zeros(num_blocks + 1, *item.shape, dtype=item.dtype) for item in blocks],
                    [torch.zeros(2, *item.shape, dtype=item.dtype) for item in lines],
                )
            )
        self.caches = tuple(caches)
        self.block_table = torch.zeros(2, num_blocks, dtype=torch.int32)
        self.block_table[1] = torch.arange(1, num_blocks + 1)
        self.computed = 0

    def build(self, token_ids: list[int]) -> StepTokens:
        """What `build_step` makes of the sequence's next tokens."""
        n = len(token_ids)
        positions = torch.arange(self.computed, self.computed + n, dtype=torch.int32)
        self.computed += n
        return StepTokens(
            token_ids=torch.tensor(token_ids, dtype=torch.int32),
            positions=positions,
            kv_slots=positions + BLOCK_SIZE,
            row_slot=torch.tensor([1], dtype=torch.int32),
            query_start=torch.tensor([0, n], dtype=torch.int32),
            kv_len=torch.tensor([self.computed], dtype=torch.int32),
        )

    def run(self, tokens: StepTokens) -> Tensor:
        """The logits at every token, [tokens, vocabulary]."""
        hidden = self.model(self.inputs(tokens))
        out = hidden.new_empty(hidden.shape[0], self.model.config.vocab_size)
        return self.model.logits(hidden, out=out)

    def inputs(self, tokens: StepTokens) -> StepInputs:
        """What the model sees of a step."""
        n = tokens.token_ids.shape[0]
        attention = {
            spec: AttentionWork.of(
                spec, tokens, attention_geometry(n, 1, spec.num_heads, spec.num_kv_heads, multiprocessors=1)
            )
            for spec in self.model.attention_specs
        }
        lines, groups = LineRows(tokens.row_slot, tokens.row_slot), (GroupInputs(self.block_table, tokens, BLOCK_SIZE),)
        return StepInputs(tokens, attention, groups, self.caches, lines=lines)

    def step(self, token_ids: list[int]) -> Tensor:
        """Feed the sequence's next tokens; return the logits at each of them."""
        return self.run(self.build(token_ids))


def greedy(model: Decoder, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the `num_tokens` tokens that follow `prompt`, fewer if an end token comes first."""
    stepper = Stepper(model, len(prompt) + num_tokens)
    tokens, fed = [], prompt
    for _ in range(num_tokens):
        token = int(stepper.step(fed)[-1].argmax())
        if token in model.config.eos_token_ids:
            break
        tokens.append(token)
        fed = [token]
    return tokens
