"""The site of the pages: navigation, links and anchors; and, where what builds it is installed, the site itself."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import make_commands_page  # noqa: E402
from check_site import check  # noqa: E402
from doc_links import anchors, beyond, links, place, slug, with_links  # noqa: E402

HEAD = "<title>t</title><h1 id='here'>t</h1>"


def paths(nav: object) -> list[str]:
    """Of the pages that a navigation names, from the repository's root."""
    if isinstance(nav, str):
        return [f"docs/{nav}" if (ROOT / "docs" / nav).exists() else nav]
    return [path for entry in (nav.values() if isinstance(nav, dict) else nav) for path in paths(entry)]


NAVIGATION = paths(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
PAGES = sorted(
    {*NAVIGATION, "README.md", *(path for path in beyond([ROOT / p for p in NAVIGATION]) if path.endswith(".md"))}
)


def test_the_navigation_names_every_page_once() -> None:
    docs = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]
    results = [path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.md")]
    assert sorted(NAVIGATION) == sorted([*docs, *results, "CONTRIBUTING.md", "CHANGELOG.md"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page) -> None:
    for path, anchor in links(ROOT / page):
        assert (ROOT / path).is_file(), f"{page}: {path}"
        if anchor:
            assert anchors(ROOT / path).count(anchor) == 1, f"{page}: {path}#{anchor}"


def test_links_are_found_wherever_prose_has_them() -> None:
    found = list(links(ROOT / "docs" / "cpu.md"))
    assert ("benchmarks/README.md", "") in {(path, "") for path, _ in found}
    assert not any(path.startswith("http") for path, _ in found)


def test_an_anchor_is_what_github_makes_of_a_heading() -> None:
    assert slug("`stepgraph graphs warm`") == "stepgraph-graphs-warm"
    assert slug("NVIDIA H100 80GB, torch 2.11: what's new?") == "nvidia-h100-80gb-torch-211-whats-new"


@pytest.mark.parametrize(
    ("page", "link", "on_site"),
    [
        ("docs/cpu.md", "../benchmarks/README.md#a", "benchmarks/README.md#a"),
        ("docs/cpu.md", "serving.md#errors", "serving.md#errors"),
        ("docs/cpu.md", "#threads", "#threads"),
        ("docs/architecture.md", "../stepgraph/step/program.py", "stepgraph/step/program.py.md"),
        ("docs/container.md", "../Dockerfile", "Dockerfile.md"),
        ("docs/chat.md", "../README.md", "readme.md"),
        ("benchmarks/h100.md", "results/a.json", "results/a.json"),
        ("benchmarks/h100.md", "../docs/cpu.md#b", "../cpu.md#b"),
        ("CONTRIBUTING.md", "docs/cpu.md", "cpu.md"),
        ("docs/cpu.md", "https://a.example/b.md", "https://a.example/b.md"),
    ],
)
def test_links_keep_what_they_mean_on_the_site(page, link, on_site) -> None:
    text = f"[x]({link}), ![y]({link})\n\n```python\na[0]({link})\n```\n"
    assert with_links(page, text) == f"[x]({on_site}), ![y]({on_site})\n\n```python\na[0]({link})\n```\n"


def test_a_link_that_shows_the_name_of_a_file_shows_its_title_on_the_site() -> None:
    text = "[docs/cpu.md](docs/cpu.md#threads), [the file](docs/cpu.md), [cpu.md](https://a.example/cpu.md)"
    shown = "[On a CPU](cpu.md#threads), [the file](cpu.md), [cpu.md](https://a.example/cpu.md)"
    assert with_links("CONTRIBUTING.md", text) == shown


def test_no_two_files_have_one_place() -> None:
    files = [*PAGES, *beyond([ROOT / page for page in PAGES])]
    places = {place(path): path for path in files}
    assert {places[place(path)] for path in files} == set(files)


def test_the_page_of_commands_is_what_the_script_makes_now() -> None:
    page = make_commands_page.PAGE.read_text(encoding="utf-8")
    assert page == make_commands_page.page(), "run: python scripts/make_commands_page.py"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<a href='gone/'>", "/: /gone/ answers with status 404"),
        ("<a href='#there'>", "/: / has no #there"),
        ("<script src='https://a.example/b.js'></script>", "/: https://a.example/b.js is fetched from another host"),
        ("<link rel='stylesheet' href='a.css'>", "/a.css: //a.example/f.woff is fetched from another host"),
        ("<img src='gone.png'>", "/: /gone.png answers with status 404"),
        ("<h1>again</h1>", "/: title 't', 2 first headings"),
        ("", "/other/ is linked nowhere"),
    ],
)
def test_what_is_wrong_on_a_site_is_found(tmp_path, body, problem) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "a.css").write_text("a { src: url(//a.example/f.woff) url('b.png') } b { fill: url(#c) }")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "index.html").write_text(HEAD + body + ("<a href='other/'>" if body else ""))
    (tmp_path / "other" / "index.html").write_text(f"{HEAD}<a href='../#here'><a href='https://a.example'>")
    assert check(tmp_path).problems == [problem]


def test_a_site_without_faults_has_none(tmp_path) -> None:
    (tmp_path / "index.html").write_text(HEAD + "<a href='#here'><link rel='canonical' href='https://a.example'>")
    (tmp_path / "404.html").write_text(HEAD)
    assert check(tmp_path).problems == []


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs, which `make docs` installs"
)
def test_the_site_is_built_without_a_warning_and_every_page_opens(tmp_path) -> None:
    command = (sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path / "site")
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    site = check(tmp_path / "site")
    assert site.problems == []
    assert len(site.pages) >= len(NAVIGATION)
