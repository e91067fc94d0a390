"""Gemma 4 in an engine: layers that differ in their heads, use each other's keys and values and take embeddings of their own,
against transformers in float32."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from answers import assert_as_transformers, continued, generate, prompts_of
from checkpoints import GEMMA4, GEMMA4_SHARED, HF_CONFIGS, hf_config, random_hf_model
from fp8_folders import write_fp8
from safetensors.torch import load_file, save_file
from scripted import watch_drafts
from stepping import Stepper
from thread_group import run_ranks
from tiny import TINY_SETTINGS
from torch.utils._python_dispatch import TorchDispatchMode

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.errors import ConfigError, ModelError
from stepgraph.executor.local import runner_of
from stepgraph.layers.formats import FP8
from stepgraph.models import load_model, resolve
from stepgraph.models.registry import read_config
from stepgraph.models.update import plan_update, write
from stepgraph.verify.graphs import verify_graphs

NAMES = ("gemma 4 e4b", "gemma 4 26b", "gemma 4 12b")
LENGTHS = (1, 17, 33, 64, 90)
CPU = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 128}


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory):
    """A folder, its prompts, and how transformers goes on."""
    folder = tmp_path_factory.mktemp("checkpoint")
    hf_model = random_hf_model(HF_CONFIGS[request.param]())
    hf_model.save_pretrained(folder)
    prompts = prompts_of(LENGTHS)
    return str(folder), prompts, [continued(hf_model, prompt) for prompt in prompts]


def create(folder, device, **settings):
    sizes = {"max_num_batched_tokens": 48, "capture_sizes": (8, 48), "max_num_seqs": 4, "num_kv_blocks": 65}
    return build_engine(EngineConfig.from_settings(model=folder, device=device, **TINY_SETTINGS | sizes | settings))


@pytest.fixture(scope="module")
def engine(checkpoint, device):
    return create(checkpoint[0], device)


def test_alone_side_by_side_and_from_the_prefix_cache(engine, checkpoint) -> None:
    _, prompts, expected = checkpoint
    assert_as_transformers(generate(engine, prompts, together=False), expected)
    requests = generate(engine, prompts, together=True)
    assert_as_transformers(requests, expected)
    assert any(request.num_cached_tokens for request in requests)


def test_started_anew_on_their_way(engine, checkpoint) -> None:
    _, prompts, expected = checkpoint
    assert_as_transformers(generate(engine, prompts, together=True, preemption=0.3), expected)


def test_with_looked_up_proposals(checkpoint, device) -> None:
    engine = create(checkpoint[0], device, speculative_config={"method": "suffix", "num_speculative_tokens": 3})
    drafts = watch_drafts(engine)
    for _ in range(2):  # the second time, answers are known
        assert_as_transformers(generate(engine, checkpoint[1], together=True), checkpoint[2])
    assert any(stood for _, stood in drafts)


def test_graphs_are_verified(checkpoint, device) -> None:
    engine = create(checkpoint[0], device, speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    reports = verify_graphs(engine.executor, rounds=2, seed=0, draft_levels=(0, 2))
    assert [report.mismatches for report in reports] == [[]] * len(reports)


def test_layers_that_use_others_keys_and_values_take_no_memory_for_any(tmp_path, device) -> None:
    random_hf_model(HF_CONFIGS["gemma 4 e4b"]()).save_pretrained(tmp_path)
    runner = runner_of(create(str(tmp_path), device).executor)
    assert [spec.shares for spec in runner.layout.specs] == [None, None, 0, 1]
    assert runner.caches[2] is runner.caches[0]
    assert [cache.keys.shape[2:] for cache in runner.caches[:2]] == [(2, 16), (2, 32)]
    token = 2 * 4 * (2 * 16 + 2 * 32)  # keys and values in float32, of the first two layers
    assert runner.layout.block_bytes == runner.layout.block_size * token


def test_what_published_checkpoints_keep_for_layers_that_share_is_passed_over(tmp_path) -> None:
    random_hf_model(HF_CONFIGS["gemma 4 e4b"]()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    more = {name.replace("layers.0.", "layers.2."): tensors[name].clone() for name in tensors if "0.self_attn" in name}
    save_file(more | tensors, path, metadata={"format": "pt"})
    model = load_model(resolve(str(tmp_path)), **CPU)
    write(plan_update(model, (more | tensors).items()))
    save_file(tensors | {"model.layers.2.self_attn.x_proj.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="left over"):
        load_model(resolve(str(tmp_path)), **CPU)


def all_logits(model):
    return Stepper(model, 128).step([(7 * i + 3) % 90 for i in range(40)])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_compute_what_one_device_does(name, size, tmp_path) -> None:
    """Of four ranks, two keep the same key/value head, and all keep the same one of layers that have no more."""
    random_hf_model(HF_CONFIGS[name]()).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    expected = all_logits(load_model(source, **CPU))
    ranks = run_ranks(size, lambda group: all_logits(load_model(source, **CPU, group=group)))
    for found in ranks:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(found, ranks[0])


def test_ranks_keep_whole_experts(tmp_path) -> None:
    random_hf_model(HF_CONFIGS["gemma 4 26b"]()).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    expected = all_logits(load_model(source, **CPU))
    settings = CPU | {"expert_parallel": True}
    for found in run_ranks(2, lambda group: all_logits(load_model(source, **settings, group=group))):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_experts_in_8_bits_are_read_by_the_names_of_each(tmp_path) -> None:
    """As tools write them that quantise linear layers alone."""
    random_hf_model(HF_CONFIGS["gemma 4 26b"]()).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = {}
    for name, values in load_file(path).items():
        stem, _, part = name.rpartition(".")
        if part not in ("gate_up_proj", "down_proj"):
            tensors[name] = values
            continue
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        for expert, of_expert in enumerate(values):
            for piece, matrix in zip(parts, of_expert.chunk(len(parts)), strict=True):
                tensors[f"{stem}.{expert}.{piece}.weight"] = matrix.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    plain = write_fp8(tmp_path / "source", tmp_path / "fp8", "a scale per output", ignored=("router",))
    model, expected = (load_model(resolve(str(folder)), **CPU) for folder in (tmp_path / "fp8", plain))
    assert all(isinstance(layer.moe.experts.down_proj.format, FP8) for layer in model.layers)
    torch.testing.assert_close(all_logits(model), all_logits(expected), atol=1e-4, rtol=1e-4)


class Launches(TorchDispatchMode):
    """Writes down the operators that are called, each with how many arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func._opname, sum(arg is not None for arg in args)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_scales_and_the_gates_of_layers_inputs_are_no_kernels_of_their_own(name, tmp_path) -> None:
    random_hf_model(HF_CONFIGS[name]()).save_pretrained(tmp_path)
    model = load_model(resolve(str(tmp_path)), **CPU)
    with Launches() as launches:
        all_logits(model)
    assert launches.found["rms_norm_add", 5] == len(model.layers)
    assert launches.found["route", 13] == (len(model.layers) if name == "gemma 4 26b" else 0)  # 12 without a scale
    assert launches.found["geglu", 2] == (len(model.layers) if name == "gemma 4 e4b" else 0)


