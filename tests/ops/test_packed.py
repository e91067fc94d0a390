"""Products with packed weights: against float64 on what gguf dequantises, and bits that do not depend on neighbours."""

import pytest
import torch

from stepgraph import native, ops
from stepgraph.ops.packed import BLOCK_BYTES, EXACT_TOKENS, reference, rounds_to_bfloat16

gguf = pytest.importorskip("gguf", reason="the block formats are compared with the gguf package")

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")

FORMATS = sorted(BLOCK_BYTES)
EPS = 1e-5


def make_weight(name, outputs, inputs):
    """Codes of a random weight, and the weight that they stand for, in float32, as gguf dequantises it."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    kind = gguf.GGMLQuantizationType[name]
    codes = gguf.quants.quantize(torch.randn(outputs, inputs, generator=generator).numpy(), kind)
    return torch.from_numpy(codes), torch.from_numpy(gguf.quants.dequantize(codes, kind))


def make_x(tokens, inputs, seed=0):
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed))


def assert_near(found, expected, tolerance):
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert ((found.double() - expected).norm() / expected.norm()).item() < tolerance


def in_bfloat16(x):
    """Rounded as the CPU's products do it, where it has them."""
    return x.bfloat16().float()


@pytest.mark.parametrize("name", FORMATS)
def test_reference_and_rows_have_the_bits_of_gguf(name):
    codes, weight = make_weight(name, 37, 96)
    assert torch.equal(reference.unpacked(codes, 96), weight)
    index = torch.tensor([0, 36, 5, 5], dtype=torch.int32)
    assert torch.equal(ops.packed_rows(codes, index, 96), weight[index])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [*range(1, 12), 16, 17, 50])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (37, 96), (67, 160)])
def test_exact_product_matches_float64(name, tokens, outputs, inputs):
    codes, weight = make_weight(name, outputs, inputs)
    x = make_x(tokens, inputs)
    out = torch.full((tokens + 1, outputs), torch.nan)
    ops.packed_linear(x, codes, exact_tokens=None, out=out[:tokens])
    assert_near(out[:tokens], x.double() @ weight.double().T, 1e-6)
    assert out[tokens].isnan().all()  # nothing is written behind
    assert torch.equal(ops.packed_linear(x, codes, exact_tokens=None), out[:tokens])


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_has_the_same_bits_with_any_tokens_beside_it(name):
    codes, _ = make_weight(name, 70, 160)
    x = make_x(40, 160)
    alone = torch.cat([ops.packed_linear(x[t : t + 1], codes, exact_tokens=None) for t in range(40)])
    for tokens in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 40):
        assert torch.equal(ops.packed_linear(x[:tokens], codes, exact_tokens=None), alone[:tokens]), tokens


def test_bits_do_not_depend_on_the_number_of_threads():
    codes, _ = make_weight("Q4_1", 200, 64)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(
            [ops.packed_linear(make_x(tokens, 64), codes, exact_tokens=EXACT_TOKENS) for tokens in (1, 12, 40)]
        )
    torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [EXACT_TOKENS + 1, 24, 61])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (37, 96), (67, 160)])
def test_many_tokens_are_rounded_to_bfloat16_at_most(name, tokens, outputs, inputs):
    codes, weight = make_weight(name, outputs, inputs)
    x = make_x(tokens, inputs)
    found = ops.packed_linear(x, codes, exact_tokens=EXACT_TOKENS)
    full, rounded = x.double() @ weight.double().T, in_bfloat16(x).double() @ in_bfloat16(weight).double().T
    errors = [((found.double() - expected).norm() / expected.norm()).item() for expected in (full, rounded)]
    assert min(errors) < 1e-6, errors


def test_whether_many_tokens_are_rounded_here_is_known():
    codes, _ = make_weight("Q4_1", 37, 96)
    x = make_x(EXACT_TOKENS + 1, 96)
    exact, allowed = (ops.packed_linear(x, codes, exact_tokens=tokens) for tokens in (None, EXACT_TOKENS))
    assert rounds_to_bfloat16() == (not torch.equal(exact, allowed))


def test_few_tokens_are_never_rounded():
    codes, _ = make_weight("Q4_1", 37, 96)
    x = make_x(EXACT_TOKENS, 96)
    assert torch.equal(
        ops.packed_linear(x, codes, exact_tokens=EXACT_TOKENS), ops.packed_linear(x, codes, exact_tokens=None)
    )


@pytest.mark.parametrize("exact_tokens", [None, EXACT_TOKENS, 40])
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_fused_products_are_those_of_their_parts(tokens, exact_tokens):
    codes, _ = make_weight("Q4_1", 128, 96)
    x, norm_weight = make_x(tokens, 96), 1 + make_x(1, 96, seed=1)[0] / 10
    normed = torch.nn.functional.rms_norm(x.double(), (96,), norm_weight.double(), EPS).float()
    plain = ops.packed_linear(normed, codes, exact_tokens=exact_tokens)
    exact = exact_tokens is None or tokens <= exact_tokens
    tolerance = 1e-6 if exact else 1e-3  # the last bit of the norm can change a rounding

    fused = ops.packed_norm_linear(x, norm_weight, EPS, codes, exact_tokens=exact_tokens)
    assert_near(fused, plain.double(), tolerance)

    gated = ops.packed_norm_swiglu(x, norm_weight, EPS, codes, exact_tokens=exact_tokens)
    gate, up = plain.double().chunk(2, dim=1)
    assert_near(gated, torch.nn.functional.silu(gate) * up, tolerance)

    for multiplier in (1.0, 0.25):
        residual = make_x(tokens, 128, seed=2)
        expected = residual.double() + multiplier * ops.packed_linear(x, codes, exact_tokens=exact_tokens).double()
        ops.packed_linear_add(x, codes, residual, multiplier, exact_tokens=exact_tokens)
        assert_near(residual, expected, 1e-6)


def test_silu_holds_at_the_ends_of_its_range():
    """One weight in each of the rows, so that gates are what the norm leaves of x: through an identity."""
    values = torch.tensor([-300.0, -104.0, -88.5, -87.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 87.0, 300.0, 89.0, *[1.0] * 20])
    kind = gguf.GGMLQuantizationType.Q8_0
    codes = torch.from_numpy(gguf.quants.quantize(torch.cat((torch.eye(32), torch.eye(32))).numpy(), kind))
    weight = reference.unpacked(codes, 32)
    scale = values.square().mean().sqrt()
    found = ops.packed_norm_swiglu(values[None], scale.expand(32).contiguous(), 0.0, codes, exact_tokens=None)
    gate, up = (values.double() @ weight.double().T)[None].chunk(2, dim=1)
    torch.testing.assert_close(found.double(), torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-30)
