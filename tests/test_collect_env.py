"""`stepgraph env`: what a report of a problem needs, whatever is installed, and no secrets."""

import builtins
import json
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from stepgraph import __version__, cli, collect_env
from stepgraph.version import commit


def test_the_report_names_versions_the_machine_and_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    report = collect_env.collect()
    assert report["stepgraph"]["version"] == __version__
    assert report["stepgraph"]["commit"] == (commit() or "unknown")
    assert report["packages"]["torch"] == version("torch")
    assert report["torch"]["cuda available"] == str(torch.cuda.is_available())
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["system"]["cpu"]
    assert report["environment"]["OMP_NUM_THREADS"] == "3"
    assert "hf_secret" not in json.dumps(report)


TOPOLOGY = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tSYS\t0-47\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tNODE\t48-95\t1\t\tN/A
NIC0\tPIX\tSYS\tNODE\t X

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""


@pytest.fixture
def three_gpus(monkeypatch) -> set[tuple[int, int]]:
    """GPUs for torch and nvidia-smi; returns the pairs that are no peers."""
    gpu = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=2**37)
    apart: set[tuple[int, int]] = set()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) not in apart)
    monkeypatch.setattr(collect_env, "_output", lambda *command: TOPOLOGY if "topo" in command else None)
    return apart


def test_what_is_between_gpus_is_told(three_gpus) -> None:
    assert collect_env.collect()["ranks"] == {
        "most": "tensor_parallel_size x data_parallel_size = 3, one for each GPU",
        "peer access": "between all",
        "collectives": "push",
        "GPU0 by nvidia-smi": "X NV18 SYS",
        "GPU1 by nvidia-smi": "NV18 X SYS",
        "GPU2 by nvidia-smi": "SYS SYS X",
    }
    three_gpus |= {(2, 0), (0, 2)}
    ranks = collect_env.collect()["ranks"]
    assert (ranks["peer access"], ranks["collectives"]) == ("not 0 to 2, 2 to 0", "nccl")


def test_one_gpu_has_no_peers_and_a_cpu_has_cores(three_gpus, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert collect_env.collect()["ranks"].keys() == {"most"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert f"= {collect_env.num_cores()}, one for each usable core" in collect_env.collect()["ranks"]["most"]


def test_missing_and_broken_packages_are_reported_rather_than_fatal(monkeypatch) -> None:
    def refuse(name, *args, **kwargs):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return import_(name, *args, **kwargs)

    import_ = builtins.__import__
    monkeypatch.setattr(collect_env, "_PACKAGES", ("numpy", "no-such-package"))
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setenv("PATH", "")
    report = collect_env.collect()
    assert report["packages"] == {"numpy": version("numpy"), "no-such-package": "not installed"}
    assert "libcudart.so.13" in report["torch"]["error"]
    assert "libcudart.so.13" in collect_env.render(report)


def test_text_shows_every_fact_in_columns_and_leaves_empty_sections_out() -> None:
    text = collect_env.render(
        {"packages": {"torch": "2.13", "numpy": "2.4"}, "gpus": {}, "system": {"cpu flags": "avx2"}}
    )
    assert text == "packages\n  torch      2.13\n  numpy      2.4\n\nsystem\n  cpu flags  avx2"


@pytest.mark.parametrize("run", [lambda *flags: cli.main(["env", *flags]), lambda *flags: collect_env.main(flags)])
def test_it_is_a_command_and_a_module(run, capsys) -> None:
    assert run("--json") == 0
    assert json.loads(capsys.readouterr().out).keys() == collect_env.collect().keys()
    assert run() == 0
    assert capsys.readouterr().out.startswith("stepgraph\n  version")


def test_the_module_is_started_without_importing_torch_first() -> None:
    code = "import sys, stepgraph.collect_env; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
