"""What goes wrong, what stands beside generation, and other command lines, through the official OpenAI client."""

import re
import subprocess
import sys
from dataclasses import replace

import openai
import pytest
from live import LiveServer, free_ports, running_server
from openai_calls import ANSWER, CAPITAL, KEY, MESSAGES, PROMPT, complete, generate
from tiny import MAX_MODEL_LEN, save_tiny_model

import stepgraph
from stepgraph.version import commit

# What goes wrong

REFUSED = [
    ({"temperature": -1}, openai.BadRequestError, "temperature", "invalid_value", "between 0"),
    ({"temperature": "hot"}, openai.UnprocessableEntityError, "temperature", "invalid_type", "valid number"),
    ({"prompt": 1.5}, openai.UnprocessableEntityError, "prompt", "invalid_type", "list of token ids"),
    ({"prompt": []}, openai.BadRequestError, "prompt", "invalid_value", "at least one prompt"),
    ({"prompt": [999]}, openai.BadRequestError, "prompt", "invalid_value", "vocabulary of 257"),
    ({"prompt": "x" * 512}, openai.BadRequestError, "prompt", "context_length_exceeded", "has 512 tokens .* to 511"),
    ({"model": "gpt"}, openai.NotFoundError, "model", "model_not_found", "choose one of: tiny"),
    ({"n": 17}, openai.BadRequestError, "n", "invalid_value", "above 16"),
    ({"suffix": "x"}, openai.BadRequestError, "suffix", "invalid_value", "not supported"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "invalid_value", "set echo to true"),
    ({"logprobs": 100}, openai.BadRequestError, "logprobs", "invalid_value", "between 0"),
    (
        {"extra_body": {"structured_outputs": {"regex": "("}}},
        openai.BadRequestError,
        "structured_outputs.regex",
        None,
        "a group lacks its other bracket",
    ),
    (
        {"extra_body": {"response_format": {"type": "xml"}}},
        openai.BadRequestError,
        "response_format.type",
        None,
        "'xml'",
    ),
    ({"prompt": "x" * (9 * 2**20)}, openai.APIStatusError, None, "request_too_large", "max_body_mib=8"),
]


@pytest.mark.parametrize(("fields", "kind", "param", "code", "message"), REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_what_cannot_be_done_is_the_clients_exception(tiny, fields, kind, param, code, message, is_streamed) -> None:
    with pytest.raises(kind, match=message) as refused:
        tiny.completions.create(**{"model": "tiny", "prompt": "a", "stream": is_streamed} | fields)
    assert (refused.value.param, refused.value.code) == (param, code or "invalid_value")
    assert refused.value.request_id == refused.value.response.headers["x-request-id"]


def test_paths_and_methods_that_do_not_exist_are_told_apart(tiny_server, tiny) -> None:
    with pytest.raises(openai.NotFoundError, match="nothing at /v1/embeddings"):
        tiny.embeddings.create(model="tiny", input="a")
    reply = tiny_server.get("/v1/completions")
    error = reply.json["error"]
    assert (reply.status, error["code"], error["type"]) == (405, "method_not_allowed", "invalid_request_error")


def test_unknown_fields_are_named_and_the_requests_id_comes_back(tiny) -> None:
    raw = tiny.chat.completions.with_raw_response.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=1,
        user="somebody",
        extra_body={"not_a_field": 1, "another": {}},
        extra_headers={"X-Request-Id": "my-id-1"},
    )
    assert raw.headers["x-ignored-fields"] == "another, not_a_field"
    assert (raw.headers["x-request-id"], raw.parse()._request_id) == ("my-id-1", "my-id-1")
    raw = tiny.completions.with_raw_response.create(model="tiny", prompt="a", max_tokens=1)
    assert "x-ignored-fields" not in raw.headers
    assert len(raw.headers["x-request-id"]) == 32


# Beside generation


def test_models_are_listed_and_retrieved(tiny) -> None:
    [model] = tiny.models.list()
    assert (model.id, model.object, model.max_model_len) == ("tiny", "model", MAX_MODEL_LEN)
    assert tiny.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as refused:
        tiny.models.retrieve("other/name")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("text", ["", "plain", "naïve 日本 😀\n\ttabs", "<|im_end|> as text"])
def test_texts_become_tokens_and_texts_again(chat_server, text) -> None:
    tokens = chat_server.post("/tokenize", {"model": "smollm2", "prompt": text}).json
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 2048)
    assert chat_server.post("/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": text}


