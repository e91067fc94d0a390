"""Steps and requests that were seen as a trace that Perfetto and Chrome open.

The format is the JSON object of "Trace Event Format" (docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU):
complete events (`X`) on tracks, which nest by their times, counters (`C`), and names of tracks (`M`). Each engine is a process
with a track for the device and one for the host; its requests are another process, with a track for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_DEVICE, _HOST = 1, 2
"""Tracks of an engine."""
_REQUESTS = 1000
"""Process numbers of an engine's requests begin behind this."""
_ABOUT_STEP = ("n", "graph", "reason", "captured", "tokens", "rows", "padding", "ranks", "proposed", "accepted")
_ABOUT_REQUEST = ("prompt_tokens", "cached_tokens", "output_tokens", "preemptions", "state", "finish_reason")


def chrome_trace(
    steps: Sequence[Mapping[str, Any]],
    requests: Sequence[Mapping[str, Any]],
    gauges: Sequence[Mapping[str, Any]] = (),
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The trace, ready to be written as JSON.

    Args:
        steps: of `step_entry`, ascending.
        requests: with the fields of `SeenRequest`, and `engine`.
        gauges: `time`, `engine`, and the numbers `running`, `waiting`, `kv_used`, `kv_total`.
        about: what is to be said of the whole.
    """
    begins = [step["plan_start"] for step in steps] + [gauge["time"] for gauge in gauges]
    begins += [time for request in requests if (time := _begin(request)) is not None]
    zero = min(begins, default=0.0)
    events: list[dict[str, Any]] = []
    for step in steps:
        events += _events_of_step(step, zero)
    chunks = _chunks(steps)
    end = max((event["ts"] + event["dur"] for event in events), default=0.0)
    for request in requests:
        events += _events_of_request(request, chunks.get(request["id"], ()), zero, end)
    events += [_counter(gauge, name, fields, zero) for gauge in gauges for name, fields in _COUNTERS]
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    engines = {event["pid"] % _REQUESTS for event in events}
    names = [name for engine in sorted(engines) for name in _names(engine - 1, several=len(engines) > 1)]
    names += [
        _name("thread_name", _REQUESTS + 1 + request["engine"], request["id"], request["name"]) for request in requests
    ]
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms", "otherData": dict(about or {})}


_COUNTERS = (
    ("KV blocks", {"used": "kv_used"}),
    ("requests", {"running": "running", "waiting": "waiting"}),
)


def _begin(request: Mapping[str, Any]) -> float | None:
    """The first that was seen of a request."""
    times = (request[name] for name in ("arrived", "scheduled", "first_token", "finished"))
    return next((time for time in times if time is not None), None)


def _chunks(steps: Iterable[Mapping[str, Any]]) -> dict[int, list[tuple[Mapping[str, Any], int]]]:
    """The steps that computed something of each request's prompt, and how many tokens."""
    found: dict[int, list[tuple[Mapping[str, Any], int]]] = {}
    for step in steps:
        for number, num_tokens in step["requests"][: step["prompts"]]:
            found.setdefault(number, []).append((step, num_tokens))
    return found


def _events_of_step(step: Mapping[str, Any], zero: float) -> list[dict[str, Any]]:
    process, begin = 1 + step["engine"], _us(step["start"], zero)
    device_us = round(step["device_us"], 3)
    shape = "without a graph" if step["graph"] is None else step["graph"]
    about = {name: step[name] for name in _ABOUT_STEP if step[name] is not None and step[name] is not False}
    events = [_slice(f"{step['kind']} {shape}", "step", process, _DEVICE, begin, device_us, about)]
    number = {"n": step["n"]}
    plan_begin = _us(step["plan_start"], zero)
    events.append(_slice("plan and launch", "host", process, _HOST, plan_begin, round(step["plan_us"], 3), number))
    events.append(_slice("read results", "host", process, _HOST, begin + device_us, round(step["read_us"], 3), number))
    return events


def _events_of_request(
    request: Mapping[str, Any], chunks: Iterable[tuple[Mapping[str, Any], int]], zero: float, end: float
) -> list[dict[str, Any]]:
    """All of it, and within that: waiting, each chunk of its prompt, and the answer. `end`: of what has not ended."""
    first = _begin(request)
    if first is None:
        return []
    process, track = _REQUESTS + 1 + request["engine"], request["id"]
    begin = _us(first, zero)
    chunks = list(chunks)
    if request["finished"] is not None:
        end = _us(request["finished"], zero)
    elif request["state"] == "lost":  # what it did last that was seen
        ends = [_us(step["start"], zero) + step["device_us"] for step, _ in chunks]
        end = max(
            [*ends, *(_us(request[name], zero) for name in ("scheduled", "first_token") if request[name])],
            default=begin,
        )
    until = max(begin, end)
    about = {name: request[name] for name in _ABOUT_REQUEST if request[name] is not None}
    events = [_slice(request["name"], "request", process, track, begin, until - begin, about)]

    def part(name: str, start: float, stop: float, args: Mapping[str, Any]) -> None:
        start, stop = min(max(start, begin), until), min(stop, until)
        if stop > start:
            events.append(_slice(name, "part", process, track, start, stop - start, args))

    if request["arrived"] is not None:
        scheduled = until if request["scheduled"] is None else _us(request["scheduled"], zero)
        part("queued", begin, scheduled, {})
    for step, num_tokens in chunks:
        start = _us(step["start"], zero)
        part("prefill", start, start + round(step["device_us"], 3), {"n": step["n"], "tokens": num_tokens})
    if request["first_token"] is not None:
        part("decode", _us(request["first_token"], zero), until, {"output_tokens": request["output_tokens"]})
    return events


def _us(time: float, zero: float) -> float:
    return round(1e6 * (time - zero), 3)


def _slice(
    name: str, category: str, process: int, track: int, begin: float, duration: float, args: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": process,
        "tid": track,
        "ts": round(begin, 3),
        "dur": round(duration, 3),
        "args": args,
    }


def _counter(gauge: Mapping[str, Any], name: str, fields: Mapping[str, str], zero: float) -> dict[str, Any]:
    values = {shown: gauge[field] for shown, field in fields.items()}
    return {
        "ph": "C",
        "name": name,
        "pid": 1 + gauge["engine"],
        "tid": 0,
        "ts": _us(gauge["time"], zero),
        "args": values,
    }


def _names(engine: int, *, several: bool) -> list[dict[str, Any]]:
    suffix = f" {engine}" if several else ""
    process = 1 + engine
    return [
        _name("process_name", process, 0, f"engine{suffix}"),
        _name("thread_name", process, _DEVICE, "device"),
        _name("thread_name", process, _HOST, "host"),
        _name("process_name", _REQUESTS + process, 0, f"requests{suffix}"),
    ]


def _name(what: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}
