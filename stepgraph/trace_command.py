"""`stepgraph trace`: what a running server's steps do, as a file that Perfetto and Chrome open."""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request

from stepgraph.config.server import API_KEY_VARIABLE
from stepgraph.errors import ConfigError, StepgraphError

_REPLY_S = 60.0
"""What the server may take beyond the seconds in which it looks."""


def trace(arguments: argparse.Namespace) -> int:
    """Entry point; returns the exit code. The key is that of the environment variable STEPGRAPH_API_KEY.

    Raises:
        ConfigError: the address is none, the server refuses, or the file cannot be written.
        StepgraphError: the server cannot be reached.
    """
    url = arguments.url.rstrip("/")
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"--url {arguments.url!r} is not the address of a server; write e.g. http://127.0.0.1:8000")
    content = _get(f"{url}/ui/trace?seconds={arguments.seconds:g}", arguments.seconds)
    try:
        arguments.output.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"--output {str(arguments.output)!r} cannot be written: {error.strerror}") from error
    events = json.loads(content)["traceEvents"]
    num_steps = sum(event.get("cat") == "step" for event in events)
    num_requests = sum(event.get("cat") == "request" for event in events)
    print(f"{arguments.output}: {num_steps} steps, {num_requests} requests; open it at https://ui.perfetto.dev")
    return 0


def _get(url: str, seconds: float) -> bytes:
    key = os.environ.get(API_KEY_VARIABLE)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=seconds + _REPLY_S) as reply:
            content: bytes = reply.read()
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise ConfigError(
                f"{url} wants the API key; put it into the environment variable {API_KEY_VARIABLE}"
            ) from error
        if error.code == 404:
            raise ConfigError(
                f"there is nothing at {url}; the server was started with --no-ui, or is another"
            ) from error
        raise ConfigError(f"{url} answers with status {error.code}: {_message(error.read())}") from error
    except (OSError, ValueError) as error:
        raise StepgraphError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from error
    return content


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
