"""LoRA adapters: folders as PEFT writes them, read into buffers that the model's projections add from.

Shapes: I inputs, O outputs, N adapters counted from 1, r rank.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepgraph.config.lora import LoRAConfig
from stepgraph.errors import RequestError
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.lora import LoRA, token_adapters
from stepgraph.models.conversion import Converted
from stepgraph.models.decoder import Decoder
from stepgraph.ops import StepTokens

_MIN_RANK = 16
"""Inner size of the smallest product of a tensor core; buffers of smaller adapters are padded to it."""
_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_OFF = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
)
"""Settings of PEFT that change what an adapter computes, and are not supported."""
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Those that leave the base weights as they are."""


@dataclass(frozen=True)
class _Place:
    """Where the matrices of one module of the checkpoint go: projections `first` … of a product's buffers."""

    lora: LoRA
    first: int
    count: int  # projections that the checkpoint merges as well
    target: Any  # of the module's weight, which says how its rows are converted

    @property
    def rows(self) -> slice:
        """Outputs of the module among those of the product."""
        begin = sum(self.lora.parts[: self.first])
        return slice(begin, begin + sum(self.lora.parts[self.first : self.first + self.count]))

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of the module's weight."""
        return self.rows.stop - self.rows.start, self.lora.a.shape[2]

    def fill(self, number: int, a_rI: Tensor, b_Or: Tensor) -> None:
        """Write adapter `number`."""
        rank, padded = a_rI.shape[0], self.lora.b.shape[2]
        for part in range(self.first, self.first + self.count):
            self.lora.a[number, part * padded : part * padded + rank].copy_(a_rI)
        if isinstance(self.target, Converted):
            b_Or = self.target.convert(b_Or)
        self.lora.b[number, self.rows, :rank].copy_(b_Or)


@dataclass(frozen=True)
class Adapter:
    """An adapter in the device's memory."""

    folder: Path
    number: int  # for the slot's line; from 1 on
    key: str
    """Random, and another one whenever a folder is read again: as a cache salt it keeps prefixes apart, and no user can guess it
    to read those of others."""


