"""Random engines of mixed features, served by some ranks and by one: the same tokens, and the same bits on every rank."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from random_models import ADAPTER_RANK, WITH_LATENTS, RandomModel, model_path, random_model, save_model
from safetensors.torch import load_file
from torch import Tensor

from stepgraph.config import EngineConfig
from stepgraph.engine.engine import Engine
from stepgraph.engine.request import FinishReason, Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.executor.local import LocalExecutor
from stepgraph.step.shape import Variant

MAX_LEN = 200
_METHODS = ("none", "suffix", "mtp", "ngram", "hybrid")
Create: TypeAlias = Callable[[EngineConfig], Engine]
TIE = 1e-4
"""Largest difference of two tokens' log-probabilities, or of what their sampling compares, that rounding may turn over."""
_GUIDES = (
    {"regex": "[a-f]{3,9}(-[0-9]+)?"},
    {"choice": ["yes", "no", "maybe later"]},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
)


def _sleep(engine: Engine, folder: Path) -> None:
    engine.sleep(1)
    engine.wake_up()


def _sleep_deeply(engine: Engine, folder: Path) -> None:
    engine.sleep(2)
    engine.wake_up()
    engine.update_weights(engine.config.model.model)


_EVENTS: dict[str, Callable[[Engine, Path], object]] = {
    "sleep": _sleep,
    "deep sleep": _sleep_deeply,
    "the same weights again": lambda engine, folder: engine.update_weights(engine.config.model.model),
    "the same tensors again": lambda engine, folder: engine.update_weights(
        load_file(folder / "model.safetensors").items()
    ),
    "a forgotten cache": lambda engine, folder: engine.reset_prefix_cache(preempt=True),
}


@dataclass(frozen=True)
class Arrival:
    """A request, and when it comes and goes, in steps of the engine."""

    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int
    adapter: int | None
    abort_step: int | None


@dataclass(frozen=True)
class Case:
    """One engine, and what it is asked."""

    number: int
    num_ranks: int
    model: RandomModel
    settings: dict[str, Any]
    arrivals: tuple[Arrival, ...]
    event: tuple[int, str] | None
    """Something of `_EVENTS` that happens before a step, and changes no answer."""
    lockstep: bool = False
    """Whether each rank has requests of its own, and they share experts only."""

    @property
    def is_comparable(self) -> bool:
        """Whether rounding is so small that other sums give the same tokens, ties aside."""
        return self.settings["dtype"] == "float32" and "kv_cache_dtype" not in self.settings

    @property
    def features(self) -> list[str]:
        """For people."""
        names = [self.model.architecture, f"{self.num_ranks} ranks", self.settings["dtype"]]
        names += [self.model.block_type] if self.model.block_type else []
        names += ["experts"] if self.model.experts else []
        names += ["latents"] if self.model.architecture in WITH_LATENTS else []
        for name in ("speculative_method", "quantization", "model_impl", "graph_backend"):
            names += [self.settings[name]] if name in self.settings else []
        names += [
            name
            for name in ("deterministic", "enable_lora", "kv_cache_dtype", "enable_expert_parallel")
            if self.settings.get(name)
        ]
        names += ["lockstep"] if self.lockstep else []
        names += ["guides"] if any(a.params.structured_outputs for a in self.arrivals) else []
        return names + ([self.event[1]] if self.event else [])


def random_case(
    number: int,
    num_ranks: int,
    *,
    model: RandomModel | None = None,
    experts: bool = False,
    latents: bool = False,
    lockstep: bool = False,
    num_arrivals: int | None = None,
    device: str = "cpu",
) -> Case:
    """Always the same for the same numbers.

    Args:
        number: which.
        num_ranks: of its engine.
        model: a native one that can do everything; default: a random one.
        experts: give a random one experts.
        latents: give a random one attention over latents.
        lockstep: let each rank have requests of its own, which takes experts.
        num_arrivals: how many requests; default: a few.
        device: where it runs.
    """
    rng = random.Random(f"{number} {num_ranks}")
    method = _METHODS[number % len(_METHODS)]
    fixed, kind = model, {"experts": experts or lockstep, "latents": latents}
    model = model or random_model(rng, num_ranks, drafts=method in ("mtp", "hybrid"), **kind)
    settings = _random_settings(rng, model, method) | {"device": device}
    if fixed is not None:  # kernels are compiled for sizes and formats, which takes longer than all else
        settings |= {"quantization": "auto", "block_size": 16, "capture": "lazy"}
    settings |= {"enable_expert_parallel": True} if lockstep else {}
    guided = model.block_type is None and (rng.random() < 0.1 or num_arrivals is not None)
    stem = [rng.randrange(1, 257) for _ in range(40)]
    most = 3 * num_ranks + 3 if lockstep else 7
    count = num_arrivals or rng.randint(3, most)
    arrivals = tuple(_random_arrival(rng, settings, stem, guided) for _ in range(count))
    events = [name for name in _EVENTS if model.block_type is None or "tensors" not in name]
    event = (rng.randint(2, 15), rng.choice(events)) if rng.random() < 0.25 else None
    if event and "tensors" in event[1] and "model_impl" in settings:  # transformers' own code takes files only
        event = (event[0], "the same weights again")
    settings |= {"enable_sleep_mode": True} if event and "sleep" in event[1] else {}
    return Case(number, num_ranks, model, settings, arrivals, event, lockstep)


