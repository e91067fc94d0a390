"""docs/adding-a-model.md shows the code as it is."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_documented_model_file_is_the_real_one() -> None:
    page = (ROOT / "docs/adding-a-model.md").read_text()
    assert page.split("```python\n")[1].split("```")[0] == (ROOT / "stepgraph/models/qwen3.py").read_text()
