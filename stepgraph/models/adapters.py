"""LoRA adapters: folders as PEFT writes them, read into buffers that the model's projections add from.

Shapes: I inputs, O outputs, N adapters counted from 1, r rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from stepgraph.config.lora import LoRAConfig
from stepgraph.errors import RequestError
from stepgraph.layers.experts import ExpertLinear
from stepgraph.layers.formats import Adapted, Target
from stepgraph.layers.formats.target import part_of
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.lora import LoRA, token_adapters
from stepgraph.models.checkpoint import take
from stepgraph.models.conversion import Converted
from stepgraph.models.decoder import Decoder
from stepgraph.models.tensor_names import native_name
from stepgraph.ops import StepTokens
from stepgraph.parallel.shard import Cut, Part

_MIN_RANK = 16
"""Inner size of the smallest product of a tensor core; buffers of smaller adapters are padded to it."""
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
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
_HEADER_BYTES = 16 * 2**20
"""More than the names and settings of any adapter take."""
_WIDEST = 8
"""Bytes of a number at most."""
_OF_EXPERTS = re.compile(r"\.(?:mlp|moe)\.(?P<part>experts\b|gate$|shared_expert_gate$)")
_OF_LATENTS = re.compile(r"\.self_attn\.(kv_b_proj)$")
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Those that leave the base weights as they are."""


@dataclass(frozen=True)
class _Place:
    """Where the matrices of one module of the checkpoint go: projections `first` … of a product's buffers."""

    lora: LoRA
    first: int
    count: int  # projections that the checkpoint merges as well
    target: Target  # of the module's weight, which says what the rank keeps of it and how its rows are converted

    @property
    def rows(self) -> slice:
        """Outputs of the module among those of the product."""
        begin = sum(self.lora.parts[: self.first])
        return slice(begin, begin + sum(self.lora.parts[self.first : self.first + self.count]))

    @property
    def shape(self) -> tuple[int, ...]:
        """[O, I] of the module's weight, whole."""
        return tuple(self.target.shape)

    def fill(self, product: _Product, a_rI: Tensor, b_Or: Tensor) -> None:
        """Write the module's matrices into those of its product."""
        rank, padded, part = a_rI.shape[0], product.b.shape[1], part_of(self.target)
        if part is not None:
            assert part.columns is not None
            a_rI = take(a_rI, Part((Cut.whole(rank),), part.columns))
            b_Or = take(b_Or, Part(part.rows, Cut.whole(rank)))
        for index in range(self.first, self.first + self.count):
            product.a[index * padded : index * padded + rank].copy_(a_rI)
        if isinstance(self.target, Converted):
            b_Or = self.target.convert(b_Or)
        product.b[self.rows, :rank].copy_(b_Or)


