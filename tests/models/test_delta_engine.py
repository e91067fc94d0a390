"""Models with gated delta rules, short convolutions or Mamba-2 in an engine: states per slot, keys and values beside them,
against transformers in float32."""

import json
import re
from contextlib import nullcontext
from math import isfinite
from shutil import copytree

import pytest
import torch
from answers import assert_as_transformers, continued, generate, prompts_of
from checkpoints import HF_CONFIGS, random_hf_model
from lora_folders import ALPHA, RANK, save_adapter
from safetensors.torch import load_file, save_file
from scripted import ScriptedDrafter, watch_drafts
from tiny import TINY_SETTINGS
from triton_operators import triton_operators

from stepgraph.config import EngineConfig
from stepgraph.engine import state_lines
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.errors import ConfigError, ModelError
from stepgraph.executor.build import build_local_executor
from stepgraph.executor.local import runner_of
from stepgraph.layers.rotary import UNROTATED
from stepgraph.models import resolve
from stepgraph.spec.drafter import Drafter
from stepgraph.verify.graphs import verify_graphs

TOKENS = 160
LENGTHS = (1, 16, 17, 63, 64, 65, 128, 129, 190)
"""Of prompts: around what runs token by token, chunks, and steps."""
NAMES = (
    "qwen3 next",
    "qwen3.5",
    "olmo hybrid",
    "lfm2 with biases",
    "lfm2 moe",
    "granite 4.0-h",
    "falcon h1",
    "nemotron h",
)


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory):
    """A folder, its prompts, and how transformers goes on: tokens and their log-probabilities."""
    folder = tmp_path_factory.mktemp("checkpoint")
    hf_model = random_hf_model(HF_CONFIGS[request.param]())
    with torch.no_grad():
        hf_model.lm_head.weight.mul_(0.5)
    hf_model.save_pretrained(folder)
    prompts = prompts_of(LENGTHS)
    return str(folder), prompts, [continued(hf_model, prompt) for prompt in prompts]


def create(folder: str, device: str, *, drafter: Drafter | None = None, **settings) -> Engine:
    sizes = {"max_num_batched_tokens": TOKENS, "capture_sizes": (8, TOKENS), "max_num_seqs": 5, "num_kv_blocks": 129}
    config = EngineConfig.from_settings(model=folder, device=device, **TINY_SETTINGS | sizes | settings)
    source = resolve(folder)
    executor = None if drafter is None else build_local_executor(config, source, drafter=drafter)
    return build_engine(config, source=source, executor=executor)


@pytest.fixture(scope="module")
def engine(checkpoint, device):
    return create(checkpoint[0], device)


def test_alone(engine, checkpoint) -> None:
    _, prompts, answers = checkpoint
    assert_as_transformers(generate(engine, prompts, together=False), answers)


def test_side_by_side_in_mixed_steps(engine, checkpoint) -> None:
    """Prompts are cut where a step is full, and slots are used by one request after the other."""
    _, prompts, answers = checkpoint
    assert_as_transformers(generate(engine, prompts, together=True), answers)


def test_started_anew_on_their_way(engine, checkpoint) -> None:
    _, prompts, answers = checkpoint
    assert_as_transformers(generate(engine, prompts, together=True, preemption=0.2), answers)


@pytest.mark.parametrize("chunk", [21, 65])
def test_prompts_cut_into_chunks(checkpoint, device, chunk) -> None:
    folder, prompts, answers = checkpoint
    engine = create(folder, device, max_num_batched_tokens=chunk, capture_sizes=None, graph_backend="eager")
    assert_as_transformers(generate(engine, prompts, together=True), answers)


def test_proposals_are_taken_back(checkpoint, device) -> None:
    """Some rounds stand as a whole, and some fall in the middle."""
    folder, prompts, answers = checkpoint
    known = [(prompt, tokens) for prompt, (tokens, _) in zip(prompts, answers, strict=True)]
    drafter = ScriptedDrafter(known, max_model_len=256, vocab_size=96, device=device)
    settings = {"method": "ngram", "num_speculative_tokens": 3, "adaptive": False}
    engine = create(folder, device, drafter=drafter, speculative_config=settings)
    drafts = watch_drafts(engine)
    assert_as_transformers(generate(engine, prompts, together=True, preemption=0.1), answers)
    assert {stood < num for num, stood in drafts} == {True, False}


