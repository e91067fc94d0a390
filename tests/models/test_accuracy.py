"""`stepgraph eval`: figures are those of float64, a model is no distance from itself, and broken weights of 4 or 8 bits show."""

import json

import pytest
import torch
from checkpoints import SIZES, random_hf_model
from four_bit_folders import write_four_bits
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from stepgraph.cli import main
from stepgraph.config import EngineConfig
from stepgraph.errors import StepgraphError
from stepgraph.executor.build import build_local_executor
from stepgraph.layers.formats import FP8, FourBit
from stepgraph.layers.linear import Linear
from stepgraph.models.source import resolve_configured
from stepgraph.ops.packed import BLOCK_BYTES
from stepgraph.verify.accuracy import Window, compare, copy_weights, hidden_states, windows

WIDE = SIZES | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 257, "eos_token_id": 0}
TOKENS = [(11 * i * i + 3 * i) % 257 for i in range(61)]
CUT = {"size": 24, "stride": 10}


def runner(model, **settings):
    """Of an engine with room for a window."""
    sizes = {"max_num_seqs": 2, "max_model_len": 64, "num_kv_blocks": 5, "graph_backend": "eager", "device": "cpu"}
    config = EngineConfig.from_settings(model=str(model), **sizes | {"dtype": "float32"} | settings)
    return build_local_executor(config, resolve_configured(config.model)).runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one token per byte, whose distributions are neither flat nor certain."""
    folder = tmp_path_factory.mktemp("unquantised")
    save_byte_tokenizer(folder)
    random_hf_model(LlamaConfig(**WIDE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def awq(folder, tmp_path_factory):
    """The same in 4 bits, and what its codes stand for."""
    packed = tmp_path_factory.mktemp("awq") / "packed"
    return packed, write_four_bits(folder, packed, "awq")


@pytest.fixture(scope="module")
def reference(folder):
    return runner(folder)


@given(num_tokens=st.integers(2, 90), size=st.integers(2, 40), data=st.data())
def test_every_token_but_the_first_counts_once_behind_enough_context(num_tokens, size, data) -> None:
    stride = data.draw(st.integers(1, size - 1))
    cut = list(windows(num_tokens, size, stride))
    assert [t for _, counted, end in cut for t in range(counted, end)] == list(range(1, num_tokens))
    for index, (begin, counted, end) in enumerate(cut):
        assert begin == index * stride
        assert begin < counted < end <= begin + size
        assert index == 0 or counted - begin >= min(size - stride, counted)


def test_the_windows_of_a_short_text() -> None:
    assert list(windows(10, 6, 4)) == [Window(0, 1, 6), Window(4, 6, 10)]


@torch.no_grad()
def log_probs_in_float64(folder, prefix):
    """Of each token after the first, from transformers' own model: all of the window that counts it, at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows, logits = [], []
    for target in range(1, len(TOKENS)):
        begin = 0
        while begin + CUT["size"] <= target:
            begin += CUT["stride"]
        row = model(torch.tensor([prefix + TOKENS[begin:target]])).logits[0, -1]
        rows.append(row.log_softmax(0))
        logits.append(row)
    return torch.stack(rows), torch.stack(logits)


