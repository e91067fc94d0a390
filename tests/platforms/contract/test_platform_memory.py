"""The device's memory: what it reports, and what is given up while an engine sleeps."""

import pytest
import torch
from device_work import Output


@pytest.fixture
def memory(platform):
    """For two storages of 4096 bytes each, which can be given up; and a tensor of twelve numbers that lies in one of them."""
    if platform.name == "cuda":
        pytest.importorskip("cuda.bindings", reason="sleep needs the driver's Python bindings")
    made = platform.memory([4096, 4096], sleepable=True)
    yield made
    made.free()


def test_memory_is_reported_in_bytes(platform) -> None:
    free, total = platform.free_memory_bytes(), platform.total_memory_bytes()
    assert isinstance(free, int)
    assert isinstance(total, int)
    assert 1 << 20 < free <= total
    platform.release_cached_memory()


def test_a_peak_is_what_is_held_at_a_time_or_unknown(platform) -> None:
    peak = platform.peak_memory_bytes(lambda: torch.ones(1 << 20, dtype=torch.float32, device=platform.device).sum())
    assert peak == 0 or 1 << 22 <= peak < 1 << 26


def test_new_tensors_are_zero_and_their_own(platform, memory) -> None:
    first = memory.zeros((8, 16), torch.float32)
    second = memory.zeros((4096,), torch.uint8)
    assert (first.shape, first.dtype, first.device) == ((8, 16), torch.float32, platform.device)
    assert not first.any()
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert (second == 2).all()
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def test_adopted_tensors_keep_their_values_and_what_they_share(platform, memory) -> None:
    values = torch.arange(24, dtype=torch.float32)
    whole = values.to(platform.device, copy=True).view(4, 6)
    part = whole[1:3, ::2]
    memory.adopt([whole, part])
    assert torch.equal(whole.cpu(), values.view(4, 6))
    assert torch.equal(part.cpu(), values.view(4, 6)[1:3, ::2])
    whole.zero_()
    assert not part.any()


@pytest.mark.parametrize("keep_content", [True, False])
def test_captured_graphs_find_their_tensors_after_sleep(platform, backend, memory, keep_content) -> None:
    """Graphs hold views of some tensors, which nobody else has."""
    assert memory.releasable
    made = memory.zeros((4, 16), torch.float32)
    adopted = torch.full((64,), 3.0, device=platform.device)
    memory.adopt([adopted])
    graph = backend.capture(lambda: Output(made.view(-1) * 2 + adopted.view(4, 16).view(-1)), 1)
    platform.synchronize()
    made.fill_(1)
    addresses = made.data_ptr(), adopted.data_ptr()

    memory.release(keep_content=keep_content)
    memory.restore()
    memory.restore()  # nothing to do
    if platform.captures_addresses:
        assert (made.data_ptr(), adopted.data_ptr()) == addresses
    if keep_content:
        assert (made == 1).all()
        assert (adopted == 3).all()
        found = graph.replay()
        platform.synchronize()
        assert (found.value == 5).all()
    made.fill_(10)
    adopted.fill_(1)
    found = graph.replay()
    platform.synchronize()
    assert (found.value == 21).all(), "the graph reads memory that the tensors have left"


def test_content_that_was_kept_can_be_dropped_later(memory) -> None:
    made = memory.zeros((16,), torch.float32).fill_(1)
    memory.release(keep_content=True)
    memory.release(keep_content=False)
    memory.restore()
    made.fill_(4)
    assert (made == 4).all()
