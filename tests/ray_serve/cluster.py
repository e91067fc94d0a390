"""A real Ray on this machine, with an application on it, as a user sees it."""

import http.client
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray import serve

WAIT_S = 180
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # whose keys would lie in the user's home
    "RAY_memory_monitor_refresh_ms": "0",  # it would end actors for what others on this machine take
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.1",
    "OMP_NUM_THREADS": "1",
}
_ENGINES = "SERVE_REPLICA::default#StepgraphEngine#"


@contextmanager
def running_ray(folder: Path, port: int) -> Iterator[None]:
    """Start Ray with one GPU that is there in name only, and Serve."""
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        ray.init(
            num_cpus=4,
            num_gpus=1,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(folder),
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield
        finally:
            serve.shutdown()
            ray.shutdown()


def replicas() -> dict[str, Any]:
    """The engines' actors, by the names of their replicas."""
    named = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    engines = [name for name in named if name.startswith(_ENGINES)]
    return {name.removeprefix(_ENGINES): ray.get_actor(name, namespace="serve") for name in engines}


def running_replicas() -> int:
    """How many of them take requests."""
    return serve.status().applications["default"].deployments["StepgraphEngine"].replica_states.get("RUNNING", 0)


def engine_processes() -> set[int]:
    """Those that actors of this process's Ray have started. Of an actor that is gone they would not be known for these: see
    `running`."""
    return {
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and "stepgraph.server.engine_process" in _read(entry / "cmdline") and _is_ours(entry)
    }


def running(engines: set[int]) -> set[int]:
    """Those of the processes that have not ended, whoever has them now."""
    return {pid for pid in engines if "stepgraph.server.engine_process" in _read(Path(f"/proc/{pid}/cmdline"))}


def wait_for(condition: Callable[[], Any]) -> Any:
    """Poll until it holds, which must happen."""
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.05)
    return found


class Client:
    """Sends requests to the application."""

    def __init__(self, port: int):
        self.port = port

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a reply."""
        with self.open(method, path, body, **headers) as reply:
            return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()

    @contextmanager
    def open(self, method: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """A reply that is still to be read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json", **headers})
            yield connection.getresponse()
        finally:
            connection.close()

    def by_replica(self, name: str, **labels: str) -> Counter[str]:
        """The samples of a metric (with stepgraph: in front), by replica."""
        found: Counter[str] = Counter()
        for line in self.request("GET", "/metrics")[2].decode().splitlines():
            match = re.fullmatch(rf'stepgraph:{name}{{replica="(\w+)",(.*)}} (\S+)', line)
            if match and all(f'{key}="{value}"' in match[2] for key, value in labels.items()):
                found[match[1]] += float(match[3])
        return found


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""


def _is_ours(process: Path) -> bool:
    """Whether this process started it, or what it was started by."""
    while process.name not in ("", "0", str(os.getpid())):
        process = process.with_name((_read(process / "stat").rpartition(")")[2].split() or ["", "0"])[1])
    return process.name == str(os.getpid())
