"""Where no compiler is: CPU kernels for kinds of CPUs, and Triton's module for the driver, compiled ahead."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepgraph import native
from stepgraph.native import ahead, library
from stepgraph.platforms import kernel_cache

ALL = frozenset().union(*(kind.features for kind in ahead.KINDS))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of one small source and its libraries for all kinds."""
    if isinstance(reason := library.plan(), str):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("sources")
    (folder / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    libraries = library.compile_ahead(folder)
    assert [path.name.rpartition("-")[0] for path in libraries] == [kind.name for kind in ahead.KINDS]
    assert {path.stat().st_mode & 0o777 for path in libraries} == {0o644}
    return folder


@pytest.mark.parametrize(
    ("capability", "features", "found"),
    [
        ("AVX512", ALL, "avx512-bf16"),
        ("AVX512", ALL - {"avx512_bf16"}, "avx512"),
        ("AVX512", ALL - {"avx512vl"}, None),
        ("AVX2", ALL, "avx2"),
        ("AVX2", ALL - {"movbe"}, None),
    ],
)
def test_the_best_is_found_that_the_cpu_can_run(made, monkeypatch, capability, features, found):
    monkeypatch.setattr(ahead, "cpu_features", lambda: features)
    path = ahead.find(made, capability)
    assert (path and path.name.rpartition("-")[0]) == found


def test_it_is_used_without_a_compiler_and_nothing_is_written(made, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library.shutil, "which", lambda *_: None)
    monkeypatch.setattr(ahead, "cpu_features", lambda: ALL)
    planned = library.plan(made)
    found = library.build(planned)
    assert found.parent == made / "ready"
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(native, "plan", lambda: planned)
    assert native.describe().endswith(", compiled ahead")
    [plain] = [path for path in found.parent.iterdir() if path.name.startswith("avx2-")]
    assert ctypes.CDLL(str(plain)).one() == 1


@pytest.mark.parametrize("change", ["source", "torch", "trust"])
def test_another_source_or_torch_or_an_open_folder_is_passed_over(made, monkeypatch, change):
    monkeypatch.setattr(ahead, "cpu_features", lambda: ALL)
    assert ahead.find(made, "AVX2")
    if change == "source":
        monkeypatch.setattr(ahead, "digest", lambda *_: "another")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    else:
        monkeypatch.setattr(ahead, "why_untrusted", lambda _: "everybody can write to it")
    assert ahead.find(made, "AVX2") is None


def test_what_cannot_be_compiled_ahead_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "one.cpp").write_text("this is not C++")
    if not isinstance(library.plan(), str):
        assert "error" in library.compile_ahead(tmp_path)
        assert list((tmp_path / "ready").iterdir()) == []
        (tmp_path / "ready").rmdir()
        (tmp_path / "ready").touch()
        assert "File exists" in library.compile_ahead(tmp_path)
    monkeypatch.setattr(library.shutil, "which", lambda *_: None)
    assert "no C++ compiler" in library.compile_ahead(tmp_path)
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    assert "x86-64" in library.compile_ahead(tmp_path)


DRIVER = """
from pathlib import Path
from stepgraph.platforms.kernel_cache import guard_kernel_cache
guard_kernel_cache(Path(READY))
from triton.backends.nvidia.driver import CudaUtils
print(CudaUtils().launch.__name__)
"""


def test_triton_reaches_the_driver_without_a_compiler(tmp_path):
    """The driver here is one whose functions do nothing, found as a container finds the host's."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    names = re.findall(r"\bcu[A-Z]\w+", Path(driver.dirname, "driver.c").read_text())
    kernel_cache._make_stand_in(tmp_path / "libcuda.so.1", {*names, *(f"{name}_v2" for name in names)})
    ready, cache = kernel_cache.make_ready(tmp_path / "ready"), tmp_path / "cache"
    [made] = ready.iterdir()
    cache.mkdir()
    (cache / made.name).symlink_to(tmp_path / "of an image that is gone")
    if file := shutil.which("file"):  # Triton's key depends on what it says of Python
        (tmp_path / "file").symlink_to(file)
    paths = {"PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(cache)}
    alone = os.environ | paths | {"CC": "no-such-cc"}
    command = (sys.executable, "-c", DRIVER.replace("READY", repr(str(ready))))
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "launch\n"), done.stderr
    assert [path.readlink() for path in cache.iterdir()] == [made]


def test_a_folder_that_cannot_be_made_is_replaced_by_one_of_this_process(tmp_path, monkeypatch, caplog):
    from triton import knobs

    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    found = kernel_cache.guard_kernel_cache()
    assert found == Path(knobs.cache.dir)
    assert found.is_dir()
    assert "file/triton, as it cannot be made: Not a directory; set TRITON_CACHE_DIR" in caplog.text
