"""A browser for all tests of the page."""

from collections.abc import Iterator

import pytest
from chromium import Chromium, need_chromium, running_chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Chromium]:
    need_chromium()
    with running_chromium(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium
