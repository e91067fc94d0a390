"""docs/models.md lists what transformers has and what runs natively, and counts its own rows; some of them are tried again."""

import sys
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stepgraph.models.registry import ARCHITECTURES

SCRIPTS = Path(__file__).parents[1] / "scripts"
RUN = "run scripts/make_models_page.py"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import make_models_page
    finally:
        sys.path.remove(str(SCRIPTS))
    return make_models_page


@pytest.fixture(scope="module")
def rows(script):
    text = script.PAGE.read_text()
    if f"Tried with transformers {transformers.__version__}:" not in text:
        pytest.skip(f"the page is of another version of transformers than {transformers.__version__}")
    return script.read_rows(text)


def test_every_type_that_transformers_writes_text_with_has_a_row(rows) -> None:
    listed = {row.name for row in rows if row.section in ("decoders", "others", "text parts")}
    assert listed >= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys(), RUN


def test_native_models_are_called_so(rows) -> None:
    assert ARCHITECTURES.keys() <= {row.class_name for row in rows}, RUN
    wrong = {
        row.class_name for row in rows if row.section == "decoders" and row.cells[0] == "native"
    } - ARCHITECTURES.keys()
    assert not wrong, RUN
    wrong = {row.class_name for row in rows if row.cells[0] == "transformers"} & ARCHITECTURES.keys()
    assert not wrong, RUN


def test_what_does_not_run_is_refused_for_a_reason(rows) -> None:
    for row in rows:
        assert row.runs or len(row.cells[0]) > len("refused: because"), row
        assert row.cells[0].startswith(("native", "transformers", "refused: ")), row


def test_the_page_is_what_the_script_makes_of_its_rows(script, rows) -> None:
    assert script.page(rows, transformers.__version__) == script.PAGE.read_text(), f"{RUN} --count"
    assert sorted(row[:3] for row in rows) == sorted(row[:3] for row in script.everything()), RUN
    assert sum(row.recipes for row in rows if row.section == "published") == 68


@pytest.mark.parametrize("name", ["TranslateGemma", "Glyph", "xlnet"])
def test_a_row_is_what_becomes_of_its_model(name, script, rows) -> None:
    (cells,) = [row.cells for row in rows if row.name == name]
    ((section, class_name, make),) = [(s, c, m) for s, n, c, _, m in script.everything() if n == name]
    assert script.try_row(section, class_name, make) == cells, RUN
