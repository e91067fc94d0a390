"""What the two processes tell each other."""

import pytest

from stepgraph.engine.sampling_params import SamplingParams, StructuredOutputs
from stepgraph.errors import RequestError
from stepgraph.server.messages import settings_of


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("regex", "é" * 33_000),
        ("grammar", 'root ::= "' + "a" * 66_000 + '"'),
        ("choice", ("a" * 40_000, "b" * 40_000)),
        ("json", {"const": "a" * 200_000}),
        ("structural_tag", {"format": {"type": "const_string", "value": "a" * 2**20}}),
    ],
)
def test_a_form_that_cannot_be_followed_for_its_length_is_not_sent_to_the_engine(name, value) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputs(**{name: value}))
    with pytest.raises(RequestError, match=rf"structured_outputs\.{name} has .* at most \d+ are allowed"):
        settings_of(params)


def test_forms_of_the_lengths_that_can_be_followed_are_sent() -> None:
    for form in ({"regex": "a" * 65_536}, {"choice": ("a" * 32_768, "b" * 32_768)}):
        params = SamplingParams(structured_outputs=StructuredOutputs(**form))
        assert settings_of(params)["structured_outputs"] == form
    emoji = {"const": "\U0001f600" * 16_000}  # 64 kB, and three times as much once it is escaped
    sent = settings_of(SamplingParams(structured_outputs=StructuredOutputs(json=emoji)))
    assert StructuredOutputs(**sent["structured_outputs"]).json == emoji
