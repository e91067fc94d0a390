"""LoRA adapters: a projection plus its update against transformers with the update merged into the weight."""

import json

import pytest
import torch
from checkpoints import HF_CONFIGS, random_hf_model
from safetensors.torch import save_file
from stepping import Stepper

from stepgraph.abi import slot_line
from stepgraph.config.lora import LoRAConfig
from stepgraph.engine.adapters import AdapterTable
from stepgraph.errors import RequestError
from stepgraph.layers.lora import token_adapters
from stepgraph.models import load_model, resolve
from stepgraph.models.adapters import AdapterStore
from stepgraph.ops import StepTokens

TOKENS = [(7 * i + 3) % 96 for i in range(80)]
ALPHA = 8
PREFIX = "base_model.model."


def matrices(hf_model, rank, seed=0, ends_with=""):
    """Random A and B of every linear module of the layers that can be adapted and whose name ends so."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5,
            torch.randn(module.out_features, rank, generator=generator) * 0.3,
        )
        for name, module in hf_model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and ".layers." in name
        and name.endswith(ends_with)
        and not name.endswith("kv_b_proj")
    }


def save_adapter(folder, modules, **config):
    """Write what PEFT's save_pretrained writes."""
    folder.mkdir(exist_ok=True)
    rank = next(iter(modules.values()))[0].shape[0]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "bias": "none", "use_dora": False} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {
        f"{PREFIX}{name}.lora_{side}.weight": m
        for name, ab in modules.items()
        for side, m in zip("AB", ab, strict=True)
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return str(folder)


def merged_logits(hf_model, modules, scale):
    """Logits of transformers' model in float64 with ``weight + scale · B A``."""
    weights = {name: hf_model.get_submodule(name).weight for name in modules}
    before = {name: weight.clone() for name, weight in weights.items()}
    hf_model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        hf_model.double()
        for name, (a, b) in modules.items():
            hf_model.get_submodule(name).weight += scale * b.double() @ a.double()
        logits = hf_model(torch.tensor([TOKENS])).logits[0].float()
        hf_model.float()
        for name, weight in before.items():
            hf_model.get_submodule(name).weight.copy_(weight)
    return logits


def table(store, max_loras=2):
    return AdapterTable(store.read, store.write, max_loras)


class AdaptedStepper(Stepper):
    """A Stepper whose sequence uses an adapter."""

    def __init__(self, model, store, number):
        super().__init__(model, 128)
        self.store = store
        self.lines = torch.zeros(2, slot_line.LINE_WIDTH, dtype=torch.int32)
        self.lines[1, slot_line.ADAPTER] = number

    def run(self, built):
        self.store.select(built, self.lines)
        return super().run(built)


def make(name, folder, **config):
    hf_model = random_hf_model(HF_CONFIGS[name]())
    hf_model.save_pretrained(folder)
    model = load_model(resolve(str(folder)), dtype=torch.float32, device=torch.device("cpu"), max_model_len=128)
    return hf_model, model, AdapterStore(model, LoRAConfig(enable_lora=True, **config), max_tokens=128)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make("llama", tmp_path_factory.mktemp("llama"), max_loras=2)


@pytest.fixture
def adapter(llama, tmp_path):
    """Writes an adapter of `llama` that differs from a good one as told, and returns its folder."""

    def write(name="adapter", *, rank=4, seed=0, ends_with="", **config):
        return save_adapter(tmp_path / name, matrices(llama[0], rank, seed, ends_with), **config)

    return write


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen2",
        "ernie 4.5",
        "gemma 3",
        "gemma 4 e4b",
        "gemma 4 12b",
        "gemma 4 26b",
        "phi 4 with long rope",
        "mixtral with windows",
        "qwen2 moe",
        "ernie 4.5 moe",
        "deepseek v2",
        "deepseek v3",
    ],
)
def test_logits_match_transformers_with_the_adapter_merged(name, tmp_path):
    hf_model, model, store = make(name, tmp_path / "model")
    modules = matrices(hf_model, rank=5, ends_with=("_proj", "_proj_with_mqa"))
    number = table(store).load(save_adapter(tmp_path / "adapter", modules), ()).number
    found = AdaptedStepper(model, store, number).step(TOKENS)
    torch.testing.assert_close(found, merged_logits(hf_model, modules, ALPHA / 5), atol=3e-4, rtol=1e-4)
    without = AdaptedStepper(model, store, 0).step(TOKENS)
    torch.testing.assert_close(without, merged_logits(hf_model, {}, 1), atol=3e-4, rtol=1e-4)
    assert (found - without).norm() > 0.1 * without.norm()


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("block_sparse_moe.experts.0.w1", "an expert"),
        ("mlp.experts.5.down_proj", "an expert"),
        ("mlp.experts", "an expert"),
        ("block_sparse_moe.gate", "a gate"),
        ("mlp.shared_expert_gate", "a gate"),
    ],
)
def test_what_adapts_experts_or_their_gates_is_refused_by_name(tmp_path, module, what):
    _, _, store = make("qwen2 moe", tmp_path / "model")
    folder = save_adapter(tmp_path / "adapter", {f"model.layers.0.{module}": (torch.zeros(4, 64), torch.zeros(32, 4))})
    with pytest.raises(
        RequestError, match=rf"it adapts model.layers.0.{module}, {what} of a mixture. Attention and feed-forw"
    ):
        table(store).load(folder, ())


