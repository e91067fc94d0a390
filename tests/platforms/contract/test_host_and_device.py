"""Host and device: when work is done, in which order, and where its results show."""

import threading

import pytest
import torch
from device_work import Reporter

from stepgraph.devices import BUILT_IN, plugins
from stepgraph.platforms import PROTOCOL_VERSION
from stepgraph.platforms.tuning import KernelTuning
from stepgraph.step.output_rings import RING_DEPTH


def test_it_says_what_it_is(platform, platform_name) -> None:
    assert platform_name in (BUILT_IN | plugins())
    assert (platform.name, platform.protocol_version) == (platform_name, PROTOCOL_VERSION)
    assert isinstance(platform.device, torch.device)
    assert platform.default_dtype.is_floating_point
    assert all(dtype.is_floating_point for dtype in platform.packed_dtypes)
    assert isinstance(platform.tuning, KernelTuning)
    assert platform.multiprocessors >= 1
    assert platform.graph_node_bytes >= 0
    assert platform.slowest_flops > 0
    for flag in ("captures_all_by_default", "captures_addresses", "supports_fp8", "shares_host_memory"):
        assert isinstance(getattr(platform, flag), bool), flag


def test_what_captures_its_steps_can_be_made_again_by_name(platform, backend) -> None:
    assert backend.name == platform.default_graph_backend


def test_the_host_runs_ahead_by_fewer_steps_than_the_ring_holds(platform) -> None:
    assert 0 <= platform.run_ahead < RING_DEPTH - 1


def test_host_buffers_are_zero_and_the_hosts_to_read_and_write(platform) -> None:
    buffer = platform.host_buffer(3, 5)
    assert (buffer.shape, buffer.dtype, buffer.device.type) == ((3, 5), torch.int32, "cpu")
    assert not buffer.any()
    view = buffer.numpy()
    view[1] = 7
    assert buffer[1].tolist() == [7] * 5
    buffer[2] = torch.arange(5, dtype=torch.int32)
    assert view[2].tolist() == [0, 1, 2, 3, 4]


def test_results_show_in_a_host_buffer_once_the_completion_says_so(platform, backend) -> None:
    reporter = Reporter(platform, backend)
    graph, report = reporter.capture()
    seen = report.numpy()
    reporter.input.fill_(1)
    completion = platform.completion()
    for step in range(1, 6):  # one completion is recorded again and again
        graph.replay()
        completion.record()
        completion.wait()
        assert seen.tolist() == [step]


def test_synchronize_waits_for_all_work(platform, backend) -> None:
    reporter = Reporter(platform, backend)
    graph, report = reporter.capture()
    reporter.input.fill_(1)
    for _ in range(3):
        graph.replay()
    platform.synchronize()
    assert report.tolist() == reporter.counter.tolist() == [3]


def test_a_completion_covers_what_came_before_it_and_they_complete_in_order(platform, backend) -> None:
    reporter = Reporter(platform, backend)
    graphs = [reporter.capture() for _ in range(RING_DEPTH - 1)]
    completions = [platform.completion() for _ in graphs]
    reporter.input.fill_(1)
    for (graph, _), completion in zip(graphs, completions, strict=True):
        graph.replay()
        completion.record()
    for step, ((_, report), completion) in enumerate(zip(graphs, completions, strict=True), start=1):
        completion.wait()
        assert report.tolist() == [step]
        assert all(earlier.tolist() == [i] for i, (_, earlier) in enumerate(graphs[:step], start=1))


def test_copies_from_host_buffers_take_their_turn_between_launches(platform, backend) -> None:
    """As plans do: each launch reads what was sent before it, though the host has sent the next by then."""
    reporter = Reporter(platform, backend)
    graphs = [reporter.capture() for _ in range(1 + platform.run_ahead)]
    staging = [platform.host_buffer(4) for _ in graphs]
    completion = platform.completion()
    for i, ((graph, _), buffer) in enumerate(zip(graphs, staging, strict=True)):
        buffer.numpy()[2] = 10**i
        reporter.input.copy_(buffer[2:3], non_blocking=True)
        graph.replay()
    completion.record()
    completion.wait()
    assert [report.item() for _, report in graphs] == [int("1" * (i + 1)) for i in range(len(graphs))]


def test_a_completion_that_nothing_preceded_is_done(platform) -> None:
    completion = platform.completion()
    completion.record()
    completion.wait()
    platform.synchronize()


def test_what_the_program_decided_on_the_host_is_baked_into_its_graph(platform, backend) -> None:
    reporter = Reporter(platform, backend, rounds=1)
    graph, report = reporter.capture()
    reporter._rounds = 0  # nobody looks at it again
    reporter.input.fill_(5)
    output = graph.replay()
    platform.synchronize()
    assert (report.item(), output.value.item()) == (5, 10)


def test_a_side_stream_begins_after_what_was_submitted_and_ends_with_its_work_done(platform, backend) -> None:
    reporter = Reporter(platform, backend)
    graph, _ = reporter.capture()
    reporter.input.fill_(1)
    graph.replay()
    seen: list[int] = []

    def beside() -> None:
        with torch.no_grad(), platform.side_stream():
            doubled = reporter.counter * 2
        seen.append(doubled.item())

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert seen == [2]


def test_compiling_ahead_leaves_nothing_behind(platform) -> None:
    ran: list[int] = []
    counts = platform.compile_ahead([lambda: ran.append(1)])
    assert len(counts) == 2
    assert all(count >= 0 for count in counts)
    assert len(ran) <= 1


@pytest.mark.parametrize("size", [(0,), (2, 0)])
def test_host_buffers_may_be_empty(platform, size) -> None:
    assert platform.host_buffer(*size).shape == size
