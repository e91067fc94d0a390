"""What pyproject.toml cannot say: archives and wheels hold the commit that they were made of, which the source does not.

It is that of the checkout, or what an archive has of it already, or the environment variable STEPGRAPH_COMMIT, where neither is
at hand, as in a container that is built.
"""

import os
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

VERSION = runpy.run_path(str(Path(__file__).parent / "stepgraph" / "version.py"))


def write_commit(root: str) -> None:
    """Write the commit, if it is known, into the package below `root`, which was copied there. An earlier one goes."""
    found = os.environ.get("STEPGRAPH_COMMIT") or VERSION["commit"]()
    path = Path(root, "stepgraph", VERSION["COMMIT_FILE"])
    path.unlink(missing_ok=True)  # it may be a second name of a file that is kept
    if found:
        path.write_text(found + "\n", encoding="ascii")


class BuildWithCommit(build_py):
    """The package as a wheel has it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_commit(self.build_lib)


class ArchiveWithCommit(sdist):
    """The source as it is released."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(base_dir)


setup(cmdclass={"build_py": BuildWithCommit, "sdist": ArchiveWithCommit})
