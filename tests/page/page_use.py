"""What tests of the page do with it again and again."""

from pathlib import Path

from chromium import Tab

SHOWN = "Number(document.querySelector('#timeline').dataset.shown)"
CHOSEN = "document.querySelector('#step-details').innerText"


def told(*steps: dict) -> dict:
    """The message that tells of steps."""
    return {"type": "steps", "steps": list(steps), "dropped": 0}


def ask(tab: Tab, text: str) -> None:
    """Send the model a message."""
    tab.click("#message")
    tab.type(text)
    tab.press("Enter")


def open_table(tab: Tab, name: str) -> None:
    """Show one of the tables below the plots."""
    tab.value(f"void (document.querySelector('#{name}-table-box').open = true)")


def wait_for_file(tab: Tab, path: Path) -> None:
    """Wait for a download, which a browser names when it is whole."""
    for _ in range(2000):
        if path.exists():
            return
        tab.value("new Promise((done) => setTimeout(done, 30))")
    raise AssertionError(f"{path} never came: {list(path.parent.iterdir())}")
