"""Which platform a machine gets, and what of installed packages is refused."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from stepgraph import LLM, collect_env
from stepgraph.config import EngineConfig
from stepgraph.errors import ConfigError
from stepgraph.executor import build
from stepgraph.platforms import PROTOCOL_VERSION, create_platform


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("acme-npu", "1.2", "npu", code)`: a package whose module of that code has the class `Platform`, for this test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(package: str, version: str, platform: str, code: str) -> None:
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
        about = Path(tmp_path, f"{module}-{version}.dist-info")
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (about / "entry_points.txt").write_text(f"[stepgraph.platforms]\n{platform} = {module}:Platform\n")
        importlib.invalidate_caches()

    return write


@pytest.mark.parametrize(("build", "vendor"), [("hip", "ROCm"), ("xpu", "XPU")])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_build_of_torch_for_other_gpus_is_refused_and_runs_on_the_cpu_if_asked(
    monkeypatch, device, build, vendor
) -> None:
    monkeypatch.setattr(torch.version, build, "7.0.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as builds for AMD say
    with pytest.raises(ConfigError, match=rf"{vendor}.*no platform yet; use device='cpu'"):
        create_platform(device)
    assert create_platform("cpu").name == "cpu"


def test_the_refusal_of_other_gpus_names_the_platforms_that_packages_bring(monkeypatch, install) -> None:
    install("acme-rocm", "1.0", "rocm", "")
    monkeypatch.setattr(torch.version, "hip", "7.0.0")
    with pytest.raises(ConfigError, match=r"torch for NVIDIA GPUs, or device='rocm', which a package here brings$"):
        create_platform("auto")


@pytest.mark.parametrize("device", ["xpu", "mps", "cuda:1", ""])
def test_a_device_that_nothing_brings_is_refused_with_what_there_is(install, device) -> None:
    install("acme-npu", "1.2", "npu", "")
    for refuse in (create_platform, lambda device: EngineConfig.from_settings(device=device)):
        with pytest.raises(
            ConfigError, match=f"^device='{device}' is not known; choose one of: auto, cpu, cuda, npu[.]"
        ):
            refuse(device)


def test_names_of_platforms_that_packages_bring_are_settings_and_in_the_report(install) -> None:
    install("acme-npu", "1.2", "npu", "raise RuntimeError('a name needs no import')")
    assert EngineConfig.from_settings(device="npu").model.device == "npu"
    assert collect_env.collect()["platforms"] == {"npu": "acme-npu 1.2"}
    assert "acme-npu 1.2" in collect_env.render(json.loads(json.dumps(collect_env.collect())))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import libnpu", "acme-npu 1.2, which cannot be imported (ModuleNotFoundError: No module named 'libnpu')"),
        ("1 / 0", "acme-npu 1.2, which cannot be imported (ZeroDivisionError: division by zero)"),
        ("", "acme-npu 1.2, which cannot be imported (AttributeError: module 'acme_npu' has no attribute 'Platform')"),
        ("class Platform: pass", "acme-npu 1.2, which is made for version None of the platform protocol"),
        (
            f"class Platform: protocol_version = {PROTOCOL_VERSION + 1}",
            f"acme-npu 1.2, which is made for version {PROTOCOL_VERSION + 1} of the platform protocol where this stepgraph "
            f"has version {PROTOCOL_VERSION}; install releases of the two that fit",
        ),
        (
            f"class Platform: protocol_version, name = {PROTOCOL_VERSION}, 'cpu'",
            "acme-npu 1.2, whose platform calls itself 'cpu'; its entry point must have the platform's name",
        ),
        (
            f"class Platform:\n protocol_version, name = {PROTOCOL_VERSION}, 'npu'\n def __init__(self): self.driver = 1 / 0",
            "acme-npu 1.2, whose platform cannot be made (ZeroDivisionError: division by zero); check its device and driver",
        ),
        (
            f"class Platform:\n protocol_version, name = {PROTOCOL_VERSION}, 'npu'\n def __getattr__(self, name):\n"
            "  if name in ('side_stream', 'tuning'): raise AttributeError(name)",
            "acme-npu 1.2, whose platform lacks side_stream, tuning; it must have all that stepgraph.platforms.Platform asks for",
        ),
    ],
)
def test_a_package_that_cannot_be_used_is_named_in_one_sentence(install, code, message) -> None:
    install("acme-npu", "1.2", "npu", code)
    with pytest.raises(ConfigError) as refusal:
        create_platform("npu")
    assert str(refusal.value).startswith("device='npu' is brought by ")
    assert message in str(refusal.value)


def test_two_packages_with_one_name_are_refused(install) -> None:
    install("acme-npu", "1.2", "npu", "")
    install("other-npu", "0.1", "npu", "")
    with pytest.raises(ConfigError, match=r"'npu' is brought by 2 packages: .*; uninstall all but one of them"):
        create_platform("npu")


def test_a_package_cannot_take_a_built_in_name(install) -> None:
    install("acme-npu", "1.2", "cpu", "1 / 0")
    assert create_platform("cpu").name == "cpu"
    assert collect_env.collect()["platforms"] == {}


def test_cuda_graphs_elsewhere_are_refused_before_the_model_is_read(monkeypatch, tiny_model) -> None:
    """Where there is a GPU too, its graph would hold nothing of what the CPU did."""
    monkeypatch.setattr(build, "create_model", None)
    with pytest.raises(
        ConfigError, match=r"^graph_backend='cuda' captures .*, and device='cpu' is none; leave it at auto"
    ):
        LLM(model=tiny_model, device="cpu", graph_backend="cuda")
