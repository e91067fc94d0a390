"""A short run of scripts/fuzz_guides.py with the tiny model."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("xgrammar", reason="guided answers need xgrammar")


def load_script():
    path = Path(__file__).parents[2] / "scripts" / "fuzz_guides.py"
    spec = importlib.util.spec_from_file_location("fuzz_guides", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_no_structured_output_holds_up_others(create_engine) -> None:
    engine = create_engine()
    report = load_script().fuzz(engine, seconds=2.5)
    engine.shutdown()
    for name in ("free", "guided"):
        assert report[name]["tokens"] > 20
        assert report[name]["longest_ms"] < 5000, report[name]
    assert report["requests"] > 8
    assert not any("True" in outcome or "None" in outcome for outcome in report["outcomes"])  # sentences, not tuples