@pytest.mark.parametrize("name", ["deepseek v2", "minicpm 3"])
def test_what_adapts_the_matrix_that_latent_attention_absorbs_is_refused_by_name(name, tmp_path):
    hf_model, _, store = make(name, tmp_path / "model")
    modules = matrices(hf_model, rank=5, ends_with="o_proj")
    module = "model.layers.1.self_attn.kv_b_proj"
    weight = hf_model.get_submodule(module).weight
    modules[module] = (torch.zeros(5, weight.shape[1]), torch.zeros(weight.shape[0], 5))
    with pytest.raises(RequestError, match=rf"it adapts .*{module}, .* target_modules without kv_b_proj, or merge it"):
        table(store).load(save_adapter(tmp_path / "adapter", modules), ())


@pytest.mark.parametrize(
    ("ends_with", "config", "scale"), [("v_proj", {}, ALPHA / 4), ("down_proj", {"use_rslora": True}, ALPHA / 2)]
)
def test_an_adapter_may_leave_out_modules_and_scale_by_the_root_of_its_rank(llama, adapter, ends_with, config, scale):
    hf_model, model, _ = llama
    store = AdapterStore(model, LoRAConfig(), max_tokens=128)
    number = table(store).load(adapter(ends_with=ends_with, **config), ()).number
    found = AdaptedStepper(model, store, number).step(TOKENS)
    expected = merged_logits(hf_model, matrices(hf_model, 4, 0, ends_with), scale)
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)


def test_an_adapter_in_use_stays_and_a_reused_place_holds_nothing_of_the_one_before(llama, adapter):
    hf_model, model, _ = llama
    store = AdapterStore(model, LoRAConfig(max_loras=2), max_tokens=128)
    adapters = table(store)
    everything, keys = adapter("all", rank=16), adapter("k", ends_with="k_proj")
    values = adapter("v", ends_with="v_proj")
    first, second = adapters.load(everything, ()), adapters.load(keys, ())
    assert {first.number, second.number} == {1, 2}
    with pytest.raises(RequestError, match=r"unfinished requests use 2 LoRA adapters.*larger max_loras"):
        adapters.load(values, {first, second})
    assert adapters.load(everything, {second}) == first, "the refused one has cost nobody's place"
    third = adapters.load(values, {second})
    assert third.number == first.number, "the other one is in use"
    found = AdaptedStepper(model, store, third.number).step(TOKENS)
    expected = merged_logits(hf_model, matrices(hf_model, 4, 0, "v_proj"), ALPHA / 4)
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)
    again = adapters.load(everything, ())
    assert again.number == second.number, "values were asked for after keys"
    assert again.key != first.key, "it was read again"