@pytest.mark.parametrize("settings", [{}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}])
def test_prompts_start_from_states_that_were_kept(checkpoint, device, monkeypatch, settings) -> None:
    """Each prompt again, and each as the beginning of another, which transformers had as well."""
    folder, prompts, answers = checkpoint
    monkeypatch.setattr(state_lines, "PROMPT_TOKENS", 32)
    engine = create(folder, device, max_num_seqs=len(prompts), **settings)
    known = [prompt + tokens[:-1] for prompt, (tokens, _) in zip(prompts, answers, strict=True)]
    generate(engine, prompts, together=True)
    again = generate(engine, prompts, together=True)
    assert_as_transformers(again, answers)
    assert [request.num_cached_tokens for request in again] == [0, 0, 0, 48, 48, 48, 112, 112, 176]
    for request, (tokens, logprobs) in zip(generate(engine, known, together=True), answers, strict=True):
        assert request.output_token_ids[0] == tokens[-1]
        assert request.output_logprobs[0].logprob == pytest.approx(logprobs[-1], abs=2e-4)
        assert request.num_cached_tokens >= (len(request.prompt_token_ids) > 70) * 48


@pytest.mark.parametrize("name", ["qwen3.5", "falcon h1"])
def test_triton_kernels_read_and_write_the_lines_of_rows(name, tmp_path, device, monkeypatch) -> None:
    """Prompts side by side, in chunks, of which one starts from a state that another has left."""
    monkeypatch.setattr(state_lines, "PROMPT_TOKENS", 16)
    random_hf_model(HF_CONFIGS[name]()).save_pretrained(tmp_path)
    settings = {"method": "ngram", "num_speculative_tokens": 2}
    prompts, found = [list(range(3, 24)), list(range(40, 47))], []
    for operators in ((), ("causal_conv", "gated_delta", "mamba2")):
        with triton_operators(*operators) if operators else nullcontext():
            engine = create(str(tmp_path), device, graph_backend="eager", speculative_config=settings)
            requests = generate(engine, prompts, together=True, max_tokens=3)
            requests += generate(engine, prompts[:1], together=True, max_tokens=2)
        assert [request.num_cached_tokens for request in requests] == [0, 0, 16]
        found.append([entry.logprob for request in requests for entry in request.output_logprobs])
    assert found[0] == pytest.approx(found[1], abs=2e-4)


