"""Clients that people use, against a live server: a table of what each of them got.

    pip install '.[server,clients]'
    stepgraph serve smollm2 &
    python scripts/check_clients.py [--base-url http://127.0.0.1:8000] [--only instructor …] [--page docs/clients.md]

Each check drives a client as its own documentation does and fails if the client raises, or if what comes back is not what was
asked for. Answers are forced by grammars wherever the client lets a server do that, so that a small model suffices; where a
client only asks the model politely (marked "by prompt"), an answer that is no JSON is the model's doing and counted as such.
Exit code 1 if a check fails, 2 if a client is not installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from clients import of_agents, sdks, typed
from clients.base import CHECKS, ByTheModelError, Server

from stepgraph.bench.report import table

__all__ = ["of_agents", "sdks", "typed"]  # importing them adds their checks


@dataclass(frozen=True)
class Row:
    client: str
    what: str
    result: str
    remark: str


def run_checks(server: Server, only: set[str]) -> list[Row]:
    """Every check, one after the other."""
    rows = []
    for (client, what), run in CHECKS.items():
        if only and client not in only:
            continue
        try:
            result, remark = "ok", run(server)
        except ModuleNotFoundError as error:
            result, remark = "not installed", str(error)
        except ByTheModelError as error:
            result, remark = "by the model", str(error)
        except Exception as error:
            result, remark = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rows.append(Row(client, what, result, remark))
        print(f"{client}: {what}: {result} ({remark})", file=sys.stderr)
    return rows


def version_of(client: str) -> str:
    """As installed."""
    try:
        return importlib.metadata.version("pydantic-ai-slim" if client == "pydantic-ai" else client)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def page(server: Server, version: str, rows: list[Row]) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Clients",
        "",
        f"What clients got from stepgraph {version} serving {server.model}, each driven as its own documentation does.",
        f"Made by `scripts/check_clients.py --page docs/clients.md` under Python {platform.python_version()}, which is how to",
        "see what another version, or another model, does; `pip install '.[server,clients]'` installs versions that go together.",
        "",
        "| Client | Version | | Result |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {row.client} | {version_of(row.client)} | {row.what} | {row.result} |" for row in rows]
    lines += [
        "",
        "*By prompt*: the client asks the model for a form and the server for nothing, so that it is for the model to follow it;",
        "*by the model*: it did not. All other forms are forced by the server.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    parser.add_argument("--api-key", default="none", metavar="KEY")
    parser.add_argument("--only", nargs="+", default=[], metavar="CLIENT")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table as a page of the documentation")
    arguments = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = arguments.api_key  # some clients insist on it
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch a list of prices
    root = arguments.base_url.rstrip("/").removesuffix("/v1")
    unknown = set(arguments.only) - {client for client, _ in CHECKS}
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: known are {', '.join(dict(CHECKS))}")
    headers = {"Authorization": f"Bearer {arguments.api_key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{root}/v1/models", headers=headers)) as reply:
            model = json.load(reply)["data"][0]["id"]
        with urllib.request.urlopen(f"{root}/version") as reply:
            version = json.load(reply)["version"]
    except OSError as error:
        print(f"error: {root} does not answer ({error}); start one with `stepgraph serve smollm2`", file=sys.stderr)
        return 2
    server = Server(root, arguments.api_key, model)
    rows = run_checks(server, set(arguments.only))
    print(
        table(
            ["client", "version", "what", "result", "remark"],
            [[row.client, version_of(row.client), row.what, row.result, row.remark] for row in rows],
        )
    )
    if arguments.page is not None:
        arguments.page.write_text(page(server, version, rows))
    if any(row.result == "FAILED" for row in rows):
        return 1
    return 2 if any(row.result == "not installed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
