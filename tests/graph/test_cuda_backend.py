"""What the CUDA back end leaves behind when a capture fails, with torch's calls stubbed: no GPU is needed."""

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch

from stepgraph.errors import CaptureError, DeviceMemoryError
from stepgraph.graph.cuda import CudaBackend


class Output(NamedTuple):
    value: int


class FakeCuda:
    """As much of `torch.cuda` as capturing takes: memory pools live as long as a graph in them."""

    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self) -> None:
        self.capturing = False
        self.pools: list[tuple[int, int]] = []
        self.emptied = 0
        self.instantiation_error: RuntimeError | None = None
        self.refuses_to_end = False
        self.recording: set[tuple[int, int]] = set()  # pools that the allocator serves
        self.recording_pinned: set[tuple[int, int]] = set()
        cuda = self

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

            def synchronize(self) -> None:
                assert not cuda.capturing

        class CUDAGraph:
            def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
                assert not cuda.capturing
                if pool in cuda.recording | cuda.recording_pinned:
                    raise RuntimeError("already recording to mempool_id")
                cuda.recording.add(pool)
                cuda.recording_pinned.add(pool)
                cuda.capturing, self.pool = True, pool

            def capture_end(self) -> None:
                assert cuda.capturing
                cuda.capturing = False
                if cuda.refuses_to_end:
                    raise RuntimeError("operation failed due to a previous error during capture")
                cuda.recording.remove(self.pool)
                cuda.recording_pinned.remove(self.pool)
                if cuda.instantiation_error is not None:
                    raise cuda.instantiation_error

        self.Stream, self.CUDAGraph = Stream, CUDAGraph
        self.stream, self.current_stream = (lambda stream: nullcontext()), Stream

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools.append((0, len(self.pools)))
        return self.pools[-1]

    def current_device(self) -> int:
        return 0

    def end_allocate_to_pool(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.remove(pool)

    def empty_cache(self) -> None:
        self.emptied += 1

    def memory_snapshot(self, mempool_id: tuple[int, int]) -> list[dict[str, int]]:
        return [{"total_size": 100}, {"total_size": 10 * mempool_id[1]}]


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate_to_pool)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None)
    return fake


class DriverError(RuntimeError):
    error_code = 2


@pytest.mark.parametrize("fails_at", [1, 2, 3], ids=["first warm-up", "second warm-up", "capture"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceMemoryError),
        (DriverError("CUDA error: out of memory"), DeviceMemoryError),
        (AssertionError("a bug"), AssertionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_whatever_fails_nothing_is_being_captured_any_more(cuda, fails_at, error, raised) -> None:
    runs = []

    def program() -> Output:
        runs.append(cuda.capturing)
        if len(runs) == fails_at:
            raise error
        return Output(1)

    backend = CudaBackend()
    with pytest.raises(raised):
        backend.capture(program, warmups=2)
    assert runs == [False, False, True][:fails_at]
    assert not cuda.capturing
    assert backend.memory_bytes() == 0
    assert backend.capture(lambda: Output(2), warmups=1).output == Output(2)


@pytest.mark.parametrize("others", [0, 1], ids=["the first graph", "beside another graph"])
def test_a_capture_that_the_driver_refuses_to_end_does_not_block_the_memory_that_graphs_share(cuda, others) -> None:
    def program() -> Output:
        if cuda.capturing:
            raise RuntimeError("CUDA error: operation would make the legacy stream depend on a capturing one")
        return Output(1)

    backend = CudaBackend()
    graphs = [backend.capture(lambda: Output(1), warmups=1) for _ in range(others)]
    cuda.refuses_to_end = True
    with pytest.raises(CaptureError):
        backend.capture(program, warmups=1)
    cuda.refuses_to_end = False
    assert backend.capture(lambda: Output(2), warmups=1).output == Output(2)
    assert cuda.recording == set()
    assert len(graphs) == others


def test_what_waits_for_the_device_is_a_fault_of_the_program(cuda) -> None:
    def program() -> Output:
        if cuda.capturing:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        return Output(1)

    with pytest.raises(CaptureError, match="not permitted when stream is capturing; something in the program"):
        CudaBackend().capture(program, warmups=1)
    assert not cuda.capturing


def test_a_driver_without_memory_for_the_graph_itself_is_a_lack_of_memory(cuda) -> None:
    backend = CudaBackend()
    cuda.instantiation_error = DriverError("CUDA error: out of memory")
    with pytest.raises(DeviceMemoryError, match="lower gpu_memory_utilization"):
        backend.capture(lambda: Output(1), warmups=1)
    cuda.instantiation_error = None
    assert backend.capture(lambda: Output(2), warmups=1).output == Output(2)


def test_graphs_share_a_memory_pool_and_the_next_after_the_last_gets_another(cuda) -> None:
    backend = CudaBackend()
    graphs = [backend.capture(lambda: Output(1), warmups=1) for _ in range(2)]
    assert [graph.graph.pool for graph in graphs] == [(0, 0)] * 2
    assert (backend.memory_bytes(), cuda.emptied) == (100, 0)
    del graphs
    assert backend.memory_bytes() == 0
    graph = backend.capture(lambda: Output(1), warmups=1)
    assert graph.graph.pool == (0, 1)
    assert (backend.memory_bytes(), cuda.emptied) == (110, 1)
