"""What deploy/kubernetes asks of a cluster is what Kubernetes and its extensions understand, and what the server does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kustomize import Resource, build, documents, pod_of, pods_containers
from starlette.routing import Route

from stepgraph import __version__
from stepgraph.cli import _parser
from stepgraph.config import EngineConfig, serve_config, settings_from_flags
from stepgraph.config.server import ServerConfig
from stepgraph.server.app import create_app

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "server"))

from live import TINY_FLAGS, running_server  # noqa: E402
from observed import service  # noqa: E402

FOLDER = ROOT / "deploy" / "kubernetes"
PAGE = ROOT / "docs" / "kubernetes.md"
KUSTOMIZATIONS = sorted(path.parent for path in FOLDER.rglob("kustomization.yaml"))
LONE = [FOLDER / "gateway" / "inference-pool.yaml", FOLDER / "kserve" / "llm-inference-service.yaml"]
VALUES = sorted(FOLDER.rglob("router-values*.yaml"))
SCHEMAS = json.loads((ROOT / "tests" / "data" / "kubernetes_schemas.json").read_text())
KUBERNETES = ("1.30", kubernetes_validate.latest_version())
"""The oldest that the manifests are for, and the newest that is known."""
VARIABLES = {"$(POD_IP)": "10.0.0.7"}
"""What a cluster fills in."""
MARGIN_S = 15
"""For processes to end, after their requests have."""


def name_of(folder: Path) -> str:
    return str(folder.relative_to(FOLDER))


def everything() -> Iterator[tuple[str, Resource]]:
    """All resources, each kustomization's as it is built, with where they come from."""
    for folder in KUSTOMIZATIONS:
        for resource in build(folder):
            yield f"{name_of(folder)}: {resource['kind']} {resource['metadata']['name']}", resource
    for file in LONE:
        for resource in documents(file):
            yield f"{name_of(file)}: {resource['kind']}", resource


ALL = dict(everything())
SERVERS = {
    name: (pod["spec"] if pod else resource["spec"]["template"])
    for name, resource in ALL.items()
    if (pod := pod_of(resource)) or resource["kind"] == "LLMInferenceService"
}
"""What pods with a server in them are."""


def server_in(pod: Resource) -> Resource:
    [server] = pod["containers"]
    return server


def settings_of(server: Resource, monkeypatch: pytest.MonkeyPatch) -> tuple[EngineConfig, ServerConfig]:
    """The settings that a container's command line stands for, as the command itself reads them."""
    monkeypatch.setenv("STEPGRAPH_KV_TRANSFER_SECRET", "a secret that is long enough")
    words = [*server.get("command", ("stepgraph",)), *server["args"]]
    for variable, filled in VARIABLES.items():
        words = [word.replace(variable, filled) for word in words]
    assert words[:2] == ["stepgraph", "serve"]
    assert not [word for word in words if "$" in word]
    return serve_config(settings_from_flags(_parser().parse_args(words[1:]), server=True))


