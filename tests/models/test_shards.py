"""Shards of models: each parameter is its part of the whole model's, nothing else is read, and the parts' products add up."""

import math

import pytest
import torch
from checkpoints import HF_CONFIGS, SIZES, random_hf_model
from fp8_folders import write_fp8
from safetensors.torch import load_file
from shards import assert_is_shard, run_stepper
from stepping import Stepper
from test_adapters import matrices, save_adapter
from thread_group import run_ranks
from transformers import LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

from stepgraph import native
from stepgraph.config.lora import LoRAConfig
from stepgraph.errors import ModelError
from stepgraph.layers.formats.target import part_of
from stepgraph.layers.linear import Linear
from stepgraph.models import load_model, random_weights, resolve, safetensors
from stepgraph.models.adapters import AdapterStore
from stepgraph.models.update import TensorInMemory, match_tensors, plan_update, write
from stepgraph.parallel.shard import Axis, Cut, Part, Shard, sizes_that_divide
from stepgraph.spec.mtp import MTPLayer, MTPOptions
from stepgraph.spec.mtp_checkpoint import _dequantised

TOKENS = [(7 * i + 3) % 96 for i in range(40)]
NAMES = [
    "llama",
    "llama with every bias",
    "qwen2",
    "qwen3",
    "ernie 4.5 with every bias",
    "phi 3 with windows",
    "phi 4 with long rope",
    "gemma 3",
    "granite",
    "smollm 3",
    "minicpm 3",
    "youtu",
]
GROUPED = SIZES | {"intermediate_size": 512}
WIDE = {
    "llama": lambda: LlamaConfig(**GROUPED, head_dim=128, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=128),
    "phi 3, merged": lambda: Phi3Config(**GROUPED | {"hidden_size": 512}, pad_token_id=0),
    "llama, one group": lambda: LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 128}, head_dim=32),
}
"""Of which every rank of four has whole groups of inputs, or a part of the only one, which all of them share."""
BLOCKS = {
    "llama": lambda: LlamaConfig(**SIZES | {"intermediate_size": 128}, head_dim=32),
    "qwen2": lambda: Qwen2Config(**SIZES | {"hidden_size": 128, "intermediate_size": 128}),
    "qwen3 tied": lambda: Qwen3Config(**SIZES | {"intermediate_size": 128}, head_dim=32, tie_word_embeddings=True),
}
"""Of which every rank of four has whole blocks of GGUF files."""
SHARDS = [(rank, size) for size in (2, 4) for rank in range(size)]
"""Of four ranks, two keep the same key/value head."""


def load(path, **settings):
    settings = {"dtype": torch.float32, "max_model_len": 64} | settings
    return load_model(resolve(str(path)), device=torch.device("cpu"), **settings)


def save(hf_config, folder):
    random_hf_model(hf_config).save_pretrained(folder)
    return folder


def assert_shards(path, **settings) -> None:
    """Each of two and of four shards of a checkpoint holds its part."""
    whole = load(path, **settings)
    for rank, size in SHARDS:
        assert_is_shard(load(path, shard=Shard(rank, size), **settings), whole, rank, size)


def assert_adds_up(path, *, tolerance=2e-4, **settings) -> None:
    expected = Stepper(load(path, **settings), 64).step(TOKENS)
    for size in (2, 4):
        found = run_ranks(size, lambda group: run_stepper(Stepper(load(path, group=group, **settings), 64), TOKENS))
        assert all(torch.equal(each, found[0]) for each in found)
        torch.testing.assert_close(found[0], expected, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_shards_of_a_model_hold_their_parts_and_add_up(name, tmp_path) -> None:
    save(HF_CONFIGS[name](), tmp_path)
    assert_shards(tmp_path)
    assert_adds_up(tmp_path)


@pytest.mark.parametrize("layout", ["a scale per matrix", "a scale per output", "fp8 with a scale per block"])
@pytest.mark.parametrize("name", WIDE)
def test_shards_in_8_bits_keep_codes_and_scales(name, layout, tmp_path) -> None:
    write_fp8(save(WIDE[name](), tmp_path / "plain"), tmp_path / "fp8", layout)
    assert_shards(tmp_path / "fp8")
    assert_adds_up(tmp_path / "fp8", tolerance=1e-3)


@pytest.mark.parametrize("layout", ["a scale per output", "modelopt with a scale per block"])
def test_shards_are_dequantised_wherever_they_are_cut(layout, tmp_path) -> None:
    """Inputs are cut within groups, outputs within blocks."""
    config = LlamaConfig(**SIZES | {"hidden_size": 192, "intermediate_size": 328}, head_dim=34)
    write_fp8(save(config, tmp_path / "plain"), tmp_path / "fp8", layout)
    assert_shards(tmp_path / "fp8", quantization="none")


def write_blocks(hf_config, path):
    gguf = pytest.importorskip("gguf", reason="writes GGUF files")
    from gguf_files import write_gguf

    types = gguf.GGMLQuantizationType
    kinds = {
        "token_embd": types.Q8_0,
        "_norm": types.F32,
        "bias": types.F32,
        "ffn_down": types.Q8_0,
        "weight": types.Q4_1,
    }
    write_gguf(path, random_hf_model(hf_config), kinds)
    return path


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")
def test_shards_in_blocks_keep_the_files_own(name, tmp_path) -> None:
    path = write_blocks(BLOCKS[name](), tmp_path / "model.gguf")
    assert {str(p.dtype) for n, p in load(path, packed=True).named_parameters() if n.endswith("proj.weight")} == {
        "torch.uint8"
    }
    assert_shards(path, packed=True)
    assert_adds_up(path, packed=True)


@pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")
def test_a_real_file_of_blocks_is_shared_by_three_and_by_no_others() -> None:
    tokens = [(7919 * i + 3) % 49152 for i in range(12)]
    expected = Stepper(load("smollm2", packed=True), 64).step(tokens)

    def run(group):
        model = load("smollm2", packed=True, group=group)
        return model, Stepper(model, 64).step(tokens)

    (_, found), (shard, _), _ = run_ranks(3, run)
    down_proj = shard.layers[0].mlp.down_proj
    assert down_proj.weight.dtype == torch.uint8
    assert (down_proj.in_features, shard.layers[0].self_attn.qkv_proj.out_features) == (512, 5 * 64)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-3)
    for size in (2, 4, 9):
        with pytest.raises(ModelError, match=r"devices cannot share .*can: 1, 3\."):
            load("smollm2", packed=True, shard=Shard(1, size))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_shards_of_blocks_are_dequantised_wherever_they_are_cut(name, tmp_path) -> None:
    assert_shards(write_blocks(HF_CONFIGS[name](), tmp_path / "model.gguf"))


def test_plain_tensors_of_gguf_files_are_cut_too(tmp_path) -> None:
    gguf = pytest.importorskip("gguf", reason="writes GGUF files")
    from gguf_files import write_gguf

    types = gguf.GGMLQuantizationType
    write_gguf(
        tmp_path / "model.gguf",
        random_hf_model(HF_CONFIGS["llama"]()),
        {"_norm": types.F32, "ffn_down": types.BF16, "attn_output": types.F16, "weight": types.F32},
    )
    assert_shards(tmp_path / "model.gguf")


class CountedFile:
    """A safetensors file that writes down how many numbers are read of each tensor, and the most at once."""

    def __init__(self, file, numbers, largest) -> None:
        self.file, self.numbers, self.largest = file, numbers, largest

    def keys(self):
        return self.file.keys()

    def get_tensor(self, name):
        return self.note(name, self.file.get_tensor(name))

    def get_slice(self, name):
        return CountedSlice(self, name)

    def note(self, name, values):
        self.numbers[name] = self.numbers.get(name, 0) + values.numel()
        self.largest[name] = max(self.largest.get(name, 0), values.numel())
        return values


class CountedSlice:
    def __init__(self, file, name) -> None:
        self.file, self.name, self.slice = file, name, file.file.get_slice(name)

    def __getattr__(self, name):
        return getattr(self.slice, name)

    def __getitem__(self, index):
        return self.file.note(self.name, self.slice[index])


@pytest.mark.parametrize("layout", [None, "a scale per output", "fp8 with a scale per block"])
@pytest.mark.parametrize("name", WIDE)
def test_of_a_large_tensor_no_more_is_read_than_is_kept(name, layout, tmp_path, monkeypatch) -> None:
    folder = save(WIDE[name](), tmp_path / "plain")
    if layout is not None:
        write_fp8(folder, tmp_path / "fp8", layout)
        folder = tmp_path / "fp8"
    stored = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
    numbers, largest, open_file = {}, {}, safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *args, **kwargs: CountedFile(open_file(*args, **kwargs), numbers, largest)
    )
    load(folder, shard=Shard(1, 4))
    for tensor, numel in stored.items():
        projection = ".layers." in tensor and tensor.endswith("proj.weight")
        most = numel // 2 if "k_proj" in tensor or "v_proj" in tensor else numel // 4  # two ranks keep a head of two
        if "qkv_proj" in tensor:
            most = numel * (1 + 1 + 1) // (4 + 2 + 2)
        if tensor.endswith(("o_proj.bias", "down_proj.bias")):
            most = 0
        elif not projection and tensor != "lm_head.weight":
            continue
        assert numbers.get(tensor, 0) == most, tensor
    assert sum(numbers.values()) < sum(stored.values())


def test_sizes_that_do_not_divide_are_refused_with_those_that_do(tmp_path) -> None:
    save(HF_CONFIGS["llama"](), tmp_path)
    with pytest.raises(ModelError, match=r"3 devices cannot share .*4 query heads, 2 key/value heads.* can: 1, 2, 4\."):
        load(tmp_path, shard=Shard(0, 3))
    with pytest.raises(ModelError, match=r"8 devices cannot share"):
        load(tmp_path, shard=Shard(0, 8))


def test_groups_of_inputs_are_not_cut(tmp_path) -> None:
    config = LlamaConfig(**SIZES | {"intermediate_size": 512}, head_dim=64)
    write_fp8(save(config, tmp_path / "plain"), tmp_path / "fp8", "fp8 with a scale per block")
    load(tmp_path / "fp8", shard=Shard(1, 2))
    with pytest.raises(
        ModelError, match=r"4 devices cannot share .*o_proj evenly.* groups of 128 of 256 .*can: 1, 2\. Or"
    ):
        load(tmp_path / "fp8", shard=Shard(1, 4))
    load(tmp_path / "fp8", shard=Shard(1, 4), quantization="none")


@pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")
def test_blocks_of_inputs_are_not_cut(tmp_path) -> None:
    sizes = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 192}
    config = LlamaConfig(**SIZES | sizes, head_dim=16)
    path = write_blocks(config, tmp_path / "model.gguf")
    load(path, packed=True, shard=Shard(1, 3))
    with pytest.raises(
        ModelError, match=r"4 devices cannot share .*o_proj evenly.* groups of 32 of 192 .*can: 1, 2, 3, 6\."
    ):
        load(path, packed=True, shard=Shard(1, 4))


def test_a_shard_refuses_what_does_not_fit_the_whole_model(tmp_path) -> None:
    save(HF_CONFIGS["llama with every bias"](), tmp_path)
    model = load(tmp_path, shard=Shard(1, 2))
    tensors = load_file(tmp_path / "model.safetensors")

    def without(name):
        return {key: value for key, value in tensors.items() if key != name}.items()

    with pytest.raises(ModelError, match=r"1 \(model.layers.1.mlp.down_proj.bias\) missing, none left over"):
        plan_update(model, without("model.layers.1.mlp.down_proj.bias"))
    with pytest.raises(ModelError, match=r"none missing, 1 \(model.more.weight\) left over"):
        plan_update(model, {**tensors, "model.more.weight": torch.zeros(1)}.items())
    short = tensors["model.layers.0.mlp.up_proj.weight"][:48]
    with pytest.raises(ModelError, match=r"up_proj.weight has shape \[48, 64\] .*\[96, 64\]"):
        plan_update(model, {**tensors, "model.layers.0.mlp.up_proj.weight": short}.items())


@pytest.mark.parametrize("layout", [None, "fp8 with a scale per block"])
def test_new_weights_are_written_into_shards(layout, tmp_path) -> None:
    hf_model = random_hf_model(WIDE["llama"]())
    hf_model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.mul_(0.5)
    hf_model.save_pretrained(tmp_path / "second")
    paths = tmp_path / "first", tmp_path / "second"
    if layout is not None:
        for name in ("first", "second"):
            write_fp8(tmp_path / name, tmp_path / f"{name}-fp8", layout)
        paths = tmp_path / "first-fp8", tmp_path / "second-fp8"
    shard = load(paths[0], shard=Shard(3, 4))
    write(plan_update(shard, resolve(str(paths[1]))))
    assert_is_shard(shard, load(paths[1]), 3, 4)
    if layout is None:
        write(plan_update(shard, load_file(paths[0] / "model.safetensors").items()))
        assert_is_shard(shard, load(paths[0]), 3, 4)


