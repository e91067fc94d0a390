"""Draft modules, one or several: what they propose is what their definition gives, whatever happened to the request before."""

import random

import pytest
import torch
from drafted import watch_rounds
from mtp_reference import Reference
from safetensors.torch import load_file, save_file
from tiny import TINY_SETTINGS, VOCAB_SIZE, drain, mtp_tensors, save_tiny_model
from transformers import AutoModelForCausalLM

from stepgraph.abi import slot_line
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, str]:
    """Checkpoints of the same model with so many modules."""
    return {n: save_tiny_model(tmp_path_factory.mktemp(f"modules-{n}"), num_mtp_modules=n) for n in (1, 2, 3)}


def reference(folder: str, num_modules: int) -> Reference:
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(f"{folder}/mtp.safetensors")
    modules = []
    for k in range(num_modules):
        prefix = f"model.layers.{hf_model.config.num_hidden_layers + k}."
        modules.append({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)})
    return Reference(hf_model, tuple(modules))


def create(folder: str, num_drafts: int, acceptance: float = 0.6, **settings) -> Engine:
    speculative = {
        "method": "mtp",
        "num_speculative_tokens": num_drafts,
        "adaptive": False,
        "acceptance": acceptance,
    }
    return build_engine(
        EngineConfig.from_settings(
            **{"model": folder, "graph_backend": "eager", "speculative_config": speculative} | TINY_SETTINGS | settings
        )
    )


def params(max_tokens: int = 24, **fields) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **fields)


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(length)]


def assert_as_defined(rounds, ref: Reference, at_least: int, every: int = 1) -> None:
    """All rounds with proposals, or each `every`-th, hold those of the reference."""
    assert len(rounds) >= at_least, len(rounds)
    for known, drafts in rounds[::every]:
        assert list(drafts) == ref.drafts(list(known), len(drafts)), (len(known), drafts)


@pytest.mark.parametrize(
    ("num_modules", "num_drafts", "backend"),
    [
        *((D, K, "eager") for D, K in ((1, 1), (1, 4), (2, 1), (2, 2), (2, 5), (3, 2), (3, 3), (3, 4))),
        *((D, K, "auto") for D, K in ((1, 4), (2, 1), (3, 4))),
    ],
)
def test_proposals_are_those_of_the_definition_across_rejections_and_chunks(folders, num_modules, num_drafts, backend):
    engine = create(folders[num_modules], num_drafts, graph_backend=backend)
    rounds = watch_rounds(engine)
    requests = [
        engine.add_request(str(n), text(n, length), params()) for n, length in enumerate((1, 2, 3, 17, 49, 130))
    ]
    drain(engine)
    stood = sum(len(request.accepted) for request in requests)
    assert 0 < stood < sum(request.num_draft_tokens for request in requests)
    assert_as_defined(rounds, reference(folders[num_modules], num_modules), at_least=30, every=3)


@pytest.mark.parametrize("num_modules", [1, 2, 3])
def test_proposals_are_those_of_the_definition_after_prefix_hits(folders, num_modules):
    engine = create(folders[num_modules], 3)
    rounds = watch_rounds(engine)
    shared = text(0, 80)
    for n in range(3):  # at first with the one before it in the same step, then with what was computed long ago
        # What a module cached at the last shared positions depends on one, two or three tokens more.
        pair = [engine.add_request(f"{n}{m}", shared + n * [7] + text(n + m, 4), params(12)) for m in range(2)]
        drain(engine)
    assert min(request.num_cached_tokens for request in pair) > 0
    # An answer, with a continuation: blocks that rounds filled are found.
    first = engine.add_request("first", text(5, 20), params(60))
    drain(engine)
    follow_up = engine.add_request("follow-up", first.prompt_token_ids + first.output_token_ids + [1], params(12))
    drain(engine)
    assert follow_up.num_cached_tokens > 20
    assert_as_defined(rounds, reference(folders[num_modules], num_modules), at_least=25)


@pytest.mark.parametrize("num_modules", [1, 3])
def test_proposals_are_those_of_the_definition_after_preemptions(folders, num_modules):
    engine = create(folders[num_modules], 3, num_kv_blocks=21)
    rounds = watch_rounds(engine)
    requests = [engine.add_request(str(n), text(n, 40), params(60)) for n in range(6)]
    drain(engine)
    assert sum(request.num_preemptions for request in requests) > 0
    assert_as_defined(rounds, reference(folders[num_modules], num_modules), at_least=60, every=4)


