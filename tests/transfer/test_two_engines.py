"""What one engine has computed of a prompt, another goes on from."""

import pytest
from scheduling import Loop

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import RequestError
from stepgraph.transfer.reference import Offer, Reference


@pytest.mark.parametrize(
    ("transfer", "role"), [(Offer(), "prefill"), (Reference("engine", "/tmp/socket", 0, "lease"), "decode")]
)
def test_an_engine_that_does_all_of_a_request_refuses_a_part_of_one_and_says_which_do(transfer, role) -> None:
    loop = Loop()
    with pytest.raises(RequestError, match=f"--splitwise-role {role}"):
        loop.engine.add_request("a", [1, 2, 3], SamplingParams(), transfer=transfer)
    loop.check_nothing_is_held()
