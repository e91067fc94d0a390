"""A browser, and a server that says what a test wants, for all tests of the page."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium, Tab, need_chromium, opened_tab, running_chromium
from page_server import FakeServer, running_fake

sys.path.append(str(Path(__file__).parents[1] / "server"))  # its servers serve here too


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Chromium]:
    need_chromium()
    with running_chromium(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with running_fake() as server:
        yield server


@pytest.fixture
def tab(browser, fake, tmp_path) -> Iterator[Tab]:
    """The page, open and connected. Whatever a test does, it asks nobody but its server, and nothing in it goes wrong."""
    with opened_tab(browser, downloads=tmp_path) as opened:
        opened.open(fake.url)
        opened.wait_text("#connection", "Live")
        yield opened
        assert [url for url in opened.requests if not url.startswith((fake.url, f"blob:{fake.url}"))] == []
        assert opened.complaints == []