@pytest.mark.parametrize("name", ["llama", "ernie 4.5", "phi 4 with long rope", "minicpm 3"])
def test_adapters_add_up_over_shards(name, tmp_path) -> None:
    hf_model = random_hf_model(HF_CONFIGS[name]())
    hf_model.save_pretrained(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", matrices(hf_model, rank=5))

    def adapted(**settings):
        model = load(tmp_path / "model", **settings)
        store = AdapterStore(model, LoRAConfig(enable_lora=True), max_tokens=128)
        store.write(1, store.read(adapter))
        store._index.fill_(1)
        return model

    expected = Stepper(adapted(), 64).step(TOKENS)
    for size in (2, 4):
        found = run_ranks(size, lambda group: Stepper(adapted(group=group), 64).step(TOKENS))
        torch.testing.assert_close(found[0], expected, atol=5e-4, rtol=1e-4)
    assert (expected - Stepper(load(tmp_path / "model"), 64).step(TOKENS)).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize(
    "projection", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", ""]
)
def test_each_tokens_adapter_is_cut_as_each_projection_is(projection, tmp_path) -> None:
    """Of which one is cut otherwise than its projection, or added by every rank, shows alone."""
    config = LlamaConfig(
        **SIZES | {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12}, head_dim=8
    )
    hf_model = random_hf_model(config)
    hf_model.save_pretrained(tmp_path / "model")
    folders = [
        save_adapter(tmp_path / f"adapter {seed}", matrices(hf_model, rank=3 + seed, seed=seed, ends_with=projection))
        for seed in (1, 2)
    ]

    def adapted(**settings):
        model = load(tmp_path / "model", **settings)
        store = AdapterStore(model, LoRAConfig(enable_lora=True, max_loras=2), max_tokens=128)
        for number, folder in enumerate(folders, 1):
            store.write(number, store.read(folder))
        store._index.copy_(torch.arange(128) % 3)
        return model, store

    def run(group):
        model, store = adapted(group=group)
        return Stepper(model, 64).step(TOKENS), model, store

    expected = Stepper(adapted()[0], 64).step(TOKENS)
    for size in (2, 3, 4):
        ranks = run_ranks(size, run)
        torch.testing.assert_close(ranks[0][0], expected, atol=2e-4, rtol=1e-4)
        for _, model, store in ranks:
            linears = [module for module in model.layers.modules() if isinstance(module, Linear)]
            widths = sum(len(linear.lengths) * linear.in_features + linear.out_features for linear in linears)
            assert store.bytes == 3 * 16 * widths * 4
    without = Stepper(load(tmp_path / "model"), 64).step(TOKENS)
    changed = [bool((found - other).abs().max() > 1e-3) for found, other in zip(expected, without, strict=True)]
    assert changed[:3] == [False, True, True], "the first token has no adapter, and sees no other"


@pytest.mark.parametrize("name", ["ernie 4.5 with every bias", "minicpm 3"])
def test_draft_modules_are_cut_as_layers_are(name, tmp_path) -> None:
    config = load(save(HF_CONFIGS[name](), tmp_path)).config
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def filled(shard):
        layer = MTPLayer(
            config, MTPOptions(), max_model_len=64, shard=shard, dtype=torch.float32, device=torch.device("cpu")
        )
        targets = layer.checkpoint_tensors()
        for name, target in targets.items():
            if name not in tensors and len(target.shape) == 2:  # as the packaged modules are stored
                codes = torch.randint(-127, 128, target.shape, generator=generator, dtype=torch.int8)
                tensors[name] = TensorInMemory(name, codes)
                scale = torch.rand(len(codes), 1, generator=generator)
                tensors[f"{name}_scale"] = TensorInMemory(f"{name}_scale", scale)
            elif name not in tensors:
                tensors[name] = TensorInMemory(name, torch.rand(target.shape, generator=generator))
        write(match_tensors(targets, _dequantised(list(tensors.values())), "made up"))
        return layer

    whole = filled(Shard())
    for rank, size in SHARDS:
        assert_is_shard(filled(Shard(rank, size)), whole, rank, size)


@pytest.mark.parametrize("name", ["llama with every bias", "phi 4 with long rope"])
@pytest.mark.parametrize("quantization", ["auto", "fp8"])
def test_random_weights_of_ranks_are_parts_of_the_wholes(name, quantization, tmp_path, monkeypatch) -> None:
    """Also where a matrix is drawn in several pieces."""
    save(HF_CONFIGS[name](), tmp_path)
    monkeypatch.setattr(random_weights, "_PIECE", 1000)
    assert_shards(tmp_path, load_format="dummy", quantization=quantization)
    numbers = load(tmp_path, load_format="dummy").layers[0].mlp.down_proj.weight.flatten()
    assert len(numbers.unique()) > 0.99 * len(numbers)
    assert 0.018 < numbers.std() < 0.022


@pytest.mark.parametrize("name", ["llama with every bias", "phi 3 with windows"])
def test_shards_rounded_to_8_bits_as_they_are_read_have_the_codes_of_the_whole(name, tmp_path) -> None:
    save(HF_CONFIGS[name](), tmp_path)
    assert_shards(tmp_path, quantization="fp8")
    assert_adds_up(tmp_path, tolerance=1e-3, quantization="fp8")
    shard, whole = load(tmp_path, shard=Shard(1, 2), quantization="fp8"), load(tmp_path, quantization="fp8")
    write(
        plan_update(shard, ((name, 2 * values) for name, values in load_file(tmp_path / "model.safetensors").items()))
    )
    write(
        plan_update(whole, ((name, 2 * values) for name, values in load_file(tmp_path / "model.safetensors").items()))
    )
    assert_is_shard(shard, whole, 1, 2)


def test_heads_of_a_rank_are_those_that_its_queries_use() -> None:
    for num_heads, num_kv_heads in ((8, 2), (8, 8), (32, 4), (6, 3)):
        for size in sizes_that_divide(num_heads, num_kv_heads):
            group = num_heads // num_kv_heads
            for rank in range(size):
                queries, keys = Shard(rank, size).cut(num_heads), Shard(rank, size).heads(num_kv_heads)
                used = {head // group for head in range(queries.begin, queries.begin + queries.length)}
                assert used == set(range(keys.begin, keys.begin + keys.length))
                assert queries.length % keys.length == 0, "as many queries for each key head"


def test_a_part_widened_to_blocks_holds_the_part() -> None:
    values = torch.arange(7 * 100).view(7, 100)
    for begin, length in ((0, 100), (0, 10), (33, 30), (90, 10), (32, 32)):
        part = Part((Cut(4, 1, 2), Cut(3, 2, 1)), Cut(100, begin, length))
        widened = part.widened(32)
        assert widened.columns.begin % 32 == 0
        read = torch.cat([values[index] for index in widened.slices])
        (index,) = part.within(widened).slices
        assert torch.equal(read[index], values[[1, 2, 6], begin : begin + length])
        assert (part.shape, part.kept_shape) == ((7, 100), (3, length))


def test_outputs_of_ranks_are_the_wholes_side_by_side_and_their_sums_are_the_wholes() -> None:
    generator = torch.Generator().manual_seed(0)
    float64 = {"dtype": torch.float64, "device": torch.device("cpu")}
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((96, 64), (96,)))
    x = torch.randn(5, 64, generator=generator, dtype=torch.float64)
    tensors = [TensorInMemory("weight", weight), TensorInMemory("bias", bias)]

    def filled(axis, shard):
        layer = Linear(64, 96, bias=True, axis=axis, shard=shard, **float64)
        write(match_tensors(layer.targets(), tensors, "made up"))
        return layer

    for size in (1, 2, 4):
        shards = [Shard(rank, size) for rank in range(size)]
        side_by_side = torch.cat([filled(Axis.OUT, shard)(x) for shard in shards], 1)
        added = sum(filled(Axis.IN, shard)(x.chunk(size, 1)[shard.rank].contiguous()) for shard in shards)
        for found in (side_by_side, added):
            torch.testing.assert_close(found, x @ weight.T + bias, atol=1e-12, rtol=1e-12)


def test_of_blocks_no_more_is_dequantised_than_is_kept(tmp_path, monkeypatch) -> None:
    gguf = pytest.importorskip("gguf", reason="writes GGUF files")
    path = write_blocks(BLOCKS["llama"](), tmp_path / "model.gguf")
    sizes, dequantize = [], gguf.quants.dequantize

    def noted(stored, kind):
        values = dequantize(stored, kind)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(gguf.quants, "dequantize", noted)
    shard = load(path, shard=Shard(1, 4))
    read = [size for size in sizes if size > 32]  # a file is opened with a trial of one block
    assert sorted(read) == sorted(target_sizes(shard))


def target_sizes(model):
    """Numbers in the parts of a checkpoint's tensors that a model keeps."""
    parts = [(target, part_of(target)) for target in model.checkpoint_tensors().values()]
    return [math.prod(target.shape if part is None else part.kept_shape) for target, part in parts]