def test_random_weights_are_finite_and_scale_nothing(checkpoint, device) -> None:
    engine = create(checkpoint[0], device, load_format="dummy", graph_backend="eager")
    model = runner_of(engine.executor).model
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert {float(layer.layer_scalar) for layer in model.layers} == {1.0}


def test_in_16_bits_norms_and_embeddings_round_where_transformers_does(tmp_path) -> None:
    hf_model = random_hf_model(HF_CONFIGS["gemma 4 e4b"]()).bfloat16()
    hf_model.save_pretrained(tmp_path)
    model = load_model(resolve(str(tmp_path)), **CPU | {"dtype": torch.bfloat16})
    tokens = torch.arange(32)
    x = model.embed_tokens(tokens)
    assert torch.equal(x, hf_model.model.embed_tokens(tokens))
    per_layer = hf_model.model.get_per_layer_inputs(tokens[None], None)[0].flatten(1)
    assert torch.equal(model.per_layer_inputs.embedding(tokens), per_layer)
    same = model.layers[0].input_layernorm(x) == hf_model.model.layers[0].input_layernorm(x)
    assert same.float().mean() > 0.99  # float32 sums differ in their last bit, which may decide a rounding
    assert model.layers[0].self_attn.q_norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma 4 e4b", {"use_bidirectional_attention": "all"}, "its attention is not causal"),
        ("gemma 4 e4b", {"vocab_size_per_layer_input": 95}, r"has 96 tokens, and embeddings of each layer for 95"),
        ("gemma 4 e4b", {"num_kv_shared_layers": 3}, "The last 3 of the 4 layers"),
        ("gemma 4 e4b", {"num_kv_shared_layers": 4}, "The last 4 of the 4 layers"),
        (
            "gemma 4 e4b",
            {"per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 64}}},
            "Layers of one type differ",
        ),
        ("gemma 4 e4b", {"num_key_value_heads": 3}, "must be a multiple of each number"),
        ("gemma 4 26b", {"top_k_experts": 9}, "number of experts per token is 9"),
        ("gemma 4 26b", {"hidden_activation": "relu"}, 'feed-forward activation is "relu"'),
    ],
)
def test_configs_that_cannot_run_are_refused(name, changes, said, tmp_path) -> None:
    config = HF_CONFIGS[name]().to_dict() | {"architectures": ["Gemma4ForCausalLM"]} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        resolve(str(tmp_path))


