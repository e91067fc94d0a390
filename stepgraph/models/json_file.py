"""JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepgraph.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError if it cannot be read, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}; download it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; download it again.")
    return content
