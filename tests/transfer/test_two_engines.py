"""A prompt is computed by one engine, and another goes on: what it answers is what one engine answers that does both."""

import time
from collections.abc import Callable, Iterator

import pytest
from safetensors.torch import load_file
from tiny import TINY_SETTINGS, drain

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.transfer.reference import Offer, Reference, read_params

PROMPTS = [[(7 * i + 3 * j) % 251 + 1 for j in range(length)] for i, length in enumerate((5, 33, 100, 150))]


@pytest.fixture
def build(tiny_model) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def build(role: str, **settings) -> Engine:
        config = EngineConfig.from_settings(
            model=tiny_model, device="cpu", splitwise_role=role, **(TINY_SETTINGS | settings)
        )
        engines.append(build_engine(config))
        return engines[-1]

    yield build
    for engine in engines:
        engine.shutdown()


def answered(*engines: Engine) -> None:
    """Run all requests to their end, and until nothing is held for others."""
    deadline = time.monotonic() + 30
    while any(engine.has_work or engine.exchange.is_active for engine in engines):
        assert time.monotonic() < deadline, [engine.exchange.is_active for engine in engines]
        for engine in engines:
            if engine.has_work:
                engine.step()
            else:
                engine.prepare()


def reference_to(source: Engine, lease: str) -> Reference:
    assert source.transfers is not None
    return Reference(source.transfers.engine_id, source.transfers.host, source.transfers.port, lease)


@pytest.mark.parametrize("settings", [{}, {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}])
@pytest.mark.parametrize("at_once", [False, True])
def test_answers_are_those_of_one_engine(build, settings, at_once) -> None:
    params = [SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=12, ignore_eos=True) for i in range(4)]
    mixed = build("mixed", **settings)
    expected = [mixed.add_request(f"{i}", prompt, params[i]) for i, prompt in enumerate(PROMPTS)]
    drain(mixed)
    source, sink = build("prefill", **settings), build("decode", **settings)
    one = SamplingParams(temperature=0, max_tokens=1)
    offers = [source.add_request(f"{i}", prompt, one, transfer=Offer(f"lease {i}")) for i, prompt in enumerate(PROMPTS)]
    if at_once:
        references = [reference_to(source, f"lease {i}") for i in range(len(PROMPTS))]
    else:
        drain(source)
        references = [read_params(offer.kv_transfer_params) for offer in offers]
        assert references[0] is None  # its prompt fills no block
    requests = [
        sink.add_request(f"{i}", prompt, params[i], transfer=reference)
        for i, (prompt, reference) in enumerate(zip(PROMPTS, references, strict=True))
    ]
    answered(source, sink)
    assert [request.output_token_ids for request in requests] == [request.output_token_ids for request in expected]
    assert [request.num_cached_tokens for request in requests] == [0, 32, 96, 144]
    assert_at_rest(source, sink)


def assert_at_rest(*engines: Engine) -> None:
    for engine in engines:
        counts = engine.transfers.counts()
        assert (counts.num_leases, counts.num_fetches) == (0, 0)
        assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_usable


def test_engines_that_slept_go_on_and_those_with_other_weights_do_not_mix(build, tiny_model) -> None:
    source, sink = build("prefill", kv_lease=1.0), build("decode")
    one, params = SamplingParams(temperature=0, max_tokens=1), SamplingParams(temperature=0, max_tokens=6)

    def transfer(name: str) -> Request:
        source.add_request(name, PROMPTS[2], one, transfer=Offer(name))
        request = sink.add_request(name, PROMPTS[2], params, transfer=reference_to(source, name))
        answered(source, sink)
        assert_at_rest(source, sink)
        return request

    first = transfer("first")
    for engine in (source, sink):
        engine.sleep()
        engine.wake_up()
    second = transfer("second")
    sink.reset_prefix_cache()
    source.update_weights(load_file(f"{tiny_model}/model.safetensors").items())  # which might be any
    third = transfer("third")
    sink.reset_prefix_cache()
    source.update_weights(tiny_model)
    fourth = transfer("fourth")
    requests = [first, second, third, fourth]
    assert [request.num_cached_tokens for request in requests] == [96, 96, 0, 96]
    assert [request.output_token_ids for request in requests] == [first.output_token_ids] * 4
    assert sink.transfers.counts().failures == {"other_model": 1}
