"""Requests made from the server's own OpenAPI document: none of them is the server's fault, and it serves on."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

EXAMPLES = 12  # of each operation


@pytest.mark.slow
def test_no_request_breaks_the_server(tiny_server) -> None:
    def known() -> str:
        reply = tiny_server.post("/v1/completions", {"prompt": "abc", "max_tokens": 8, "temperature": 0})
        assert reply.status == 200
        return reply.json["choices"][0]["text"]

    expected = known()
    schema = schemathesis.openapi.from_url(f"{tiny_server.url}/openapi.json")
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case) -> None:
            # an answer may be long: that is no fault
            if isinstance(case.body, dict):
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                    if name in case.body:
                        case.body[name] = 4
            if case.query.get("seconds"):  # nor may a trace
                case.query["seconds"] = 0.1
            response = case.call(timeout=60)
            assert response.status_code < 500, (response.status_code, response.text, case.as_curl_command())

        check()
        tried.add(operation.label)
    assert {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses", "GET /graphs"} <= tried
    tiny_server.wait_idle()
    assert known() == expected