def test_graphs_are_verified(checkpoint, device) -> None:
    engine = create(checkpoint[0], device, speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    reports = verify_graphs(engine.executor, rounds=2, seed=0, draft_levels=(0, 2))
    assert [report.mismatches for report in reports] == [[]] * len(reports)


@pytest.mark.parametrize("name", ["qwen3.5", "lfm2", "bamba"])
def test_deterministic_answers_do_not_depend_on_the_steps(name, tmp_path, device) -> None:
    random_hf_model(HF_CONFIGS[name]()).save_pretrained(tmp_path)
    prompts = [[3 + (7 * place + number) % 90 for place in range(30 * number)] for number in (1, 2, 3)]
    found = []
    for settings in ({}, {"max_num_batched_tokens": 37, "capture_sizes": None}):
        engine = create(str(tmp_path), device, deterministic=True, graph_backend="eager", **settings)
        requests = generate(engine, prompts, together=True)
        found.append([[entry.logprob for entry in request.output_logprobs] for request in requests])
    assert found[0] == found[1]


def test_states_are_counted_where_memory_is_short(checkpoint, device) -> None:
    with pytest.raises(ConfigError, match=r"lower max_num_seqs=5, as many states take"):
        create(checkpoint[0], device, num_kv_blocks=1 << 40)


def test_random_weights_are_finite(checkpoint, device) -> None:
    engine = create(checkpoint[0], device, load_format="dummy", graph_backend="eager")
    (request,) = generate(engine, checkpoint[1][-1:], together=True)
    assert all(isfinite(entry.logprob) for entry in request.output_logprobs)
    assert all(parameter.isfinite().all() for parameter in runner_of(engine.executor).model.parameters())


def test_an_adapter_is_what_merged_weights_are(checkpoint, device, tmp_path) -> None:
    """Of projections whose rows are put in another order as they are loaded."""
    folder, prompts, _ = checkpoint
    tensors, pairs = load_file(f"{folder}/model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    adapted = re.compile(r".*\.([abg]_proj|in_proj\w*|o(ut)?_proj|q_proj|shared_mlp\.input_linear)\.weight")
    for name in filter(adapted.fullmatch, list(tensors)):
        outputs, inputs = tensors[name].shape
        a = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
        b = torch.randn(outputs, RANK, generator=generator) / 4
        pairs[name.removesuffix(".weight")] = a, b
        tensors[name] += ALPHA / RANK * b @ a
    copytree(folder, tmp_path / "merged")
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter").mkdir()
    adapter = save_adapter(tmp_path / "adapter", pairs)
    merged = generate(create(str(tmp_path / "merged"), device, graph_backend="eager"), prompts[2:6], together=True)
    engine = create(folder, device, graph_backend="eager", enable_lora=True, max_lora_rank=RANK)
    adapted = generate(engine, prompts[2:6], together=True, adapter=adapter)
    assert [request.output_token_ids for request in adapted] == [request.output_token_ids for request in merged]


@pytest.mark.parametrize(
    ("rope", "rotates"),
    [
        ({"rope_parameters": None}, False),
        ({"rope_parameters": {"rope_type": None}}, False),
        ({"rope_parameters": {"rope_theta": None, "rope_type": "default"}}, False),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, True),
        ({"rope_parameters": None, "rope_theta": 5e5}, True),
    ],
)
def test_olmo_hybrid_rotates_only_by_a_base_that_its_config_has(tmp_path, rope, rotates) -> None:
    config = HF_CONFIGS["olmo hybrid"]().to_dict() | {"architectures": ["OlmoHybridForCausalLM"]} | rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {rope != UNROTATED for rope in resolve(str(tmp_path)).config.ropes} == {rotates}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen3.5", {"hidden_act": "gelu_pytorch_tanh"}, "run with silu"),
        ("qwen3.5", {"linear_num_value_heads": 5}, "must be a multiple of key heads"),
        ("qwen3.5", {"linear_conv_kernel_dim": 1}, "at least 2 tokens"),
        ("qwen3.5", {"layer_types": ["linear_attention"] * 2}, "at least one must be full_attention"),
        ("qwen3.5", {"layer_types": ["linear_attention", "sliding_attention"]}, "layers of type sliding_attention"),
        ("qwen3.5", {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
        ("olmo hybrid", {"linear_num_value_heads": 5}, "must be a multiple of key heads"),
        ("lfm2", {"conv_L_cache": 1}, r"of 1 tokens \(conv_L_cache\), and must be of at least 2"),
        ("lfm2", {"layer_types": ["conv"] * 3}, "at least one must be full_attention"),
        ("lfm2", {"block_multiple_of": 0}, r"feed-forward layers of -?\d+ values, in multiples of 0"),
        ("lfm2", {"block_ffn_dim_multiplier": 1e30}, "feed-forward layers of"),
        ("lfm2 moe", {"layer_types": None}, "no layer_types"),
        (
            "lfm2 moe",
            {"layer_types": ["conv", "linear_attention", "full_attention"]},
            "layers of type linear_attention",
        ),
        ("lfm2 moe", {"num_experts_per_tok": 9}, "number of experts per token is 9"),
    ],
)
def test_configs_of_other_layers_are_refused(tmp_path, name, changes, said) -> None:
    class_name = {
        "qwen3.5": "Qwen3_5ForCausalLM",
        "lfm2": "Lfm2ForCausalLM",
        "lfm2 moe": "Lfm2MoeForCausalLM",
        "olmo hybrid": "OlmoHybridForCausalLM",
    }[name]
    config = HF_CONFIGS[name]().to_dict() | {"architectures": [class_name]} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        resolve(str(tmp_path))