class _Product(NamedTuple):
    """One adapter's share of a projection's buffers, in host memory."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class AdapterFile:
    """An adapter in host memory, as `AdapterStore.read` found it."""

    folder: str
    digest: bytes
    """SHA-256 of all that it computes with: its settings and matrices, whole, whatever part of them this rank keeps."""
    products: Sequence[_Product | None]  # of the model's projections, in their order; None where it changes nothing
    version: tuple[int, ...] = ()
    """Differs from that of what the folder held before or after."""


class AdapterStore:
    """The device's memory of adapters.

    Makes the buffers of all projections of a model's layers, once, but of experts and of what makes keys and values of latents;
    graphs are captured over them. Driven by the engine's thread, but for `read`; writes are ordered before the next step on the
    device's stream.
    """

    def __init__(self, model: Decoder, config: LoRAConfig, *, max_tokens: int) -> None:
        """Args:
        model: gets the buffers, zero.
        config: how many adapters of what rank.
        max_tokens: of the largest step.
        """
        self._max_rank = config.max_lora_rank
        rank = max(_MIN_RANK, 1 << (config.max_lora_rank - 1).bit_length())
        self._index = torch.zeros(max_tokens, dtype=torch.int32, device=model.embed_tokens.weight.device)
        self._loras: list[LoRA] = []
        self._places: dict[str, _Place] = {}
        targets = model.checkpoint_tensors()
        for path, module in model.layers.named_modules(prefix="layers"):
            if not isinstance(module, Linear) or isinstance(module, ExpertLinear) or module.needs_numbers:
                continue
            parts = module.lengths
            zeros = partial(torch.zeros, dtype=model.dtype, device=module.weight.device)
            lora = LoRA(
                a=zeros(config.max_loras + 1, len(parts) * rank, module.in_features),
                b=zeros(config.max_loras + 1, module.out_features, rank),
                parts=parts,
                index=self._index,
            )
            module.use(Adapted(module.format.base, lora))
            self._loras.append(lora)
            stored = model.checkpoint_name(path)
            if f"{stored}.weight" in targets:
                self._places[stored] = _Place(lora, 0, len(parts), targets[f"{stored}.weight"])
            elif (merged := model.merged_name(stored)) is not None:
                self._places[merged] = _Place(lora, 0, len(parts), module.targets()["weight"])
            elif isinstance(module, MergedLinear):
                for i, part in enumerate(module.parts):
                    name = f"{stored.rpartition('.')[0]}.{part}"
                    self._places[name] = _Place(lora, i, 1, targets[f"{name}.weight"])

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return sum(lora.a.nbytes + lora.b.nbytes for lora in self._loras)

    def select(self, tokens: StepTokens, lines: Tensor) -> None:
        """Tell the projections each token's adapter. Runs inside the graph, before the model.

        Args:
            tokens: of the step.
            lines: [slots, LINE_WIDTH]; column ADAPTER holds the number of an adapter, or 0.
        """
        self._index[: tokens.token_ids.shape[0]].copy_(token_adapters(tokens, lines))

    def read(self, folder: str) -> AdapterFile:
        """Read an adapter into host memory, laid out as the device's. May take long, and may be called in any thread.

        Raises:
            RequestError: the folder is not an adapter that this model can run.
        """
        products: list[_Product | None] = [None] * len(self._loras)
        version, digest = _version(Path(folder)), hashlib.sha256()
        for name, a_rI, b_Or in self._read(Path(folder), digest):
            place = self._places[_native(name)]
            index = next(index for index, lora in enumerate(self._loras) if lora is place.lora)
            a, b = place.lora.a[0], place.lora.b[0]
            product = products[index] or _Product(
                torch.zeros(a.shape, dtype=a.dtype), torch.zeros(b.shape, dtype=b.dtype)
            )
            place.fill(product, a_rI, b_Or)
            products[index] = product
        if _version(Path(folder)) != version:
            _refuse(Path(folder), "it was written to while it was read", "Ask for it again")
        return AdapterFile(os.path.abspath(folder), digest.digest(), products, version)

    def write(self, number: int, file: AdapterFile) -> None:
        """Put an adapter into the device's memory, as the one that slots of `SlotSampling.adapter` = `number` use.

        Args:
            number: 1 … `max_loras`.
            file: from `read`.
        """
        for lora, product in zip(self._loras, file.products, strict=True):
            for buffer, matrix in zip((lora.a, lora.b), product or (None, None), strict=True):
                if matrix is None:  # both sides: what a damaged adapter left, times zero, may be NaN
                    buffer[number].zero_()
                else:
                    buffer[number].copy_(matrix)

    def _read(self, folder: Path, digest: hashlib._Hash) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each module's two matrices, whole, [r, I] and [O, r] float32, the second one scaled. Sizes are checked before any is
        read. `digest` gets all that is read."""
        config = _read_config(folder)
        digest.update(hashlib.sha256(json.dumps(config, sort_keys=True).encode()).digest())
        with _opened(folder) as file:
            modules = _modules(folder, _shapes(file))
            for name, sides in modules.items():
                self._check_sizes(folder, name, *(shape for _, shape in sides))
            # Not mapped: where a drive fails or the file is cut meanwhile, reading fails, and does not end the process.
            file.seek(0)
            content = file.read()
            digest.update(content)
            stored = load(content)
            for name, sides in modules.items():
                a_rI, b_Or = (stored[tensor].float() for tensor, _ in sides)
                rank = a_rI.shape[0]
                scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
                yield name, a_rI, b_Or * scale

    def _check_sizes(self, folder: Path, name: str, a_shape: list[int], b_shape: list[int]) -> None:
        place = self._places.get(_native(name))
        if place is None and (match := _OF_LATENTS.search(_native(name))):
            _refuse(
                folder,
                f"it adapts {name}, whose weight is multiplied into queries and results, for all adapters alike",
                f"Train it with target_modules without {match[1]}, or merge it into the base model with PEFT's merge_and_unload",
            )
        if place is None and (match := _OF_EXPERTS.search(_native(name))):
            _refuse(
                folder,
                f"it adapts {name}, {'an expert' if match['part'] == 'experts' else 'a gate'} of a mixture",
                "Attention and feed-forward layers that all tokens take can be adapted: train it with target_modules of these, "
                "or merge it into the base model",
            )
        if place is None:
            known = sorted({known.rpartition(".")[2] for known in self._places})
            _refuse(folder, f"it adapts {name}", f"The modules of layers that can be adapted are {', '.join(known)}")
        rank, (outputs, inputs) = a_shape[0], place.shape
        if a_shape != [rank, inputs] or b_shape != [outputs, rank]:
            _refuse(
                folder,
                f"its matrices of {name} are {a_shape} and {b_shape}, and the weight is [{outputs}, {inputs}]",
                "It was made for another model",
            )
        if rank > self._max_rank:
            _refuse(
                folder,
                f"its rank is {rank}, and max_lora_rank is {self._max_rank}",
                f"Start the engine with max_lora_rank={rank}",
            )


