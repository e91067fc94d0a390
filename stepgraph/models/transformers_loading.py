"""A checkpoint read by transformers, which renames and merges tensors where its class asks for it."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from stepgraph.errors import ModelError
from stepgraph.models.mtp_tensors import mtp_names
from stepgraph.models.safetensors import read_safetensors
from stepgraph.models.text_part import is_of_media
from stepgraph.models.transformers_config import TransformersConfig
from stepgraph.models.transformers_halves import class_of
from stepgraph.models.transformers_interfaces import IMPLEMENTATIONS


def read_checkpoint(config: TransformersConfig, folder: Path, *, dtype: torch.dtype, progress: bool) -> Any:
    """The model of a folder, with our attention, in host memory.

    Args:
        config: read from the folder.
        folder: with safetensors files.
        dtype: of parameters and activations.
        progress: show a bar on stderr.

    Raises:
        ModelError: the checkpoint's tensors are not those of the model, or a file is damaged.
    """
    stored = sum(math.prod(tensor.shape) for tensor in read_safetensors(folder))
    if config.num_parameters > 2 * stored:  # else transformers says which are missing, having taken memory for them
        raise ModelError(
            f"The {config.architecture} that the config in {folder} describes has {config.num_parameters:,} parameters, and "
            f"its weight files hold {stored:,}; config and weights are not of one model, or a file is missing."
        )
    with _progress_bars(progress), _report_untold() as untold:
        try:
            hf_model, report = class_of(config.hf_config)[0].from_pretrained(
                folder,
                config=copy.deepcopy(config.hf_config),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, by name
                **IMPLEMENTATIONS,
            )
        except Exception as error:  # transformers raises many types here
            apart = sorted(set(re.findall(r"^(\S+) *\|[^|]*CONVERSION", "\n".join(untold), re.MULTILINE)))
            why = f"what becomes {', '.join(apart[:3])} is missing in part, or of unequal sizes." if apart else error
            raise ModelError(
                f"transformers cannot load the checkpoint in {folder}: {why} A file may be truncated, or of another "
                "model than config.json; download it again."
            ) from error
    left_over = set(report["unexpected_keys"]) - mtp_names(report["unexpected_keys"])
    report["unexpected_keys"] = {name for name in left_over if not (config.media_token_ids and is_of_media(name))}
    if odd := [f"{kind}: {_some(sorted(map(str, names)))}" for kind, names in report.items() if names]:
        raise ModelError(
            f"The checkpoint in {folder} does not fit the {config.architecture} that its config describes "
            f"({'; '.join(odd)}); config and weights are not of one model."
        )
    return hf_model


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Have transformers show progress bars, or none."""
    before = transformers_logging.is_progress_bar_enabled()
    try:
        (transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar)()
        yield
    finally:
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()


@contextmanager
def _report_untold() -> Iterator[list[str]]:
    """Have transformers log no report of tensors that do not fit, of which an error tells; gives what it would have said."""
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if is_report := "LOAD REPORT" in record.getMessage():
            reports.append(record.getMessage())
        return not is_report

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield reports
    finally:
        logger.removeFilter(keep)
