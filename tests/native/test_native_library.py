"""The library of CPU kernels: made once, remade when what it is made of changes, done without where it cannot be made."""

import ctypes
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from stepgraph import native
from stepgraph.native import library as building
from stepgraph.platforms.kernel_cache import guard_kernel_cache
from stepgraph.trusted_folder import make_private, why_untrusted

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


def test_of_those_who_build_at_once_one_does_and_the_others_wait_for_it(sources, capsys):
    planned = building.plan(sources)
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(building.build, [planned] * 3)) == {planned.library}
    assert capsys.readouterr().err.count("compiling") == 1


def test_its_folder_is_made_so_that_nobody_else_can_enter_it(sources):
    planned = building.plan(sources)
    planned.library.parent.mkdir(parents=True)
    planned.library.parent.chmod(0o755)
    assert building.build(planned) == planned.library
    assert planned.library.parent.stat().st_mode & 0o777 == 0o700
    assert planned.library.stat().st_mode & 0o777 == 0o600


def test_a_file_that_somebody_planted_where_no_home_is_is_not_used(sources, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(building.Path, "home", _homeless)
    monkeypatch.setattr(building.tempfile, "tempdir", str(tmp_path))
    planned = building.plan(sources)
    assert planned.library.parents[2].parent == tmp_path
    planned.library.parent.mkdir(parents=True)
    planned.library.write_bytes(b"planted")
    _let_others_write(planned.library.parents[2])
    found = building.build(planned)
    assert found.parent != planned.library.parent
    assert ctypes.CDLL(str(found)).one() == 1
    assert found.parent.stat().st_mode & 0o777 == 0o700
    assert f"everybody can write to {planned.library.parents[2]}" in caplog.text
    assert planned.library.read_bytes() == b"planted"
    (sources / "one.cpp").write_text("this is not C++")
    before = set(tmp_path.iterdir())
    assert "failed" in building.build(building.plan(sources))
    assert set(tmp_path.iterdir()) == before, "nothing is left behind"


def test_without_a_home_a_folder_of_this_users_keeps_it(sources, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(building.Path, "home", _homeless)
    monkeypatch.setattr(building.tempfile, "tempdir", str(tmp_path))
    planned = building.plan(sources)
    assert building.build(planned) == planned.library
    assert planned.library.parents[2].stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("place", [0, 1, 2], ids=["file", "folder", "folder above"])
def test_what_belongs_to_somebody_else_is_untrusted(tmp_path, monkeypatch, place):
    folder = tmp_path / "above" / "folder"
    make_private(folder)
    (folder / "file").write_bytes(b"")
    assert why_untrusted(folder / "file") is None
    theirs = [folder / "file", folder, folder.parent][place]
    if os.geteuid() == 0:
        os.chown(theirs, 12345, -1)
        assert why_untrusted(folder / "file") == f"{theirs} belongs to user 12345"
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert f"belongs to user {os.getuid()}" in why_untrusted(folder / "file")


def test_links_count_with_where_they_lie_and_where_they_lead(tmp_path):
    open_to_all, private = tmp_path / "open", tmp_path / "private"
    for folder in (open_to_all, private):
        folder.mkdir()
    _let_others_write(open_to_all)
    (open_to_all / "to private").symlink_to(private)
    (private / "to open").symlink_to(open_to_all)
    (private / "to itself").symlink_to(private)
    wanted = f"everybody can write to {open_to_all}"
    assert why_untrusted(open_to_all / "to private" / "new") == wanted
    assert why_untrusted(private / "to open" / "new") == wanted
    assert why_untrusted(private / "to itself" / "new") is None
    open_to_all.chmod(0o1777)  # as /tmp is: what lies there is its owner's
    assert why_untrusted(open_to_all / "to private" / "new") is None
    assert why_untrusted(open_to_all) == wanted


def test_triton_keeps_its_kernels_where_nobody_else_can_write(tmp_path, monkeypatch, caplog):
    from triton import knobs

    wanted = tmp_path / "kernels"
    wanted.mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(wanted))
    guard_kernel_cache()
    assert (knobs.cache.dir, caplog.text) == (str(wanted), "")
    _let_others_write(wanted)
    guard_kernel_cache()
    assert f"everybody can write to {wanted}" in caplog.text
    assert why_untrusted(Path(knobs.cache.dir)) is None


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


def _homeless():
    raise RuntimeError("no home")


def _let_others_write(folder):
    folder.chmod(0o777)


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
assert native.describe().startswith("AVX2, compiled")
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
