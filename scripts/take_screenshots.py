"""Take the pictures of the page that docs/page.md shows.

    python scripts/take_screenshots.py [--output docs/images]

Starts `stepgraph serve smollm2`, gives it some requests to do, and looks at its page in Chromium (`apt-get install chromium`).
Run it again when the page looks otherwise, and look at what it made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "server"), str(ROOT / "tests" / "page")]

from chromium import Tab, opened_tab, running_chromium  # noqa: E402
from live import LiveServer, Reply, running_server  # noqa: E402

FLAGS = (
    *("--device", "cpu", "--max-num-seqs", "8", "--max-model-len", "2048", "--max-num-batched-tokens", "256"),
    *("--speculative-method", "ngram"),
)
QUESTION = "Why is the sky blue? Explain it in a few sentences, and then as a list."
PROMPTS = (
    ("The harbour opens at six in the morning and", 90),
    ("Here is a list of the planets, from the sun outwards:", 70),
    ("def fibonacci(n):", 60),
    ("Once upon a time, " * 30, 40),
    ("The three laws of robotics say that a robot", 110),
    ("one two three four five six seven eight " * 24, 120),
    ("In the year 1900 the city had", 80),
)
PAUSE_S = 0.4
MAX_BYTES = 200_000


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="folder for the pictures")
    output = parser.parse_args().output
    output.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as profile,
        running_chromium(Path(profile)) as browser,
        running_server("smollm2", FLAGS) as server,
        opened_tab(browser, width=1360, height=1000) as tab,
    ):
        tab.open(f"{server.url}/")
        tab.wait_text("#connection", "Live")
        work(server, tab)
        save(tab, output / "page.webp")
        tab.set_dark(True)
        show_mixture(tab)
        save(tab, output / "page-dark.webp")


def work(server: LiveServer, tab: Tab) -> None:
    """Have a chat in the page, and other requests beside it."""
    for greeting in (
        "Good day.",
        "Fine day.",
        "Nice day.",
    ):  # first, graphs are captured; prompts differ, as they are cached
        chat_beside_others(server, tab, greeting)


def chat_beside_others(server: LiveServer, tab: Tab, greeting: str) -> None:
    """One answer in the page, and others elsewhere, to prompts that begin with a greeting."""

    def complete(prompt: str, max_tokens: int) -> Reply:
        return server.post("/v1/completions", {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0})

    tab.value(
        "void (document.querySelector('#max-tokens').value = 220, document.querySelector('#temperature').value = 0)"
    )
    tab.click("#chat-clear")
    tab.click("#message")
    tab.type(QUESTION)
    tab.press("Enter")
    tab.wait("document.querySelector('article.assistant .text').innerText.length > 20")
    others: list[Future[Reply]] = []
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for prompt, max_tokens in PROMPTS:
            others.append(pool.submit(complete, f"{greeting} {prompt}", max_tokens))
            time.sleep(PAUSE_S)  # so that they begin one after the other
    assert [reply.result().status for reply in others] == [200] * len(PROMPTS)
    tab.wait("!document.querySelector('#send').hidden")
    server.wait_idle()
    tab.value("new Promise((done) => setTimeout(done, 1000))")  # until the page has heard of the last of it
    tab.click("article.assistant .foot button")
    tab.click("#steps-title")
    tab.press("x")


def show_mixture(tab: Tab) -> None:
    """Choose the largest step that decodes for some requests and computes the prompts of others."""
    tab.value("void (document.querySelector('#steps-table-box').open = true)")
    tab.wait("document.querySelector('#steps-table tbody').rows.length > 0")
    tab.value("void document.querySelector('[data-kind=decode]').click()")
    tab.value("void document.querySelector('[data-kind=prefill]').click()")
    tab.wait_frame()
    found = tab.texts("#steps-table tbody td:nth-child(4)")
    largest = 1 + max(range(len(found)), key=lambda place: int(found[place]))
    tab.click(f"#steps-table tbody tr:nth-child({largest}) button")
    for kind in ("decode", "prefill"):
        tab.value(f"void document.querySelector('[data-kind={kind}]').click()")
    tab.value("void (document.querySelector('#steps-table-box').open = false)")
    tab.value("void document.querySelector('#steps').scrollTo(0, 0)")


def save(tab: Tab, path: Path) -> None:
    """A picture of what the page has drawn; too large a one is refused."""
    tab.value("new Promise((done) => setTimeout(done, 500))")
    tab.save_screenshot(path)
    print(f"{path}: {path.stat().st_size:,} bytes")
    assert path.stat().st_size < MAX_BYTES, "too large for the repository"


if __name__ == "__main__":
    main()
