"""Every page of the documentation's site in a real browser. tests/test_site.py follows its links."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import opened_tab

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))

from check_site import serving  # noqa: E402

HEADING = "document.querySelector('h1')"


@pytest.fixture(scope="module")
def site(browser, tmp_path_factory) -> Path:
    """Built after the browser: without one, it is not needed."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs the extra docs, which `make docs` installs")
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--site-dir", folder)
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, check=True)
    return folder


def test_every_page_opens_asks_nobody_else_and_has_no_error(browser, site):
    pages = sorted(path.relative_to(site).as_posix().removesuffix("index.html") for path in site.rglob("*.html"))
    assert len(pages) > 40
    with serving(site) as address, opened_tab(browser) as tab:
        for page in pages:
            tab.open(f"{address}/{page}")
            assert tab.value(f"{HEADING}.checkVisibility() && {HEADING}.innerText.length > 1"), page
            pictures = (
                "[...document.querySelectorAll('article img')].filter((each) => each.complete && !each.naturalWidth)"
            )
            assert tab.value(f"{pictures}.length") == 0, page
            assert tab.complaints == [], page
        assert [url for url in tab.requests if not url.startswith((f"{address}/", "data:", f"blob:{address}/"))] == []
