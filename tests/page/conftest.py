"""A browser for all tests of the page."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium, need_chromium, running_chromium

sys.path.append(str(Path(__file__).parents[1] / "server"))  # its servers serve here too


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Chromium]:
    need_chromium()
    with running_chromium(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium
