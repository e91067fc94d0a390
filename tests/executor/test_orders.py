"""Orders as words, there and back."""

from array import array

import numpy as np
import pytest

from stepgraph.executor.orders import (
    admission_of,
    call_of,
    shape_of,
    words_of_admission,
    words_of_call,
    words_of_shape,
)
from stepgraph.step.admission import Admission
from stepgraph.step.shape import StepShape, Variant
from stepgraph.step.slot_sampling import SlotSampling


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 0), (40, 2), (131072, 8191)])
def test_an_admission_comes_out_as_it_went_in(num_tokens, num_blocks) -> None:
    tokens, blocks = array("i", range(num_tokens)), list(range(9, 9 + num_blocks))
    lines = (5, 3) if num_blocks else ()
    sampling = SlotSampling(seed=2**63 + 1, temperature=0.3, stop_token_ids=(4, 5), logit_bias=((3, -0.5),))
    admission = Admission(3, tokens, 1, 7, num_tokens + 10, sampling, blocks, 16 * num_blocks, lines)
    words = words_of_admission(admission)
    assert words.dtype == np.int32
    again = admission_of(words)
    assert isinstance(again.tokens, array)
    assert again._replace(blocks=list(again.blocks)) == admission


def test_shapes_and_calls_come_out_as_they_went_in() -> None:
    shape = StepShape(48, 8, Variant.EXTENDED, 3)
    assert shape_of(words_of_shape(shape)) == shape
    function, args = call_of(words_of_call(max, (3, "text", None)))
    assert (function, args) == (max, (3, "text", None))
