"""The first stop string of a text, however the text is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.engine.stop_strings import StopMatch, StopStrings

STRINGS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3)
TEXT = st.text("ab", max_size=24)


def first_match(text: str, strings: list[str], searched_from: int = 0) -> StopMatch | None:
    """By definition: complete first; then the longest."""
    for end in range(searched_from + 1, len(text) + 1):
        ending = [string for string in strings if text[:end].endswith(string)]
        if ending:
            longest = max(ending, key=len)
            return StopMatch(longest, end - len(longest), end)
    return None


def num_pending(text: str, strings: list[str]) -> int:
    """Of the longest suffix that starts one of the strings without being all of it."""
    return max(n for n in range(len(text) + 1) for string in strings if n < len(string) and text.endswith(string[:n]))


@given(TEXT, STRINGS, st.integers(1, 5))
def test_the_first_string_to_be_complete_is_found_in_pieces_of_any_size(text, strings, size) -> None:
    stop_strings = StopStrings(strings)
    match = None
    for start in range(0, len(text), size):
        match = stop_strings.feed(text[start : start + size], may_stop=True)
        if match is not None:
            break
        assert stop_strings.num_pending == num_pending(text[: start + size], strings)
    assert match == first_match(text, strings)


@given(TEXT, TEXT, STRINGS)
def test_a_match_that_is_complete_too_early_is_passed_over_and_one_across_the_border_is_not(
    early, late, strings
) -> None:
    stop_strings = StopStrings(strings)
    assert stop_strings.feed(early, may_stop=False) is None
    assert stop_strings.num_pending == num_pending(early, strings)
    assert stop_strings.feed(late, may_stop=True) == first_match(early + late, strings, len(early))


@pytest.mark.parametrize(
    ("text", "strings", "string", "start"),
    [
        ("say END now", ["END"], "END", 4),
        ("aab", ["ab", "b"], "ab", 1),
        ("aab", ["b", "ab"], "ab", 1),
        ("abcd", ["abcd", "bc"], "bc", 1),
        ("aaab", ["aab"], "aab", 1),
        ("語語。", ["語。"], "語。", 1),
    ],
)
def test_of_overlapping_strings_the_first_to_be_complete_wins_then_the_longest(text, strings, string, start) -> None:
    assert StopStrings(strings).feed(text, may_stop=True) == StopMatch(string, start, start + len(string))
