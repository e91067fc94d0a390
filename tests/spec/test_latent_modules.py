"""Modules whose layer has latent attention and experts, as DeepSeek-V3's and GLM-4.7-Flash's, in the formats they come in."""

from dataclasses import replace
from math import inf

import pytest
import torch
from drafted import watch_rounds
from fp8_folders import write_fp8
from mtp_reference import Reference
from safetensors.torch import load_file
from test_mtp_checkpoints import add_tensors, create, save_model
from tiny import drain
from transformers import DeepseekV3Config, Glm4MoeLiteConfig

from stepgraph import native
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.layers.formats import FP8, Packed, Plain
from stepgraph.layers.linear import Linear
from stepgraph.platforms.cpu import CpuPlatform
from stepgraph.platforms.tuning import DEFAULT

SIZES = {
    "vocab_size": 12,  # so that proposals of random modules stand now and then
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
}
CONFIGS = {
    "DeepSeek-V3": lambda **sizes: DeepseekV3Config(
        **SIZES | sizes, n_group=2, topk_group=1, first_k_dense_replace=1, routed_scaling_factor=2.5
    ),
    "GLM-4.7-Flash": lambda **sizes: Glm4MoeLiteConfig(
        **SIZES | sizes, n_group=1, topk_group=1, mlp_layer_types=["dense", "sparse"]
    ),
}
NONE = {"method": "none", "num_speculative_tokens": None}
PROMPTS = [[i * i % 11 + 1 for i in range(57)], [5, 6], [9] * 17, [7, 8, 9, 7, 8, 9, 7, 8]]


def save(folder, name, num_modules=1, **sizes) -> Reference:
    """Write a model and its modules, with what checkpoints repeat of the model beside them. Returns what these propose."""
    hf_config, other = CONFIGS[name](**sizes), folder.with_name("other")
    folder.mkdir()
    hf_model, donor = save_model(folder, hf_config), save_model(other, hf_config, seed=1)
    E, generator = hf_config.hidden_size, torch.Generator().manual_seed(2)
    shapes = {"enorm.weight": (E,), "hnorm.weight": (E,), "shared_head.norm.weight": (E,), "eh_proj.weight": (E, 2 * E)}
    module = {n: torch.empty(s).normal_(float(len(s) == 1), 0.2, generator=generator) for n, s in shapes.items()}
    last = "model.layers.1."
    layer = {n.removeprefix(last): t for n, t in load_file(other / "model.safetensors").items() if n.startswith(last)}
    copies = {"embed_tokens.weight": torch.zeros(12, E), "shared_head.head.weight": torch.zeros(12, E)}
    for k in range(num_modules):
        add_tensors(folder, {f"model.layers.{2 + k}.{n}": t.clone() for n, t in (module | layer | copies).items()})

    def computed(x_TE: torch.Tensor) -> torch.Tensor:
        x_1TE, positions = x_TE[None], torch.arange(len(x_TE))[None]
        mask = torch.full((len(x_TE), len(x_TE)), -torch.inf).triu(1)[None, None]
        rotary = donor.model.rotary_emb(x_1TE, positions)
        return donor.model.layers[1](x_1TE, attention_mask=mask, position_embeddings=rotary)[0]

    return Reference(hf_model, (module,) * num_modules, layer=computed)


def answers(engine, temperatures=(0, 0, 0.8, 1.1)):
    """Of the prompts, and how many proposals stood."""
    params = [SamplingParams(temperature=t, max_tokens=12, seed=5, ignore_eos=True) for t in temperatures]
    requests = [engine.add_request(str(i), *case) for i, case in enumerate(zip(PROMPTS, params, strict=True))]
    drain(engine)
    assert [request.error for request in requests] == [None] * len(requests)
    return [request.output_token_ids for request in requests], sum(len(request.accepted) for request in requests)


def formats(engine):
    """How the first module's layers keep their weights."""
    layers = engine.executor._drafter.layers[0].named_modules()
    return {path: layer.format for path, layer in layers if isinstance(layer, Linear)}