@pytest.mark.parametrize("prefix", [[], [5, 9]])
def test_figures_are_those_of_transformers_in_float64(folder, awq, reference, prefix) -> None:
    packed, plain = awq
    found = compare(reference, runner(packed), TOKENS, **CUT, prefix=prefix)
    (expected, expected_logits), (other, other_logits) = (log_probs_in_float64(f, prefix) for f in (folder, plain))
    target = torch.tensor(TOKENS[1:])[:, None]
    kl = (expected.exp() * (expected - other)).sum(1).sort().values
    at = 0.99 * (len(kl) - 1)
    p99 = kl[int(at)] + (at - int(at)) * (kl[int(at) + 1] - kl[int(at)])
    assert found.tokens == len(TOKENS) - 1
    assert found.reference_perplexity == pytest.approx(expected.gather(1, target).mean().neg().exp().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(other.gather(1, target).mean().neg().exp().item(), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.reference_perplexity)
    assert [found.mean_kl, found.p99_kl, found.max_kl] == pytest.approx(
        [kl.mean().item(), p99.item(), kl[-1].item()], rel=1e-4
    )
    assert found.same_top_token == (expected.argmax(1) == other.argmax(1)).double().mean().item()
    assert 0 < found.same_top_token < 1
    distance = other_logits - expected_logits
    assert found.max_logit_difference == pytest.approx(distance.abs().max().item(), rel=1e-4)
    relative = distance.norm(dim=1) / expected_logits.norm(dim=1)
    assert found.mean_logit_difference == pytest.approx(relative.mean().item(), rel=1e-4)


def test_a_model_is_no_distance_from_itself(folder, reference) -> None:
    for other in (reference, runner(folder)):
        found = compare(reference, other, TOKENS, **CUT)
        assert (found.mean_kl, found.max_kl, found.max_logit_difference) == (0, 0, 0)
        assert (found.same_top_token, found.perplexity_ratio) == (1, 1)


def test_chunks_of_a_window_change_nothing(folder, reference) -> None:
    """Those of a step are as many as `max_num_batched_tokens`."""
    pieces = runner(folder, max_num_batched_tokens=7)
    torch.testing.assert_close(hidden_states(pieces, TOKENS), hidden_states(reference, TOKENS), rtol=1e-4, atol=1e-5)


def test_logits_that_are_no_numbers_are_an_error(folder, reference) -> None:
    broken = runner(folder)
    broken.model.layers[1].mlp.down_proj.weight.data[3] = torch.nan
    with pytest.raises(StepgraphError, match=r"logits of 60 of 60 tokens hold NaN or infinity"):
        compare(reference, broken, TOKENS, **CUT)


def wrong_scale(layer) -> None:
    layer.scale.data[:, 0] *= 2


def swapped_nibbles(layer) -> None:
    layer.weight.data.copy_(layer.weight << 4 | layer.weight >> 4)


def shifted_groups(layer) -> None:
    layer.scale.data.copy_(layer.scale.roll(1, 1))
    if "zero" in layer._parameters:
        layer.zero.data.copy_(layer.zero.roll(1, 1))


@pytest.mark.parametrize("break_", [wrong_scale, swapped_nibbles, shifted_groups])
def test_one_broken_matrix_of_a_checkpoint_in_4_bits_shows(awq, break_) -> None:
    """Beside the numbers that the codes stand for, which differ by roundings."""
    packed, _ = awq
    dequantised, candidate = runner(packed, quantization="none"), runner(packed)
    own = compare(dequantised, candidate, TOKENS, **CUT)
    assert own.max_kl < 1e-8
    layer = candidate.model.layers[1].mlp.down_proj
    assert isinstance(layer.format, FourBit)
    break_(layer)
    assert compare(dequantised, candidate, TOKENS, **CUT).mean_kl > 1e-4


@pytest.mark.parametrize(
    ("quantization", "break_"),
    [("int4", wrong_scale), ("int4", swapped_nibbles), ("int4", shifted_groups), ("fp8", wrong_scale)],
)
def test_a_broken_matrix_shows_beside_what_rounding_costs(tmp_path, quantization, break_) -> None:
    """In a model whose layers add little to what they get, as in trained ones; others lose most of what they say to 4 bits."""
    model = random_hf_model(LlamaConfig(**WIDE))
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(0.3 if parameter.dim() > 1 else 1)
    model.save_pretrained(tmp_path)
    reference, candidate = runner(tmp_path), runner(tmp_path, quantization=quantization)
    own = compare(reference, candidate, TOKENS, **CUT)
    layer = candidate.model.layers[1].mlp.down_proj
    assert isinstance(layer.format, FourBit if quantization == "int4" else FP8)
    assert own.mean_kl > 1e-6
    break_(layer)
    assert compare(reference, candidate, TOKENS, **CUT).mean_kl > 2 * own.mean_kl


def blocks_of(layer):
    """A GGUF file's blocks of 32 codes of 4 bits: scales, and 16 bytes of codes behind them."""
    assert layer.format.blocks in ("Q4_0", "Q4_1")
    blocks = layer.weight.data.unflatten(1, (-1, BLOCK_BYTES[layer.format.blocks]))
    return blocks[..., :-16], blocks[..., -16:]


def swapped_codes(layer) -> None:
    _, codes = blocks_of(layer)
    codes.copy_(codes << 4 | codes >> 4)


def shifted_blocks(layer) -> None:
    scales, _ = blocks_of(layer)
    scales.copy_(scales.roll(1, 1))


def test_one_broken_matrix_of_30_layers_shows_in_a_model_that_speaks(smollm2) -> None:
    """Beside what blocks of a file cost in their own products, which round."""
    tokens = smollm2.tokenizer().encode(
        "The sun sets behind the hills, the sky turns red, and one by one the stars appear."
    )
    cut = {"size": len(tokens), "stride": 1}
    reference, candidate = runner("smollm2", quantization="none"), runner("smollm2", dtype="auto")
    own = compare(reference, candidate, tokens, **cut)
    assert 0 < own.mean_kl < 1e-3
    layer = candidate.model.layers[15].mlp.down_proj
    right = layer.weight.clone()
    for break_ in (swapped_codes, shifted_blocks):
        layer.weight.data.copy_(right)
        break_(layer)
        assert compare(reference, candidate, tokens, **cut).mean_kl > 20 * own.mean_kl


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantization": "fp8"}, {"quantization": "int4"}])
def test_random_weights_are_the_same_in_every_dtype_and_format(folder, settings) -> None:
    reference, candidate = runner(folder, load_format="dummy"), runner(folder, load_format="dummy", **settings)
    copy_weights(reference.model, candidate.model)
    for ours, theirs in zip(candidate.model.modules(), reference.model.modules(), strict=True):
        if isinstance(ours, Linear):
            torch.testing.assert_close(ours.values().float(), theirs.values(), rtol=0.1, atol=0.01)
    assert compare(reference, candidate, TOKENS, **CUT).mean_logit_difference < 0.2


def evaluated(folder, *flags) -> int:
    return main(["eval", str(folder), "--device", "cpu", "--tokens", "40", "--window", "24", *flags])


def test_the_command_prints_and_writes_what_it_finds(awq, tmp_path, capsys) -> None:
    packed, _ = awq
    (tmp_path / "text").write_text("Nobody has seen this text before, least of all a model of random weights.")
    file = tmp_path / "out" / "result.json"
    assert evaluated(packed, "--text", str(tmp_path / "text"), "--stride", "8", "--json", str(file)) == 0
    out = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert (result["tokens"], result["window"], result["stride"]) == (40, 24, 8)
    assert result["text"] == str(tmp_path / "text")
    assert 0 <= result["max_kl"] < 1e-8
    assert result["perplexity_ratio"] == pytest.approx(1)
    assert f"({result['digest']}), 40 tokens counted, windows of 24, stride 8" in out
    assert "float32, quantization none" in out
    assert f"{result['perplexity']:.3f}" in out
    assert result["weight_bytes"] < result["reference_weight_bytes"]
    assert evaluated(packed, "--kv-cache-dtype", "fp8") == 0
    out = capsys.readouterr().out
    assert "topics of Python" in out
    assert "float32, quantization auto, fp8 cache" in out


def test_random_weights_get_no_perplexity(folder, tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    assert evaluated(folder, "--load-format", "dummy", "--dtype", "bfloat16", "--json", str(file)) == 0
    out, result = capsys.readouterr().out, json.loads(file.read_text())
    assert "there is no perplexity to speak of" in out
    assert "perplexity  " not in out
    assert 0 < result["mean_logit_difference"] < 0.1
    assert not [name for name in result if "perplexity" in name]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--stride", "24"), "stride=24 must be between 1 and one less than the window, 23"),
        (("--window", "300"), "window=300 must be between 2 and 256"),
        (("--tokens", "0"), "tokens=0 counts nothing"),
        (
            ("--tensor-parallel-size", "2"),
            "tensor_parallel_size=2: eval holds two models against each other on one device",
        ),
        (("--text", "none.txt"), "--text 'none.txt' cannot be read: No such file or directory"),
        (("--text", "bytes"), "--text 'bytes' cannot be read: it is not UTF-8"),
        (("--text", "short"), "short has 1 tokens; give a text of at least two"),
    ],
)
def test_what_cannot_be_compared_is_refused(folder, flags, reason, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xff")
    (tmp_path / "short").write_text("a")
    assert evaluated(folder, *flags) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("error: ")) == ("", 1)
    assert reason in err
