"""Make stepgraph/server/dashboards/grafana.json: a Grafana dashboard of the metrics in docs/metrics.md.

    python scripts/make_dashboard.py

A test holds the file against this script, and its queries against the metrics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARD = Path(__file__).parents[1] / "stepgraph" / "server" / "dashboards" / "grafana.json"

WIDTH = 24
"""Columns of Grafana's grid."""
PANEL_HEIGHT = 8
ROW_HEIGHT = 1
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
MODEL, ENGINE = 'model_name=~"$model_name"', 'engine=~"$engine"'
OF_FRONTS = ("http_requests_total", "requests_refused_total")
"""Metrics that no engine has to do with."""


class Panel(NamedTuple):
    """Curves over time."""

    title: str
    unit: str
    """Grafana's name of it: `s`, `bytes`, `percentunit`, `short`."""
    queries: tuple[tuple[str, str], ...]
    """(PromQL, legend)."""
    description: str = ""
    stacked: bool = False


def chosen(metric: str, *labels: str) -> str:
    """Series of the chosen models and engines."""
    return f"stepgraph:{metric}{{{','.join((MODEL, *(() if metric in OF_FRONTS else (ENGINE,)), *labels))}}}"


def rate(metric: str, by: str = "", **labels: str) -> str:
    """A counter's growth per second, summed over servers and over all labels but `by`."""
    series = chosen(metric, *(f'{name}="{value}"' for name, value in labels.items()))
    return f"sum{f' by ({by}) ' if by else ''}(rate({series}[$__rate_interval]))"


def total(metric: str, by: str = "") -> str:
    """A gauge, summed over servers and over all labels but `by`."""
    return f"sum{f' by ({by}) ' if by else ''}({chosen(metric)})"


def by_rank(metric: str, worst: str) -> tuple[tuple[str, str], ...]:
    """A gauge of ranks: for each, the worst of all servers, which is what `worst` of PromQL gives."""
    return ((f"{worst} by (engine, rank) ({chosen(metric)})", "engine {{engine}} rank {{rank}}"),)


def mean(metric: str) -> str:
    """Of a histogram's values."""
    return f"{rate(f'{metric}_sum')} / {rate(f'{metric}_count')}"