def _random_settings(rng: random.Random, model: RandomModel, method: str) -> dict[str, Any]:
    block_size = rng.choice((8, 16, 32))
    blocks_of_one = -(-MAX_LEN // block_size) + 1
    rows, tokens = rng.choice((3, 6)), rng.choice((16, 40, 96))
    settings: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "max_num_seqs": rows,
        "max_num_batched_tokens": tokens,
        "max_num_partial_prefills": rng.choice((1, 3)),
        "capture_sizes": rng.choice(((tokens,), (8, tokens))),
        "capture_rows": (rows,),
        "block_size": block_size,
        "num_kv_blocks": rng.choice((blocks_of_one + 2, 4 * blocks_of_one)),
        "enable_prefix_caching": rng.random() < 0.7,
        "graph_backend": rng.choice(("auto", "auto", "eager")),
        "seed": rng.getrandbits(32),
    }
    if rng.random() < 0.2:
        settings |= {"insertion_policy": "gather", "prefill_gather_size": 2, "prefill_gather_ms": 1.0}
    if method != "none":
        settings |= {"speculative_method": method, "num_speculative_tokens": rng.randint(1, 4)}
        settings |= {"speculative_adaptive": rng.random() < 0.2}
    if model.num_adapters:
        settings |= {"enable_lora": True, "max_loras": model.num_adapters, "max_lora_rank": ADAPTER_RANK}
    if model.experts and rng.random() < 0.5:
        settings |= {"enable_expert_parallel": True}
    native = model.block_type or model.num_adapters or model.num_mtp_modules or model.experts
    if (
        not native and rng.random() < 0.2 and model.architecture not in ("phi 3", *WITH_LATENTS)
    ):  # ranks would gather those
        settings |= {"model_impl": "transformers"}
    elif rng.random() < 0.2:
        settings |= {"deterministic": True, "dtype": rng.choice(("float32", "bfloat16"))}
    elif (model.experts or not native) and rng.random() < 0.3:
        settings |= {"quantization": "fp8"}
    if rng.random() < 0.1:
        settings |= {"kv_cache_dtype": "fp8"}
    return settings


def _random_arrival(rng: random.Random, settings: dict[str, Any], stem: list[int], guided: bool) -> Arrival:
    phrase = [rng.randrange(1, 257) for _ in range(rng.randint(2, 12))]
    prompt = (*stem[: rng.choice((0, 17, 40))], *(phrase * rng.randint(1, 6)))[: MAX_LEN - 60]
    step = rng.choice((0, 0, rng.randint(0, 25)))
    return Arrival(
        step,
        prompt,
        _random_params(rng, guided),
        priority=rng.randint(0, 2),
        adapter=rng.choice((None, *range(settings["max_loras"]))) if "max_loras" in settings else None,
        abort_step=step + rng.randint(1, 15) if rng.random() < 0.15 else None,
    )


