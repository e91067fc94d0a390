"""LoRA adapters in the engine: requests with different adapters share steps and graphs, and do not notice each other."""

from pathlib import Path

import pytest
import torch
from lora_folders import ALPHA, RANK, matrices, save_adapter
from safetensors.torch import load_file, save_file
from tiny import drain

from stepgraph import LLM, SamplingParams
from stepgraph.errors import RequestError

PROMPTS = [[(5 * i + 3 * j) % 257 for j in range(length)] for i, length in enumerate((9, 30, 2, 60, 17, 5))]
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of three adapters of the tiny model."""
    return [save_adapter(tmp_path_factory.mktemp(f"adapter{seed}"), matrices(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def create_lora_engine(create_engine):
    return lambda **settings: create_engine(**({"enable_lora": True, "max_loras": 3, "max_lora_rank": 4} | settings))


def answers(engine, chosen, params=GREEDY):
    """Tokens of every prompt, all in flight at once; prompt i uses the adapter `chosen[i]`."""
    requests = [
        engine.add_request(str(i), prompt, params, adapter=adapter)
        for i, (prompt, adapter) in enumerate(zip(PROMPTS, chosen, strict=True))
    ]
    drain(engine)
    return [list(request.output_token_ids) for request in requests]


def test_rows_with_and_without_adapters_in_one_step_get_the_tokens_of_steps_of_their_own(create_lora_engine, adapters):
    engine = create_lora_engine()
    by_adapter = {adapter: answers(engine, [adapter] * len(PROMPTS)) for adapter in (None, *adapters)}
    assert len({tuple(tokens[0]) for tokens in by_adapter.values()}) == 4, "the adapters change nothing"
    first, second, third = adapters
    chosen = [None, first, second, first, None, third]
    assert answers(engine, chosen) == [by_adapter[adapter][i] for i, adapter in enumerate(chosen)]


def test_answers_are_those_of_the_adapter_merged_into_the_model(
    create_lora_engine, create_engine, adapters, tiny_model, tmp_path
):
    weights = load_file(f"{tiny_model}/model.safetensors")
    for name, (a, b) in matrices(1).items():
        weights[f"{name}.weight"] += ALPHA / RANK * b @ a
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path(tiny_model, name).read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    plain = [None] * len(PROMPTS)
    assert answers(create_lora_engine(), plain) == answers(create_engine(), plain)
    merged = answers(create_engine(model=str(tmp_path)), plain)
    assert answers(create_lora_engine(), [adapters[1]] * len(PROMPTS)) == merged


def test_prefixes_cached_with_an_adapter_are_not_used_without_it(create_lora_engine, adapters):
    engine = create_lora_engine()

    def run(name, adapter):
        request = engine.add_request(name, [i % 250 for i in range(64)], GREEDY, adapter=adapter)
        drain(engine)
        return request

    adapted, plain, again = run("a", adapters[0]), run("b", None), run("c", adapters[0])
    assert plain.num_cached_tokens == 0
    assert adapted.output_token_ids != plain.output_token_ids
    assert again.num_cached_tokens > 0
    assert again.output_token_ids == adapted.output_token_ids


def test_answers_of_an_adapter_are_proposed_to_its_requests_alone(create_lora_engine, adapters):
    engine = create_lora_engine(speculative_config={"method": "suffix", "adaptive": False, "memory_tokens": 4096})
    requests = [
        engine.add_request(str(i), [1, 2], GREEDY, adapter=adapter)
        for i, adapter in enumerate((None, adapters[0], adapters[1], adapters[0]))
    ]
    keys = [request.sampling.memory_key for request in requests]
    assert keys[0] == 0
    assert keys[1] == keys[3]
    assert len(set(keys)) == 3
    drain(engine)


def test_ended_and_aborted_and_refused_requests_make_room_for_other_adapters(create_lora_engine, adapters):
    engine = create_lora_engine(max_loras=1)
    engine.add_request("a", [1, 2], GREEDY, adapter=adapters[0])
    with pytest.raises(RequestError, match="max_loras=1"):
        engine.add_request("b", [1, 2], GREEDY, adapter=adapters[1])
    drain(engine)
    engine.add_request("b", [1, 2], GREEDY, adapter=adapters[1])
    with pytest.raises(RequestError, match="in use"):
        engine.add_request("b", [1, 2], GREEDY, adapter=adapters[1])  # the id is in use
    engine.abort("b")
    engine.add_request("c", [1, 2], GREEDY, adapter=adapters[2])
    drain(engine)


def test_a_damaged_adapter_leaves_nothing_to_the_one_in_its_place(create_lora_engine, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "sound").mkdir()
    damaged = {name: (torch.full_like(a, torch.nan), b) for name, (a, b) in matrices(0).items()}
    damaged = save_adapter(tmp_path / "damaged", damaged)
    sound = {name: pair for name, pair in matrices(1).items() if name.endswith("q_proj")}
    sound = save_adapter(tmp_path / "sound", sound)
    engine = create_lora_engine(max_loras=1)
    assert answers(engine, [damaged] * len(PROMPTS)) == [[]] * len(PROMPTS)
    chosen = [sound] * len(PROMPTS)
    assert answers(engine, chosen) == answers(create_lora_engine(), chosen)


def test_an_engine_without_adapters_says_how_to_get_them(create_engine, adapters):
    with pytest.raises(RequestError, match="start it with enable_lora=True"):
        create_engine().add_request("a", [1], GREEDY, adapter=adapters[0])


CHUNKS_OF_5 = {"capture_sizes": (5,), "max_num_batched_tokens": 5, "max_num_seqs": 3, "capture_rows": (3,)}


@pytest.mark.parametrize("settings", [{"graph_backend": "eager"}, CHUNKS_OF_5], ids=["eager", "in chunks of 5"])
def test_with_deterministic_mode_adapters_give_the_same_tokens_at_any_temperature(
    settings, create_lora_engine, adapters
):
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=5, ignore_eos=True)
    chosen = [None, *adapters, adapters[0], None]
    expected = answers(create_lora_engine(deterministic=True), chosen, params)
    assert answers(create_lora_engine(deterministic=True, **settings), chosen, params) == expected


def test_each_prompt_of_a_call_may_name_its_adapter(adapters, tiny_model, device):
    prompts = [PROMPTS[0]] * 3
    with LLM(
        tiny_model, device=device, progress=False, enable_lora=True, max_lora_rank=4, num_kv_blocks=100, dtype="float32"
    ) as llm:
        mixed = llm.generate(prompts, GREEDY, adapter=[None, *adapters[:2]], use_tqdm=False)
        [alone] = llm.generate([PROMPTS[0]], GREEDY, adapter=adapters[0], use_tqdm=False)
        *_, streamed = llm.stream(PROMPTS[0], GREEDY, adapter=adapters[1])
    assert len({output.outputs[0].token_ids for output in mixed}) == 3
    assert mixed[1].outputs[0].token_ids == alone.outputs[0].token_ids
    assert mixed[2].outputs[0].token_ids == streamed.outputs[0].token_ids