@pytest.mark.parametrize(
    ("name", "num_modules", "least"),
    [("DeepSeek-V3", 2, inf), ("GLM-4.7-Flash", 1, inf), ("DeepSeek-V3", 2, 1)],
    ids=["DeepSeek-V3", "GLM-4.7-Flash", "DeepSeek-V3, steps of prompts by keys and values of their own tokens"],
)
def test_modules_propose_what_their_definition_says(name, num_modules, least, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(CpuPlatform, "tuning", replace(DEFAULT, min_expanded_tokens=least))
    ref = save(tmp_path / "model", name, num_modules)
    rounds = watch_rounds(engine := create(tmp_path / "model", {"acceptance": 0.5}))
    answers(engine, temperatures=[0] * 4)
    assert len(rounds) > 12
    for known, drafts in rounds[::3]:
        assert list(drafts) == ref.drafts(list(known), len(drafts))


@pytest.mark.parametrize(
    "settings",
    [
        {
            "speculative": {"method": "hybrid", "num_speculative_tokens": 4},
            "max_num_batched_tokens": 16,
            "capture_sizes": (16,),
        },
        {"speculative": {"num_speculative_tokens": 2}, "deterministic": True, "graph_backend": "auto"},
    ],
    ids=["hybrid, in chunks", "deterministic, in graphs"],
)
def test_answers_are_those_without_speculation(settings, tmp_path) -> None:
    save(tmp_path / "model", "DeepSeek-V3", 2)
    plain = create(
        tmp_path / "model", NONE, **{name: value for name, value in settings.items() if name != "speculative"}
    )
    (found, accepted), (expected, _) = answers(create(tmp_path / "model", **settings)), answers(plain)
    assert found == expected
    assert accepted > 2


def test_a_module_in_8_bits_keeps_them(tmp_path) -> None:
    """With several groups of inputs, whose last one is incomplete, and a projection that is not in 8 bits, as published."""
    save(tmp_path / "model", "DeepSeek-V3", hidden_size=192, v_head_dim=40)
    plain = create(
        write_fp8(tmp_path / "model", tmp_path / "fp8", "fp8 with a scale per block", ignored=["eh_proj"]), {}
    )
    engine = create(tmp_path / "fp8", {})
    kept = {path for path, format in formats(engine).items() if isinstance(format, FP8)}
    assert formats(engine).keys() - kept == {"projection", "block.self_attn.kv_proj"}
    assert isinstance(formats(engine)["block.mlp.experts.gate_up_proj"], FP8)
    rounds = [watch_rounds(one) for one in (engine, plain)]
    assert answers(engine) == answers(plain)
    assert rounds[0] == rounds[1]
    numbers = create(tmp_path / "fp8", {}, quantization="none")
    assert set(formats(numbers).values()) == {Plain()}


@pytest.mark.skipif(not native.available(), reason="no kernels")
def test_beside_a_model_in_blocks_a_module_is_rounded_to_them_but_for_the_matrix_that_attention_reads(tmp_path) -> None:
    gguf = pytest.importorskip("gguf", reason="writing GGUF files needs the gguf package")
    from gguf_files import write_gguf

    ref = save(tmp_path / "model", "DeepSeek-V3", v_head_dim=32)
    types = dict.fromkeys(("ffn_gate_inp", "_norm", "exp_probs_b"), gguf.GGMLQuantizationType.F32)
    write_gguf(tmp_path / "model.gguf", ref.hf_model, types | {"blk.": gguf.GGMLQuantizationType.Q8_0})
    settings = {"quantization": "auto", "graph_backend": "auto"}
    engine = create(tmp_path / "model.gguf", {"model": str(tmp_path / "model")}, **settings)
    plain = {path for path, format in formats(engine).items() if format == Plain()}
    assert plain == {"block.self_attn.kv_proj"}
    assert all(isinstance(format, Packed) for path, format in formats(engine).items() if path not in plain)
    without = create(tmp_path / "model.gguf", NONE, **settings)
    assert answers(engine)[0] == answers(without)[0]


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_new_weights_leave_answers_and_proposals_as_they_were(level, tmp_path) -> None:
    ref = save(tmp_path / "model", "DeepSeek-V3")
    engine = create(
        tmp_path / "model", {"acceptance": 0.5}, graph_backend="auto", enable_sleep_mode=True, deterministic=True
    )
    rounds = watch_rounds(engine)
    expected, proposed = answers(engine), list(rounds)
    engine.sleep(level)
    engine.wake_up()
    for weights in (str(tmp_path / "model"), ref.hf_model.state_dict().items()):
        if level == 2 or weights != str(tmp_path / "model"):
            engine.update_weights(weights)
        rounds.clear()
        assert answers(engine) == expected
        assert rounds == proposed
