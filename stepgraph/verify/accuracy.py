"""How far one set of settings is from another on the same tokens: both models' whole distributions, token by token.

Windows of the text are run as prompts: by the step's own program, eagerly, which is what graphs compute bit for bit, in chunks of
at most `max_num_batched_tokens`. Of the hidden states that a window leaves, logits are computed some tokens at a time in both
models, so that memory never holds those of a text.

Shapes: T tokens, C of which are compared at a time, E hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stepgraph.errors import StepgraphError
from stepgraph.layers.matrix import Matrix
from stepgraph.models.language_model import LanguageModel
from stepgraph.step.admission import Admission
from stepgraph.step.plan import StepPlan
from stepgraph.step.runner import StepRunner
from stepgraph.step.shape import Variant
from stepgraph.step.slot_sampling import SlotSampling

_SLOT = 1
_CHUNK = 128
"""Tokens whose distributions are compared at once; in float64, 152 MiB for each of some tensors at a vocabulary of 152k."""


class Window(NamedTuple):
    """A part of a text that is run by itself. Its first tokens are context only: the window before has counted them."""

    begin: int
    counted: int
    """First token whose prediction counts."""
    end: int


@dataclass(frozen=True)
class Accuracy:
    """What a candidate's distributions are beside a reference's. Divergences are in nats per token."""

    tokens: int
    """Predictions that were counted."""
    perplexity: float
    reference_perplexity: float
    mean_kl: float
    """Of KL(reference ‖ candidate)."""
    p99_kl: float
    max_kl: float
    same_top_token: float
    """Share of tokens for which both find the same one likeliest."""
    mean_logit_difference: float
    """Of ‖difference‖ / ‖reference‖."""
    max_logit_difference: float
    """Largest |difference| of a logit."""

    @property
    def perplexity_ratio(self) -> float:
        """The candidate's perplexity by the reference's."""
        return self.perplexity / self.reference_perplexity


def windows(num_tokens: int, size: int, stride: int) -> Iterator[Window]:
    """Cut a text into windows of `size` tokens, each `stride` after the one before; the last ends with the text.

    Every token but the first counts once: in the first window that holds it, behind at least `size - stride` others, but in the
    text's first window, which counts all it predicts.
    """
    assert 1 <= stride < size, (size, stride)
    begin, counted = 0, 1
    while counted < num_tokens:
        end = min(begin + size, num_tokens)
        yield Window(begin, counted, end)
        begin, counted = begin + stride, end


def compare(
    reference: StepRunner,
    candidate: StepRunner,
    tokens: Sequence[int],
    *,
    size: int,
    stride: int,
    prefix: Sequence[int] = (),
    progress: bool = False,
) -> Accuracy:
    """Hold a model's predictions of a text against a reference's.

    Args:
        reference, candidate: of one vocabulary, on one device, with KV blocks for a window and no request under way. Runs nothing
            of their graphs.
        tokens: the text, at least two.
        size, stride: see `windows`.
        prefix: tokens before each window's own, as a tokenizer puts them before a text. They are not among `size`.
        progress: show a bar on stderr.

    Raises:
        StepgraphError: logits are no numbers.
    """
    parts: list[Tensor] = []
    cut = list(windows(len(tokens), size, stride))
    for begin, counted, end in tqdm(
        cut, "comparing", unit="window", disable=not progress, leave=False, file=sys.stderr
    ):
        seen = [*prefix, *tokens[begin : end - 1]]
        hidden = [(runner, hidden_states(runner, seen)[counted - end :]) for runner in (reference, candidate)]
        target_T = torch.tensor(tokens[counted:end], device=hidden[0][1].device)
        parts += _compare_window(hidden, target_T)
    nll_T, reference_nll_T, kl_T, same_T, relative_T, largest_T = torch.cat(parts, 1).unbind()
    if not bool(kl_T.isfinite().all()):
        raise StepgraphError(
            f"logits of {int((~kl_T.isfinite()).sum())} of {len(kl_T)} tokens hold NaN or infinity; the dtype may be too narrow "
            "for this model: use bfloat16 or float32"
        )
    return Accuracy(
        tokens=len(kl_T),
        perplexity=nll_T.mean().exp().item(),
        reference_perplexity=reference_nll_T.mean().exp().item(),
        mean_kl=kl_T.mean().item(),
        p99_kl=kl_T.quantile(0.99).item(),
        max_kl=kl_T.max().item(),
        same_top_token=same_T.mean().item(),
        mean_logit_difference=relative_T.mean().item(),
        max_logit_difference=largest_T.max().item(),
    )


@torch.no_grad()
def _compare_window(hidden: Sequence[tuple[StepRunner, Tensor]], target_T: Tensor) -> Iterator[Tensor]:
    """Yields of each chunk, [6, C] float64 on the CPU: both negative log-likelihoods of the text's token, the divergence, whether
    the likeliest token is the same, and how far logits are apart, relatively and at most."""
    outs = [runner.logits.buffers(Variant.PLAIN).logits for runner, _ in hidden]
    chunk = min(_CHUNK, *(len(out) for out in outs))
    for start in range(0, len(target_T), chunk):
        part = slice(start, start + chunk)
        target_C1 = target_T[part, None]
        reference_CV, logits_CV = (
            runner.model.logits(hidden_TE[part], out=out[: len(target_C1)]).double()
            for (runner, hidden_TE), out in zip(hidden, outs, strict=True)
        )
        difference_CV = logits_CV - reference_CV
        expected_CV, found_CV = reference_CV.log_softmax(1), logits_CV.log_softmax(1)
        yield torch.stack(
            (
                -found_CV.gather(1, target_C1)[:, 0],
                -expected_CV.gather(1, target_C1)[:, 0],
                (expected_CV.exp() * (expected_CV - found_CV)).sum(1),
                (expected_CV.argmax(1) == found_CV.argmax(1)).double(),
                difference_CV.norm(dim=1) / reference_CV.norm(dim=1),
                difference_CV.abs().amax(1),
            )
        ).cpu()


def hidden_states(runner: StepRunner, tokens: Sequence[int]) -> Tensor:
    """Run a prompt in the runner's first slot, while no request is under way.

    Args:
        runner: with KV blocks for the prompt.
        tokens: the prompt, shorter than `max_model_len`.

    Returns:
        [T, E] in the model's dtype, as `LanguageModel.logits` takes them.
    """
    num_blocks = runner.layout.groups.size * -(-len(tokens) // runner.block_size)
    parts: list[Tensor] = []

    def keep(model: nn.Module, inputs: object, hidden_TE: Tensor) -> None:
        parts.append(hidden_TE.clone())

    hook = cast(nn.Module, runner.model).register_forward_hook(keep)
    try:
        with runner.workbench():
            runner.state.admit(
                Admission(
                    _SLOT,
                    tokens=tokens,
                    prompt_len=len(tokens),
                    blocks=range(1, num_blocks + 1),
                    generation=1,
                    max_length=runner.max_model_len,
                    sampling=SlotSampling(seed=0),
                )
            )
            for start in range(0, len(tokens), runner.policy.max_tokens):
                num_tokens = min(runner.policy.max_tokens, len(tokens) - start)
                shape = runner.policy.round_up(num_tokens, 1)
                runner.load(StepPlan(((_SLOT, num_tokens),), (), 1), shape)
                runner.graphs.store.eager_twin(shape).replay()
                parts[-1] = parts[-1][:num_tokens]
    finally:
        hook.remove()
    return torch.cat(parts)


@torch.no_grad()
def copy_weights(source: LanguageModel, target: LanguageModel) -> None:
    """Fill a model with the weights of another of the same layers, rounded as its formats keep them. Random ones are drawn in the
    dtype that they are kept in, and are others in another."""
    for ours, theirs in zip(target.modules(), source.modules(), strict=True):
        filled = ours.targets() if isinstance(ours, Matrix) else dict(ours.named_parameters(recurse=False))
        given = theirs.targets() if isinstance(theirs, Matrix) else dict(theirs.named_parameters(recurse=False))
        for name, weight in filled.items():
            weight.copy_(cast(Tensor, given[name]))
