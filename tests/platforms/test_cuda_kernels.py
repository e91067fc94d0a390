"""The kernels of the platform `cuda` by the operators' part of its contract, without a GPU: under Triton's interpreter."""

import sys
from pathlib import Path

import pytest
import torch
from triton_operators import triton_operators

sys.path += [str(Path(__file__).parents[1] / "ops"), str(Path(__file__).parent / "contract")]

from operator_cases import CASES, assert_as_reference  # their folders are not on the path before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the contract itself runs them there")
@pytest.mark.parametrize("name", CASES)
def test_triton_kernels_give_what_plain_torch_gives(name) -> None:
    with triton_operators(CASES[name].operator):
        assert_as_reference(name, 0, torch.device("cpu"))
