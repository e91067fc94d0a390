"""Fields of requests."""

import pytest
from pydantic import ValidationError

from stepgraph.server.protocol import ChatRequest, CompletionRequest


@pytest.mark.parametrize(("kind", "prompt"), [(CompletionRequest, {"prompt": "a"}), (ChatRequest, {"messages": []})])
def test_a_cache_salt_is_short_as_the_engine_reads_all_of_it_time_and_again(kind, prompt) -> None:
    assert kind.model_validate({**prompt, "cache_salt": "s" * 1024}).cache_salt == "s" * 1024
    with pytest.raises(ValidationError, match="cache_salt"):
        kind.model_validate({**prompt, "cache_salt": "s" * 1025})
