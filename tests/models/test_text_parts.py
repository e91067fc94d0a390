"""Models that take images beside text, as writers of text: tokens and log-probabilities of their own classes in transformers."""

import copy
import json
from itertools import product

import pytest
import torch
import transformers
from checkpoints import SIZES, random_hf_model
from fp8_folders import write_fp8
from multimodal import IMAGE_TOKEN, MULTIMODAL, NATIVE, random_multimodal_model
from safetensors.torch import load_file, save_file
from stepping import Stepper
from thread_group import run_ranks

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ModelError, RequestError
from stepgraph.models import load_model, resolve
from stepgraph.models.transformers_model import ModelPart, TransformersModel, judge_part
from stepgraph.models.transformers_parts import ShapesOnly, keep_part
from stepgraph.models.update import plan_update, write
from stepgraph.parallel.shard import Shard
from stepgraph.verify.graphs import verify_graphs

CPU = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 64}
PROMPTS = [[(7 * i + 3) % 90 for i in range(40)], [(5 * i + 11) % 90 for i in range(9)]]
PARAMS = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each model, and the folder that it is in."""
    models = {}

    def save(name):
        if name not in models:
            folder = tmp_path_factory.mktemp("model")
            model = random_multimodal_model(name)
            model.save_pretrained(folder)
            models[name] = model, folder
        return models[name]

    return save


def engine_of(folder, model_impl="auto"):
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "capture_sizes": (2, 16), "capture_rows": (2,)}
    settings |= {"device": "cpu", "dtype": "float32", "max_model_len": 64, "num_kv_blocks": 17}
    return build_engine(EngineConfig.from_settings(model=str(folder), model_impl=model_impl, **settings))


def answers(engine, prompts):
    requests = [engine.add_request(str(i), prompt, PARAMS) for i, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    return requests


def logits_of(hf_model, token_ids):
    with torch.no_grad():
        return hf_model(input_ids=torch.tensor([token_ids])).logits[0]


@pytest.mark.parametrize(
    ("name", "model_impl"),
    [*product(MULTIMODAL, ("native", "transformers")), *product(NATIVE, ("native",))],
)
def test_tokens_and_logprobs_are_those_of_the_whole_model(name, model_impl, saved) -> None:
    hf_model, folder = saved(name)
    engine = engine_of(folder, model_impl)
    together = answers(engine, PROMPTS)
    alone = [answers(engine, [prompt])[0] for prompt in PROMPTS]
    assert [request.output_token_ids for request in together] == [request.output_token_ids for request in alone]
    for prompt, request in zip(PROMPTS, together, strict=True):
        tokens = prompt + request.output_token_ids
        logprobs = logits_of(hf_model, tokens)[:-1].log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert request.output_token_ids == logprobs[len(prompt) - 1 :].argmax(-1).tolist()
        found = [position.logprob for position in (*request.prompt_logprobs[1:], *request.output_logprobs)]
        torch.testing.assert_close(torch.tensor(found), chosen, atol=1e-4, rtol=0)
    with pytest.raises(RequestError, match=f"token id {IMAGE_TOKEN}, in whose place this model takes an image"):
        engine.add_request("image", [3, IMAGE_TOKEN, 4], PARAMS)
    engine.shutdown()


def test_queries_are_scaled_by_position_in_graphs_with_poisoned_padding(saved) -> None:
    engine = engine_of(saved("ministral 3")[1])
    assert [report.mismatches for report in verify_graphs(engine.executor, rounds=4, seed=0)] == [[]] * 2
    engine.shutdown()


def all_logits(model):
    stepper = Stepper(model, 64)
    with torch.no_grad():
        hidden = model(stepper.inputs(stepper.build(PROMPTS[0])))
        return model.logits(hidden, out=torch.empty(len(PROMPTS[0]), model.config.vocab_size, dtype=model.dtype))


def test_two_ranks_compute_what_one_device_does(saved) -> None:
    source = resolve(str(saved("gemma 3")[1]))
    expected = all_logits(load_model(source, **CPU))
    for found in run_ranks(2, lambda group: all_logits(load_model(source, **CPU, group=group))):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_two_ranks_share_what_transformers_runs(saved) -> None:
    hf_model, folder = saved("qwen2.5-vl")
    config = resolve(str(folder), model_impl="transformers").config
    part = judge_part(config, ShapesOnly(Shard(0, 2)))

    def run(group):
        mine = copy.deepcopy(hf_model)
        mine.set_attn_implementation("stepgraph")
        keep_part(mine, config, group)
        return all_logits(TransformersModel(config, mine, ModelPart(group, part.attention_specs, part.num_parameters)))

    for found in run_ranks(2, run):
        torch.testing.assert_close(found, logits_of(hf_model, PROMPTS[0]), atol=1e-4, rtol=1e-4)


def rewritten(folder, to, rename, **more):
    """A copy of a checkpoint whose tensors have other names."""
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): values for name, values in tensors.items()} | more, to / "model.safetensors")
    (to / "config.json").write_text((folder / "config.json").read_text())
    return resolve(str(to))


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("gemma 3", lambda name: name.replace("language_model.model.", "model.language_model.")),
        ("mistral small 3", lambda name: name.replace("language_model.model.", "model.language_model.")),
        ("qwen2.5-vl", lambda name: name.replace("model.layers.", "model.language_model.layers.")),
    ],
)
def test_both_layouts_that_transformers_has_written_are_read(name, rename, saved, tmp_path) -> None:
    hf_model, folder = saved(name)
    model = load_model(rewritten(folder, tmp_path, rename), **CPU)
    torch.testing.assert_close(all_logits(model), logits_of(hf_model, PROMPTS[0]), atol=1e-4, rtol=1e-4)


def test_gemma_3n_is_run_as_its_decoder_which_needs_no_package_for_images(tmp_path) -> None:
    text = transformers.Gemma3nTextConfig(
        **SIZES, head_dim=16, layer_types=["sliding_attention", "full_attention"], sliding_window=20, num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.9, 0.0], hidden_size_per_layer_input=16, vocab_size_per_layer_input=96, laurel_rank=8,
    )  # fmt: skip
    hf_model = random_hf_model(copy.deepcopy(text))
    hf_model.save_pretrained(tmp_path)
    tensors = {
        name.replace("model.", "model.language_model.", 1): values
        for name, values in load_file(tmp_path / "model.safetensors").items()
    }
    tensors |= {f"model.{part}.weight": torch.zeros(2) for part in ("vision_tower.a", "audio_tower.b", "embed_audio")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = transformers.Gemma3nConfig(
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        audio_token_id=94,
        architectures=["Gemma3nForConditionalGeneration"],
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_diff_dict()))
    source = resolve(str(tmp_path))
    assert source.config.media_token_ids == (94, IMAGE_TOKEN)
    torch.testing.assert_close(
        all_logits(load_model(source, **CPU)), logits_of(hf_model, PROMPTS[0]), atol=1e-4, rtol=1e-4
    )


def test_a_tensor_that_is_of_no_known_part_is_an_error(saved, tmp_path) -> None:
    more = {"vision_tower_2.weight": torch.zeros(2)}
    source = rewritten(saved("qwen3-vl")[1], tmp_path, str, **more)
    with pytest.raises(ModelError, match=r"none missing, 1 \(vision_tower_2.weight\) left over"):
        load_model(source, **CPU)


def test_weights_are_updated_from_all_tensors_of_the_whole_model(saved, tmp_path) -> None:
    hf_model, folder = saved("qwen3-vl")
    model = load_model(resolve(str(folder)), **CPU)
    new = {name: values.detach() * 0.5 for name, values in hf_model.state_dict().items()}
    write(plan_update(model, new.items()))
    torch.testing.assert_close(model.norm.weight, new["model.language_model.norm.weight"])
    torch.testing.assert_close(model.embed_tokens.weight, new["model.language_model.embed_tokens.weight"])


def test_ministral_3_is_read_in_the_8_bits_in_which_it_is_published(saved, tmp_path) -> None:
    plain = write_fp8(saved("ministral 3")[1], tmp_path / "fp8", "fp8 as Mistral writes it", ignored=("vision_tower",))
    expected, found = (all_logits(load_model(resolve(str(path)), **CPU)) for path in (plain, tmp_path / "fp8"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_the_whole_config_says_of_the_decoder_holds(saved, tmp_path) -> None:
    config = json.loads((saved("gemma 3")[1] / "config.json").read_text())
    del config["text_config"]["eos_token_id"]
    quantization = {"quant_method": "awq", "bits": 3}
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 8], "dtype": "bfloat16"}))
    read = resolve(str(tmp_path)).config
    assert (read.eos_token_ids, read.dtype, read.media_token_ids) == ((7, 8), torch.bfloat16, (IMAGE_TOKEN,))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ModelError, match='quantised with method "awq" of 3 bits'):
        resolve(str(tmp_path))


def test_a_decoder_that_no_class_here_runs_is_refused_by_name(saved, tmp_path) -> None:
    config = json.loads((saved("gemma 3")[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"text_config": config["text_config"] | {"final_logit_softcapping": 30.0}})
    )
    with pytest.raises(ModelError, match=r"gemma3_text model cannot run: it caps logits"):
        resolve(str(tmp_path), model_impl="native")
