"""Who may come in, and what stays inside."""

import socket
from pathlib import Path

import pytest
import zmq
from live import TINY_FLAGS, running_server

import stepgraph.server
from stepgraph.cli import main

MARK = "zebra7391"


def test_nothing_without_a_key_but_what_operators_need(tiny_model, tmp_path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("from-file\n")
    flags = [
        *TINY_FLAGS,
        "--api-key",
        "first",
        "second",
        "--api-key-file",
        str(keys),
        "--cors-allow-origins",
        "https://a.example",
    ]
    with running_server(tiny_model, ["--served-model-name", "tiny", *flags], STEPGRAPH_API_KEY="from-env") as server:
        for path in ("/health", "/ready", "/version", "/load", "/metrics"):
            assert server.get(path).status == 200, path
        for header in (
            None,
            "first",
            "Bearer",
            "Bearer wrong",
            "Bearer firs",
            "Bearer first2",
            "Basic first",
            "Bearer é",
        ):
            headers = {} if header is None else {"Authorization": header.encode()}
            for path in ("/v1/models", "/graphs", "/docs", "/openapi.json", "/nowhere"):
                reply = server.get(path, headers=headers)
                assert reply.status == 401, (header, path)
            assert reply.json["error"]["code"] == "invalid_api_key"
            assert server.post("/tokenize", {"prompt": "a"}, headers=headers).status == 401
        for key in ("first", "second", "from-file", "from-env"):
            assert server.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status == 200
            assert server.get("/v1/models", headers={"X-Api-Key": key, "Authorization": "Bearer wrong"}).status == 200
        refused = server.post("/v1/messages", {}, headers={"X-Api-Key": "wrong"})
        assert (refused.status, refused.json["error"]["type"]) == (401, "authentication_error")
        allowed = server.get("/v1/models", headers={"Authorization": "Bearer first", "Origin": "https://a.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = server.get("/v1/models", headers={"Authorization": "Bearer first", "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        refused = server.get("/v1/models", headers={"Origin": "https://a.example"})
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"  # so that the page can read why
        preflight = server.request(
            "OPTIONS",
            "/v1/models",
            headers={"Origin": "https://a.example", "Access-Control-Request-Method": "GET"},
        )
        assert preflight.status == 200  # browsers send no key with it


def test_only_this_machine_is_listened_to_and_no_origin_let_in(tiny_server) -> None:
    assert (
        "access-control-allow-origin"
        not in tiny_server.get("/v1/models", headers={"Origin": "https://a.example"}).headers
    )
    local = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    assert f"0100007F:{tiny_server.port:04X}" in local
    assert f"00000000:{tiny_server.port:04X}" not in local


@pytest.mark.parametrize("asked", [False, True])
def test_logs_hold_prompts_only_if_asked_to(tiny_model, asked) -> None:
    flags = [*TINY_FLAGS, "-vv", "--access-log", *(["--log-requests"] if asked else [])]
    with running_server(tiny_model, ["--served-model-name", "tiny", *flags]) as server:
        bodies = [
            ("/v1/completions", {"prompt": MARK, "max_tokens": 2}),
            ("/v1/completions", {"prompt": MARK * 100}),
            ("/v1/completions", {"prompt": MARK, "temperature": -1}),
            ("/v1/completions", {"prompt": MARK, "max_tokens": 2, "stream": True, "stop": MARK}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": MARK}], "max_tokens": 2}),
            ("/v1/chat/completions", {"messages": [{"role": MARK, "content": [{"type": MARK}]}]}),
            ("/v1/completions", f'{{"prompt": "{MARK}'.encode()),
            ("/tokenize", {"prompt": MARK}),
        ]
        for path, body in bodies:
            server.post(path, body)
        server.wait_for(lambda: sum("/tokenize" in line for line in server.output))
        assert any(MARK in line for line in server.output) == asked


def test_a_stranger_at_the_engines_port_neither_speaks_nor_disturbs(tiny_model) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--served-model-name", "tiny", *TINY_FLAGS, "--engine-worker-queue-port", str(port)]
    with running_server(tiny_model, flags) as server:
        body = {"prompt": "abc", "max_tokens": 8, "temperature": 0}
        expected = server.post("/v1/completions", body).json["choices"]
        context = zmq.Context()
        stranger = context.socket(zmq.PAIR)
        stranger.connect(f"tcp://127.0.0.1:{port}")
        for _ in range(10):
            stranger.send(b"\x81\xa4type\xa4Stop", zmq.NOBLOCK)
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"\xff\x00garbage" * 100)
            assert server.post("/v1/completions", body).json["choices"] == expected
        assert not stranger.poll(200)
        stranger.close(linger=0)
        context.term()
        assert server.post("/v1/completions", body).json["choices"] == expected
        assert server.metric("engine_restarts_total") == 0


def test_nothing_is_unpickled() -> None:
    for path in Path(stepgraph.server.__file__).parent.glob("*.py"):
        source = path.read_text()
        assert not any(word in source for word in ("pickle", "recv_pyobj", "send_pyobj", "marshal")), path


def test_code_of_models_is_refused(capsys) -> None:
    assert main(["serve", "smollm2", "--trust-remote-code"]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