def test_a_forgotten_adapter_stays_with_those_who_use_it_and_its_place_is_the_next_to_be_taken(llama, adapter):
    _, model, _ = llama
    store = AdapterStore(model, LoRAConfig(max_loras=2), max_tokens=128)
    adapters = table(store)
    everything, keys, values = adapter("all"), adapter("k", ends_with="k_proj"), adapter("v", ends_with="v_proj")
    first, second = adapters.load(everything, ()), adapters.load(keys, ())
    adapters.forget(keys)
    assert (adapters.holds(everything), adapters.holds(keys)) == (True, False)
    with pytest.raises(RequestError, match="unfinished requests use 2"):
        adapters.load(keys, {first, second})
    third = adapters.load(values, ())
    assert (third.number, adapters.holds(everything)) == (second.number, True), "though keys were asked for last"
    adapters.forget(keys)  # nothing of it is there


def test_every_token_of_a_step_has_its_rows_adapter_and_padding_has_none():
    lines = torch.zeros(6, slot_line.LINE_WIDTH, dtype=torch.int32)
    lines[:, slot_line.ADAPTER] = torch.tensor([0, 3, 0, 1, 2, 7])
    ints = {"dtype": torch.int32}
    tokens = StepTokens(
        token_ids=torch.zeros(9, **ints),
        positions=torch.zeros(9, **ints),
        kv_slots=torch.zeros(9, **ints),
        row_slot=torch.tensor([4, 5, 2, 1], **ints),
        query_start=torch.tensor([0, 3, 3, 4, 6], **ints),  # the second row is empty
        kv_len=torch.zeros(4, **ints),
    )
    found = token_adapters(tokens, lines)
    assert found.dtype == torch.int32
    assert found.tolist() == [2, 2, 2, 0, 3, 3, 0, 0, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"lora_alpha": "8"}, "adapter_config.json cannot be used"),
        ({"rank": 17}, "rank is 17, and max_lora_rank is 16. Start the engine with max_lora_rank=17"),
    ],
)
def test_an_adapter_that_computes_something_else_is_refused(llama, adapter, config, message):
    with pytest.raises(RequestError) as error:
        llama[2].read(adapter(**config))
    assert message in str(error.value)


def test_folders_that_are_no_adapter_of_this_model_are_refused(llama, adapter, tmp_path):
    store = llama[2]
    a, b = torch.zeros(4, 64), torch.zeros(64, 4)

    def refused(folder, message):
        with pytest.raises(RequestError, match=message):
            store.read(str(folder))

    refused(tmp_path / "nowhere", "holds no adapter_config.json")
    empty = tmp_path / "empty"
    save_adapter(empty, {"x": (a, b)})
    (empty / "adapter_model.safetensors").unlink()
    refused(empty, "holds no adapter_model.safetensors")
    (empty / "adapter_model.safetensors").write_bytes(b"version https://git-lfs")
    refused(empty, "cannot be read")
    refused(save_adapter(tmp_path / "head", {"lm_head": (a, b)}), "adapts lm_head.*can be adapted are .*q_proj")
    name = "model.layers.0.self_attn.q_proj"
    refused(save_adapter(tmp_path / "wide", {name: (torch.zeros(4, 65), b)}), r"\[4, 65\].*the weight is \[64, 64\]")
    half = tmp_path / "half"
    save_adapter(half, {name: (a, b)})
    save_file({f"{PREFIX}{name}.lora_A.weight": a}, half / "adapter_model.safetensors")
    refused(half, "lacks one of lora_A and lora_B")
    save_file({f"{PREFIX}model.embed_tokens.lora_embedding_A": a}, half / "adapter_model.safetensors")
    refused(half, "lora_embedding_A")
