"""transformers' own classes under the step program, in float32: what runs, with which logits, and what is refused."""

import copy

import pytest
import torch
import transformers
from checkpoints import SIZES, hf_config, random_hf_model
from safetensors.torch import load_file, save_file
from tiny import TINY_SETTINGS, drain

from stepgraph.abi import slot_line
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError, ModelError
from stepgraph.executor.build import build_local_executor
from stepgraph.models import DecoderConfig, load_model, resolve
from stepgraph.models.transformers_checks import explain
from stepgraph.models.transformers_config import TransformersConfig
from stepgraph.models.transformers_interfaces import IMPLEMENTATIONS
from stepgraph.models.transformers_model import TransformersModel, judge
from stepgraph.platforms import create_platform
from stepgraph.step.plan import StepPlan
from stepgraph.step.runner import StepRunner
from stepgraph.verify.graphs import verify_graphs

MAX_MODEL_LEN = 128
SETTINGS = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "capture_sizes": (48,),
    "capture_rows": (4,),
    "num_kv_blocks": 33,
}
GPT2_SIZES = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ODD_SIZES = SIZES | {"pad_token_id": 0}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}

SUPPORTED = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
    "mistral: a window in every layer": lambda: transformers.MistralConfig(**SIZES, sliding_window=20),
    "gpt2: learned positions, biases": lambda: transformers.GPT2Config(**GPT2_SIZES),
    "gpt2: a token for padding": lambda: transformers.GPT2Config(**GPT2_SIZES, pad_token_id=3),
    "gpt_bigcode: one key head": lambda: transformers.GPTBigCodeConfig(**GPT2_SIZES),
    "gpt_neox: parallel residual, part of each head rotated": lambda: transformers.GPTNeoXConfig(**SIZES),
    "phi: head bias, part of each head rotated": lambda: transformers.PhiConfig(**SIZES),
    "olmo2: norms after each part": lambda: transformers.Olmo2Config(**ODD_SIZES),
    "granite: multipliers, divided logits": lambda: transformers.GraniteConfig(
        **SIZES, logits_scaling=8.0, embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.5
    ),
    "cohere: scaled logits, interleaved rotation": lambda: transformers.CohereConfig(**ODD_SIZES, logit_scale=0.25),
    "cohere2: windows in some layers": lambda: transformers.Cohere2Config(
        **ODD_SIZES, sliding_window=20, layer_types=["sliding_attention", "full_attention"]
    ),
    "glm4: four norms": lambda: transformers.Glm4Config(**ODD_SIZES, head_dim=16),
    "gemma3: two rotations": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=20, layer_types=["sliding_attention", "full_attention"]
    ),
    "starcoder2: plain feed-forward": lambda: transformers.Starcoder2Config(**SIZES),
    "smollm3: a layer without positions": lambda: transformers.SmolLM3Config(**ODD_SIZES, no_rope_layers=[1, 0]),
    "nanochat: capped logits": lambda: transformers.NanoChatConfig(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe: a shared expert": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **MOE, shared_expert_intermediate_size=48
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **MOE, head_dim=16),
    "glm4_moe: routing with a buffer, a dense layer": lambda: transformers.Glm4MoeConfig(
        **SIZES,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "laguna: query heads per layer": lambda: hf_config(
        "LagunaConfig",
        **SIZES | MOE,
        head_dim=16,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=20,
        num_attention_heads_per_layer=[4, 8],
    ),
    "deepseek_v3: latents made keys and values, which differ in size": lambda: transformers.DeepseekV3Config(
        **SIZES | LATENT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
    ),
    "stablelm: attention that is given no keyword arguments": lambda: transformers.StableLmConfig(**SIZES),
    "diffllama: two calls of attention in a layer": lambda: transformers.DiffLlamaConfig(**SIZES),
    "hrm_text: layers that run several times": lambda: hf_config(
        "HrmTextConfig",
        **SIZES | {"num_hidden_layers": 8},
        num_layers_per_stack=1,
        H_cycles=2,
        L_cycles=3,
    ),
    "gpt_oss: sinks": lambda: transformers.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=20
    ),
    "gemma2: capped scores": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=16, sliding_window=20, attn_logit_softcapping=2.0, final_logit_softcapping=4.0
    ),
    "opt: a decoder in its base model, positions from 2": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=96, word_embed_proj_dim=32
    ),
}
"""What runs, and what is particular about it."""
NATIVE = ["llama", "qwen3"]
"""Compared with the native model, which other tests compare with transformers."""


def through_transformers(folder):
    return resolve(str(folder), model_impl="transformers")


def create_runner(source, device) -> StepRunner:
    platform = create_platform(device)
    model = load_model(source, dtype=torch.float32, device=platform.device, max_model_len=MAX_MODEL_LEN)
    config = EngineConfig.from_settings(model=source.name, device=device, **SETTINGS)
    return StepRunner(model, config, platform, max_model_len=MAX_MODEL_LEN)


