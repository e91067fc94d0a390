"""What is there, and what is not: the way to it, in a client's error and in a browser, without anything from elsewhere."""

import re
from html.parser import HTMLParser

import pytest
from observed import service
from starlette.testclient import TestClient

from stepgraph.config.server import ServerConfig
from stepgraph.server.app import create_app, create_metrics_app

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture(scope="module", params=["", "/llm"], ids=["plain", "behind a proxy"])
def web(request):
    """The application without an engine and without the page to look at, and the path that comes before all others."""
    app = create_app(service(ServerConfig(root_path=request.param or None, ui=False)), api_keys=())
    client = TestClient(app, base_url="http://here")
    return client, request.param


@pytest.fixture(scope="module")
def app():
    return TestClient(create_app(service(ServerConfig(ui=False)), api_keys=()))


class References(HTMLParser):
    """What a page loads or leads to."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.add(tag)
        self.found += [value for name, value in attributes if name in ("href", "src", "action", "srcset", "data")]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_and_lead_to_this_server_only(web, path) -> None:
    client, root = web
    page = client.get(root + path, headers=BROWSER)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; style-src 'unsafe-inline';")
    references = References(page.text)
    assert references.found
    for reference in references.found:
        if reference.startswith("#"):
            assert f'id="{reference[1:]}"' in page.text, reference
        else:
            assert not re.match(r"[a-z]+:|//", reference), reference
            assert client.get(str(page.url.join(reference))).status_code == 200, reference
    assert references.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    assert not re.search(r"@import|url\(", page.text)
    assert "cdn" not in page.text


def test_the_reference_shows_every_endpoint_with_the_fields_of_its_requests(app) -> None:
    page, document = app.get("/docs").text, app.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"<code>{method.upper()} {path}</code>" in page
    for name, schema in document["components"]["schemas"].items():
        if "ValidationError" not in name:
            assert f'<details id="{name}">' in page
            assert all(f"<code>{field}</code>" in page for field in schema.get("properties", {}))


def test_the_servers_address_lists_its_endpoints(app) -> None:
    listed = app.get("/").json()["endpoints"]
    assert {"methods": ["POST"], "path": "/v1/chat/completions", "summary": "Answer a conversation"} in listed
    assert {each["path"] for each in listed} >= {"/", "/docs", "/ping", "/tokenizer_info", "/v1/models/{name}"}
    page = app.get("/", headers=BROWSER).text
    assert all(f"<code>{each['path']}</code>" in page for each in listed)


@pytest.mark.parametrize(
    ("path", "way"),
    [
        ("/v1/v1/chat/completions", "did you mean /v1/chat/completions?"),
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/chat/completions/chat/completions", "did you mean /v1/chat/completions?"),
        ("/openai/v1/responses", "did you mean /v1/responses?"),
        ("/v1/tokenize", "did you mean /tokenize?"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions or /v1/completions?"),
        ("/healthz", "did you mean /health?"),
        ("/v1", "clients take this as their base URL"),
        ("/v1/embeddings", "embeddings and scores are not computed"),
        ("/rerank", "embeddings and scores are not computed"),
        ("/v1/assistants/abc", "nothing is kept between requests"),
        ("/v1/audio/transcriptions", "text only"),
        ("/v1/files", "are not offered"),
        ("/v1/responses/resp_1", "no reply is kept"),
        ("/api/generate", "texts are continued at /v1/completions"),
        ("/api/chat", "conversations are answered at /v1/chat/completions"),
        ("/api/tags", "/v1/models lists the models"),
        ("/generate", "texts are continued at /v1/completions"),
        ("/redoc", "are at /docs"),
        ("/sleep", "--enable-admin-endpoints"),
        ("/v1/load_lora_adapter", "--enable-admin-endpoints"),
        ("/qqqqq", "there is nothing at /qqqqq. GET / lists what there is."),
    ],
)
def test_an_unknown_path_is_answered_with_the_way_to_what_was_meant(app, path, way) -> None:
    for method in ("GET", "POST"):
        reply = app.request(method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
        assert way in reply.json()["error"]["message"]
        assert "GET / lists" in reply.json()["error"]["message"]


def test_a_path_of_any_length_is_answered_at_once_and_in_short(app) -> None:
    for path in ("/v1" * 10_000, "/" + "a" * 30_000, "/" * 30_000):
        reply = app.get(f"http://testserver{path}", follow_redirects=False)
        assert reply.status_code == 404
        assert len(reply.json()["error"]["message"]) < 400


def test_another_method_than_a_path_has_is_answered_with_those_it_has(app) -> None:
    reply = app.get("/v1/chat/completions")
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert reply.json()["error"] == {
        "message": "/v1/chat/completions takes POST, not GET, with what is asked as JSON in the body",
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_allowed",
    }
    reply = app.delete("/ping")
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD, POST")
    assert reply.json()["error"]["message"] == "/ping takes GET, HEAD, POST, not DELETE"
    assert app.head("/v1/completions").status_code == 405


@pytest.fixture
def port_of_metrics():
    return TestClient(create_metrics_app(service()))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/messages"])
def test_the_port_of_metrics_says_that_the_api_is_elsewhere(port_of_metrics, path) -> None:
    reply = port_of_metrics.get(path)
    assert reply.status_code == 404
    assert reply.json()["error"]["message"].endswith("this port has /health, /metrics, /ping only")


def test_the_port_of_metrics_answers_head_as_get(port_of_metrics) -> None:
    assert port_of_metrics.head("/metrics").status_code == 200
    assert port_of_metrics.delete("/metrics").headers["allow"] == "GET, HEAD"