class AdapterStore:
    """The adapters in the device's memory.

    Makes the buffers of all projections of a model's layers, once; graphs are captured over them. Driven by the engine's
    thread; writes are ordered before the next step on the device's stream.
    """

    def __init__(self, model: Decoder, config: LoRAConfig, *, max_tokens: int) -> None:
        """Args:
        model: gets the buffers, zero.
        config: how many adapters of what rank.
        max_tokens: of the largest step.
        """
        self._max_loras, self._max_rank = config.max_loras, config.max_lora_rank
        rank = max(_MIN_RANK, 1 << (config.max_lora_rank - 1).bit_length())
        self._index = torch.zeros(max_tokens, dtype=torch.int32, device=model.embed_tokens.weight.device)
        self._loras: list[LoRA] = []
        self._places: dict[str, _Place] = {}
        targets = model.checkpoint_tensors()
        for path, module in model.layers.named_modules(prefix="model.layers"):
            if not isinstance(module, Linear):
                continue
            parts = tuple(module.parts.values()) if isinstance(module, MergedLinear) else (module.out_features,)
            zeros = partial(torch.zeros, dtype=model.dtype, device=module.weight.device)
            module.lora = LoRA(
                a=zeros(config.max_loras + 1, len(parts) * rank, module.in_features),
                b=zeros(config.max_loras + 1, module.out_features, rank),
                parts=parts,
                index=self._index,
            )
            self._loras.append(module.lora)
            if f"{path}.weight" in targets:
                self._places[path] = _Place(module.lora, 0, len(parts), targets[f"{path}.weight"])
            elif isinstance(module, MergedLinear):
                for i, part in enumerate(module.parts):
                    name = f"{path.rpartition('.')[0]}.{part}"
                    self._places[name] = _Place(module.lora, i, 1, targets[f"{name}.weight"])
        self._adapters: dict[Path, Adapter] = {}  # least recently asked for first

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return sum(lora.a.nbytes + lora.b.nbytes for lora in self._loras)

    def select(self, tokens: StepTokens, lines: Tensor) -> None:
        """Tell the projections each token's adapter. Runs inside the graph, before the model.

        Args:
            tokens: of the step.
            lines: [slots, LINE_WIDTH]; column ADAPTER holds an `Adapter.number`, or 0.
        """
        self._index[: tokens.token_ids.shape[0]].copy_(token_adapters(tokens, lines))

    def load(self, folder: str, in_use: Collection[Adapter]) -> Adapter:
        """Bring an adapter into memory, unless it is there, in place of the one that was asked for least recently.

        Args:
            folder: of the adapter; read only when it comes into memory.
            in_use: those that unfinished requests use. They stay.

        Raises:
            RequestError: the folder is not an adapter that this model can run, or `max_loras` others are in use.
        """
        path = Path(folder).resolve()
        adapter = self._adapters.pop(path, None)
        if adapter is None:
            tensors = self._read(path)
            adapter = Adapter(path, self._free_number(in_use), secrets.token_hex(16))
            for lora in self._loras:  # both sides: what a damaged adapter left, times zero, may be NaN
                lora.a[adapter.number].zero_()
                lora.b[adapter.number].zero_()
            for name, (a_rI, b_Or) in tensors.items():
                self._places[name].fill(adapter.number, a_rI, b_Or)
        self._adapters[path] = adapter
        return adapter

    def _free_number(self, in_use: Collection[Adapter]) -> int:
        if len(self._adapters) < self._max_loras:
            return len(self._adapters) + 1
        unused = next((path for path, adapter in self._adapters.items() if adapter not in in_use), None)
        if unused is None:
            raise RequestError(
                f"unfinished requests use {self._max_loras} LoRA adapters, as many as max_loras={self._max_loras} keeps; wait "
                "until the requests of one have ended, or start the engine with a larger max_loras"
            )
        return self._adapters.pop(unused).number

    def _read(self, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
        """Each module's two matrices, [r, I] and [O, r] float32, the second one scaled."""
        tensors = {}
        for name, (a_rI, b_Or) in _read_matrices(folder).items():
            place = self._places.get(name)
            if place is None:
                known = sorted({known.rpartition(".")[2] for known in self._places})
                _refuse(
                    folder, f"it adapts {name}", f"The modules of layers that can be adapted are {', '.join(known)}"
                )
            rank, (outputs, inputs) = a_rI.shape[0], place.shape
            if a_rI.shape != (rank, inputs) or b_Or.shape != (outputs, rank):
                _refuse(
                    folder,
                    f"its matrices of {name} are {list(a_rI.shape)} and {list(b_Or.shape)}, and the weight is "
                    f"[{outputs}, {inputs}]",
                    "It was made for another model",
                )
            if rank > self._max_rank:
                _refuse(
                    folder,
                    f"its rank is {rank}, and max_lora_rank is {self._max_rank}",
                    f"Start the engine with max_lora_rank={rank}",
                )
            tensors[name] = (a_rI, b_Or)
        return tensors


def _read_matrices(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    config = _read_config(folder)
    if not (folder / _WEIGHTS).is_file():
        _refuse(folder, f"it holds no {_WEIGHTS}", "Save it again with PEFT's save_pretrained; .bin files are not read")
    try:
        stored = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        _refuse(folder, f"{_WEIGHTS} cannot be read: {error}", "Copy it again")
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.dim() != 2:
            _refuse(
                folder,
                f"it holds {name} {list(tensor.shape)}",
                "Only matrices lora_A and lora_B of linear layers can be run",
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor.float()
    matrices = {}
    for name, matrix in sides.items():
        if len(matrix) != 2:
            _refuse(folder, f"{name} lacks one of lora_A and lora_B", "Copy it again")
        rank = matrix["A"].shape[0]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        matrices[name] = (matrix["A"], matrix["B"] * scale)
    return matrices


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_alpha"] + 0.0  # a number, or the file is none of PEFT's
    except FileNotFoundError:
        _refuse(folder, "it holds no adapter_config.json", "Name a folder that PEFT's save_pretrained wrote")
    except (ValueError, KeyError, TypeError, OSError) as error:
        _refuse(folder, f"its adapter_config.json cannot be used: {error!r}", "Save the adapter again")
    if config.get("peft_type") != "LORA":
        _refuse(folder, f"it is of type {config.get('peft_type')}", "Adapters of type LORA can be run")
    wrong = {name: config[name] for name in _OFF if config.get(name)}
    if config.get("bias", "none") != "none":
        wrong["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in _INITIALISATIONS:
        wrong["init_lora_weights"] = config["init_lora_weights"]
    if wrong:
        name, value = next(iter(wrong.items()))
        _refuse(
            folder,
            f"{name} is {value!r}",
            "Merge it into the base model with PEFT's merge_and_unload, or train without that setting",
        )
    return dict(config)


def _refuse(folder: Path, what: str, instead: str) -> NoReturn:
    raise RequestError(f"the LoRA adapter {folder} cannot be run: {what}. {instead}.")
