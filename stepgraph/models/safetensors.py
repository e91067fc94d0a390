"""Checkpoints in folders of safetensors files, as transformers saves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.models.checkpoint import CheckpointTensor, take
from stepgraph.models.expert_tensors import split_experts
from stepgraph.models.four_bit_checkpoint import join_codes
from stepgraph.models.fp8_checkpoint import join_scales
from stepgraph.models.joined_tensors import join_convolutions
from stepgraph.models.json_file import read_json
from stepgraph.models.tensor_names import native_name
from stepgraph.models.text_part import is_of_media
from stepgraph.parallel.shard import Part

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint.

    Raises:
        ModelError: there are none, or one that the index names is missing.
    """
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
            strange = [name for name in names if Path(name).name != name]
        except (KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{folder / _INDEX} is not an index of safetensors files: it maps no names of tensors to names of files; "
                "download it again."
            ) from error
        if strange:
            raise ModelError(f"{folder / _INDEX} names {strange[0]!r}, which is not the name of a file beside it.")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the {len(names)} weight files that its index names, "
                f"e.g. {missing[0]}; download them again."
            )
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise ModelError(
        f"{folder} holds neither {_SINGLE} nor {_INDEX}. Other weight formats (such as pytorch_model.bin) are not "
        "read: load them with transformers and save them again with save_pretrained."
    )


def read_safetensors(folder: Path) -> Iterator[CheckpointTensor]:
    """Yield every tensor of the checkpoint in `folder` by its name in native models, weights in 8 or 4 bits joined with their
    scales, but for those of what makes embeddings of images, sound or video.

    Raises:
        ModelError: a file is missing, truncated or not a safetensors file, or scales do not fit their weight.
    """
    tensors = join_codes(join_convolutions(split_experts(_stored(folder))), lambda: _quantization(folder))
    yield from join_scales(tensors)


def _quantization(folder: Path) -> Mapping[str, Any]:
    """The `quantization_config` of a checkpoint, or of its text part; empty if there is none."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    described = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    return described if isinstance(described, dict) else {}


def _stored(folder: Path) -> Iterator[CheckpointTensor]:
    for path in weight_files(folder):
        try:
            file = safe_open(path, framework="pt")
            names = [name for name in file.keys() if not is_of_media(name)]  # noqa: SIM118  (it is not a mapping)
            tensors = [_SafetensorsTensor(path, file, name) for name in names]
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        yield from tensors


class _SafetensorsTensor(CheckpointTensor):
    def __init__(self, path: Path, file: Any, name: str) -> None:
        self.name, self._stored_name = native_name(name), name
        stored = file.get_slice(name)
        self.shape = tuple(stored.get_shape())
        self.is_e4m3 = stored.get_dtype() == "F8_E4M3"
        self._path, self._file = path, file

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        values = self.stored(part)
        if dtype.is_floating_point and not values.is_floating_point():
            raise ModelError(
                f"{self._path} holds {self._stored_name} as {values.dtype}, which is no weight; download it again."
            )
        return values.to(device).to(dtype)  # moved first: the conversion is faster there

    def stored(self, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.stored`; a view of the mapped file, or copies of its pieces."""
        try:
            if part is not None:
                return take(self._file.get_slice(self._stored_name), part)
            values: Tensor = self._file.get_tensor(self._stored_name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(self._path, error) from error
        return values


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path} ({path.stat().st_size:,} bytes) cannot be read as safetensors: {error}. It may be truncated, or a "
        "git-lfs pointer instead of the file; download it again."
    )
