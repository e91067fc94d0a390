"""The PTX of `four_bit_linear`, run instruction by instruction on any machine, over every byte."""

import re

import pytest
import torch

from stepgraph.ops.four_bit_linear import ptx
from stepgraph.ops.four_bit_linear.reference import CHUNK, FourBitWeight, dequantize

MASK = 2**32 - 1
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def halves(word, dtype):
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(dtype)


def run(text, word, inputs):
    """The registers after a block whose last operand is `word`."""
    registers = {f"${inputs}": word}

    def value(operand):
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.sub(r"[{}]|\.reg [^;]*;", "", text).split(";"):
        if not line.strip():
            continue
        name, operands = line.split(maxsplit=1)
        to, *rest = (part.strip() for part in operands.split(","))
        a, b, c, *more = (*map(value, rest), 0, 0)
        operation, *kinds = name.split(".")
        match operation:
            case "mov":
                result = a
            case "and":
                result = a & b
            case "shl":
                result = a << b
            case "shr":
                result = a >> b
            case "lop3":
                assert more[0] == 0xEA
                result = (a & b) | c
            case "prmt":
                bytes_ = a.to_bytes(4, "little") + b.to_bytes(4, "little")
                result = int.from_bytes(bytes(bytes_[c >> 4 * place & 7] for place in range(4)), "little")
            case "fma":
                x, y, z = (halves(pair, TYPES[kinds[1][:-2]]).double() for pair in (a, b, c))
                low, high = (x * y + z).to(TYPES[kinds[1][:-2]]).view(torch.int16).tolist()
                result = (high & 0xFFFF) << 16 | low & 0xFFFF
            case _:
                raise AssertionError(name)
        registers[to] = result & MASK
    return registers


WORDS = [sum((start + 37 * place & 255) << 8 * place for place in range(4)) for start in range(256)]
"""Every byte in every place."""


def numbers(word, first, is_e2m1):
    codes = [word >> 8 * place + first & 15 for place in range(4)]
    bytes_ = torch.tensor([codes + [0] * (CHUNK // 2 - 4)], dtype=torch.uint8)
    return dequantize(FourBitWeight(bytes_, torch.ones(1, 1), None, None, CHUNK, is_e2m1), 4)[0]


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("is_e2m1", [False, True])
def test_numbers_of_16_bits_are_those_of_the_codes(dtype, first, is_e2m1) -> None:
    text = (ptx.e2m1 if is_e2m1 else ptx.integers)(dtype, first)
    for word in WORDS:
        registers = run(text, word, 2)
        found = torch.cat([halves(registers[f"${index}"], TYPES[dtype]) for index in range(2)])
        assert torch.equal(found.float(), numbers(word, first, is_e2m1)), hex(word)


@pytest.mark.parametrize("first", [0, 4])
def test_bits_of_float32_are_those_of_the_codes_and_16(first) -> None:
    for word in WORDS:
        registers = run(ptx.float32_bits(first), word, 4)
        found = torch.tensor([registers[f"${index}"] for index in range(4)], dtype=torch.int32).view(torch.float32)
        assert torch.equal(found - 24, numbers(word, first, False)), hex(word)