def _random_params(rng: random.Random, guided: bool) -> SamplingParams:
    """Greedy or sampled, with any mixture of features."""

    def maybe(**settings: Any) -> dict[str, Any]:
        return settings if rng.random() < 0.2 else {}

    if guided and rng.random() < 0.6:
        return SamplingParams(temperature=0, max_tokens=16, structured_outputs=rng.choice(_GUIDES))
    return SamplingParams(
        temperature=rng.choice((0, 0, 0.7, 1.1)),
        seed=rng.getrandbits(64),
        max_tokens=rng.randint(1, 25),
        ignore_eos=True,
        **maybe(top_k=rng.randint(1, 50)),
        **maybe(top_p=rng.uniform(0.3, 1.0)),
        **maybe(min_p=rng.uniform(0.0, 0.2)),
        **maybe(repetition_penalty=rng.uniform(0.6, 1.8)),
        **maybe(presence_penalty=rng.uniform(-2, 2), frequency_penalty=rng.uniform(-2, 2)),
        **maybe(logit_bias={rng.randrange(257): rng.uniform(-9, 9) for _ in range(5)}),
        **maybe(
            allowed_token_ids=rng.sample(range(257), rng.choice((2, 2, 40)))
        ),  # few repeat themselves, and are foreseen
        **maybe(stop_token_ids=tuple(rng.sample(range(257), 12)), min_tokens=1),
        **maybe(logprobs=rng.randint(0, 5)),
        **maybe(prompt_logprobs=rng.randint(0, 3)),
        **maybe(speculative={"num_speculative_tokens": rng.randint(0, 3)}),
    )


def serve(
    engine: Engine, case: Case, folder: Path, after_step: Callable[[Engine], None] | None = None
) -> list[Request]:
    """Let the case's requests come and go; `after_step` is called now and then, and at the end."""
    waiting = sorted(enumerate(case.arrivals), key=lambda item: item[1].step)
    requests: dict[int, Request] = {}
    for count in range(3000):
        while waiting and (waiting[0][1].step <= count or not engine.has_work):
            index, arrival = waiting.pop(0)
            adapter = None if arrival.adapter is None else str(folder / f"adapter{arrival.adapter}")
            requests[index] = engine.add_request(
                str(index), arrival.prompt, arrival.params, priority=arrival.priority, adapter=adapter
            )
        for index, arrival in enumerate(case.arrivals):
            if index in requests and arrival.abort_step == count:
                engine.abort(str(index))
        if case.event is not None and count == case.event[0]:
            _EVENTS[case.event[1]](engine, folder)
        if not engine.has_work and not waiting:
            break
        time.sleep(engine.seconds_until_work or 0)
        engine.step()
        if after_step is not None and count % 8 == 7:
            after_step(engine)
    else:
        raise AssertionError("the requests never end")
    if after_step is not None:
        after_step(engine)
    return [requests[index] for index in range(len(case.arrivals))]


class Parting(NamedTuple):
    """Where two answers to a request first differ."""

    request: int
    place: int
    found: int
    expected: int


def compare(case: Case, found: list[Request], expected: list[Request]) -> Iterator[Parting]:
    """Hold answers against those of another engine, up to where their tokens part; AssertionError if anything else differs."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        where = (case.number, case.num_ranks, index, case.features)
        a, b = one.output_token_ids, other.output_token_ids
        common = min(len(a), len(b))
        place = next((i for i in range(common) if a[i] != b[i]), common)
        for name in ("output_logprobs", "prompt_logprobs"):
            for x, y in zip(getattr(one, name)[:place], getattr(other, name)[:place], strict=False):
                assert (x is None) == (y is None), where
                if x is not None and y is not None:
                    assert x.token == y.token, where
                    assert x.logprob == pytest.approx(y.logprob, abs=TIE), where
                    assert [p for _, p in x.top] == pytest.approx([p for _, p in y.top], abs=TIE), where
        if place < common:
            yield Parting(index, place, a[place], b[place])
        elif FinishReason.ABORT not in (one.finish_reason, other.finish_reason):
            assert (len(a), one.finish_reason) == (len(b), other.finish_reason), (*where, a, b, one.error, other.error)


def count_ties(case: Case, folder: Path, create: Create, found: list[Request], expected: list[Request]) -> int:
    """How many answers part from those expected where two tokens were tied; AssertionError if one does for another reason, or
    anything else differs."""
    ties = 0
    for parting in compare(case, found, expected):
        answer = found[parting.request].output_token_ids[: parting.place + 1]
        assert _is_tie(case, folder, create, parting, answer), (case.number, parting, case.features)
        ties += 1
    return ties


def _is_tie(case: Case, folder: Path, create: Create, parting: Parting, answer: list[int]) -> bool:
    """Whether the least bias for the one token, or against the other, makes a single rank's answer part the same way."""
    arrival = case.arrivals[parting.request]
    for token, amount in ((parting.found, TIE), (parting.expected, -TIE)):
        biases = dict(arrival.params.logit_bias or {})
        biases[token] = biases.get(token, 0.0) + amount
        params = replace(arrival.params, logit_bias=biases)
        alone = replace(case, arrivals=(replace(arrival, step=0, params=params, abort_step=None),), event=None)
        [again] = serve_reference(alone, folder, create)
        if again.output_token_ids[: parting.place + 1] == answer:
            return True
    return False


