"""As much of `kubectl kustomize` as deploy/kubernetes uses, so that tests can look at what it makes of a folder where it is not
installed. Where it is, a test holds this against it."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]
_KEYS = {
    "containers": "name",
    "env": "name",
    "initContainers": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumes": "name",
}
"""By which items of a pod's lists are the same; patches replace lists of other names."""
_KNOWN = {"apiVersion", "kind", "resources", "images", "nameSuffix", "labels", "patches"}


def documents(path: Path) -> list[Resource]:
    """The resources in a file."""
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def build(folder: Path) -> list[Resource]:
    """The resources that a folder with a kustomization.yaml stands for."""
    [plan] = documents(folder / "kustomization.yaml")
    assert plan.keys() <= _KNOWN, f"{folder}: {plan.keys() - _KNOWN} is not known here"
    found: list[Resource] = []
    for name in plan["resources"]:
        found += build(folder / name) if (folder / name).is_dir() else documents(folder / name)
    for patch in plan.get("patches", ()):
        assert patch.keys() == {"path"}, patch
        [change] = documents(folder / patch["path"])
        [target] = [each for each in found if _is_same(each, change)]
        if change.pop("$patch", None) == "delete":
            found.remove(target)
        else:
            found[found.index(target)] = _merged(target, change)
    for resource in found:
        resource["metadata"]["name"] += plan.get("nameSuffix", "")
        for labels in plan.get("labels", ()):
            assert labels["includeSelectors"] is True
            _label(resource, labels["pairs"])
        for container in pods_containers(resource):
            for image in plan.get("images", ()):
                if container["image"].split(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def pod_of(resource: Resource) -> Resource | None:
    """What a resource says of its pods: `metadata` and `spec`."""
    return resource["spec"]["template"] if resource["kind"] == "Deployment" else None


def pods_containers(resource: Resource) -> list[Resource]:
    """All containers of a resource's pods."""
    pod = pod_of(resource)
    return [] if pod is None else [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def _is_same(one: Resource, other: Resource) -> bool:
    return (one["kind"], one["metadata"]["name"]) == (other["kind"], other["metadata"]["name"])


def _label(resource: Resource, pairs: dict[str, str]) -> None:
    pod = pod_of(resource)
    for labels in (
        resource["metadata"].setdefault("labels", {}),
        *(() if pod is None else (pod["metadata"]["labels"], resource["spec"]["selector"]["matchLabels"])),
    ):
        labels.update(pairs)


def _merged(value: Any, change: Any, name: str = "") -> Any:
    if isinstance(change, dict) and isinstance(value, dict):
        merged = value | {key: _merged(value.get(key), item, key) for key, item in change.items()}
        return {key: item for key, item in merged.items() if item is not None}
    if not isinstance(change, list) or name not in _KEYS or not value:
        return deepcopy(change)
    if {"$patch": "replace"} in change:
        return [item for item in change if "$patch" not in item]
    key, items = _KEYS[name], list(value)
    for item in reversed(change):
        place = next((place for place, each in enumerate(items) if each[key] == item[key]), None)
        if place is None:
            items.insert(0, item)
        else:
            items[place] = _merged(items[place], item)
    return items