def logits_in_steps(runner, sequences, steps) -> dict[tuple[int, int], torch.Tensor]:
    """Run known sequences through captured graphs: step by step, so many tokens of each. Returns the logits after the last token
    of each row, by sequence and position."""
    state, found = runner.state, {}
    next_block = 1
    with runner.workbench():
        for i, tokens in enumerate(sequences):
            blocks = -(-len(tokens) // runner.block_size)
            for block_table in state.block_tables:
                block_table[i + 1, :blocks] = torch.arange(next_block, next_block + blocks)
                next_block += blocks
        done = [0] * len(sequences)
        for step in steps:
            rows = [(i, n) for i, n in enumerate(step) if n]
            for i, n in rows:  # as if no more were known than this step computes, so that it samples
                line, end = state.lines[i + 1], done[i] + n
                line.zero_()
                line[slot_line.LENGTH], line[slot_line.COMPUTED], line[slot_line.ACTIVE] = end, done[i], 1
                line[slot_line.MAX_LENGTH], line[slot_line.STOP_TOKENS :] = MAX_MODEL_LEN, -1
                state.tokens[i + 1, :end] = torch.tensor(sequences[i][:end], dtype=torch.int32)
            plan = StepPlan(tuple((i + 1, n) for i, n in rows), (), 0)
            record, graph = runner.graphs.graph_for(plan)
            assert runner.graphs.store.graph(record.shape) is not None
            runner.load(plan, record.shape)
            logits = graph.replay().logits
            runner.platform.synchronize()
            for row, (i, n) in enumerate(rows):
                done[i] += n
                found[i, done[i] - 1] = logits[row].float().cpu().clone()
    assert done == [len(tokens) for tokens in sequences]
    return found


SEQUENCES = [
    [(7 * i + 3) % 96 for i in range(70)],
    [(5 * i + 1) % 96 for i in range(37)],
    [(i * i) % 96 for i in range(9)],
]
STEPS = [(5, 0, 6), (1, 37, 1), (33, 0, 1), (30, 0, 1), (1, 0, 0)]
"""Chunks, whole prompts and single tokens, side by side."""


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in NATIVE])
def test_logits_in_graphs_match_transformers_in_batches_of_chunks_and_decodes(name, tmp_path, device) -> None:
    hf_model = random_hf_model(SUPPORTED[name]())
    hf_model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = [hf_model(torch.tensor([tokens])).logits[0] for tokens in SEQUENCES]
    runner = create_runner(through_transformers(tmp_path), device)
    found = logits_in_steps(runner, SEQUENCES, STEPS)
    assert len(found) == 10
    for (i, position), logits in found.items():
        torch.testing.assert_close(logits, expected[i][position], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NATIVE)
def test_logits_are_those_of_the_native_model(name, tmp_path, device) -> None:
    random_hf_model(SUPPORTED[name]()).save_pretrained(tmp_path)
    sources = resolve(str(tmp_path)), through_transformers(tmp_path)
    native, found = (logits_in_steps(create_runner(source, device), SEQUENCES, STEPS) for source in sources)
    for place, logits in native.items():
        torch.testing.assert_close(found[place], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["cohere2: windows in some layers", "qwen3_moe"])
def test_graphs_are_right_on_random_compositions_with_poisoned_padding(name, tmp_path, device) -> None:
    random_hf_model(SUPPORTED[name]()).save_pretrained(tmp_path)
    source = through_transformers(tmp_path)
    config = EngineConfig.from_settings(model=source.name, model_impl="transformers", device=device, **SETTINGS)
    executor = build_local_executor(config, source)
    reports = verify_graphs(executor, rounds=8, seed=0)
    assert [report.mismatches for report in reports] == [[]] * len(executor.runner.policy.shapes())


def test_an_engine_gives_the_native_models_tokens(tiny_model, device) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    answers = []
    for model_impl in ("native", "transformers"):
        settings = {"model": tiny_model, "device": device, "model_impl": model_impl} | TINY_SETTINGS
        engine = build_engine(EngineConfig.from_settings(**settings), source=resolve(tiny_model, model_impl=model_impl))
        requests = [engine.add_request(str(n), list(range(1, n)), params) for n in (3, 90, 17)]
        drain(engine)
        answers.append([request.output_token_ids for request in requests])
    assert all(len(answer) == 12 for answer in answers[0])
    assert answers[0] == answers[1]


def refused_config(config, **changes):
    config.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    for name, value in changes.items():
        setattr(config, name, value)
    return config


LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
RWKV_SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 256}
REFUSED = {
    "recurrent layers": (
        lambda: transformers.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2),
        "Mamba|layers of type",
    ),
    "convolutions": (
        lambda: transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
        "layers of type conv",
    ),
    "attention of its own": (
        lambda: transformers.TrOCRConfig(vocab_size=96, d_model=64, decoder_layers=2, decoder_attention_heads=4),
        "TrOCRForCausalLM cannot run.*do not call transformers' AttentionInterface",
    ),
    "values read on the host": (
        lambda: transformers.XLMConfig(emb_dim=64, n_layers=2, n_heads=4, n_words=96, n_langs=1),
        r"XLMWithLMHeadModel cannot run.*cannot be captured in graphs with this config: the step reads a tensor's value",
    ),
    "rotation by length": (
        lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LONG),
        '"longrope", whose angles transformers chooses anew',
    ),
    "no longest sequence": (
        lambda: transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 0}),
        'does not say how long a sequence may be.*Add "max_position_embeddings"',
    ),
    "quantised": (
        lambda: refused_config(transformers.LlamaConfig(**SIZES), quantization_config={"quant_method": "awq"}),
        'method "awq"',
    ),
    "seen from both sides": (lambda: refused_config(transformers.LlamaConfig(**SIZES), is_causal=False), "not causal"),
    "encoder and decoder": (
        lambda: refused_config(transformers.LlamaConfig(**SIZES), is_encoder_decoder=True),
        "of an encoder and a decoder",
    ),
    "several modes": (lambda: refused_config(transformers.LlamaConfig(**SIZES), vision_config={"a": 1}), "multimodal"),
    "a window that its layers ignore": (
        lambda: refused_config(transformers.OlmoConfig(**ODD_SIZES), sliding_window=20),
        "layer 0 attends over a window of 0 tokens, but its config says 20",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason_before_weights_are_read(name) -> None:
    config, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        judge(refused_config(config()))


def test_an_architecture_that_transformers_does_not_have_is_refused() -> None:
    config = transformers.LlamaConfig(**SIZES, architectures=["OwnCodeForCausalLM"])
    with pytest.raises(ModelError, match=r'The code of OwnCodeForCausalLM, of model type "llama", is not part of'):
        judge(config)


@pytest.mark.parametrize(
    ("config_class", "architecture", "message"),
    [
        ("OlmoConfig", "OlmoModel", "A checkpoint that was saved as OlmoForCausalLM runs"),
        ("BertConfig", "BertModel", "BertModel cannot run.*an encoder.*read and write text"),
        ("T5Config", "T5ForConditionalGeneration", "of an encoder and a decoder"),
        ("ViTConfig", "ViTForImageClassification", "a model of images"),
        ("WhisperConfig", "WhisperForConditionalGeneration", "a model of speech"),
        ("CLIPConfig", "CLIPModel", "a model of images"),
    ],
)
def test_a_class_that_writes_no_text_is_refused_with_what_it_is(config_class, architecture, message) -> None:
    with pytest.raises(ModelError, match=message):
        judge(getattr(transformers, config_class)(num_hidden_layers=2, architectures=[architecture]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.RwkvConfig(**RWKV_SIZES), "more than the last hidden states"),
        (lambda: transformers.DeepseekV2Config(**SIZES | LATENT), "a field may be missing or empty"),
    ],
)
def test_names_from_inside_stay_inside(config, message) -> None:
    with pytest.raises(ModelError, match=message) as info:
        judge(refused_config(config()))
    for inner in ("_PassThrough", "KeyError", "stepgraph", "NoneType"):
        assert inner not in str(info.value)


def test_a_class_with_a_list_of_its_own_is_told_from_one_that_fails() -> None:
    assert "from a list of their own" in explain(KeyError(IMPLEMENTATIONS["attn_implementation"])).what
    assert "fails in a trial" in explain(KeyError("rope_theta")).what


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (lambda: transformers.PhimoeConfig(**SIZES, num_local_experts=4), "PhiMoEForCausalLM"),
        (
            lambda: hf_config(
                "SarvamMoEConfig", **SIZES | MOE | {"head_dim": 16, "num_experts": 4, "n_group": 1, "topk_group": 1}
            ),
            "SarvamMoEForCausalLM",
        ),
    ],
)
def test_what_counts_is_the_type_where_a_class_is_spelt_otherwise_than_in_transformers(config, architecture) -> None:
    config = config()
    config.architectures = [architecture]
    assert judge(config).architecture == architecture


def test_a_rope_that_scales_beyond_the_context_is_plain_within_it() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = judge(refused_config(transformers.OlmoConfig(**ODD_SIZES, rope_parameters=dynamic)))
    assert config.hf_config.rope_parameters["rope_type"] == "default"