def test_no_manifest_is_left_out() -> None:
    named = {file.resolve() for file in (*LONE, *VALUES)}
    for folder in KUSTOMIZATIONS:
        [plan] = documents(folder / "kustomization.yaml")
        named.add(folder / "kustomization.yaml")
        named |= {(folder / name).resolve() for name in plan["resources"]}
        named |= {(folder / patch["path"]).resolve() for patch in plan.get("patches", ())}
    assert {file for file in FOLDER.rglob("*") if file.is_file()} <= named


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", ["overlays/cuda-prefill-decode", "disaggregated", "gateway"])
def test_kubectl_makes_the_same_of_a_folder(name) -> None:
    folder = FOLDER / name
    made = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True).stdout

    def by_name(resources: list[Resource]) -> dict[tuple[str, str], Resource]:
        return {(each["kind"], each["metadata"]["name"]): each for each in resources}

    assert by_name(list(yaml.safe_load_all(made))) == by_name(build(folder))


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", ALL)
def test_resources_are_what_kubernetes_and_its_extensions_understand(name, version) -> None:
    resource = ALL[name]
    if resource["kind"] not in SCHEMAS:
        kubernetes_validate.validate(resource, version, strict=True)
        return
    jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    if (pod := SERVERS.get(name)) is not None:
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod}
        kubernetes_validate.validate(as_pod, version, strict=True)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("InferencePool", ("targetPorts",), []),
        ("InferencePool", ("endpointPickerRef", "port"), 9002),
        ("HTTPRoute", ("rules", 0, "timeouts", "request"), "never"),
        ("PodMonitor", ("podMetricsEndpoints", 0, "port"), 8000),
        ("ServiceMonitor", ("endpoints", 0, "port"), 8000),
        ("LLMInferenceService", ("images",), []),
        ("InferenceObjective", ("priority",), "high"),
    ],
)
def test_a_mistake_in_an_extensions_resource_is_found(kind, path, value) -> None:
    resource = json.loads(json.dumps(next(each for each in ALL.values() if each["kind"] == kind)))
    place = resource["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(resource, SCHEMAS[kind])


@pytest.mark.parametrize("name", SERVERS)
def test_command_lines_are_the_servers_own_and_listen_where_the_cluster_looks(name, monkeypatch) -> None:
    pod = SERVERS[name]
    server = server_in(pod)
    engine, config = settings_of(server, monkeypatch)
    assert config.host == "0.0.0.0"
    ports = {port["name"]: port["containerPort"] for port in server.get("ports", ())}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = server[probe]["httpGet"]["port"]
        assert ports.get(port, port) == config.port, probe
    if "kv-transfer" in ports:
        assert ports["kv-transfer"] == engine.transfer.kv_transfer_port
    events = engine.kv_events
    if "kv-events" in ports:
        replay = events.replay_endpoint
        assert events.enable_kv_cache_events
        assert replay is not None
        assert (events.endpoint.port, replay.port) == (ports["kv-events"], ports["kv-replay"])
        assert events.kv_events_topic == f"kv@{VARIABLES['$(POD_IP)']}:{config.port}@{engine.model.model}"
    for proxy in pod.get("initContainers", ()):
        flags = dict(flag.split("=") for flag in proxy["args"])
        assert (int(flags["--model-server-port"]), config.port != int(flags["--port"])) == (config.port, True)


@pytest.fixture(scope="module")
def routes() -> set[tuple[str, str]]:
    """Methods and paths of the server's application."""
    app: Any = create_app(service(), api_keys=("key",))
    while not hasattr(app, "routes"):
        app = app._app
    return {(method, each.path) for each in app.routes if isinstance(each, Route) for method in each.methods or ()}


@pytest.mark.parametrize("name", SERVERS)
def test_probes_ask_what_the_server_answers_and_give_it_the_time_it_needs(name, routes, monkeypatch) -> None:
    pod = SERVERS[name]
    server = server_in(pod)
    _, config = settings_of(server, monkeypatch)
    paths = {probe: server[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/health", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert {("GET", path) for path in paths.values()} <= routes
    liveness = server["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 600  # the server mends its engine by itself
    waits_s = (
        server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 15)
    )  # KServe's template: 15
    assert pod["terminationGracePeriodSeconds"] >= waits_s + config.shutdown_timeout + MARGIN_S


@pytest.mark.parametrize("name", [name for name, resource in ALL.items() if resource["kind"] == "Deployment"])
def test_pods_may_do_nothing_that_they_need_not(name) -> None:
    pod = SERVERS[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (1000, 1000)
    for container in pods_containers(ALL[name]):
        context = container["securityContext"]
        assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
        assert context["capabilities"] == {"drop": ["ALL"]}
    server = server_in(pod)
    mounts = {mount["mountPath"]: mount["name"] for mount in server["volumeMounts"]}
    assert mounts.keys() >= {"/home/stepgraph/.cache", "/tmp", "/dev/shm"}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    variables = {variable["name"]: variable.get("value") for variable in server["env"]}
    assert Path(variables["TRITON_CACHE_DIR"]).is_relative_to("/home/stepgraph/.cache")


@pytest.mark.parametrize("name", SERVERS)
def test_images_are_of_this_version(name) -> None:
    folder = name.partition(":")[0]
    image, _, tag = server_in(SERVERS[name])["image"].partition(":")
    assert image == "stepgraph"
    assert tag == ("" if folder == "base" else f"{__version__}-{'cuda' if 'cuda' in tag else 'cpu'}")
    words = server_in(SERVERS[name])["args"]
    assert ("--device=cpu" in words) == tag.endswith("-cpu")


def test_what_selects_pods_selects_those_of_a_server() -> None:
    labels = [pod["metadata"]["labels"] for resource in ALL.values() if (pod := pod_of(resource))]

    def selected(wanted: dict[str, str]) -> bool:
        return any(wanted.items() <= each.items() for each in labels)

    for name, resource in ALL.items():
        spec = resource["spec"]
        if resource["kind"] == "Service":
            assert selected(spec["selector"]), name
        elif resource["kind"] == "NetworkPolicy":
            assert selected(spec["podSelector"]["matchLabels"]), name
        elif resource["kind"] in ("Deployment", "InferencePool", "PodMonitor"):
            assert selected(spec["selector"]["matchLabels"]), name
        elif resource["kind"] == "ServiceMonitor":
            assert any(
                spec["selector"]["matchLabels"].items() <= each["metadata"]["labels"].items()
                for each in ALL.values()
                if each["kind"] == "Service"
            ), name
    for file in VALUES:
        [values] = documents(file)
        assert selected(values["router"]["modelServers"]["matchLabels"]), file
        assert values["router"]["modelServers"]["targetPorts"] == [{"number": 8000}]


def test_routes_and_monitors_name_what_is_there(routes) -> None:
    [pool] = documents(FOLDER / "gateway" / "inference-pool.yaml")
    route, objective = build(FOLDER / "gateway")
    [rule] = route["spec"]["rules"]
    [backend] = rule["backendRefs"]
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])
    assert objective["spec"]["poolRef"]["name"] == pool["metadata"]["name"]
    assert pool["spec"]["targetPorts"] == [{"number": 8000}]
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert ("POST", path) in routes
        assert path.startswith(rule["matches"][0]["path"]["value"])
    for monitor in build(FOLDER / "monitoring"):
        [endpoint] = monitor["spec"]["endpoints" if monitor["kind"] == "ServiceMonitor" else "podMetricsEndpoints"]
        assert ("GET", endpoint["path"]) in routes
        assert endpoint["port"] == "http"


@pytest.mark.parametrize("file", VALUES, ids=name_of)
def test_a_picker_is_told_only_of_plugins_that_it_has_been_given(file) -> None:
    [values] = documents(file)
    picker = values["router"].get("epp")
    if picker is None:  # its defaults
        return
    [config] = picker["pluginsCustomConfig"].values()
    assert picker["pluginsConfigFile"] in picker["pluginsCustomConfig"]
    read = yaml.safe_load(config)
    given = {plugin["type"]: plugin.get("parameters", {}) for plugin in read["plugins"]}
    named = {plugin["pluginRef"] for profile in read["schedulingProfiles"] for plugin in profile["plugins"]}
    for source in read.get("dataLayer", {}).get("sources", ()):
        named |= {source["pluginRef"], *(extractor["pluginRef"] for extractor in source["extractors"])}
    for parameters in given.values():
        named |= {
            *parameters.get("deciders", {}).values(),
            *filter(None, [parameters.get("prefixMatchInfoProducerName")]),
        }
    assert named <= given.keys()
    if (cache := given.get("precise-prefix-cache-producer")) is not None:
        [deployment] = [each for each in build(FOLDER / "overlays" / "cuda-kv-events") if each["kind"] == "Deployment"]
        ports = {
            port["name"]: port["containerPort"] for port in server_in(deployment["spec"]["template"]["spec"])["ports"]
        }
        assert cache["kvEventsConfig"]["podDiscoveryConfig"]["socketPort"] == ports["kv-events"]
        assert (
            cache["tokenProcessorConfig"]["blockSize"] == EngineConfig.from_settings(model="smollm2").cache.block_size
        )


def test_the_page_says_how_every_secret_is_made_and_what_every_folder_is_for() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for resource in ALL.values():
        for container in pods_containers(resource):
            for variable in container.get("env", ()):
                if (secret := variable.get("valueFrom", {}).get("secretKeyRef")) is not None:
                    assert f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}=" in text
    for folder in KUSTOMIZATIONS:
        if folder.parent.name != "disaggregated":
            assert f"deploy/kubernetes/{name_of(folder)}" in text, folder
    for file in (*LONE, *VALUES):
        assert f"deploy/kubernetes/{name_of(file)}" in text, file


WATCHER = """
import os, sys
_log = os.open(os.environ["WRITES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def _note(event, args):
    if event == "open" and not args[2] & _WRITING or event not in ("open", "os.mkdir", "os.rename"):
        return
    if isinstance(args[0], (str, bytes, os.PathLike)):
        os.write(_log, os.fsencode(os.path.abspath(args[0])) + b"\\n")
sys.addaudithook(_note)
"""
"""Of a module that Python imports first, in every process of the server: it writes down which files are opened to be written."""


def test_a_server_writes_to_no_other_folders_than_those_that_are_mounted(tiny_model, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCHER)
    written, temporary = tmp_path / "written", tmp_path / "tmp"
    written.touch()
    temporary.mkdir()
    environment = {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "WRITES": str(written),
        "TMPDIR": str(temporary),
    }
    with running_server(tiny_model, TINY_FLAGS, **environment) as server:
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 4}).status == 200
        assert server.stop() == 0
    paths = {Path(line) for line in written.read_text().splitlines()}
    assert any(path.is_relative_to(temporary) for path in paths), "nothing was watched"
    mounted = (Path.home() / ".cache", temporary, Path("/dev/shm"))
    always = (Path("/dev/null"), Path("/proc"))
    assert {path for path in paths if not any(path.is_relative_to(place) for place in (*mounted, *always))} == set()
