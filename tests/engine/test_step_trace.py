"""The trace of what ran: valid by its format, and each step is in it once, with the graph that ran it."""

import json
from collections import defaultdict

import jsonschema
import pytest
from tiny import TINY_SETTINGS

from stepgraph import LLM, SamplingParams
from stepgraph.engine.chrome_trace import chrome_trace
from stepgraph.engine.step_recorder import SeenStep, step_entry
from stepgraph.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
NUMBER = {"type": "number", "minimum": 0}
FIELDS = {"ph": {"type": "string"}, "name": {"type": "string", "minLength": 1}, "pid": NUMBER, "tid": NUMBER}


def kind(letter: str, required: list[str], **fields) -> dict:
    properties = {**FIELDS, **fields, "ph": {"const": letter}}
    return {"type": "object", "properties": properties, "required": [*FIELDS, *required], "additionalProperties": False}


SCHEMA = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "otherData": {"type": "object"},
        "traceEvents": {
            "type": "array",
            "items": {
                "oneOf": [
                    kind(
                        "X",
                        ["ts", "dur", "cat", "args"],
                        ts=NUMBER,
                        dur=NUMBER,
                        cat=FIELDS["ph"],
                        args={"type": "object"},
                    ),
                    kind("C", ["ts", "args"], ts=NUMBER, args={"additionalProperties": NUMBER, "minProperties": 1}),
                    kind(
                        "M",
                        ["args"],
                        name={"enum": ["process_name", "thread_name"]},
                        args={"required": ["name"], "properties": {"name": FIELDS["name"]}},
                    ),
                ]
            },
        },
    },
}
"""Of "Trace Event Format", the events that are used here."""
ROUNDING_US = 0.01


def check(trace: dict) -> dict[tuple[int, int], list[dict]]:
    """Hold a trace against the format; returns the slices of each track. On a track, slices lie in each other or apart."""
    jsonschema.validate(trace, SCHEMA)
    times = [event["ts"] for event in trace["traceEvents"] if "ts" in event]
    assert times == sorted(times)
    named = {(e["name"], e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "M"}
    assert len(named) == sum(e["ph"] == "M" for e in trace["traceEvents"])
    tracks = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    for (process, track), slices in tracks.items():
        assert ("thread_name", process, track) in named
        assert ("process_name", process, 0) in named
        open_ends: list[float] = []
        for event in slices:
            end = event["ts"] + event["dur"]
            while open_ends and open_ends[-1] <= event["ts"] + ROUNDING_US:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + ROUNDING_US, (event, open_ends)
            open_ends.append(end)
    return tracks


@pytest.fixture(scope="module")
def llm(tiny_model):
    settings = TINY_SETTINGS | {"capture_sizes": (8, 256), "max_num_batched_tokens": 256}
    with LLM(tiny_model, device="cpu", progress=False, enable_prefix_caching=False, **settings) as llm:
        yield llm


def test_a_step_of_a_decode_and_three_prompts_is_one_slice_of_one_graph(llm, tmp_path) -> None:
    prompts = [[number + 1] * 80 for number in range(3)]
    with llm.trace(tmp_path / "trace.json"):
        answer = llm.stream([7, 8, 9], GREEDY)
        next(answer)
        llm.generate(prompts, GREEDY, use_tqdm=False)
        list(answer)
    trace = json.loads((tmp_path / "trace.json").read_text())
    tracks = check(trace)
    device = tracks[1, 1]
    mixed = [each for each in device if each["name"].startswith("mixed")]
    assert [(each["name"], each["args"]["tokens"], each["args"]["rows"]) for each in mixed] == [("mixed 256x8", 241, 4)]
    n = mixed[0]["args"]["n"]
    assert [each["args"]["n"] for each in device] == list(range(len(device)))
    of_requests = [slices for (process, _), slices in tracks.items() if process == 1001]
    assert len(of_requests) == 4
    in_it = [each for slices in of_requests for each in slices if each["name"] == "prefill" and each["args"]["n"] == n]
    assert [each["args"]["tokens"] for each in in_it] == [80, 80, 80]
    for slices in of_requests:
        assert [each["name"] for each in slices[1:]] == ["queued", "prefill", "decode"]
        assert slices[0]["args"]["output_tokens"] == 6
    host = [each["name"] for each in tracks[1, 2]]
    assert host.count("plan and launch") == host.count("read results") == len(device)


def test_a_failure_while_it_is_written_down_leaves_what_there_was(llm, tmp_path) -> None:
    before = llm.engine.on_step

    def fail() -> None:
        with llm.trace(tmp_path / "trace.json"):
            llm.generate([[5]], GREEDY, use_tqdm=False)
            llm.generate([[]], GREEDY)

    with pytest.raises(RequestError):
        fail()
    assert llm.engine.on_step == before
    [(_, steps)] = [
        found for found in check(json.loads((tmp_path / "trace.json").read_text())).items() if found[0] == (1, 1)
    ]
    assert len(steps) == 6


def test_nothing_seen_is_a_trace_of_nothing() -> None:
    assert check(chrome_trace([], [])) == {}


def test_a_request_lies_within_what_was_seen_of_it() -> None:
    launched = LaunchedAt(10.0)
    steps = [launched.step(number, prompts=1, ids=[1, 2, 3], gained=[16, 1, 1]) for number in range(3)]
    of_all = {"engine": 0, "prompt_tokens": 48, "cached_tokens": 0, "output_tokens": 0, "preemptions": 0}
    seen = {"arrived": 9.9, "scheduled": 10.0, "first_token": None, "finished": None, "finish_reason": None} | of_all
    requests = [
        seen | {"id": 1, "name": "aborted", "state": "finished", "finished": 10.0015, "finish_reason": "abort"},
        seen | {"id": 2, "name": "lost", "state": "lost", "arrived": None, "first_token": 10.001},
        seen | {"id": 3, "name": "runs", "state": "running", "first_token": 10.0},
        seen | {"id": 4, "name": "waits", "state": "waiting", "scheduled": None},
        seen | {"id": 5, "name": "nothing", "state": "lost", "arrived": None, "scheduled": None},
    ]
    gauge = {"engine": 0, "time": 10.001, "running": 3, "waiting": 1, "kv_used": 5, "kv_total": 8}
    tracks = check(chrome_trace(steps, requests, [gauge]))
    names = {slices[0]["name"]: [each["name"] for each in slices[1:]] for (pid, _), slices in tracks.items() if pid > 1}
    assert names == {
        "aborted": ["queued", "prefill", "prefill"],
        "lost": [],
        "runs": ["queued", "decode"],
        "waits": ["queued"],
    }
    ends = {slices[0]["name"]: slices[0]["ts"] + slices[0]["dur"] for (pid, _), slices in tracks.items() if pid > 1}
    assert ends == pytest.approx({"aborted": 101_500, "lost": 101_000, "runs": 103_010, "waits": 103_010})


class LaunchedAt:
    """Steps of a millisecond, one after the other from then on."""

    def __init__(self, start: float):
        self._start = start

    def step(self, number: int, **fields) -> dict:
        start = self._start + number / 1000
        seen = SeenStep(
            "mixed", "48x8", None, False, 18, 3, 30, 1, 0, 0, start - 2e-5, 20.0, start, 1000.0, 10.0, 0, [], []
        )
        return step_entry(seen._replace(**fields), number)
