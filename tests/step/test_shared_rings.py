"""Memory that ranks share is given back by the device, also where an engine is not built to its end."""

from types import SimpleNamespace

import pytest
import torch

from stepgraph.errors import StepgraphError
from stepgraph.parallel.exchange import alone
from stepgraph.parallel.shard import WHOLE
from stepgraph.step.shape import StepShape
from stepgraph.step.shared_rings import SharedRings


@pytest.fixture
def registered(monkeypatch) -> dict[int, int]:
    """Bytes by address, of a device that can reach them."""
    found: dict[int, int] = {}

    def register(address: int, num_bytes: int, flags: int) -> int:
        found[address] = num_bytes
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=found.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    return found


def create() -> SharedRings:
    return SharedRings(StepShape(8, 2), WHOLE, alone, torch.device("cuda"))


def test_memory_is_taken_back_once(registered) -> None:
    rings = create()
    [(address, num_bytes)] = registered.items()
    [own] = rings.of_ranks
    assert address == own.rows.data_ptr()
    assert num_bytes >= own.counter.data_ptr() + 4 - address
    rings.close()
    rings.close()
    assert registered == {}


def test_memory_is_taken_back_where_nobody_closes_it(registered) -> None:
    rings = create()
    assert len(registered) == 1
    del rings
    assert registered == {}


def test_memory_that_the_device_cannot_reach_is_told_of(monkeypatch) -> None:
    cudart = SimpleNamespace(cudaHostRegister=lambda address, num_bytes, flags: 712)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with pytest.raises(StepgraphError, match=r"^cuda cannot map memory that processes share \(712\)$"):
        create()
