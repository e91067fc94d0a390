"""Links between the project's pages, as the repository and as the site have them: what tests/test_site.py and site_hook.py share.

Pages link as files of the repository do. The site is made of `docs/`, and of what its pages link to elsewhere: pages keep their
place (`benchmarks/h100.md`), source files become a page that shows them, everything else is copied.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from doc_blocks import FENCED, ROOT, without_blocks

SHOWN = (".py", ".yaml", ".toml", "Dockerfile", "LICENSE")
"""Ends of names of files that become a page."""
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:)(?P<path>[^)\s#]*)(?P<anchor>#[^)\s]*)?(?=\))")

_NAMED = re.compile(r"(?<=\[)[\w./-]+\.md(?=\]\((?!https?:)(?P<path>[^)\s#]+\.md)(?:#[^)\s]*)?\))")
"""A link that shows the name of the file that it leads to."""


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as GitHub makes it; the site is told to make the same."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def anchors(page: Path) -> list[str]:
    """Of a page's headings, in order."""
    return [slug(heading) for heading in re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)]


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Those of a page that lead to no other host, as (path from the repository's root, anchor or "")."""
    home = page.parent.relative_to(ROOT).as_posix()
    for found in _LINK.finditer(without_blocks(page)):
        path = posixpath.normpath(posixpath.join(home, found["path"])) if found["path"] else f"{home}/{page.name}"
        yield posixpath.normpath(path), (found["anchor"] or "").removeprefix("#")


def place(path: str) -> str:
    """Where the site has a file of the repository, as MkDocs names sources: from the folder of pages."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":  # which MkDocs would take for the start page
        return "readme.md"
    return f"{path}.md" if path.endswith(SHOWN) else path


def with_links(page: str, text: str, to: Callable[[str], str] = place) -> str:
    """A page's text with its links as the site has them: they show titles in place of names of files.

    Args:
        page: its path from the repository's root.
        text: what it holds.
        to: where a file is on the site.
    """

    def linked(found: re.Match[str]) -> str:
        return posixpath.normpath(posixpath.join(posixpath.dirname(page), found["path"]))

    def titled(found: re.Match[str]) -> str:
        title = re.search(r"^# (.+)$", without_blocks(ROOT / linked(found)), re.MULTILINE)
        return title[1] if title else found[0]

    def placed(found: re.Match[str]) -> str:
        if not found["path"]:
            return found[0]
        return posixpath.relpath(to(linked(found)), posixpath.dirname(to(page)) or ".") + (found["anchor"] or "")

    parts, end = [], 0
    for block in [*FENCED.finditer(text), None]:
        prose = text[end : block.start() if block else None]
        parts += [_LINK.sub(placed, _NAMED.sub(titled, prose)), block[0] if block else ""]
        end = block.end() if block else end
    return "".join(parts)


def beyond(pages: list[Path]) -> list[str]:
    """Files outside docs/ that pages link to, and that those link to which are pages, from the repository's root."""
    found: dict[str, None] = {}
    waiting = list(pages)
    while waiting:
        for path, _ in links(waiting.pop()):
            if not path.startswith("docs/") and path not in found:
                found[path] = None
                if path.endswith(".md"):
                    waiting.append(ROOT / path)
    return sorted(found)