def keep_hidden_states(executor: LocalExecutor) -> None:
    """Have a rank's hidden states be part of its `state_digest`, of graphs too if they are captured later. Logits would not do:
    each rank computes a part of them, for all."""
    model, buffers = executor.runner.model, executor.runner.logits.buffers(Variant.PLAIN)
    kept = buffers.logits.new_zeros(buffers.logits.shape[0], model.config.hidden_size)
    right = model.logits

    def keeping(hidden_RE: Tensor, out: Tensor) -> Tensor:
        kept[: hidden_RE.shape[0]].copy_(hidden_RE)
        return right(hidden_RE, out)

    model.logits = keeping
    executor.kept_hidden = kept


def state_digest(executor: LocalExecutor) -> str:
    """Of all that ranks keep alike, bit for bit: requests' state, history, block tables, masks, the ring of results, and the last
    hidden states that logits were computed from."""
    state = executor.runner.state
    executor.runner.platform.synchronize()
    digest = hashlib.sha256()
    alike = (state.lines, state.tokens, state.tables, state.ring, state.counter, state.masks, executor.kept_hidden)
    for tensor in alike:
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_ranks(engine: Engine) -> None:
    """AssertionError if the state of one rank is not that of all others, where they run the same."""
    if engine.executor.specs.data_parallel_size > 1:
        return
    digests = engine.executor.on_all(state_digest)
    assert len(set(digests)) == 1, f"ranks differ: {[digest[:8] for digest in digests]}"


@dataclass
class Outcome:
    """What came of a case."""

    number: int
    num_ranks: int
    features: list[str]
    tokens: int = 0
    ties: int = 0
    steps: int = 0
    eager_steps: int = 0
    preemptions: int = 0
    accepted: int = 0
    seconds: float = 0.0


def run_case(case: Case, folder: Path, create: Create) -> Outcome:
    """Serve a case with its ranks and with one; AssertionError where they disagree.

    Args:
        case: what to run.
        folder: for its model.
        create: makes engines, of as many ranks as their settings say.
    """
    started = time.perf_counter()
    save_model(case.model, folder)
    outcome = Outcome(case.number, case.num_ranks, case.features)
    found = serve_ranked(case, folder, create, outcome)
    if case.is_comparable:
        outcome.ties = count_ties(case, folder, create, found, serve_reference(case, folder, create))
    outcome.seconds = time.perf_counter() - started
    return outcome


def serve_ranked(case: Case, folder: Path, create: Create, outcome: Outcome) -> list[Request]:
    """Answers of the case's own engine, whose ranks are compared now and then. Notes what it did in `outcome`."""
    size = "data_parallel_size" if case.lockstep else "tensor_parallel_size"
    settings = case.settings | {size: case.num_ranks}
    engine = create(EngineConfig.from_settings(model=model_path(case.model, folder), **settings))
    try:
        engine.executor.on_all(keep_hidden_states)
        found = serve(engine, case, folder, check_ranks)
        statistics = engine.executor.statistics
        outcome.tokens = sum(len(request.output_token_ids) for request in found)
        outcome.steps, outcome.eager_steps = statistics.num_steps, statistics.num_eager_steps
        outcome.preemptions = engine.scheduler.statistics.preemptions
        outcome.accepted = sum(len(request.accepted) for request in found)
        if case.settings.get("deterministic"):
            _check_determinism(engine, case, folder, found)
    finally:
        engine.shutdown()
    return found


def serve_reference(case: Case, folder: Path, create: Create) -> list[Request]:
    """Answers of an engine of one rank that proposes nothing."""
    settings = {name: value for name, value in case.settings.items() if "specul" not in name}
    engine = create(EngineConfig.from_settings(model=model_path(case.model, folder), **settings))
    try:
        return serve(engine, case, folder)
    finally:
        engine.shutdown()


def _check_determinism(engine: Engine, case: Case, folder: Path, found: list[Request]) -> None:
    """Some requests once more, alone: not a bit may differ."""
    for index in range(0, len(found), 3):
        alone = replace(case, arrivals=(replace(case.arrivals[index], step=0, abort_step=None),), event=None)
        [again] = serve(engine, alone, folder, check_ranks)
        count = len(found[index].output_token_ids)
        assert again.output_token_ids[:count] == found[index].output_token_ids, (case.number, index, case.features)
        pairs = zip(again.output_logprobs, found[index].output_logprobs, strict=False)
        assert all(a.logprob == b.logprob for a, b in pairs), (case.number, index, case.features)