def test_a_scaled_rotation_is_refused(tmp_path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    config = HF_CONFIGS["gemma 4 12b"]().to_dict() | {"architectures": ["Gemma4UnifiedForCausalLM"]}
    config["rope_parameters"] |= {"full_attention": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"'full_attention': 'linear'.*run with default and proportional"):
        resolve(str(tmp_path))


def test_what_only_images_see_ahead_of_is_no_matter_to_text(tmp_path) -> None:
    config = HF_CONFIGS["gemma 4 e4b"]().to_dict() | {"architectures": ["Gemma4ForCausalLM"]}
    read = []
    for seen in (None, "vision"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": seen}))
        read.append(resolve(str(tmp_path)).config)
    assert read[0] == read[1]


@pytest.mark.parametrize("fields", [GEMMA4, GEMMA4_SHARED])
def test_configs_of_transformers_before_it_had_sizes_of_each_layer_are_read_alike(fields, tmp_path) -> None:
    made = hf_config("Gemma4TextConfig", **{"hidden_size_per_layer_input": 0} | fields)
    (tmp_path / "config.json").write_text(json.dumps(made.to_dict() | {"architectures": ["Gemma4ForCausalLM"]}))
    without = {name: value for name, value in made.to_dict().items() if name != "per_layer_config"}
    older = {"num_global_key_value_heads": None} | without | fields | {"architectures": ["Gemma4ForCausalLM"]}
    assert replace(read_config(SimpleNamespace(**older)), dtype=torch.float32) == resolve(str(tmp_path)).config


def test_draft_modules_are_refused_beside_embeddings_of_layers(tmp_path, device) -> None:
    random_hf_model(HF_CONFIGS["gemma 4 e4b"]()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match='"mtp" knows no modules for this Gemma4ForCausalLM'):
        create(str(tmp_path), device, speculative_config={"method": "mtp"}, load_format="dummy")


def test_sizes_of_layers_follow_from_the_fields(tmp_path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(GEMMA4_SHARED | {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text"})
    )
    config = resolve(str(tmp_path)).config
    assert [(sizes.head_dim, sizes.intermediate_size) for sizes in config.layers] == [
        (16, 96),
        (32, 96),
        (16, 192),
        (32, 192),
    ]
    assert [sizes.keys_and_values.shares for sizes in config.layers] == [None, None, 0, 1]
    assert len(set(config.ropes)) == 2
    assert sum(frequency == 0 for frequency in config.ropes[1].inv_freq) == 12  # of 16 pairs
    assert replace(config, layers=()) != config