def quantiles(metric: str, *wanted: float, legend: str = "") -> tuple[tuple[str, str], ...]:
    """Of a histogram's values."""
    return tuple(
        (f"histogram_quantile({q}, {rate(f'{metric}_bucket', by='le')})", f"{legend} p{100 * q:g}".strip())
        for q in wanted
    )


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Traffic",
        (
            Panel(
                "Requests",
                "short",
                ((total("num_requests_running"), "running"), (total("num_requests_waiting"), "waiting")),
                "In the engine, one for each answer.",
            ),
            Panel(
                "Answers ended",
                "reqps",
                ((rate("request_success_total", by="finished_reason"), "{{finished_reason}}"),),
                stacked=True,
            ),
            Panel(
                "HTTP responses",
                "reqps",
                ((rate("http_requests_total", by="handler, status"), "{{handler}} {{status}}"),),
                stacked=True,
            ),
            Panel(
                "Tokens per request",
                "short",
                (
                    *quantiles("request_prompt_tokens", 0.5, 0.95, legend="prompt"),
                    *quantiles("request_generation_tokens", 0.5, 0.95, legend="answer"),
                ),
            ),
        ),
    ),
    (
        "Latency",
        (
            Panel("Time to first token", "s", quantiles("time_to_first_token_seconds", 0.5, 0.95, 0.99)),
            Panel("Time between tokens", "s", quantiles("inter_token_latency_seconds", 0.5, 0.95, 0.99)),
            Panel("Request, end to end", "s", quantiles("e2e_request_latency_seconds", 0.5, 0.95, 0.99)),
            Panel(
                "Phases of a request",
                "s",
                (
                    *quantiles("request_queue_time_seconds", 0.95, legend="queue"),
                    *quantiles("request_prefill_time_seconds", 0.95, legend="prefill"),
                    *quantiles("request_decode_time_seconds", 0.95, legend="decode"),
                ),
            ),
        ),
    ),
    (
        "Throughput and KV cache",
        (
            Panel(
                "Tokens per second",
                "short",
                ((rate("prompt_tokens_total"), "prompt"), (rate("generation_tokens_total"), "generated")),
                "Prompt tokens include those that the prefix cache saved.",
            ),
            Panel("Tokens per step", "short", ((mean("iteration_tokens_total"), "mean"),), "Without padding."),
            Panel(
                "KV cache",
                "percentunit",
                (
                    (f"max({chosen('kv_cache_usage_perc')})", "in use"),
                    (
                        f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}",
                        "prompt tokens from the prefix cache",
                    ),
                ),
                "Usage is that of the fullest engine.",
            ),
            Panel(
                "Preemptions", "cps", ((rate("num_preemptions_total"), "preemptions"),), "A full KV cache causes them."
            ),
        ),
    ),
    (
        "Engines",
        (
            Panel(
                "Requests by engine",
                "short",
                ((total("num_requests_running", by="engine"), "{{engine}}"),),
                "Running ones. A server sends each request to the engine that has its prefix, or less to do.",
            ),
            Panel("Waiting requests by engine", "short", ((total("num_requests_waiting", by="engine"), "{{engine}}"),)),
            Panel(
                "Generated tokens by engine",
                "short",
                ((rate("generation_tokens_total", by="engine"), "{{engine}}"),),
                stacked=True,
            ),
            Panel(
                "Prefix cache by engine",
                "percentunit",
                (
                    (
                        f"{rate('prefix_cache_hits_total', by='engine')} / {rate('prefix_cache_queries_total', by='engine')}",
                        "{{engine}}",
                    ),
                ),
                "Share of prompt tokens found there.",
            ),
        ),
    ),
    (
        "Steps",
        (
            Panel(
                "Steps in graphs and eager",
                "cps",
                ((rate("steps_total", by="mode, reason"), "{{mode}} {{reason}}"),),
                stacked=True,
            ),
            Panel(
                "Shares",
                "percentunit",
                (
                    (f"{rate('steps_total', mode='graph')} / {rate('steps_total')}", "steps in graphs"),
                    (f"{rate('step_tokens_total', kind='padding')} / {rate('step_tokens_total')}", "padding tokens"),
                ),
            ),
            Panel(
                "Step time",
                "s",
                (
                    (mean("step_duration_seconds"), "mean"),
                    *quantiles("step_duration_seconds", 0.5, 0.99),
                    (mean("host_step_seconds"), "host, mean"),
                ),
                "The host plans and takes in results while the device runs; it delays steps where its time comes near theirs.",
            ),
            Panel("Steps by kind", "cps", ((rate("steps_total", by="kind"), "{{kind}}"),), stacked=True),
        ),
    ),
    (
        "Speculative decoding",
        (
            Panel(
                "Tokens per draft",
                "short",
                (
                    (
                        f"1 + {rate('spec_decode_num_accepted_tokens_total')} / {rate('spec_decode_num_drafts_total')}",
                        "mean accepted length",
                    ),
                ),
                "Of rows that verified proposals. 1 is no gain.",
            ),
            Panel(
                "Proposals",
                "cps",
                (
                    (rate("spec_decode_num_draft_tokens_total"), "verified"),
                    (rate("spec_decode_num_accepted_tokens_total"), "accepted"),
                ),
            ),
            Panel(
                "Accepted by position",
                "cps",
                ((rate("spec_decode_num_accepted_tokens_per_pos_total", by="position"), "{{position}}"),),
                "One stands only if all before it do.",
            ),
            Panel(
                "Saved steps",
                "cps",
                ((rate("spec_decode_saved_steps_total"), "saved"), (rate("steps_total"), "run")),
                "Saved ones are of single requests; a step that is run serves many.",
            ),
        ),
    ),
    (
        "Graphs",
        (
            Panel("Graph memory", "bytes", ((total("graph_bytes"), "all graphs"),)),
            Panel("Captured graphs", "short", ((total("graphs"), "graphs"),)),
            Panel(
                "Time spent capturing",
                "percentunit",
                ((rate("graph_capture_seconds_total"), "share of time"),),
                "Above 0 after the start: graphs are captured at their first use.",
            ),
            Panel(
                "Most used graphs",
                "cps",
                (
                    (
                        f"topk(8, {rate('graph_replays_total', by='tokens, rows, drafts, variant')})",
                        "{{tokens}}x{{rows}}+{{drafts}} {{variant}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "Ranks",
        (
            Panel("Graph memory by rank", "bytes", by_rank("rank_graph_bytes", "max")),
            Panel(
                "Free memory by rank",
                "bytes",
                by_rank("rank_free_memory_bytes", "min"),
                "Of its device. The KV cache, of a size fixed at the start, is not free.",
            ),
            Panel(
                "CPU by rank",
                "percentunit",
                by_rank("rank_cpu_share", "max"),
                "Of a core, since the engine was built.",
            ),
            Panel(
                "Waiting by rank",
                "percentunit",
                by_rank("rank_waiting_share", "max"),
                "For orders, since the engine was built. Rank 0 gives them.",
            ),
        ),
    ),
    (
        "Experts",
        (
            Panel(
                "Busiest experts",
                "cps",
                ((f"topk(8, {rate('expert_tokens_total', by='expert')})", "expert {{expert}}"),),
                "Tokens that choose them, in all layers together.",
            ),
            Panel(
                "Imbalance",
                "short",
                (
                    (f"max({chosen('expert_imbalance')})", "experts"),
                    (f"max({chosen('expert_rank_imbalance')})", "ranks"),
                ),
                "Tokens of the busiest over the mean, since the engine started; 1 is balance.",
            ),
            Panel("Experts' tokens by rank", "short", by_rank("rank_expert_tokens", "max")),
        ),
    ),
    (
        "Between engines, and to host memory",
        (
            Panel(
                "Keys and values that came",
                "Bps",
                ((rate("kv_transfer_bytes_total", by="engine", direction="received"), "engine {{engine}}"),),
                "From engines that compute prompts.",
            ),
            Panel(
                "Time until they were there",
                "s",
                quantiles("kv_transfer_seconds", 0.5, 0.99),
                "From asking the other engine to having them, confirmed.",
            ),
            Panel(
                "Prompts on their way",
                "short",
                (
                    (total("kv_leases"), "held for others"),
                    (total("kv_fetches"), "being fetched"),
                    (total("kv_blocks_quarantined"), "blocks quarantined"),
                ),
            ),
            Panel(
                "Prompts that did not come",
                "reqps",
                ((rate("kv_transfer_failures_total", by="reason"), "{{reason}}"),),
                "Where the answer is given, these are computed again.",
            ),
            Panel(
                "Blocks from host memory",
                "cps",
                (
                    (rate("kv_host_cache_hits_total"), "copied back"),
                    (rate("kv_host_cache_evictions_total"), "made room"),
                ),
            ),
        ),
    ),
    (
        "Health",
        (
            Panel(
                "Engine",
                "short",
                (
                    (f"min({chosen('engine_up')})", "up"),
                    (
                        f"sum(increase({chosen('engine_restarts_total')}[$__rate_interval]))",
                        "restarts",
                    ),
                ),
                "Up is 0 while any engine takes no requests.",
            ),
            Panel(
                "Errors",
                "reqps",
                (
                    (rate("request_success_total", finished_reason="error"), "answers ended by an error"),
                    (
                        "sum(rate(" + chosen("http_requests_total", 'status=~"5.."') + "[$__rate_interval]))",
                        "HTTP 5xx",
                    ),
                ),
            ),
            Panel("Refused requests", "reqps", ((rate("requests_refused_total", by="reason"), "{{reason}}"),)),
            Panel(
                "HTTP process",
                "percentunit",
                (
                    (
                        "rate(process_cpu_seconds_total[$__rate_interval]) "
                        f"and on (job, instance) {chosen('engine_up')}",
                        "CPU of {{instance}}",
                    ),
                ),
                "Near 1 it is what limits the server.",
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, contents in ROWS:
        position = {"x": 0, "y": top, "w": WIDTH, "h": ROW_HEIGHT}
        row = {"type": "row", "title": title, "gridPos": position, "collapsed": False, "panels": []}
        panels.append({"id": len(panels) + 1, **row})
        top += ROW_HEIGHT
        width = WIDTH // len(contents)
        for column, panel in enumerate(contents):
            position = {"x": column * width, "y": top, "w": width, "h": PANEL_HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, position))
        top += PANEL_HEIGHT
    return {
        "uid": "stepgraph",
        "title": "stepgraph",
        "tags": ["llm", "stepgraph"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one cursor over all panels
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "15s",
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _panel(panel: Panel, id: int, position: dict[str, int]) -> dict[str, Any]:
    curves = {"fillOpacity": 30 if panel.stacked else 0, "showPoints": "never"}
    if panel.stacked:
        curves["stacking"] = {"mode": "normal", "group": "A"}
    return {
        "id": id,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "gridPos": position,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": curves}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend,
                "range": True,
            }
            for number, (query, legend) in enumerate(panel.queries)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        _label("model_name", "Model", "stepgraph:engine_up"),
        _label("engine", "Engine", f"stepgraph:engine_up{{{MODEL}}}"),
    ]


def _label(name: str, title: str, series: str) -> dict[str, Any]:
    """A choice among the values of a label; all at first."""
    return {
        "name": name,
        "label": title,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({series}, {name})", "refId": name},
        "refresh": 2,  # whenever the range of time changes
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    DASHBOARD.parent.mkdir(exist_ok=True)
    DASHBOARD.write_text(text(), encoding="utf-8")
    print(f"wrote {DASHBOARD}")
