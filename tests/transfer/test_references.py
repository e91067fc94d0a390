"""`kv_transfer_params` as routers made for vLLM send them."""

import pytest

from stepgraph.errors import RequestError
from stepgraph.transfer.reference import Offer, Reference, read_params

REFERENCE = Reference("engine", "127.0.0.1", 5600, "lease")
FIRST = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What vLLM's proxy gives the engine that computes the prompt."""


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        ({}, None),
        ({"do_remote_prefill": False, "do_remote_decode": None}, None),
        (FIRST, Offer()),
        (FIRST | {"remote_request_id": "chosen"}, Offer("chosen")),
        (REFERENCE.params(3, 2), REFERENCE),
        (REFERENCE.params(3, 2) | {"remote_port": "5600", "more": [1]}, REFERENCE),
    ],
)
def test_what_routers_send_is_understood(given, meant) -> None:
    assert read_params(given) == meant


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"do_remote_decode": True}, "cannot both be true"),
        ({"do_remote_prefill": 1}, "do_remote_prefill"),
        ({"remote_engine_id": None}, "remote_engine_id"),
        ({"remote_host": ""}, "remote_host"),
        ({"remote_host": "a\nb"}, "remote_host"),
        ({"remote_request_id": "x" * 257}, "remote_request_id"),
        ({"remote_request_id": 7}, "remote_request_id"),
        ({"remote_port": True}, "remote_port"),
        ({"remote_port": 65536}, "remote_port"),
        ({"remote_port": "80 "}, "remote_port"),
        ({"remote_port": None}, "remote_port"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(change, wrong) -> None:
    with pytest.raises(RequestError, match=wrong) as refused:
        read_params(REFERENCE.params(3, 2) | change)
    assert refused.value.param == "kv_transfer_params"


def test_what_is_no_object_is_refused() -> None:
    for given in ([], "x", 3, True):
        with pytest.raises(RequestError, match="must be an object"):
            read_params(given)
