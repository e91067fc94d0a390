"""docs/settings.md says what the dataclasses say."""

import importlib.util
from pathlib import Path

import pytest

from stepgraph.config import read_settings, serve_config

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_settings_page.py"


@pytest.fixture(scope="module")
def script():
    """The module of the script."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_makes_now(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run: python scripts/make_settings_page.py"


def test_the_example_of_a_file_is_one(script, tmp_path):
    (tmp_path / "serve.yaml").write_text(script.EXAMPLE)
    engine, server = serve_config(read_settings(str(tmp_path / "serve.yaml")))
    assert (engine.scheduler.max_num_seqs, server.port) == (32, 8080)
