"""Make docs/coming-from.md: every flag and key of vLLM and FastDeploy, and what it comes to here.

    python scripts/make_coming_from_page.py

Everything comes from the tables in stepgraph/config/tables; a test holds the page against them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stepgraph.config.fields import flag_of
from stepgraph.config.other_engines import Row, tables, text_of, texts_of

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"

HEAD = """\
<!-- Made by scripts/make_coming_from_page.py from the tables in stepgraph/config/tables: change those, then run it. -->

# Coming from vLLM or FastDeploy

Every flag and key of both. What changes in commands, code and requests, and what is missing, is in the guides for users of
[vLLM](from-vllm.md), [FastDeploy](from-fastdeploy.md), [SGLang](from-sglang.md) and [llama.cpp](from-llama-cpp.md). Bring your
command line:

| Theirs | Ours |
| --- | --- |
| `vllm serve MODEL ...` | `stepgraph serve MODEL ...` |
| `python -m vllm.entrypoints.openai.api_server --model MODEL ...` | `python -m stepgraph.server --model MODEL ...` |
| `python -m fastdeploy.entrypoints.openai.api_server --model MODEL ...` | `python -m stepgraph.server --model MODEL ...` |

Every flag of theirs does one of four things. What has a setting here **is the same**, or **is translated**. What could only
make a difference inside their engines **has no effect**: the log says so once, with the reason. What asks for something that
does not exist here **is refused** before a model is loaded, with exit code 2 and a sentence that names the value, the reason
and what to do. Nothing is silent. The same holds for the keys of a file given with `--config`, and in Python for `LLM(...)`.

Spellings are understood, too: short flags (`-tp 1`, `-O3`), underscores (`--max_model_len`), both ways to switch off
(`--no-enable-lora`, `--disable-lora`), short numbers (`--max-model-len 32K` is 32768, `32k` is 32000), and keys of JSON with
dots (`--compilation-config.cudagraph_mode NONE`, `-cc.cudagraph_capture_sizes+ 64,512`).

What differs although it has the same name:

- The server listens on 127.0.0.1 unless `--host` says otherwise.
- Browsers of other origins are let in only with `--allowed-origins`.
- Tool calls and reasoning are set apart from the text of an answer without a flag, where the chat template shows their form;
  `--tool-call-parser none --reasoning-parser none` leaves both in the text.
- Their environment variables are not read. A server is not started where `VLLM_API_KEY` or `FD_API_KEY` was to protect it and
  nothing else does: set `STEPGRAPH_API_KEY`. `VLLM_NIXL_SIDE_CHANNEL_HOST` and `VLLM_NIXL_SIDE_CHANNEL_PORT` are
  `--kv-transfer-host` and `--kv-transfer-port`; without these, engines of one machine find each other by a socket file.
- FastDeploy's `FD_XPU_ENABLE_MIXED_EP_MODE=1`, by which an instance that both reads prompts and decodes changes between two ways
  to its experts, is `--expert-parallel-mixed on`, the default here: each step goes the way that is faster for its number of
  tokens, and mixtures need no special case. Its `0`, the default there, is `--expert-parallel-mixed off`: one way for all steps.
- Captured sizes bound steps: one family of graphs serves prompts, decodes and mixtures, so the largest of
  `cudagraph_capture_sizes` (or `max_capture_size`) is the most tokens of a step, and longer prompts are cut. Leave sizes out,
  and every step has its graph.
- `--gpu-memory-utilization`, `--max-num-seqs` and `--max-num-batched-tokens` have [defaults of their own](settings.md).

The lists were read from vLLM 0.33.0 (the package on PyPI) and from FastDeploy's development version:
`fastdeploy/engine/args_utils.py` and `fastdeploy/config.py` at commit 0009064e6f6e, `fastdeploy/entrypoints/openai/utils.py` at
00dc2b04fd02. *older* marks what only earlier versions of either had.
"""

KEYS = """\
## Keys

Of flags that hold JSON. Our own names of settings are keys, too.
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD]
    for topic, rows in tables().topics.items():
        flags = ((", ".join(f"`{flag}`" for flag in (flag_of(name), *row.alias)), row) for name, row in rows.items())
        sections.append(f"## {topic}\n\n" + _table("Flag", flags))
    sections.append(KEYS)
    for group, rows in tables().keys.items():
        sections.append(
            f"### `{flag_of(group)}`\n\n" + _table("Key", ((f"`{name}`", row) for name, row in rows.items()))
        )
    return "\n".join(sections)


def _table(what: str, rows: Iterable[tuple[str, Row]]) -> str:
    lines = [f"| {what} | Of | Here | |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {', '.join(row.of.split())} | {_here(row)} | {_cell(row.why)} |" for name, row in rows]
    return "\n".join(lines) + "\n"


def _here(row: Row) -> str:
    """What becomes of it, in words."""
    parts = []
    if row.to is not None:
        parts.append(f"`{flag_of(row.to)}`")
    elif row.same:
        parts.append("the same")
    meanings: dict[str, list[str]] = {}
    for value, settings in row.map.items():
        meanings.setdefault(_settings(settings), []).append(f"`{value}`")
    parts += [f"{', '.join(values)}: {meaning}" for meaning, values in meanings.items()]
    if row.neutral == "any":
        return "; ".join([*parts, "others have no effect" if parts else "no effect"])
    if row.neutral:
        parts.append(f"{_values(row.neutral)}: no effect")
    if row.same or row.to is not None:
        parts += [f"refused: {_values(row.refused)}"] if row.refused else []
    else:
        parts.append("else refused" if parts else "refused")
    return "; ".join(parts)


def _settings(settings: Any) -> str:
    if not settings:
        return "as it is"
    return ", ".join(
        f"{flag_of(name)} left out" if value is None else f"`{flag_of(name)} {text_of(value)}`"
        for name, value in settings.items()
    )


def _values(values: Any) -> str:
    return ", ".join(f"`{text}`" for text in texts_of(values))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
