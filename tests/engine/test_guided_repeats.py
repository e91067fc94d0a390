"""Repetitions that are written otherwise match the same texts: held against Python's `re` on all short ones."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepgraph.engine.guided_text import Limits, Regex
from stepgraph.errors import RequestError

TEXTS = ["".join(letters) for length in range(6) for letters in itertools.product("ab", repeat=length)]


def rewritten(regex: str) -> str:
    return Regex(regex, Limits("regex")).rewritten


def language(regex: str) -> set[str]:
    pattern = re.compile(regex)
    return {text for text in TEXTS if pattern.fullmatch(text)}


def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    low = st.integers(0, 3)
    times = st.one_of(
        st.sampled_from("?*+"),
        low.map(lambda n: f"{{{n}}}"),
        low.map(lambda n: f"{{{n},}}"),
        st.tuples(low, low).map(lambda bounds: f"{{{min(bounds)},{max(bounds)}}}"),
    )
    return st.one_of(
        st.tuples(inner, times).map(lambda parts: f"({parts[0]}){parts[1]}"),
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: f"({'|'.join(options)})"),
    )


REGEXES = st.recursive(st.sampled_from(["a", "b", "[ab]", "()", "a?", "b*", "a{0,2}"]), extend, max_leaves=8)


@given(REGEXES)
@settings(max_examples=200)
def test_a_rewritten_expression_matches_the_same_texts(regex) -> None:
    try:
        written = rewritten(regex)
    except RequestError:  # over a limit
        return
    assert language(written) == language(regex), (regex, written)


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        ("x(a{0,30}){0,30}y", "xa{0,900}y"),
        ("x((a{0,9}){0,9}){0,9}", "xa{0,729}"),
        ("(a{1,30}){3,5}", "a{3,150}"),
        ("(a{4}){0,2}", "(a{4}){0,2}"),
        ("(a{4,5}){2,9}", "(a{4,5}){2,9}"),
        ("(a{4,5}){3,9}", "a{12,45}"),
        ("((ab){0,3}c?){2,5}", "((ab){1,3}c?|c){0,5}"),
        ("(a?b?){3,}", "(ab?|b)*"),
        ("(a|b*|)*", "(a|b+)*"),
        ("(a*)+", "a*"),
        ("a?" * 40, "a{0,40}"),
        ("a|aa|aaa", "a{1,3}"),
        ("aabb", "aabb"),
        ("()", "()"),
    ],
)
def test_what_may_be_empty_or_nests_is_written_with_one_repetition(regex, expected) -> None:
    assert rewritten(regex) == expected


def test_a_long_list_of_words_is_read_at_once() -> None:
    words = "|".join(f"w{i}" for i in range(3000))
    assert rewritten(words) == words
