"""What `make docs` adds to MkDocs: files outside docs/ that pages link to, and anchors as GitHub makes them. See mkdocs.yml."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.append(str(Path(__file__).parent))

from doc_links import ROOT, SHOWN, beyond, place, slug, with_links

_APART = "---\nhide: [navigation]\nsearch: {exclude: true}\n---\n\n"
"""Before files that are shown."""


def on_config(config: MkDocsConfig) -> None:
    """Before anything is read."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """After docs/ is listed."""
    named = _paths(config.nav)
    pages = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    outside = [path for path in named if not (ROOT / "docs" / path).exists()]
    for path in sorted({*outside, *beyond([*pages, *(ROOT / path for path in outside)])}):
        if path.endswith(SHOWN):
            text = (ROOT / path).read_text(encoding="utf-8")
            language = Path(path).suffix.removeprefix(".") or "text"
            content = f"{_APART}# {path}\n\n~~~~~~ {language}\n{text}\n~~~~~~\n"
            file = File.generated(config, place(path), content=content)
        else:
            file = File.generated(config, place(path), abs_src_path=str(ROOT / path))
        file.inclusion = InclusionLevel.INCLUDED if path in named else InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Before a page is rendered: its links as the site has them."""
    file = page.file
    if file.generated_by is None:
        return with_links(f"docs/{file.src_uri}", markdown)
    if file.abs_src_path is None:  # a file that is shown
        return markdown
    return with_links(Path(file.abs_src_path).relative_to(ROOT).as_posix(), markdown)


def _paths(nav: object) -> list[str]:
    """Of the pages that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ()
    return [path for entry in entries for path in _paths(entry)]
