"""Requests that go wrong, one way or another: each gets a clear answer, and nobody else notices."""

import http.client
import json
import socket
import threading
import time

import openai
import pytest
from live import TINY_FLAGS, LiveServer, running_server

GOOD = {"prompt": "abc", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def small_server(tiny_model) -> LiveServer:
    """Runs two requests, lets two wait, takes small bodies only, and gives a request 20 seconds."""
    flags = [
        *TINY_FLAGS,
        "--max-num-seqs",
        "2",
        "--max-queue",
        "2",
        "--max-body-mib",
        "0.25",
        "--request-timeout",
        "20",
    ]
    with running_server(tiny_model, ["--served-model-name", "tiny", *flags]) as server:
        yield server


def good_text(server: LiveServer) -> str:
    reply = server.post("/v1/completions", GOOD)
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["text"]


def long_request(**others) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": 450, "ignore_eos": True, **others}).encode()


def send(server: LiveServer, body: bytes) -> http.client.HTTPConnection:
    """Begin a request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_slots_and_blocks(tiny_server, stream, n) -> None:
    aborted = tiny_server.metric("request_success_total", finished_reason="abort")
    connection = send(tiny_server, long_request(stream=stream, n=n))
    tiny_server.wait_for(lambda: tiny_server.metric("num_requests_running") == n)
    if stream:
        connection.getresponse().read(100)
    connection.sock.shutdown(socket.SHUT_RDWR)
    tiny_server.wait_idle()
    assert tiny_server.metric("kv_cache_usage_perc") == 0
    assert tiny_server.metric("request_success_total", finished_reason="abort") == aborted + n


def test_a_full_queue_refuses_with_a_time_to_come_again(small_server) -> None:
    busy = [send(small_server, long_request()) for _ in range(4)]
    small_server.wait_for(lambda: small_server.get("/load").json == {"server_load": 4})
    refused = small_server.post("/v1/completions", GOOD)
    assert (refused.status, refused.json["error"]["type"]) == (429, "rate_limit_error")
    assert "max_queue=2" in refused.json["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert small_server.get("/ready").status == 503
    assert small_server.get("/health").status == 200
    for connection in busy:
        assert connection.getresponse().status == 200
        connection.close()
    small_server.wait_idle()
    assert good_text(small_server)


def test_more_answers_than_the_server_holds_are_refused_for_good(small_server) -> None:
    reply = small_server.post("/v1/completions", GOOD | {"n": 5})
    assert (reply.status, "holds 4 at once" in reply.json["error"]["message"]) == (400, True)


def test_a_request_that_takes_too_long_ends_with_an_error(tiny_model) -> None:
    flags = ["--served-model-name", "tiny", *TINY_FLAGS, "--request-timeout", "0.05"]
    with running_server(tiny_model, flags) as server:
        whole = server.post("/v1/completions", json.loads(long_request()))
        assert (whole.status, whole.json["error"]["type"]) == (504, "timeout_error")
        assert "request_timeout=0.05" in whole.json["error"]["message"]
        streamed = server.post("/v1/completions", json.loads(long_request(stream=True)))
        last = streamed.body.decode().strip().splitlines()[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["message"]) == ("timeout", whole.json["error"]["message"])
        server.wait_idle()


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"", 422, ""),
        (b"[]", 422, ""),
        (b"null", 422, ""),
        (b"\xff\xfe", 400, ""),
        (b"[" * 20000 + b"]" * 20000, 400, ""),
        (b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", 400, ""),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        (b'{"prompt": "a", "temperature": Infinity}', 400, "temperature"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}", 400, "seed"),
        (b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", 400, "thousands of digits"),
        (b'{"prompt": "a", "max_tokens": 1' + b"0" * 30 + b"}", 400, "between 1 and 2**63 - 1"),
        (b'{"prompt": "a", "min_tokens": 1' + b"0" * 30 + b', "max_tokens": null}', 400, "min_tokens=1"),
        (b'{"prompt": "a", "priority": 1' + b"0" * 30 + b"}", 400, "more than 64 bits"),
        (b'{"prompt": "a", "bad_words": ["b"' + b', "b"' * 200 + b"]}", 400, "at most 128 fit"),
        (b'{"prompt": "\\ud800"}', 400, "surrogate"),
        (b'{"prompt": "a", "stop": "\\udfff"}', 400, "surrogate pair"),
        (b'{"prompt": "a", "model": "\\ud800"}', 404, ""),
        (b'{"prompt": "a", "structured_outputs": {"regex": "\\ud800"}}', 400, ""),
        (b'{"prompt": "a", "structured_outputs": {"json": {"const": "\\ud800"}}}', 400, ""),
        (b'{"prompt": "a", "structured_outputs": {"json": {"maximum": 1e999, "type": "integer"}}}', 400, ""),
        (b'{"prompt": "a", "structured_outputs": {"choice": []}}', 400, "choice"),
        (b'{"prompt": "a", "\\ud800": 1, "max_tokens": 1}', 422, ""),
        (b'{"prompt": ""}', 400, "empty"),
        (b'{"prompt": []}', 400, "empty"),
        (b'{"prompt": [[]]}', 400, "empty"),
        (b'{"prompt": [1, -1]}', 400, "-1"),
        (b'{"prompt": [1, 257]}', 400, "257"),
        (b'{"prompt": [1, 1' + b"0" * 30 + b"]}", 400, "more than 64 bits"),
        (b'{"prompt": ["a", 1]}', 422, "prompt"),
        (b'{"prompt": "a", "n": 1000}', 400, "n=1000"),
        (b'{"prompt": "a", "n": 0}', 400, "n=0"),
        (b'{"prompt": "a", "logprobs": 1000}', 400, "logprobs"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', 400, "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"300": 1}}', 400, "300"),
        (b'{"prompt": "a", "stop": ["a", ""]}', 400, "stop"),
        (b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens=0"),
        (b'{"prompt": "a", "priority": 1e3, "max_tokens": 1}', 200, ""),
        (b'{"prompt": "a", "max_tokens": 1, "echo": null, "stream": null, "priority": null}', 200, ""),
        (b'{"prompt": "a", "suffix": "b"}', 400, "suffix"),
        (b'{"prompt": "a", "response_format": {"type": "xml"}}', 400, "xml"),
        (b'{"prompt": "a", "stream": "perhaps"}', 422, "stream"),
        (b'{"prompt": "' + b"x" * 600 + b'"}', 400, "max_model_len"),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
def test_a_bad_body_is_refused_and_says_why(tiny_server, body, status, said) -> None:
    reply = tiny_server.post("/v1/completions", body)
    assert reply.status == status, reply.body
    if status != 200:
        error = reply.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert said in error["message"]


def test_bad_requests_do_not_touch_good_ones(tiny_server) -> None:
    expected = good_text(tiny_server)
    bad = [
        {"prompt": "a", "structured_outputs": {"regex": "("}},
        {"prompt": "x" * 5000},
        {"prompt": "a", "temperature": -1},
        {"prompt": [1, 2, 999]},
        {"prompt": "a", "structured_outputs": {"json": {"not": {}}}, "stream": True},
    ]
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda body=body: statuses.append(tiny_server.post("/v1/completions", body).status))
        for body in bad * 6
    ]
    for thread in threads:
        thread.start()
    assert {good_text(tiny_server) for _ in range(8)} == {expected}
    for thread in threads:
        thread.join(60)
    assert statuses == [400] * len(threads)


def test_a_large_body_is_refused_announced_or_not(small_server) -> None:
    body = json.dumps({"prompt": "x" * 300_000}).encode()
    reply = small_server.post("/v1/completions", body)
    assert (reply.status, "max_body_mib=0.25" in reply.json["error"]["message"]) == (413, True)
    with socket.create_connection(("127.0.0.1", small_server.port), timeout=30) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n"
        connection.sendall(head.encode())
        try:
            for _ in range(10):
                connection.sendall(b"8000\r\n" + b"y" * 0x8000 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert b" 413 " in connection.recv(4096)
    assert good_text(small_server)


def test_a_slow_reader_gets_its_whole_answer_and_holds_nobody_up(tiny_server) -> None:
    connection = send(tiny_server, long_request(stream=True, logprobs=20, temperature=0, n=8))
    response = connection.getresponse()
    tiny_server.wait_idle()  # the engine is done with it, though nobody has read
    assert good_text(tiny_server)
    events = [line for line in response.read().decode().split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    tokens = [0] * 8
    for line in events[:-1]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            tokens[choice["index"]] += len(choice["logprobs"]["tokens"]) if choice["logprobs"] else 0
    assert tokens == [450] * 8
    connection.close()


def test_garbage_and_slow_senders_do_not_hold_the_server_up(tiny_server) -> None:
    with (
        socket.create_connection(("127.0.0.1", tiny_server.port), timeout=30) as garbage,
        socket.create_connection(("127.0.0.1", tiny_server.port), timeout=30) as slow,
    ):
        garbage.sendall(b"\x00\x01\x02 garbage\r\n\r\n")
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert good_text(tiny_server)
        assert b" 400 " in garbage.recv(4096)


def test_a_stream_of_bytes_that_are_no_characters_is_the_whole_text(tiny_server) -> None:
    for seed in range(6):
        body = {"prompt": "a", "max_tokens": 60, "temperature": 1.5, "seed": seed, "ignore_eos": True}
        whole = tiny_server.post("/v1/completions", body).json["choices"][0]["text"]
        events = tiny_server.post("/v1/completions", body | {"stream": True}).body.decode().split("\n\n")
        pieces = [json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events if e.startswith("data: {")]
        assert "".join(pieces) == whole


def test_too_few_blocks_delay_requests_and_lose_none(tiny_model) -> None:
    flags = [*TINY_FLAGS, "--num-kv-blocks", "13", "--served-model-name", "tiny"]
    with running_server(tiny_model, flags) as server:
        alone = server.post(
            "/v1/completions", {"prompt": "abc", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        )
        with server.client() as client:
            found: list[str] = []

            def ask() -> None:
                answer = client.completions.create(
                    model="tiny", prompt="abc", max_tokens=60, temperature=0, extra_body={"ignore_eos": True}
                )
                found.append(answer.choices[0].text)

            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert found == [alone.json["choices"][0]["text"]] * 8
        assert server.metric("num_preemptions_total") > 0
        reply = server.post("/v1/completions", {"prompt": "abc", "max_tokens": 400})
        assert (reply.status, "KV blocks" in reply.json["error"]["message"]) == (400, True)


def test_logits_that_are_not_numbers_fail_their_request_alone(tiny_model, tmp_path) -> None:
    """The embedding of one token is NaN: a request that holds it fails, others do not."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "nan"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    poison = 200
    tensors["model.embed_tokens.weight"][poison] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with running_server(str(folder), TINY_FLAGS) as server:
        good = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
        before = server.post("/v1/completions", good)
        bad = server.post("/v1/completions", {"prompt": [5, poison], "max_tokens": 4}, headers={"X-Request-Id": "abc"})
        assert (bad.status, bad.headers["x-request-id"]) == (500, "abc")
        assert "NaN" in bad.json["error"]["message"]
        assert "abc" in bad.json["error"]["message"]
        after = server.post("/v1/completions", good)
        assert (before.status, after.status) == (200, 200)
        assert before.json["choices"] == after.json["choices"]


def test_a_hurried_client_is_no_trouble(tiny_server) -> None:
    """Connections that open and close at once, and a pipelined pair of requests."""
    for _ in range(50):
        socket.create_connection(("127.0.0.1", tiny_server.port)).close()
    with socket.create_connection(("127.0.0.1", tiny_server.port), timeout=30) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        received, deadline = b"", time.monotonic() + 30
        while received.count(b"200 OK") < 2:
            assert time.monotonic() < deadline
            received += connection.recv(4096)


def test_an_unknown_field_is_ignored_and_named(tiny_server) -> None:
    for path, body in (
        ("/v1/completions", GOOD),
        ("/v1/completions", GOOD | {"stream": True}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        reply = tiny_server.post(path, body | {"top_kk": 3, "größe\n": 1})
        assert (reply.status, reply.headers["x-ignored-fields"]) == (200, "gr\\xf6\\xdfe\\n, top_kk")


def test_a_name_of_any_length_is_not_repeated_whole(tiny_server) -> None:
    reply = tiny_server.post("/v1/completions", GOOD | {"model": "x" * 10**5})
    assert (reply.status, reply.json["error"]["code"]) == (404, "model_not_found")
    assert len(reply.body) < 1000


def test_the_sdk_sees_each_error_as_its_own_class(tiny_server) -> None:
    client = tiny_server.client()
    for kind, fields in (
        (openai.BadRequestError, {"temperature": -1}),
        (openai.NotFoundError, {"model": "nobody"}),
        (openai.UnprocessableEntityError, {"max_tokens": "many"}),
    ):
        with pytest.raises(kind) as caught:
            client.completions.create(**({"model": "tiny", "prompt": "a"} | fields))
        assert caught.value.param == next(iter(fields))
