"""Which kernels an architecture's numbers choose, against choices that were written down when their speed was measured."""

import json
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from stepgraph.ops.attention.geometry import attention_geometry
from stepgraph.ops.fp8_linear import triton as fp8_linear
from stepgraph.ops.linear import few_tokens
from stepgraph.ops.linear import triton as linear
from stepgraph.platforms import kernels
from stepgraph.platforms.cpu import CpuPlatform
from stepgraph.platforms.tuning import DEFAULT, SM_90, KernelTuning, SlicedTile, of_capability

CHOICES = json.loads((Path(__file__).parent.parent / "data" / "kernel_choices.json").read_text())
"""Tiles by number of tokens and, in the order of "outputs", of outputs; -1 is none."""
ARCHITECTURES = [SM_90, of_capability((10, 0)), DEFAULT]


@pytest.fixture(params=ARCHITECTURES, ids=["sm_90", "sm_100", "default"])
def tuning(request, monkeypatch) -> Iterator[KernelTuning]:
    """The kernels' modules follow it."""
    for module in (few_tokens, linear, fp8_linear):
        monkeypatch.setattr(module, "TUNING", request.param)
    forget_choices()
    yield request.param
    forget_choices()


def forget_choices() -> None:
    few_tokens._choose_tile.cache_clear()
    fp8_linear._choose_sliced.cache_clear()


def shown(tile: object) -> str | None:
    if tile is None:
        return None
    return f"{'Tile' if isinstance(tile, SlicedTile) else type(tile).__name__}{astuple(tile)}"


def cases(table: str) -> list[tuple[int, int, str | None]]:
    return [
        (int(tokens), outputs, None if choice < 0 else CHOICES["tiles"][choice])
        for tokens, row in CHOICES[table].items()
        for outputs, choice in zip(CHOICES["outputs"], row, strict=True)
    ]


@pytest.mark.parametrize("gated", [False, True])
def test_products_of_few_tokens_get_the_tiles_that_were_measured(tuning, gated) -> None:
    for tokens, outputs, choice in cases("gated" if gated else "linear"):
        x = torch.empty(tokens, 1024, dtype=torch.float16)
        assert shown(few_tokens.choose_tile(x, outputs, gated=gated)) == choice, (tokens, outputs)


def test_products_with_weights_of_8_bits_get_the_tiles_that_were_measured(tuning) -> None:
    for tokens, outputs, choice in cases("fp8"):
        x = torch.empty(tokens, 1024, dtype=torch.float16)
        assert shown(fp8_linear.choose_tile(x, outputs)) == choice, (tokens, outputs)


def test_products_by_row_get_the_tiles_that_were_measured(tuning, monkeypatch) -> None:
    chosen = []
    monkeypatch.setattr(linear, "launch_tiles", lambda x, weight, bias, out, tile: chosen.append(shown(tile)))
    for tokens, outputs, choice in cases("by_row"):
        x, weight = torch.empty(tokens, 8, dtype=torch.float16), torch.empty(outputs, 8, dtype=torch.float16)
        linear.linear_by_row(x, weight, None, torch.empty(tokens, outputs, dtype=torch.float16))
        assert chosen.pop() == choice, (tokens, outputs)


@pytest.mark.parametrize("tuning", ARCHITECTURES)
def test_attention_has_the_sizes_that_were_measured(tuning) -> None:
    for case, sizes in CHOICES["geometry"].items():
        *of_step, decode_tokens, deterministic, tall_tile = map(int, case.split(","))
        geometry = attention_geometry(
            *of_step, decode_tokens=decode_tokens, deterministic=bool(deterministic), tall_tile=tall_tile, tuning=tuning
        )
        assert geometry.own is None
        assert list(astuple(geometry)[:-1]) == sizes, case


@pytest.mark.parametrize(
    ("capability", "dependent_launch", "hopper_attention"),
    [((7, 5), False, False), ((8, 0), False, False), ((8, 9), False, False), ((9, 0), True, True), ((10, 0), True, False),
     ((12, 1), True, False)],
)  # fmt: skip
def test_what_only_some_architectures_have(capability, dependent_launch, hopper_attention) -> None:
    tuning = of_capability(capability)
    assert (tuning.dependent_launch, tuning.hopper_attention) == (dependent_launch, hopper_attention)


def test_triton_kernels_follow_the_accelerator_in_use_or_else_the_gpu_that_there_is(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_TUNING", {"cpu": CpuPlatform.tuning})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.kernel_tuning() == DEFAULT
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert kernels.kernel_tuning() == SM_90
    third = KernelTuning(min_large_tiles=7)
    monkeypatch.setitem(kernels._TUNING, "xpu", third)
    assert kernels.kernel_tuning() is third
