"""What products of every format call, alone, with adapters, deterministic, and with what comes before and after; their values."""

import itertools
from pathlib import Path

import pytest
import torch
from operator_calls import OperatorCalls

from stepgraph import native
from stepgraph.layers.embedding import Embedding
from stepgraph.layers.formats import FP8, Adapted, End, Packed, Plain
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.lora import LoRA
from stepgraph.layers.norm import RMSNorm
from stepgraph.parallel.shard import Cut

TOKENS, INPUTS, EPS = 3, 64, 1e-5
SHORT = {
    "stepgraph_native.": "native.",
    "stepgraph.": "",
    str(1 << 62): "never",
    "1e-05": "eps",
    ", pin_memory=False": "",
}
CPU = {"dtype": torch.float32, "device": torch.device("cpu")}
FORMATS = {
    "plain": lambda deterministic: Plain(deterministic),
    "fp8": lambda deterministic: FP8(deterministic=deterministic),
    "packed": lambda deterministic: Packed("Q8_0", 16, takes_values=True, deterministic=deterministic),
}
CALLS = {
    "product": {},
    "norm": {"norm": True},
    "norm, swiglu": {"norm": True, "end": End.SWIGLU},
    "norm, geglu": {"norm": True, "end": End.GEGLU},
    "swiglu": {"end": End.SWIGLU},
    "geglu": {"end": End.GEGLU},
    "add": {"end": End.ADD},
    "add half": {"end": End.ADD, "multiplier": 0.5},
}
CASES = [
    (name, *choices)
    for name, *choices in itertools.product(["plain", "fp8", "packed", "packed odd"], *[(False, True)] * 3)
]


def read_expected() -> dict[str, dict[str, list[str]]]:
    sections: dict[str, dict[str, list[str]]] = {}
    for line in (Path(__file__).parents[1] / "data/product_calls.txt").read_text().splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            call, _, calls = line.partition(": ")
            section[call] = calls.split("; ")
    return sections


EXPECTED = read_expected()


def shortened(calls):
    for long, short in SHORT.items():
        calls = [call.replace(long, short) for call in calls]
    return calls


def skip_without_kernels(name) -> None:
    if name.startswith("packed") and not native.available():
        pytest.skip(f"no kernels: {native.missing()}")


def fill(module) -> None:
    generator = torch.Generator().manual_seed(0)
    for target in module.targets().values():
        target.copy_(torch.randn(target.shape, generator=generator))


def make(name, *, lora=False, deterministic=False, bias=False):
    """A filled layer and its norm."""
    skip_without_kernels(name)
    outputs = 96 if name.endswith("odd") else 128
    layer = Linear(INPUTS, outputs, bias=bias, format=FORMATS[name.split()[0]](deterministic), **CPU)
    fill(layer)
    norm = RMSNorm(INPUTS, EPS, **CPU)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, INPUTS))
    if lora:
        generator = torch.Generator().manual_seed(1)
        a, b = torch.randn(2, 16, INPUTS, generator=generator), torch.randn(2, outputs, 16, generator=generator)
        index = torch.tensor([1, 0, 1], dtype=torch.int32)
        layer.use(Adapted(layer.format, LoRA(a, b, (outputs,), index)))
    return layer, norm


def run(layer, norm, options, x, residual):
    options = options | ({"norm": norm} if "norm" in options else {})
    return layer.product(x, **options | ({"out": residual} if options.get("end") is End.ADD else {}))


def inputs(outputs):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, INPUTS, generator=generator), torch.randn(TOKENS, outputs, generator=generator)


@pytest.mark.parametrize(("name", "lora", "deterministic", "bias"), CASES)
def test_a_product_calls_the_operators_that_fit_it(name, lora, deterministic, bias) -> None:
    layer, norm = make(name, lora=lora, deterministic=deterministic, bias=bias)
    section = " ".join([name] + ["lora"] * lora + ["deterministic"] * deterministic + ["bias"] * bias)
    lines = {}
    for call, options in CALLS.items():
        x, residual = inputs(layer.out_features)
        named = dict(layer.named_parameters()) | {"x": x, "residual": residual, "norm": norm.weight}
        if lora:
            named |= {key: getattr(layer.format.lora, key) for key in ("a", "b", "index")}
        with torch.no_grad(), OperatorCalls(**named) as recorded:
            run(layer, norm, options, x, residual)
        lines[call] = shortened(recorded.calls)
    assert lines == EXPECTED[section]