def test_a_model_whose_tokens_meet_outside_attention_is_refused() -> None:
    config = judge(refused_config(transformers.LlamaConfig(**SIZES)))
    hf_model = random_hf_model(copy.deepcopy(config.hf_config))
    hf_model.set_attn_implementation(IMPLEMENTATIONS["attn_implementation"])
    TransformersModel(config, copy.deepcopy(hf_model))
    hf_model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: args[0] + 0.1 * args[0].roll(1, 1))
    with pytest.raises(ModelError, match="tokens meet outside attention"):
        TransformersModel(config, hf_model)


def test_a_model_that_counts_positions_by_itself_is_refused() -> None:
    config = judge(refused_config(transformers.GPT2Config(**GPT2_SIZES)))
    hf_model = random_hf_model(copy.deepcopy(config.hf_config))
    hf_model.set_attn_implementation(IMPLEMENTATIONS["attn_implementation"])
    table = hf_model.transformer.wpe
    table.register_forward_pre_hook(lambda module, args: torch.arange(args[0].shape[-1]).unsqueeze(0))
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel cannot run.*counts positions by itself, from the first"):
        TransformersModel(config, hf_model)


def test_a_model_that_counts_positions_from_elsewhere_is_refused() -> None:
    config = transformers.RobertaConfig(**SIZES, is_decoder=True, pad_token_id=0)
    with pytest.raises(ModelError, match=r"RobertaForCausalLM cannot run.*does not count positions from 0"):
        TransformersModel.with_random_weights(
            judge(refused_config(config)), dtype=torch.float32, device=torch.device("cpu")
        )


def test_the_native_model_is_chosen_where_there_is_one(tmp_path) -> None:
    for name, folder in (
        ("llama", tmp_path / "llama"),
        ("olmo2: norms after each part", tmp_path / "olmo2"),
    ):
        random_hf_model(SUPPORTED[name]()).save_pretrained(folder)
    llama, olmo2 = str(tmp_path / "llama"), str(tmp_path / "olmo2")
    assert isinstance(resolve(llama).config, DecoderConfig)
    assert isinstance(resolve(olmo2).config, TransformersConfig)
    assert isinstance(resolve(llama, model_impl="transformers").config, TransformersConfig)
    with pytest.raises(ModelError, match="No native model runs the architecture Olmo2ForCausalLM"):
        resolve(olmo2, model_impl="native")


def test_a_refusal_of_the_native_model_points_to_transformers(tmp_path) -> None:
    transformers.LlamaConfig(**SIZES, hidden_act="relu", architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r'"relu".*model_impl to transformers'):
        resolve(str(tmp_path))
    assert resolve(str(tmp_path), model_impl="transformers").config.num_layers == 2


def test_a_gguf_file_runs_on_native_models_only(tmp_path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="GGUF file, which native models read; set model_impl to auto"):
        resolve(str(tmp_path / "model.gguf"), model_impl="transformers")


def load(folder, **options):
    return load_model(
        through_transformers(folder), dtype=torch.float32, device=torch.device("cpu"), max_model_len=64, **options
    )


@pytest.fixture
def folder(tmp_path):
    random_hf_model(SUPPORTED["llama"]()).save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_are_missing_or_left_over_are_named(folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(ModelError, match=r"missing_keys: 1 \(model\.layers\.1\.self_attn\.k_proj\.weight\)"):
        load(folder)
    random_hf_model(SUPPORTED["llama"]()).save_pretrained(folder)
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    with pytest.raises(ModelError, match=r"unexpected_keys: 1 \(model\.layers\.0\.self_attn\.q_proj\.bias\)"):
        load(folder)


def test_a_tensor_of_another_shape_is_named(folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}))
    with pytest.raises(ModelError, match=r"mismatched_keys: 1 .*model\.norm\.weight.*63.*64"):
        load(folder)


def test_a_truncated_file_and_one_that_is_absent_are_told(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="truncated"):
        load(folder)
    path.unlink()
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors"):
        load(folder)


def test_dummy_weights_need_no_files_and_are_the_same_every_time(folder) -> None:
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = load(folder, load_format="dummy"), load(folder, load_format="dummy")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert 0.015 < next(first.parameters()).std() < 0.025


def test_a_shape_without_weights_says_so() -> None:
    with pytest.raises(ModelError, match='load_format "dummy"'):
        load("qwen3-0.6b")


def test_progress_goes_to_stderr_and_only_when_asked_for(folder, capfd) -> None:
    load(folder)
    assert "Loading" not in "".join(capfd.readouterr())
    load(folder, progress=True)
    out, err = capfd.readouterr()
    assert "Loading" in err
    assert out == ""


def test_deterministic_mode_needs_a_native_model(folder) -> None:
    with pytest.raises(ConfigError, match="needs a native model, and LlamaForCausalLM would run through transformers"):
        load(folder, deterministic=True)
