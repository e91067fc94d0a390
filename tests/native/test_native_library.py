"""The library of CPU kernels: made once, remade when what it is made of changes, done without where it cannot be made."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepgraph import native
from stepgraph.native import library as building

AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A folder with one small source, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(building.SWITCH, raising=False)
    if isinstance(reason := building.plan(), str):
        pytest.skip(reason)
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cpp").write_text('#include "one.h"\nextern "C" int one() { return ONE; }\n')
    (folder / "one.h").write_text("#define ONE 1\n")
    return folder


def test_it_is_built_once_with_a_word_on_stderr(sources, capsys):
    planned = building.plan(sources)
    assert building.build(planned) == planned.library
    assert "compiling" in capsys.readouterr().err
    built = planned.library.stat().st_mtime_ns
    assert building.build(building.plan(sources)) == planned.library
    assert capsys.readouterr().err == ""
    assert planned.library.stat().st_mtime_ns == built
    assert [path.name for path in planned.library.parent.iterdir()] == [planned.library.name]  # nothing is left behind


@pytest.mark.parametrize("file", ["one.cpp", "one.h"])
def test_another_source_is_another_library(sources, file):
    before = building.plan(sources)
    (sources / file).write_text((sources / file).read_text() + "// more\n")
    assert building.plan(sources).library != before.library


def test_another_capability_is_another_library(sources, monkeypatch):
    plans = []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        plans.append(building.plan(sources))
    assert plans[0].library != plans[1].library
    assert "-mavx2" in plans[0].command


def test_a_source_that_does_not_compile_is_a_reason_and_leaves_nothing(sources):
    (sources / "one.cpp").write_text("this is not C++")
    planned = building.plan(sources)
    reason = building.build(planned)
    assert isinstance(reason, str)
    assert "error" in reason
    assert not list(planned.library.parent.iterdir())


def test_a_compiler_that_does_not_exist_is_named_with_the_one_used_instead(sources, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-c++")
    planned = building.plan(sources)
    assert building.build(planned) == planned.library
    assert f"with {planned.command[0]}, as there is no no-such-c++" in capsys.readouterr().err

    monkeypatch.setattr(building.shutil, "which", lambda _: None)
    assert "no-such-c++, c++" in building.plan(sources)


def test_a_compiler_that_writes_nothing_is_a_reason(sources, monkeypatch):
    monkeypatch.setenv("CXX", "true")
    planned = building.plan(sources)
    reason = building.build(planned)
    assert isinstance(reason, str)
    assert re.fullmatch(r"\S*true wrote no library, though it reported success; set CXX to a C\+\+17 compiler", reason)
    assert not list(planned.library.parent.iterdir())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda patch: patch.setattr(building.shutil, "which", lambda _: None), "no C++ compiler"),
        (lambda patch: patch.setenv(building.SWITCH, "0"), "STEPGRAPH_NATIVE=0"),
        (lambda patch: patch.setenv(building.SWITCH, "False"), "STEPGRAPH_NATIVE=False"),
        (lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"), "need AVX2"),
        (lambda patch: patch.setattr(building.platform, "machine", lambda: "aarch64"), "x86-64"),
    ],
    ids=["no compiler", "switched off", "in a word", "old CPU", "other CPU"],
)
def test_without_what_it_needs_there_is_a_reason(sources, monkeypatch, change, reason):
    change(monkeypatch)
    assert reason in building.plan(sources)
    assert reason in native.describe()


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        (sys.executable, "-c", program), env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_switched_off_torch_computes():
    program = """
import torch
from stepgraph import native, ops
print(native.missing(), ops.rms_norm(torch.ones(1, 16), torch.ones(16), 0.0).sum().item())
"""
    assert run(program, STEPGRAPH_NATIVE="0") == "STEPGRAPH_NATIVE=0 is set 16.0\n"


@pytest.mark.skipif(not AVX2, reason="the CPU has no AVX2")
@pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")
def test_the_avx2_library_computes_the_same():
    program = """
import torch
from stepgraph import native, ops
from stepgraph.ops.packed import EXACT_TOKENS, reference
assert native.available(), native.missing()
assert native.describe() == "AVX2, compiled"
torch.manual_seed(0)
worst = 0
for block_bytes in (18, 20, 34):
    codes = torch.randint(0, 100, (37, 3 * block_bytes), dtype=torch.uint8)
    weight = reference.unpacked(codes, 96)
    assert torch.equal(ops.packed_rows(codes, torch.arange(37, dtype=torch.int32), 96), weight)
    for tokens in (1, 5, 9, 40):
        x = torch.randn(tokens, 96)
        exact = x.double() @ weight.double().T
        worst = max(worst, ((ops.packed_linear(x, codes, exact_tokens=EXACT_TOKENS) - exact).norm() / exact.norm()).item())
print(worst < 1e-6)
"""
    assert run(program, ATEN_CPU_CAPABILITY="avx2") == "True\n"