@pytest.mark.parametrize("name", EXPECTED["head"])
def test_a_head_writes_where_it_is_told(name) -> None:
    skip_without_kernels(name)
    kind, deterministic = name.split()[0], name.endswith("deterministic")
    head_format = Packed("Q8_0", None, True, deterministic) if kind == "packed" else FORMATS[kind](deterministic)
    for head in (Linear(INPUTS, 96, format=head_format, **CPU), Embedding(96, INPUTS, format=head_format, **CPU)):
        fill(head)
        x, out = inputs(96)
        with OperatorCalls(x=x, weight=head.weight, out=out) as recorded:
            assert head.product(x, out=out) is out
        assert shortened(recorded.calls) == EXPECTED["head"][name]
        torch.testing.assert_close(out, x @ head.values().T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EXPECTED["embedding"])
def test_an_embedding_takes_rows(name) -> None:
    skip_without_kernels(name)
    table, index = Embedding(96, INPUTS, format=FORMATS[name](False), **CPU), torch.tensor([95, 0], dtype=torch.int32)
    fill(table)
    with OperatorCalls(weight=table.weight, index=index) as recorded:
        found = table(index)
    assert shortened(recorded.calls) == EXPECTED["embedding"][name]
    assert torch.equal(found, table.values()[[95, 0]])


@pytest.mark.parametrize("call", [*CALLS, "add after norm"])
@pytest.mark.parametrize(("name", "lora", "deterministic", "bias"), CASES)
def test_a_product_is_what_its_parts_give(name, lora, deterministic, bias, call) -> None:
    """In float64, of the weight's values. The last is of no model so far."""
    options = CALLS.get(call, {"norm": True, "end": End.ADD})
    layer, norm = make(name, lora=lora, deterministic=deterministic, bias=bias)
    x, residual = inputs(layer.out_features)
    x64 = (norm(x) if "norm" in options else x).double()
    expected = x64 @ layer.values().double().T
    if bias:
        expected += layer.bias.double()
    if lora:
        update = (x64 @ layer.format.lora.a[1].double().T) @ layer.format.lora.b[1].double().T
        expected += update * layer.format.lora.index[:, None]
    end = options.get("end", End.STORE)
    if end is End.ADD:
        expected = residual.double() + options.get("multiplier", 1.0) * expected
    elif end in (End.SWIGLU, End.GEGLU):
        gate, up = expected.chunk(2, 1)
        gelu = torch.nn.functional.gelu(gate, approximate="tanh")
        expected = (gelu if end is End.GEGLU else torch.nn.functional.silu(gate)) * up
    found = run(layer, norm, options, x, residual)
    assert (found is residual) == (end is End.ADD)
    assert (found.double() - expected).norm() < 1e-5 * expected.norm()


def test_another_format_brings_new_parameters_and_keeps_those_that_it_keeps_alike() -> None:
    layer = Linear(256, 96, bias=True, **CPU)
    weight, bias = layer.weight, layer.bias
    layer.use(Plain(deterministic=True))
    assert layer.weight is weight
    layer.use(FP8(grouped=True))
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        "weight": ((96, 256), torch.float8_e4m3fn),
        "scale": ((96, 2), torch.float32),
        "bias": ((96,), torch.float32),
    }
    assert layer.bias is bias
    codes = layer.weight
    layer.use(Adapted(layer.format, LoRA(torch.zeros(1), torch.zeros(1), (96,), torch.zeros(1))))
    assert layer.weight is codes, "filled or not"
    layer.use(Plain())
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_a_merged_layer_are_filled_apart(name) -> None:
    skip_without_kernels(name)
    layer = MergedLinear(
        INPUTS, {"a": [Cut.whole(32)], "b": [Cut.whole(96)]}, bias=True, format=FORMATS[name](False), **CPU
    )
    assert layer.part_targets().keys() == {"a.weight", "a.bias", "b.weight", "b.bias"}
    generator = torch.Generator().manual_seed(0)
    given = {}
    for key, target in layer.part_targets().items():
        given[key] = torch.randn(target.shape, generator=generator)
        target.copy_(given[key])
    assert torch.equal(layer.bias, torch.cat((given["a.bias"], given["b.bias"])))
    exact = torch.cat((given["a.weight"], given["b.weight"]))
    assert (layer.values() - exact).abs().max() <= (0 if name == "plain" else exact.abs().max() / 28)
