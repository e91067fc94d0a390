"""`stepgraph bench serve` against a scripted server: what it sends, what it makes of the answers, and what it survives."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from aiohttp import web
from fake_server import FakeServer, answer_in_full, chunks, send_events

from stepgraph import bench
from stepgraph.bench import report as bench_report
from stepgraph.bench import serve, serve_client, serve_processes
from stepgraph.errors import StepgraphError

VLLM_FIELDS = {
    *("date", "endpoint_type", "backend", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness"),
    *("max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("max_output_tokens_per_s", "max_concurrent_requests"),
    *(
        f"{statistic}_{metric}_ms"
        for statistic in ("mean", "median", "std", "p95", "p99")
        for metric in ("ttft", "tpot", "itl", "e2el")
    ),
}
DETAILS = {"input_lens", "output_lens", "ttfts", "itls", "start_times", "errors"}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def measure(server, tmp_path, monkeypatch):
    """Runs the command and returns what it wrote."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def measure(*flags: str, code: int = 0) -> dict:
        file = tmp_path / "result.json"
        common = ["serve", "--base-url", server.url, "--random-input-len", "8", "--json", str(file), "--save-detailed"]
        common += ["--request-timeout", "60"]
        if "--dataset" in flags:
            del common[3:5]
        assert bench.main([*common, *flags]) == code
        return json.loads(file.read_text())

    return measure


