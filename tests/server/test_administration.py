"""Administrators bring the engine to rest and wake it, and load adapters: requests wait or hear why not, and none is lost."""

import asyncio
import json
import os
import shutil
import signal
import threading

import pytest
from fakes import FakeEngine, FakeFronts
from live import TINY_FLAGS, running_server
from lora_folders import matrices, save_adapter
from observed import service
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from stepgraph.config.server import ServerConfig
from stepgraph.server.administrator import Administrator
from stepgraph.server.app import create_app
from stepgraph.server.directory import ADMINISTRATION
from stepgraph.server.rest import Rest

FLAGS = ["--enable-admin-endpoints", "--enable-lora", "--max-lora-rank", "4", "--max-loras", "2", *TINY_FLAGS]
SHORT = {"prompt": "abc" * 20, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
LONG = SHORT | {"max_tokens": 300}


@pytest.fixture(scope="module")
def server(tiny_model):
    with running_server(tiny_model, ["--served-model-name", "tiny", *FLAGS]) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """Each test finds the server awake, without requests, and with the adapters it started with."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        for path in ("/wake_up", "/resume"):
            assert server.post(path, None).status == 200
        for card in server.get("/v1/models").json["data"]:
            if card["parent"] is not None:
                server.post("/v1/unload_lora_adapter", {"lora_name": card["id"]})
        server.wait_idle()


@pytest.fixture(scope="module")
def expected(server):
    return answer(server, SHORT)


@pytest.fixture(scope="module")
def expected_long(server):
    return answer(server, LONG)


class Asking:
    """A request under way in a thread."""

    def __init__(self, server, body, path="/v1/completions"):
        self._reply = None
        self._thread = threading.Thread(target=self._ask, args=(server, path, body))
        self._thread.start()

    def _ask(self, server, path, body):
        self._reply = server.post(path, body)

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive()

    def reply(self):
        self._thread.join(60)
        assert self._reply is not None, "there was no answer"
        return self._reply


def answer(server, body) -> list:
    """The tokens of an answer, as they are: the tiny model writes bytes that are no text."""
    reply = server.post("/v1/completions", body | {"return_token_ids": True})
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["token_ids"]


def message(reply) -> str:
    return reply.json["error"]["message"]


def running(server, number=1):
    server.wait_for(lambda: server.metric("num_requests_running") == number)


def load(server, name, folder, **more):
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), **more})


# Who may


def app_of(config: ServerConfig, **options) -> TestClient:
    return TestClient(create_app(service(config), api_keys=options.get("keys", ())))


def test_administration_is_there_with_its_flag_only_and_under_the_key() -> None:
    off, locked = app_of(ServerConfig()), app_of(ServerConfig(enable_admin_endpoints=True), keys=("key",))
    for path in ADMINISTRATION:
        assert "--enable-admin-endpoints" in message_of(off.post(path))
        assert locked.post(path).status_code == locked.get(path).status_code == 401
    assert locked.get("/is_sleeping", headers={"Authorization": "Bearer key"}).json() == {
        "is_sleeping": False,
        "level": 0,
    }
    routes = app_of(ServerConfig(enable_admin_endpoints=True)).get("/").json()["endpoints"]
    assert {each["path"] for each in routes} >= ADMINISTRATION


def test_pages_of_other_sites_cannot_administer() -> None:
    app = app_of(ServerConfig(enable_admin_endpoints=True, cors_allow_origins=("https://ours.example",)))
    assert "may not administer" in message_of(app.post("/sleep?level=9", headers={"Origin": "https://theirs.example"}))
    for path in ("/update_weights_from_disk", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert app.post(path, json={}, headers={"Origin": "https://theirs.example"}).status_code == 403
    for origin in ("https://ours.example", "http://testserver"):  # let in, and refused for the level
        assert app.post("/sleep?level=9", headers={"Origin": origin}).status_code == 400


def message_of(reply) -> str:
    return reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/sleep?level=3", "level"),
        ("/sleep?level=", "level"),
        ("/sleep?mode=now", "mode"),
        ("/pause?mode=now", "mode"),
        ("/wake_up?tags=weights", "tags"),
        ("/reset_prefix_cache?reset_running_requests=maybe", "reset_running_requests"),
    ],
)
def test_a_value_that_is_not_known_is_refused(path, param) -> None:
    reply = app_of(ServerConfig(enable_admin_endpoints=True)).post(path)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


# Rest


def test_requests_wait_while_the_engine_is_paused_and_get_their_answer_then(server, expected) -> None:
    assert server.get("/is_paused").json == {"is_paused": False}
    for _ in range(2):
        assert server.post("/pause", None).json == {"status": "paused"}
    assert server.get("/is_paused").json == {"is_paused": True}
    assert (server.get("/health").status, server.get("/health").json) == (200, {"status": "paused"})
    assert (server.get("/ready").status, server.metric("engine_paused")) == (503, 1)
    asking = Asking(server, SHORT | {"return_token_ids": True})
    server.wait_for(lambda: server.metric("num_requests_waiting") == 1)
    endless = server.post("/sleep?mode=wait", None)
    assert (endless.status, "they cannot end" in message(endless)) == (409, True)
    assert asking.is_open
    for _ in range(2):
        assert server.post("/resume", None).json == {"status": "resumed"}
    assert asking.reply().json["choices"][0]["token_ids"] == expected
    assert (server.get("/ready").status, server.metric("engine_paused")) == (200, 0)


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeping_engine_refuses_requests_and_goes_on_with_those_it_kept(
    server, expected, expected_long, level
) -> None:
    asking = Asking(server, LONG | {"return_token_ids": True})
    running(server)
    reply = server.post(f"/sleep?level={level}&reset_external=true", None)
    assert reply.json == {"status": "asleep", "level": level}
    assert reply.headers["x-ignored-fields"] == "reset_external"
    assert asking.is_open
    assert server.post("/sleep?level=1", None).json == {"status": "asleep", "level": level}
    assert server.get("/is_sleeping").json == {"is_sleeping": True, "level": level}
    refused = server.post("/v1/completions", SHORT)
    assert (refused.status, message(refused)) == (503, "the engine sleeps; POST /wake_up wakes it")
    assert "retry-after" in refused.headers
    assert (server.get("/health").status, server.get("/ready").status) == (200, 503)
    assert (server.metric("engine_sleep_level"), server.metric("engine_up")) == (level, 1)
    assert server.get("/v1/models").json["data"][0]["max_model_len"] == 512
    assert server.post("/tokenize", {"prompt": "a"}).json["count"] == 1
    for _ in range(2):
        assert server.post("/wake_up", None).json == {"status": "awake"}
    assert asking.reply().json["choices"][0]["token_ids"] == expected_long
    assert answer(server, SHORT) == expected
    assert server.metric("engine_sleep_level") == 0


def test_sleep_can_wait_for_requests_or_end_them(server) -> None:
    asking = Asking(server, LONG)
    running(server)
    sleeping = Asking(server, None, "/sleep?mode=wait")
    server.wait_for(lambda: server.get("/ready").status == 503)
    refused = server.post("/v1/completions", SHORT)
    assert refused.status == 503
    assert "about to sleep" in message(refused) or not asking.is_open
    assert asking.reply().json["choices"][0]["finish_reason"] == "length"
    assert sleeping.reply().status == 200
    server.post("/wake_up", None)

    messages = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 300, "stream": True, "ignore_eos": True}
    stream, whole = Asking(server, messages, "/v1/chat/completions"), Asking(server, LONG)
    running(server, 2)
    server.post("/sleep?mode=abort", None)
    assert whole.reply().json["choices"][0]["finish_reason"] == "abort"
    events = [line.removeprefix("data: ") for line in stream.reply().body.decode().splitlines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "abort"


def test_a_call_that_aborts_does_not_wait_for_one_that_waits_for_requests() -> None:
    engine, rest = FakeEngine(0), Rest()

    async def both() -> None:
        administrator = Administrator([engine], FakeFronts([engine]), rest, {})
        waiting = asyncio.create_task(administrator.sleep(1, "wait"))
        await asyncio.sleep(0)
        assert rest.coming is not None
        async with asyncio.timeout(10):
            await administrator.pause("abort")
            await waiting

    engine.num_unfinished = 1
    asyncio.run(both())
    assert (rest.sleep_level, rest.paused, rest.coming) == (1, True, None)


def test_calls_at_once_are_done_one_after_the_other(server, expected) -> None:
    paths = ("/sleep?level=1", "/wake_up", "/pause", "/resume", "/reset_prefix_cache", "/sleep?level=2", "/wake_up") * 2
    assert [call.reply().status for call in [Asking(server, None, path) for path in paths]] == [200] * len(paths)
    server.post("/wake_up", None)
    server.post("/resume", None)
    assert answer(server, SHORT) == expected


def test_the_prefixes_of_earlier_requests_are_forgotten(server, expected_long) -> None:
    def cached() -> int:
        return server.post("/v1/completions", SHORT).json["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() > 0
    assert server.post("/reset_prefix_cache", None).json == {"success": True, "kept_blocks": 0}
    assert cached() == 0
    asking = Asking(server, LONG | {"return_token_ids": True})
    running(server)
    kept = server.post("/reset_prefix_cache", None).json
    assert (kept["success"], kept["kept_blocks"] > 0) == (False, True)
    assert server.post("/reset_prefix_cache?reset_running_requests=true", None).json["success"]
    assert asking.reply().json["choices"][0]["token_ids"] == expected_long


# Adapters


def test_adapters_come_and_go_while_the_server_runs(server, expected, tmp_path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "large")]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        save_adapter(folder, matrices(seed))
    config = json.loads((folders[2] / "adapter_config.json").read_text())
    save_adapter(folders[2], {name: (a.repeat(2, 1), b.repeat(1, 2)) for name, (a, b) in matrices(2).items()})
    assert config["r"] == 4
    adapted = SHORT | {"model": "poet"}
    assert server.post("/v1/completions", adapted).status == 404
    assert load(server, "poet", folders[0]).json == {"status": "ok", "message": "poet is loaded"}
    first = answer(server, adapted)
    assert first != expected
    [_, card] = server.get("/v1/models").json["data"]
    assert (card["id"], card["root"], card["parent"]) == ("poet", str(folders[0]), "tiny")
    assert "loaded already" in load(server, "poet", folders[0]).json["message"]

    for name, folder, status, says in [
        ("tiny", folders[1], 409, "the name of the model"),
        ("poet", folders[1], 409, "load_inplace"),
        ("other", tmp_path / "nowhere", 400, "adapter_config.json"),
        ("other", folders[2], 400, "its rank is 8, and max_lora_rank is 4"),
        ("", folders[1], 400, "printable"),
        ("other", "a\0b", 400, "printable"),
    ]:
        refused = load(server, name, folder)
        assert (refused.status, says in message(refused)) == (status, True), (name, message(refused))
    assert server.post("/v1/load_lora_adapter", {"lora_name": "other"}).status == 422
    assert len(server.get("/v1/models").json["data"]) == 2

    # the folder holds another adapter now: what runs keeps the first one
    whole = answer(server, LONG | {"model": "poet"})
    asking = Asking(server, LONG | {"model": "poet", "return_token_ids": True})
    running(server)
    save_adapter(folders[0], matrices(1))
    assert answer(server, adapted) == first
    replaced = load(server, "poet", folders[0], load_inplace=True, lora_int_id=3)
    assert replaced.json["message"] == "poet is replaced"
    assert replaced.headers["x-ignored-fields"] == "lora_int_id"
    second = answer(server, adapted)
    assert second != first
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "poet"}).json["message"] == "poet is unloaded"
    for _ in range(2):
        gone = server.post("/v1/unload_lora_adapter", {"lora_name": "poet"})
        assert (gone.status, gone.json["error"]["code"]) == (404, "model_not_found")
    assert len(server.post("/v1/unload_lora_adapter", {"lora_name": "x" * 10**5}).body) < 1000
    assert server.post("/v1/completions", adapted).status == 404
    assert asking.reply().json["choices"][0]["token_ids"] == whole
    # more than there are places for: each is read when it is asked for
    load(server, "poet", folders[1])
    save_adapter(folders[0], matrices(0))
    for name in ("b", "c", "d"):
        assert load(server, name, folders[0]).status == 200
    assert answer(server, SHORT | {"model": "d"}) == first
    assert answer(server, adapted) == second


def test_the_folder_of_an_adapter_that_another_replaced_is_read_again(server, tmp_path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        save_adapter(folder, matrices(seed))
    load(server, "poet", folders[0])
    first = answer(server, SHORT | {"model": "poet"})
    load(server, "poet", folders[1], load_inplace=True)
    second = answer(server, SHORT | {"model": "poet"})
    assert second != first
    save_adapter(folders[0], matrices(1))
    load(server, "other", folders[0])
    assert answer(server, SHORT | {"model": "other"}) == second


# The engine's process ends


def other_weights(tiny_model, folder) -> str:
    """The tiny model with the rows of its embedding in another order."""
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_an_engine_that_dies_comes_back_as_it_was_left(server, expected, tiny_model, tmp_path) -> None:
    (tmp_path / "adapter").mkdir()
    load(server, "poet", save_adapter(tmp_path / "adapter", matrices(0)))
    weights = other_weights(tiny_model, tmp_path / "weights")
    assert server.post("/update_weights_from_disk", {"model_path": weights}).json == {"success": True}
    changed = answer(server, SHORT)
    assert changed != expected
    absent = "is not on the server's machine"
    for path, says in ((tmp_path / "nowhere", absent), ("a" * 5000, absent), (tmp_path / "adapter", "config.json")):
        refused = server.post("/update_weights_from_disk", {"model_path": str(path)})
        assert (refused.status, refused.json["error"]["param"], says in message(refused)) == (400, "model_path", True)
    adapted = answer(server, SHORT | {"model": "poet"})
    server.post("/pause", None)
    server.post("/sleep?level=2", None)
    os.kill(server.engine_pid(), signal.SIGKILL)
    # its memory may be others' by now: it is not started before it is woken up
    server.wait_for(lambda: server.metric("engine_up") == 0)
    server.wait_for(lambda: "started when it is to wake up" in "".join(server.output))
    assert (server.get("/health").status, server.get("/is_sleeping").json["is_sleeping"]) == (200, True)
    refused = server.post("/v1/completions", SHORT)
    assert (refused.status, "POST /wake_up" in message(refused)) == (503, True)
    assert "POST /wake_up starts it" in message(server.get("/graphs"))
    assert server.post("/reset_prefix_cache", None).json["success"]
    assert server.post("/update_weights_from_disk", {"model_path": weights}).status == 409
    assert server.post("/wake_up", None).status == 200
    assert server.get("/is_paused").json == {"is_paused": True}
    asking = Asking(server, SHORT | {"model": "poet", "return_token_ids": True})
    server.wait_for(lambda: server.metric("num_requests_waiting") == 1)
    server.post("/resume", None)
    assert asking.reply().json["choices"][0]["token_ids"] == adapted
    assert answer(server, SHORT) == changed
    assert server.post("/update_weights_from_disk", {"model_path": tiny_model}).status == 200
    assert answer(server, SHORT) == expected
