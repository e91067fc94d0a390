"""PTX that makes numbers of the codes of four bytes, $0 and on, by bits: with half as many instructions as Triton's own for each.

An integer is put into the mantissa of a power of two that it counts up by one, from which the power is taken, and 8; E2M1's bits
into sign, exponent and mantissa of the least numbers, which a power of two then makes them.
"""

_ONE_AND_MINUS = {"bf16": (0x43004300, 0x3F803F80, 0xC308C308), "f16": (0x64006400, 0x3C003C00, 0xE408E408)}
"""Pairs of 128 and of 1024, of one, and of what is to be taken away: 136 and 1032."""
_MANTISSA_AND_FACTOR = {"bf16": (6, 0x7E807E80), "f16": (9, 0x74007400)}
"""Where the last bit of the exponent and mantissa goes, and pairs of 2^126 and of 2^14."""
_ANY_AND_OR = 0xEA
"""Of lop3: (a & b) | c."""


def float32_bits(first: int) -> str:
    """Integers and 16, as bits of float32 in four registers, of the codes from bit `first` on of each byte of $4."""
    lines = []
    for byte in range(4):
        left = 19 - 8 * byte - first
        shift = f"shl.b32 t, $4, {left}" if left >= 0 else f"shr.u32 t, $4, {-left}"
        lines += [shift, f"lop3.b32 ${byte}, t, 0x780000, 0x41800000, {_ANY_AND_OR}"]
    return _block("t", lines)


def integers(dtype: str, first: int) -> str:
    """Integers less 8, two of 16 bits in each of two registers, of the codes from bit `first` on of each byte of $2."""
    power, one, minus = _ONE_AND_MINUS[dtype]
    lines = [f"mov.b32 one, {one:#x}", f"mov.b32 minus, {minus:#x}", *_pairs(first)]
    for index in range(2):
        lines += [
            f"lop3.b32 p{index}, p{index}, 0x000F000F, {power:#x}, {_ANY_AND_OR}",
            f"fma.rn.{dtype}x2 ${index}, p{index}, one, minus",
        ]
    return _block("v, p0, p1, one, minus", lines)


def e2m1(dtype: str, first: int) -> str:
    """Likewise E2M1's numbers."""
    shift, factor = _MANTISSA_AND_FACTOR[dtype]
    lines = [f"mov.b32 factor, {factor:#x}", "mov.b32 zero, 0x80008000", *_pairs(first)]
    for index in range(2):
        lines += [
            f"shl.b32 t, p{index}, {shift}",
            f"and.b32 t, t, {0x00070007 << shift:#x}",
            f"shl.b32 p{index}, p{index}, 12",
            f"lop3.b32 t, p{index}, 0x80008000, t, {_ANY_AND_OR}",
            f"fma.rn.{dtype}x2 ${index}, t, factor, zero",
        ]
    return _block("v, t, p0, p1, factor, zero", lines)


def _pairs(first: int) -> list[str]:
    """Bytes of $2 in the lower halves of 16 bits each, codes lowest."""
    return [f"shr.u32 v, $2, {first}", "prmt.b32 p0, v, 0, 0x4140", "prmt.b32 p1, v, 0, 0x4342"]


def _block(registers: str, lines: list[str]) -> str:
    return "{ .reg .b32 " + registers + "; " + " ".join(f"{line};" for line in lines) + " }"