def test_every_request_is_answered_and_counted_as_the_server_counts(server, measure) -> None:
    result = measure("--num-prompts", "5", "--random-output-len", "7", "--vocab-size", "50")
    assert (result["completed"], result["failed"]) == (5, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (40, 35)
    assert result["input_lens"] == [8] * 5
    assert result["output_lens"] == [7] * 5
    assert [len(itls) for itls in result["itls"]] == [3] * 5  # four chunks
    assert result["errors"] == [""] * 5
    assert all(seconds > 0 for seconds in [*result["ttfts"], *result["start_times"]])
    assert result["completed_without_usage"] == 0
    for body in server.bodies:
        prompt = body.pop("prompt")
        assert len(prompt) == 8
        assert set(prompt) <= set(range(50))
        assert body == {
            "model": "first/model",
            "max_tokens": 7,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }


def test_results_have_the_names_of_vllm(measure) -> None:
    result = measure("--num-prompts", "2")
    assert set(result) >= VLLM_FIELDS | DETAILS
    assert result["backend"] == result["endpoint_type"] == "openai"
    assert result["model_id"] == "first/model"
    assert result["request_rate"] == "inf"
    client = {"device", "versions", "processes", "cpu_share", "cpu_shares", "was_limit", "max_late_ms"}
    assert client == set(result["client"])


def test_a_chat_gets_messages(server, measure) -> None:
    result = measure("--num-prompts", "2", "--endpoint", "/v1/chat/completions", "--no-ignore-eos")
    assert result["backend"] == "openai-chat"
    assert set(server.paths) == {"/v1/chat/completions"}
    for body in server.bodies:
        assert len(body["messages"][0]["content"].split()) == 8
        assert body["max_completion_tokens"] == 128
        assert not {"prompt", "max_tokens", "ignore_eos"} & set(body)


def test_flags_reach_the_requests(server, measure, tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Hello", "max_tokens": 3}\n')
    flags = ["--dataset", "file", "--dataset-path", str(file), "--num-prompts", "1", "--model", "named"]
    flags += ["--temperature", "0.5", "--ignore-eos", "--extra-body", '{"top_k": 4, "temperature": 0.7}']
    measure(*flags, "--header", "X-One=1", "X-Two=a=b")
    [body], [headers] = server.bodies, server.headers
    assert {name: body[name] for name in ("model", "prompt", "max_tokens", "temperature", "ignore_eos", "top_k")} == {
        "model": "named",
        "prompt": "Hello",
        "max_tokens": 3,
        "temperature": 0.7,
        "ignore_eos": True,
        "top_k": 4,
    }
    assert (headers["X-One"], headers["X-Two"]) == ("1", "a=b")
    assert "Authorization" not in headers


@pytest.mark.parametrize("by_flag", [True, False])
def test_the_api_key_is_sent_but_not_written(server, measure, monkeypatch, by_flag) -> None:
    flags = ["--api-key", "sk-flag"] if by_flag else []
    monkeypatch.setattr(
        bench_report.sys, "orig_argv", ["python", "-m", "x", *flags, "--header", "A=s3", "B=s4", "--plot"]
    )
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    result = measure("--num-prompts", "1", *flags, "--header", "A=s3", "B=s4")
    assert server.headers[0]["Authorization"] == f"Bearer {'sk-flag' if by_flag else 'sk-environment'}"
    assert "sk-" not in json.dumps(result)
    assert result["command"].endswith("--header *** *** --plot")


def test_failures_are_counted_by_kind_and_end_nothing(server, measure, capsys) -> None:
    async def answer(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        match number % 7:
            case 0 | 1:
                return web.json_response({"error": {"message": "too many"}}, status=429)
            case 2:
                return await send_events(request, chunks(2))
            case 3:
                return await send_events(request, [*chunks(1), {"error": {"message": "out of memory"}}, "[DONE]"])
            case 4:
                response = await send_events(request, chunks(1))
                request.transport.abort()
                return response
            case 5:
                await asyncio.Event().wait()  # until the client gives up
        return await answer_in_full(number, request, body)

    server.answer = answer
    result = measure("--num-prompts", "14", "--max-concurrency", "1", "--request-timeout", "0.5")
    kinds = result["errors_by_kind"]
    assert (result["completed"], result["failed"]) == (2, 12)
    assert result["total_output_tokens"] == 2 * 128
    assert {kind: kinds.pop(kind) for kind in ("HTTP 429", "stream ended early", "error in the stream")} == {
        "HTTP 429": 4,
        "stream ended early": 2,
        "error in the stream": 2,
    }
    assert sorted(kinds.values()) == [2, 2], kinds  # a cut connection and a timeout, by the names of their exceptions
    assert Counter(bool(error) for error in result["errors"]) == {True: 12, False: 2}
    shown = capsys.readouterr().out
    for text in ("4 failed with HTTP 429", "too many", "2 failed with error in the stream", "out of memory"):
        assert text in shown


def test_the_command_fails_if_nothing_was_answered(server, measure) -> None:
    async def refuse(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        return web.Response(status=500, text="broken")

    server.answer = refuse
    result = measure("--num-prompts", "3", "--goodput", "ttft:100", code=1)
    assert (result["completed"], result["failed"], result["request_goodput"]) == (0, 3, 0.0)
    assert result["mean_ttft_ms"] is None


def test_no_more_requests_are_under_way_than_allowed(server, measure) -> None:
    complete = [asyncio.Event() for _ in range(3)]

    async def answer_in_threes(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        if number % 3 == 2:
            complete[number // 3].set()
        await complete[number // 3].wait()
        return await answer_in_full(number, request, body)

    server.answer = answer_in_threes
    result = measure("--num-prompts", "9", "--max-concurrency", "3")
    assert result["completed"] == 9
    assert server.most_active == result["max_concurrent_requests"] == 3


def test_requests_do_not_wait_for_answers(server, measure) -> None:
    everyone = asyncio.Event()

    async def answer_the_last_first(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        if number == 19:
            everyone.set()
        await everyone.wait()
        return await answer_in_full(number, request, body)

    server.answer = answer_the_last_first
    result = measure("--num-prompts", "20", "--request-rate", "1000", "--burstiness", "0.5")
    assert result["completed"] == result["max_concurrent_requests"] == 20
    assert result["request_rate"] == 1000.0


def test_ctrl_c_reports_what_has_ended(server, measure, capsys) -> None:
    async def interrupt_at_the_third(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        if number < 2:
            return await answer_in_full(number, request, body)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
        raise AssertionError

    server.answer = interrupt_at_the_third

    def mine(number, frame) -> None:
        pytest.fail("Ctrl-C went past the run")

    before = signal.signal(signal.SIGINT, mine)
    try:
        result = measure("--num-prompts", "5", "--max-concurrency", "1", code=130)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result["completed"], result["failed"], result["interrupted"]) == (2, 0, True)
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("num_processes", ["1", "3"])
def test_several_processes_send_what_one_would_and_no_more_at_once(server, measure, num_processes) -> None:
    """Groups of four must be under way at once; the lengths tell the requests apart, and their order."""
    complete = [asyncio.Event() for _ in range(3)]

    async def answer_in_fours(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        if number % 4 == 3:
            complete[number // 4].set()
        await complete[number // 4].wait()
        return await answer_in_full(number, request, body)

    server.answer = answer_in_fours
    flags = ("--num-prompts", "12", "--max-concurrency", "4", "--client-processes", num_processes)
    lengths = ("--random-input-range", "5", "500", "--random-output-range", "1", "9", "--seed", "3")
    result = measure(*flags, *lengths, "--dataset", "random")
    assert (result["completed"], result["failed"]) == (12, 0)
    assert server.most_active == result["max_concurrent_requests"] == 4
    assert result["client"]["processes"] == len(result["client"]["cpu_shares"]) == int(num_processes)
    options = serve.PromptOptions("random", chat=False, seed=3, output_range=(1, 9), input_range=(5, 500))
    expected = serve.make_prompts(options, 12)
    assert result["input_lens"] == [len(prompt.content) for prompt in expected]
    assert result["output_lens"] == [prompt.max_tokens for prompt in expected]
    assert sorted(body["prompt"] for body in server.bodies) == sorted(prompt.content for prompt in expected)
    assert all(0 < seconds < result["duration"] for seconds in result["start_times"])


def test_ctrl_c_ends_all_processes_and_reports_what_has_ended(server, measure) -> None:
    async def interrupt_at_the_last(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        if number < 3:
            return await answer_in_full(number, request, body)
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
        raise AssertionError

    server.answer = interrupt_at_the_last
    before = signal.signal(signal.SIGINT, lambda number, frame: pytest.fail("Ctrl-C went past the run"))
    try:
        result = measure("--num-prompts", "8", "--max-concurrency", "2", "--client-processes", "2", code=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result["completed"], result["failed"], result["interrupted"]) == (3, 0, True)


def test_a_process_that_dies_is_told_and_takes_the_others_with_it(server, monkeypatch) -> None:
    async def never(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        os.kill(started[0].pid, signal.SIGKILL)
        await asyncio.Event().wait()
        raise AssertionError

    started = []

    def start(*arguments, **settings) -> subprocess.Popen:
        started.append(popen(*arguments, **settings))
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(serve_processes.subprocess, "Popen", start)
    server.answer = never
    flags = ["--random-input-len", "3", "--num-prompts", "4", "--client-processes", "2"]
    with pytest.raises(StepgraphError, match=r"process of the load generator died \(exit code -9\)"):
        bench.main(["serve", "--base-url", server.url, *flags])
    assert [process.poll() is not None for process in started] == [True, True]


def test_warm_ups_are_other_prompts_and_not_counted(server, measure) -> None:
    result = measure("--num-prompts", "3", "--num-warmups", "2")
    assert result["completed"] == result["num_prompts"] == 3
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == 5
    measure("--num-prompts", "3")
    assert Counter(prompts[2:]) == Counter(tuple(body["prompt"]) for body in server.bodies[5:])


def test_failed_warm_ups_are_told(server, measure, capsys) -> None:
    async def refuse_the_first(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        if number == 0:
            return web.Response(status=503, text="not yet")
        return await answer_in_full(number, request, body)

    server.answer = refuse_the_first
    assert measure("--num-prompts", "1", "--num-warmups", "1")["failed"] == 0
    assert "1 of 1 warm-ups failed, the first with HTTP 503: not yet" in capsys.readouterr().err


def test_answers_without_usage_count_their_chunks_and_are_told(server, measure, capsys) -> None:
    async def answer(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        return await send_events(request, [*chunks(4), "[DONE]"])

    server.answer = answer
    result = measure("--num-prompts", "2")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (16, 8)
    assert result["completed_without_usage"] == 2
    assert "2 answers came without usage" in capsys.readouterr().out


def test_every_answer_is_good_if_the_limits_are_far(measure) -> None:
    result = measure("--num-prompts", "4", "--goodput", "ttft:1e9", "tpot:1e9", "e2el:1e9")
    assert result["request_goodput"] == result["request_throughput"] > 0
    assert result["goodput"] == {"ttft": 1e9, "tpot": 1e9, "e2el": 1e9}


def test_metrics_and_percentiles_can_be_chosen(measure, capsys) -> None:
    result = measure("--num-prompts", "2", "--percentile-metrics", "e2el,ttft", "--metric-percentiles", "50,99.9")
    statistics = {name for name in result if name.endswith("_ms") and not name.startswith("max")}
    assert statistics == {
        f"{name}_{metric}_ms" for name in ("mean", "median", "std", "p50", "p99.9") for metric in ("ttft", "e2el")
    }
    assert "p99.9" in capsys.readouterr().out


def test_a_result_is_saved_under_a_name_that_says_what_it_is(server, tmp_path, monkeypatch) -> None:
    flags = [
        "serve",
        "--base-url",
        f"{server.url}/v1/",
        "--num-prompts",
        "2",
        "--random-input-len",
        "3",
        "--save-result",
    ]
    flags += ["--result-dir", str(tmp_path / "results"), "--max-concurrency", "2"]
    assert bench.main(flags) == bench.main([*flags, "--result-filename", "mine.json"]) == 0
    named, other = sorted((tmp_path / "results").iterdir(), key=lambda file: file.name == "mine.json")
    assert named.name.startswith("openai-infqps-concurrency2-model-2")
    assert other.name == "mine.json"
    assert not DETAILS & set(json.loads(other.read_text()))


def test_curves_are_drawn_even_if_nothing_was_answered(server, measure, tmp_path) -> None:
    async def refuse_odd_ones(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        return web.Response(status=500) if number % 2 else await answer_in_full(number, request, body)

    async def refuse(number: int, request: web.Request, body: dict) -> web.StreamResponse:
        return web.Response(status=500)

    for answer, code in ((refuse_odd_ones, 0), (refuse, 1)):
        server.answer = answer
        plot = tmp_path / "plots" / f"{code}.png"
        measure("--num-prompts", "4", "--plot", str(plot), code=code)
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_notes_tell_of_a_generator_that_was_late_or_busy(measure, monkeypatch, capsys) -> None:
    real = serve_client.run_load

    def slow(load, *, on_end):
        done = real(load, on_end=on_end)
        return type(done)(done.outcomes, done.duration_s, shares, 0.25, done.interrupted)

    monkeypatch.setattr(serve_client, "run_load", slow)
    shares = [0.25, 0.75]
    client = measure("--num-prompts", "1", "--client-processes", "1")["client"]
    assert (client["max_late_ms"], client["processes"], client["cpu_share"], client["was_limit"]) == (
        250,
        2,
        0.75,
        False,
    )
    shown = capsys.readouterr().out
    assert "late by up to 250 ms" in shown
    assert "busiest of 2 load generators used 75% of a core: latencies include waiting" in shown
    shares = [0.95]
    assert measure("--num-prompts", "1", "--client-processes", "1")["client"]["was_limit"]
    assert "The load generator used 95% of a core: the figures are its own limit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "cores", "processes"),
    [
        ("--num-prompts 1000 --max-concurrency 128", 32, 4),
        ("--num-prompts 1000 --max-concurrency 128", 8, 2),
        ("--num-prompts 1000 --max-concurrency 31", 32, 1),
        ("--num-prompts 70", 128, 2),
        ("--num-prompts 1000 --max-concurrency 128", 2, 1),
        ("--num-prompts 1000 --max-concurrency 128 --client-processes 7", 2, 7),
    ],
)
def test_processes_are_as_many_as_requests_under_way_and_cores_allow(
    server, monkeypatch, flags, cores, processes
) -> None:
    asked = []
    monkeypatch.setattr(serve, "num_cores", lambda: cores)
    monkeypatch.setattr(serve, "_run_load", lambda load, unit, num_processes: asked.append(num_processes) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.main(["serve", "--base-url", server.url, "--random-input-len", "1", *flags.split()])
    assert asked == [processes]


def test_help_needs_neither_aiohttp_nor_torch_and_a_run_no_torch(server) -> None:
    script = """
import sys
for name in {without}:
    sys.modules[name] = None
from stepgraph import bench
sys.exit(bench.main({flags}))
"""
    run = ["serve", "--base-url", server.url, "--num-prompts", "1", "--random-input-len", "3"]
    for without, flags in (
        (["aiohttp", "torch", "transformers"], ["serve", "--help"]),
        (["torch", "transformers"], run),
    ):
        code = script.format(without=without, flags=flags)
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
    assert (
        "--request-rate"
        in subprocess.run(
            [sys.executable, "-m", "stepgraph.bench", "serve", "--help"], capture_output=True, text=True, timeout=120
        ).stdout
    )
