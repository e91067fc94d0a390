"""The Grafana dashboard is what its script makes, and asks for metrics that exist."""

import importlib.util
import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from observed import busy_metrics
from prometheus_client import parser

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_dashboard.py"
SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds."""
METRIC = re.compile(r"((?:stepgraph:|process_)\w+)(?:\{([^}]*)\})?")


def grouping(query: str) -> set[str]:
    """The labels by which a query sums or joins."""
    return {label for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for label in labels.split(", ")}


@pytest.fixture(scope="module")
def script():
    """The module of the script."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dashboard(script):
    """As Grafana reads it."""
    return json.loads(script.DASHBOARD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def queries(dashboard):
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


@pytest.fixture(scope="module")
def labels_of():
    """The labels of every sample that a busy server gives."""
    text = busy_metrics().render(None)[0].decode()
    labels: dict[str, set[str]] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set(SCRAPED)).update(sample.labels)
    return labels


def test_the_dashboard_is_what_the_script_makes_now(script):
    assert script.DASHBOARD.read_text(encoding="utf-8") == script.text(), "run: python scripts/make_dashboard.py"


def test_every_metric_and_label_of_a_query_exists(queries, labels_of):
    assert queries
    for query in queries:
        metrics = METRIC.findall(query)
        assert metrics, query
        for name, selector in metrics:
            assert name in labels_of, query
            assert set(re.findall(r"(\w+)=~?\"", selector)) <= labels_of[name], query
        assert grouping(query) <= set.intersection(*(labels_of[name] for name, _ in metrics)), query


def test_legends_name_labels_that_the_query_keeps(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            if "sum" in target["expr"]:
                kept = grouping(target["expr"]) - {"le"}
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == kept, target


def test_every_query_of_the_server_is_for_the_chosen_models(queries):
    for query in queries:
        for name, selector in METRIC.findall(query):
            assert 'model_name=~"$model_name"' in selector or name.startswith("process_"), query


def test_every_query_of_engines_is_for_the_chosen_ones(queries, labels_of):
    for query in queries:
        for name, selector in METRIC.findall(query):
            assert ('engine=~"$engine"' in selector) == ("engine" in labels_of[name]), query


def test_brackets_of_queries_match(queries):
    for query in queries:
        rest = re.sub(r"[^()\[\]{}]", "", re.sub(r'"[^"]*"', "", query))
        while rest != (rest := re.sub(r"\(\)|\[\]|\{\}", "", rest)):
            pass
        assert rest == "", query


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for a, b in combinations([panel["gridPos"] for panel in panels], 2):
        apart_across = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_down = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_across or apart_down, (a, b)
    assert all(0 <= panel["gridPos"]["x"] <= 24 - panel["gridPos"]["w"] for panel in panels)


def test_data_source_model_and_engines_can_be_chosen(dashboard):
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "model_name", "engine"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if "targets" in panel} == {"${datasource}"}
