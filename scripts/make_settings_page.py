"""Make docs/settings.md: every setting with its flag, its key in files, its default and its meaning.

    python scripts/make_settings_page.py

Everything comes from the dataclasses in stepgraph/config; a test holds the page against them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from stepgraph.config.engine import GROUPS
from stepgraph.config.fields import flag_of, scalar_type
from stepgraph.config.server import API_KEY_VARIABLE, LOG_LEVEL_VARIABLE, SERVE_PARTS

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

EXAMPLE = """\
model: smollm2            # or the section: {model: smollm2, dtype: float32}
max-model-len: 4096

scheduler:
  max-num-seqs: 32
  max-num-batched-tokens: 1024

server:
  port: 8080
  served-model-name: [assistant, smollm2]
  api-key-file: keys.txt
  request-timeout: 120
"""

HEAD = f"""\
<!-- Made by scripts/make_settings_page.py from the dataclasses in stepgraph/config: change those, then run it. -->

# Settings

Every setting is a flag and, under the same name, a key of the file that `--config` names. The sections below are those of
`--help`: `server` is for `stepgraph serve`, all others are for every command that runs a model, and in Python keyword arguments
of `LLM` and `EngineConfig.from_settings`. Unknown names, bad values and settings that contradict each other are refused before a
model is loaded, by commands with exit code 2.

## Flags

```console
$ stepgraph serve smollm2 --port 8080 --max-num-seqs 32
```

- `stepgraph serve --model smollm2` and `python -m stepgraph.server --model smollm2` are the same as `stepgraph serve smollm2`.
- A switch has two flags: `--enable-lora` and `--no-enable-lora`.
- Whole numbers may be written short: `8k` is 8000, `8K` is 8192.
- A list takes several values, or the flag several times: `--served-model-name assistant smollm2`. Put MODEL before it.

## A file

```console
$ stepgraph serve --config serve.yaml --port 9000
```

```yaml
{EXAMPLE}```

Keys are the names of settings, with dashes or underscores, at the top or in their section. Flags override the file. Paths in
it are relative to the folder in which the command is run. Commands other than `stepgraph serve` refuse a file with settings of
the server. Needs PyYAML (`pip install 'stepgraph[server]'`).

## Environment variables

| Variable | Meaning |
| --- | --- |
| `{API_KEY_VARIABLE}` | one more key that opens the API, beside those of `--api-key` and `--api-key-file`; must not be empty |
| `{LOG_LEVEL_VARIABLE}` | what `stepgraph serve`'s engine logs: `DEBUG`, `INFO`, `WARNING` (default), `ERROR` or `CRITICAL` |
| `STEPGRAPH_NATIVE` | `0`: torch's kernels instead of those of [our own](cpu.md) on a CPU |

What is underneath reads its own, among them `CUDA_VISIBLE_DEVICES`, `OMP_NUM_THREADS`, `HF_HOME` and `HF_HUB_OFFLINE`.
"""

FOREIGN = """\
## Settings from other engines

Flags, keys and values of vLLM and FastDeploy are understood, have no effect or are refused with the reason, in files and in
Python too: [coming-from.md](coming-from.md).
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD]
    for part, part_type in SERVE_PARTS.items():
        title = (part_type.__doc__ or "").strip().splitlines()[0]
        lines = [f"## {part}", "", title, "", "| Flag | Key | Default | Meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(part_type, field) for field in dataclasses.fields(part_type)]
        for name, group in GROUPS.items():
            if group.part == part and group.help is not None:
                meaning = f"several of these at once as JSON (in a file: as a mapping), {group.help}"
                lines.append(f"| `{flag_of(name)}` | `{name}` |  | {meaning} |")
        sections.append("\n".join(lines) + "\n")
    sections.append(FOREIGN)
    return "\n".join(sections)


def _row(part_type: type, field: dataclasses.Field[Any]) -> str:
    flag = f"`{flag_of(field.name)}`"
    if field.name == "model":
        flag = f"`MODEL` or {flag}"
    meaning = field.metadata["help"]
    if field.metadata["choices"]:
        meaning += f"; one of {', '.join(field.metadata['choices'])}"
    elif scalar_type(part_type, field.name)[1]:
        meaning += " (a list)"
    default = "" if field.default is None else f"`{_yaml(field.default)}`"
    return f"| {flag} | `{field.name}` | {default} | {_cell(meaning)} |"


def _yaml(value: Any) -> str:
    """`value` as one writes it in a file."""
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
