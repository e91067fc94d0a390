"""What is counted of transfers, from the engine to the metrics, over the lives of an engine's processes."""

from collections import Counter
from types import SimpleNamespace

import pytest
from observed import LOAD, OneServer, busy_metrics

from stepgraph.engine.sink import FetchReport
from stepgraph.server import transfer_report
from stepgraph.server.engine_observer import EngineState
from stepgraph.server.messages import Progress, decode_from_engine, encode
from stepgraph.server.transfer_report import TransferReport
from stepgraph.transfer.base import FetchFailure, TransferCounts
from stepgraph.transfer.leases import LossReason


def value(metrics: OneServer, name: str, **labels: str) -> float:
    [found] = [
        sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.name == f"stepgraph:{name}" and labels.items() <= sample.labels.items()
    ]
    return found


@pytest.fixture
def now(monkeypatch):
    """The clock, to be set."""
    clock = SimpleNamespace(s=0.0)
    monkeypatch.setattr(transfer_report.time, "monotonic", lambda: clock.s)
    return clock


def counts(**given) -> TransferCounts:
    return TransferCounts(
        **{
            "num_leases": 1,
            "num_fetches": 2,
            "blocks_sent": 3,
            "bytes_sent": 300,
            "blocks_received": 4,
            "bytes_received": 400,
            "leases_ended": {LossReason.EXPIRED: 5},
            "failures": {FetchFailure.LINK: 6},
        }
        | given
    )


def test_an_engine_tells_what_it_and_its_links_have_counted_and_asks_them_now_and_then(now) -> None:
    asked = Counter()

    def count() -> TransferCounts:
        asked["counts"] += 1
        return counts(num_leases=asked["counts"])

    sink = SimpleNamespace(failures=Counter(short=1), recomputed_tokens=7, on_end=None, tier=None)
    exchange = SimpleNamespace(transfers=SimpleNamespace(counts=count), sink=sink, num_quarantined=8)
    report = TransferReport(exchange)
    sink.on_end(FetchReport(0.25, 0.0007, 4, None))
    sink.on_end(FetchReport(0.25, 1000.0, 4, None))
    sink.on_end(FetchReport(9.0, 9.0, 0, "link"))
    loads = [report.load() for _ in range(3)]
    assert loads == loads[:1] * 3
    assert (asked["counts"], loads[0].num_quarantined, loads[0].recomputed_tokens) == (1, 8, 7)
    assert (loads[0].leases_ended, loads[0].failures) == ({"expired": 5}, {"link": 6, "short": 1})
    assert (loads[0].fetch_counts[1], loads[0].fetch_counts[-1], sum(loads[0].fetch_counts)) == (1, 1, 2)
    assert (loads[0].fetch_seconds, loads[0].wait_seconds, sum(loads[0].wait_counts)) == (1000.0007, 0.5, 2)
    now.s = 0.2
    assert report.load().num_leases == 2
    assert report.load()[-4:] == (0, 0, 0, 0)
    message = Progress([], [], LOAD._replace(transfers=loads[0]))
    assert decode_from_engine(encode(message)) == message


def test_an_engine_with_host_memory_and_no_other_engine_tells_of_that(now) -> None:
    tier = SimpleNamespace(num_blocks=3, num_bytes=300, num_hits=2, num_evictions=1)
    sink = SimpleNamespace(failures=Counter(host_copy=1), recomputed_tokens=0, on_end=None, tier=tier)
    load = TransferReport(SimpleNamespace(transfers=None, sink=sink, num_quarantined=0)).load()
    assert load[-4:] == (3, 300, 2, 1)
    assert (load.num_leases, load.failures) == (0, {"host_copy": 1})


def test_an_engine_that_has_to_do_with_no_other_tells_and_shows_nothing() -> None:
    assert TransferReport(SimpleNamespace(transfers=None, sink=None)).load() is None
    names = {family.name for family in OneServer("tiny").collect()}
    assert not [name for name in names if "transfer" in name or "lease" in name]


def test_counts_go_on_when_an_engine_is_started_again_and_what_was_there_is_gone() -> None:
    metrics = busy_metrics()
    assert (value(metrics, "kv_leases"), value(metrics, "kv_fetches"), value(metrics, "kv_blocks_quarantined")) == (
        1,
        2,
        3,
    )
    metrics.on_state(EngineState.RESTARTING)
    assert (value(metrics, "kv_leases"), value(metrics, "kv_fetches"), value(metrics, "kv_blocks_quarantined")) == (
        0,
        0,
        0,
    )
    assert value(metrics, "kv_transfer_bytes_total", direction="received") == 5000
    metrics.on_state(EngineState.READY)
    again = LOAD.transfers._replace(failures={"link": 2, "timeout": 1})
    metrics.on_progress(Progress([], [], LOAD._replace(transfers=again)))
    assert value(metrics, "kv_transfer_bytes_total", direction="sent") == 8000
    assert value(metrics, "kv_transfer_failures_total", reason="link") == 3
    assert value(metrics, "kv_transfer_failures_total", reason="timeout") == 1
    assert value(metrics, "kv_leases_ended_total", reason="confirmed") == 12
    assert (value(metrics, "kv_transfer_seconds_count"), value(metrics, "kv_transfer_seconds_sum")) == (4, 0.004)
    assert value(metrics, "kv_transfer_seconds_bucket", le="0.001") == 4
    assert value(metrics, "kv_transfer_wait_seconds_count") == 4
    assert value(metrics, "kv_leases") == 1
    assert (value(metrics, "kv_host_cache_hits_total"), value(metrics, "kv_host_cache_evictions_total")) == (14, 16)
    assert (value(metrics, "kv_host_cache_blocks"), value(metrics, "kv_host_cache_bytes")) == (5, 640)