@contextmanager
def _opened(folder: Path) -> Iterator[BinaryIO]:
    """The file of an adapter's matrices. What cannot be read of it inside is refused."""
    if not (folder / _WEIGHTS).is_file():
        _refuse(folder, f"it holds no {_WEIGHTS}", "Save it again with PEFT's save_pretrained; .bin files are not read")
    try:
        with (folder / _WEIGHTS).open("rb") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        _refuse(folder, f"{_WEIGHTS} cannot be read: {error}", "Copy it again")


def _version(folder: Path) -> tuple[int, ...]:
    """When and where a folder's files were written, and how long they are; nothing of those that cannot be found, as those find
    who read them."""
    numbers: list[int] = []
    for name in (_CONFIG, _WEIGHTS):
        with suppress(OSError, ValueError):
            stat = os.stat(folder / name)
            numbers += (stat.st_mtime_ns, stat.st_ino, stat.st_size)
    return tuple(numbers)


def _shapes(file: BinaryIO) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, from its header; ValueError if they and the file's size differ."""
    size = os.fstat(file.fileno()).st_size
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > min(size, _HEADER_BYTES):
        raise ValueError(f"it begins with a header of {header_bytes} bytes")
    header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    shapes = {name: [int(size) for size in entry["shape"]] for name, entry in header.items()}
    most = 8 + header_bytes + sum(_WIDEST * math.prod(shape) for shape in shapes.values())
    if size > most:
        raise ValueError(f"it has {size} bytes, and its tensors at most {most}")
    return shapes


_Sides = list[tuple[str, list[int]]]
"""Name and shape of a module's matrices, A before B."""


def _modules(folder: Path, shapes: Mapping[str, list[int]]) -> dict[str, _Sides]:
    """Each module's tensors."""
    found: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for name, shape in shapes.items():
        match = _NAME.fullmatch(name)
        if match is None or len(shape) != 2:
            _refuse(folder, f"it holds {name} {shape}", "Only matrices lora_A and lora_B of linear layers can be run")
        found.setdefault(match["module"], {})[match["side"]] = name, shape
    for name, sides in found.items():
        if len(sides) != 2:
            _refuse(folder, f"{name} lacks one of lora_A and lora_B", "Copy it again")
        if sides["A"][1][0] < 1:
            _refuse(folder, f"its matrices of {name} are of rank {sides['A'][1][0]}", "Save the adapter again")
    return {name: [sides["A"], sides["B"]] for name, sides in found.items()}


def _native(module: str) -> str:
    """The name in native models of a module that an adapter names as its checkpoint does."""
    return native_name(f"{module}.weight").removesuffix(".weight")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        with (folder / _CONFIG).open("rb") as file:
            config = json.loads(file.read(_HEADER_BYTES))
        config["lora_alpha"] + 0.0  # a number, or the file is none of PEFT's
    except FileNotFoundError:
        _refuse(folder, "it holds no adapter_config.json", "Name a folder that PEFT's save_pretrained wrote")
    except (ValueError, KeyError, TypeError, OSError, ArithmeticError, RecursionError) as error:
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
    raise RequestError(f"the LoRA adapter {folder} cannot be run: {what}. {instead}.", param="adapter")