@pytest.mark.parametrize("num_modules", [1, 3])
def test_proposals_are_those_of_the_definition_whatever_the_steps_before_proposed(folders, num_modules):
    """Steps that propose nothing, or less than there are modules, keep all caches up."""
    engine = create(folders[num_modules], 4)
    rounds = watch_rounds(engine)
    rng = random.Random(0)
    engine.scheduler._choose_drafts = lambda num_rows: rng.choice((0, 0, 1, 2, 4))
    for n in range(3):
        engine.add_request(str(n), text(n, 20 + 30 * n), params(60))
    engine.add_request("few", text(5, 30), params(60, speculative={"num_speculative_tokens": 1}))
    drain(engine)
    assert {1, 2, 4} <= {len(drafts) for _, drafts in rounds}
    assert_as_defined(rounds, reference(folders[num_modules], num_modules), at_least=40, every=2)


@pytest.mark.parametrize("num_modules", [2, 3])
def test_a_slots_next_request_takes_nothing_over_from_the_one_before(folders, num_modules):
    engine = create(folders[num_modules], 3, max_num_seqs=1)
    rounds = watch_rounds(engine)
    for n in range(4):
        engine.add_request(str(n), text(n, 1 + n), params(6))
    drain(engine)
    assert_as_defined(rounds, reference(folders[num_modules], num_modules), at_least=5)


def test_several_modules_leave_answers_as_they_are(folders):
    prompts = [text(n, length) for n, length in enumerate((1, 5, 60))]

    def answers(settings: dict) -> list[list[int]]:
        engine = build_engine(
            EngineConfig.from_settings(**TINY_SETTINGS | {"model": folders[3], "graph_backend": "eager"} | settings)
        )
        requests = [engine.add_request(str(n), prompt, params(30)) for n, prompt in enumerate(prompts)]
        drain(engine)
        return [request.output_token_ids for request in requests]

    expected = answers({})
    for method in ("mtp", "hybrid"):
        assert answers({"speculative_config": {"method": method, "num_speculative_tokens": 4}}) == expected


# New weights


def test_new_weights_of_the_model_reach_the_rows_of_the_draft_head(folders, tmp_path):
    """And what a deep sleep dropped, modules and head, is read again."""
    hf_config = AutoModelForCausalLM.from_pretrained(folders[1]).config
    ids = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))[:60].to(torch.int32)
    tensors = mtp_tensors(hf_config, 1)
    save_file(tensors | {"draft_token_ids": ids}, tmp_path / "model.safetensors")
    speculative = {
        "method": "mtp",
        "num_speculative_tokens": 3,
        "adaptive": False,
        "acceptance": 0.5,
        "model": str(tmp_path),
    }
    engine = create(folders[1], 3, enable_sleep_mode=True, speculative_config=speculative)
    other = {name: tensor.flip(0).contiguous() for name, tensor in load_file(f"{folders[1]}/model.safetensors").items()}
    hf_model = AutoModelForCausalLM.from_pretrained(folders[1]).eval()
    module = {name.partition("layers.2.")[2]: tensor for name, tensor in tensors.items()}
    ref = Reference(hf_model, (module,), draft_token_ids=tuple(ids.tolist()))
    for weights in (None, other.items(), folders[1]):
        if weights is not None:
            engine.sleep(2)
            engine.wake_up()
            engine.update_weights(weights)
            hf_model.load_state_dict(load_file(f"{folders[1]}/model.safetensors") if weights == folders[1] else other)
        rounds = watch_rounds(engine)
        engine.add_request("r", text(1, 20), params(16))
        drain(engine)
        assert_as_defined(rounds, ref, at_least=3)
        assert {draft for _, drafts in rounds for draft in drafts} <= set(ids.tolist())


# The layout


def test_a_request_that_starts_behind_cached_tokens_says_so_in_its_slot(folders):
    engine = create(folders[2], 2)
    for n in range(2):
        engine.add_request(str(n), text(0, 70), params(2))
        drain(engine)
    assert {0, 64} == {int(line[slot_line.START]) for line in engine.executor.runner.state.lines}