def test_a_conversations_tokens_are_those_it_is_answered_from(chat_server, smollm) -> None:
    body = {"messages": CAPITAL, "return_token_strs": True}
    tokens = chat_server.post("/tokenize", body).json
    reply = smollm.chat.completions.create(
        model="smollm2", max_tokens=1, extra_body={"return_token_ids": True}, messages=CAPITAL
    )
    assert tokens["tokens"] == reply.prompt_token_ids
    assert tokens["token_strs"][0] == "<|im_start|>"
    text = chat_server.post("/detokenize", {"tokens": tokens["tokens"]}).json["prompt"]
    assert text.endswith("What is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    shorter = chat_server.post("/tokenize", body | {"add_generation_prompt": False}).json["tokens"]
    assert shorter == tokens["tokens"][: len(shorter)] != tokens["tokens"]


def test_tokenizer_info_lets_a_client_work_without_a_tokenizer_of_its_own(tiny_server, chat_server) -> None:
    for server, eos in ((tiny_server, "<end>"), (chat_server, "<|im_end|>")):
        info = server.get("/tokenizer_info").json
        assert info["eos_token"] == eos
        body = {"prompt": info["eos_token"], "add_special_tokens": False}
        assert server.post("/tokenize", body).json["tokens"] == [info["eos_token_id"]]
        assert info["model_max_length"] == server.get("/v1/models").json["data"][0]["max_model_len"]
        assert "messages" in info["chat_template"]
        assert "/" not in "".join(str(value) for name, value in info.items() if name != "chat_template")
    assert tiny_server.get("/tokenizer_info").json["bos_token"] is None


def test_operators_find_health_version_load_and_graphs(tiny_server, tiny) -> None:
    for path in ("/health", "/ready"):
        reply = tiny_server.get(path)
        assert (reply.status, reply.json) == (200, {"status": "ok"})
        head = tiny_server.request("HEAD", path)
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", reply.headers["content-length"])
    told = tiny_server.get("/version").json
    assert told == {"version": stepgraph.__version__, "commit": told["commit"]}
    assert (told["commit"] or "").partition(",")[0] == (commit() or "").partition(",")[
        0
    ]  # files may have changed meanwhile
    complete(tiny, max_tokens=2)
    tiny_server.wait_idle()
    graphs = tiny_server.get("/graphs").json
    assert graphs["token_sizes"] == [8, 48]
    assert sum(graph["uses"] for graph in graphs["graphs"]) == graphs["steps"] > 0
    assert tiny_server.get("/openapi.json").json["info"]["title"] == "stepgraph"


def test_a_head_request_gets_the_headers_of_get_and_no_body(tiny_server) -> None:
    for path in ("/", "/ping", "/version", "/v1/models", "/tokenizer_info", "/docs"):
        get, head = tiny_server.get(path), tiny_server.request("HEAD", path)
        assert (head.status, head.body) == (200, b""), path
        assert head.headers["content-length"] == get.headers["content-length"], path
    assert tiny_server.metric("http_requests_total", handler="/tokenizer_info", status="200") >= 2
    assert tiny_server.post("/ping", {}).json == {"status": "ok"}


def test_every_step_ran_in_a_graph(tiny_server, chat_server, tiny, smollm) -> None:
    """Those of all tests that came before, too."""
    complete(tiny, max_tokens=2)
    smollm.completions.create(model="smollm2", prompt="a", max_tokens=2)
    for server in (tiny_server, chat_server):
        assert server.metric("steps_total", mode="graph") > 0
        assert server.metric("steps_total", mode="eager") == 0
        graphs = server.get("/graphs").json
        assert (graphs["eager_steps"], graphs["eager_reasons"]) == (0, {})


# Started otherwise


@pytest.fixture(scope="module")
def fastdeploy(tmp_path_factory) -> tuple[LiveServer, LiveServer]:
    """Started by a command line for FastDeploy, for a context of 32768, with a key to the API; and its port for metrics."""
    model = save_tiny_model(tmp_path_factory.mktemp("long-model"), max_model_len=32768)
    port, queue_port, metrics_port = free_ports(3)
    flags = [
        *("--max-num-seqs", "64", "--max-model-len", "32768", "--port", f"{port}"),
        *("--engine-worker-queue-port", f"{queue_port}", "--metrics-port", f"{metrics_port}"),
        *("--tensor-parallel-size", "1"),
        *("--graph-optimization-config", ' {"use_cudagraph":true, "cudagraph_only_prefill":true}'),
        *("--override-generation-config", '{"temperature": 0}'),
    ]
    with running_server(model, flags, STEPGRAPH_API_KEY=KEY) as server:
        assert server.port == port
        yield server, replace(server, port=metrics_port)


def test_a_command_line_for_fastdeploy_serves_on_its_ports(fastdeploy, offline) -> None:
    server, metrics = fastdeploy
    with server.client(api_key=KEY) as client:
        [model] = client.models.list()
        reply = client.completions.create(model=model.id, prompt=PROMPT, max_tokens=24)  # greedy, as the server is told
        assert reply.choices[0].text == generate(offline, PROMPT, ANSWER).outputs[0].text
        assert model.model_dump()["max_model_len"] == 32768
    assert metrics.metric("steps_total", kind="prefill", mode="graph") > 0
    assert metrics.metric("steps_total", kind="prefill", mode="eager") == 0
    assert metrics.metric("steps_total", kind="decode", mode="graph") == 0
    assert metrics.metric("steps_total", kind="decode", reason="not_pure_prefill") >= reply.usage.completion_tokens - 1
    assert "steps without a graph: those that decode (cudagraph_only_prefill)" in "".join(server.output)
    assert metrics.metric("steps_total", kind="decode", mode="graph") == 0
    assert metrics.metric("steps_total", kind="decode", mode="eager", reason="not_pure_prefill") > 0
    assert metrics.get("/v1/models").status == 404


def test_a_wrong_key_is_an_authentication_error(fastdeploy) -> None:
    server, _ = fastdeploy
    with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.models.list()
    assert refused.value.code == "invalid_api_key"
    assert "'Authorization: Bearer KEY'" in str(refused.value)
    assert server.get("/health").status == 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pipeline-parallel-size", "2"], "pipeline_parallel_size=2 is not supported"),
        (["--max-model-len", "999999"], "max_model_len=999999 is above the 512 positions"),
    ],
)
def test_settings_that_cannot_be_had_end_with_code_2_and_one_line(tiny_model, flags, message) -> None:
    command = [sys.executable, "-m", "stepgraph.server", "--model", tiny_model, "--port", "0", "--device", "cpu"]
    ended = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", ended.stderr)
