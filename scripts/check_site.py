"""Opens every page of the built site and follows every link on it, over HTTP from a server of its own; `make docs` runs it.

    python scripts/check_site.py [FOLDER]

A page must be there, have a title and one first heading, and be reached from the start page. Links must lead to a page or file
that is there, and to an anchor that it has. Nothing that a browser fetches by itself may come from another host. Only the
standard library is needed.
"""

from __future__ import annotations

import argparse
import http.client
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

SITE = Path(__file__).parents[1] / "build" / "site"
FETCHED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}
"""Elements whose address a browser fetches by itself."""
NOT_FETCHED = {"canonical", "prev", "next", "alternate"}
"""Relations of a `link` that only name another page."""
UNLINKED = "/404.html"
"""A page that no other links to."""


class Page(HTMLParser):
    """What a page holds that can be wrong."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.title = ""
        self.num_first_headings = 0
        self.anchors = {"", "top"}
        self.links: list[str] = []
        self.fetched: list[str] = []
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Of `HTMLParser`."""
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self._in_title = tag == "title" and not self.title
        self.num_first_headings += tag == "h1"
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in FETCHED and given.get(FETCHED[tag]):
            to = self.links if given.get("rel") in NOT_FETCHED else self.fetched
            to.append(given[FETCHED[tag]])

    def handle_data(self, data: str) -> None:
        """Of `HTMLParser`."""
        if self._in_title:
            self.title += data.strip()

    def handle_endtag(self, tag: str) -> None:
        """Of `HTMLParser`."""
        self._in_title &= tag != "title"


@dataclass
class Site:
    """A site that is served at `address`, looked at from the start page on."""

    address: str
    pages: dict[str, Page] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    num_links: int = 0
    problems: list[str] = field(default_factory=list)

    def look(self, *starts: str) -> None:
        """Open everything that can be reached from some pages."""
        waiting, anchors = [(start, "the site") for start in starts], []
        while waiting:
            path, source = waiting.pop()
            if path in self.pages or path in self.files:
                continue
            found = self._get(path, source)
            if not isinstance(found, Page):
                self.files.add(path)
                waiting += [(self._path(path, url), path) for url in _urls_of_styles(found) if self._is_here(path, url)]
                continue
            self.pages[path] = found
            if not found.title or found.num_first_headings != 1:
                self.problems.append(f"{path}: title {found.title!r}, {found.num_first_headings} first headings")
            for url in found.fetched:
                if self._is_here(path, url):
                    waiting.append((self._path(path, url), path))
            for url in found.links:
                target, anchor = urldefrag(urljoin(f"{self.address}{path}", url))
                if urlsplit(target).netloc == urlsplit(self.address).netloc:
                    self.num_links += 1
                    waiting.append((urlsplit(target).path, path))
                    anchors.append((path, urlsplit(target).path, unquote(anchor)))
        for source, path, anchor in anchors:
            if path in self.pages and anchor not in self.pages[path].anchors:
                self.problems.append(f"{source}: {path} has no #{anchor}")

    def _get(self, path: str, source: str) -> Page | str:
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        kind = answer.headers.get_content_type()
        if answer.status != 200:
            self.problems.append(f"{source}: {path} answers with status {answer.status}")
            return ""
        if kind == "text/html":
            return Page(body.decode())
        return body.decode() if kind == "text/css" else ""

    def _path(self, page: str, url: str) -> str:
        return urlsplit(urljoin(f"{self.address}{page}", url)).path

    def _is_here(self, page: str, url: str) -> bool:
        """Whether something that is fetched is of this site; it must be, or be in the page itself."""
        if url.startswith("data:"):
            return False
        is_here = urlsplit(urljoin(f"{self.address}{page}", url)).netloc == urlsplit(self.address).netloc
        if not is_here:
            self.problems.append(f"{page}: {url} is fetched from another host")
        return is_here


def _urls_of_styles(text: str) -> list[str]:
    found = re.findall(r"""url\(\s*(?:"([^"]*)"|'([^']*)'|([^)"']*))\s*\)|@import\s+["']([^"']+)""", text)
    return [url for groups in found for url in groups if url and not url.startswith("#")]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Of `BaseHTTPRequestHandler`: every request a line on stderr."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address at which `folder` can be read during the block."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def check(folder: Path) -> Site:
    """Look at the site in `folder`."""
    with serving(folder) as address:
        site = Site(address)
        site.look(*["/", *([UNLINKED] if (folder / UNLINKED[1:]).exists() else [])])
    there = {f"/{path.relative_to(folder).as_posix()}".removesuffix("index.html") for path in folder.rglob("*.html")}
    site.problems += [f"{path} is linked nowhere" for path in sorted(there - site.pages.keys())]
    return site


def main() -> int:
    """Returns the exit code: 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", default=SITE, help="default: build/site")
    folder = parser.parse_args().folder
    if not (folder / "index.html").is_file():
        sys.exit(f"error: {folder} holds no site; run: make docs")
    site = check(folder)
    for problem in site.problems:
        print(f"error: {problem}", file=sys.stderr)
    print(
        f"{len(site.pages)} pages, {site.num_links} links, {len(site.files)} other files; {len(site.problems)} problems"
    )
    return 1 if site.problems else 0


if __name__ == "__main__":
    sys.exit(main())
