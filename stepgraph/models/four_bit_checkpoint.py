"""Weights that checkpoints store in codes of 4 bits, and what belongs to them, which they store as further tensors.

Read are what AutoAWQ (``awq``), GPTQModel (``gptq``) and AutoRound (``auto-round``, packed as either) write, llm-compressor
(``compressed-tensors``: pack-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized), and NVIDIA (``modelopt``: NVFP4).

Shapes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.layers.formats.four_bit import FourBit, pack
from stepgraph.models.checkpoint import CheckpointTensor, take
from stepgraph.ops.four_bit_linear import CHUNK, FourBitWeight, dequantize, interleave
from stepgraph.parallel.shard import Cut, Part

_PER_WORD = 8
"""Codes of an int32."""
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ has the code of each of eight outputs, counted from the lowest bits."""
_PACKINGS = ("auto_round:auto_gptq", "auto_round:auto_awq")
_UNUSED = ("input_global_scale", "input_scale", "k_scale", "v_scale", "q_scale", "output_scale")
"""What scales activations and the KV cache, neither of which is quantised here."""


def four_bit_refusal(method: str, config: Mapping[str, Any]) -> str | None:
    """Why 4-bit weights of method awq, gptq or auto-round cannot be read, as the end of a sentence; None if they can."""
    bits = config.get("bits") or config.get("w_bit")
    if bits != 4:
        return ", and 4 bits are read"
    if method == "awq" and str(config.get("version", "gemm")).lower() != "gemm":
        return f" in the layout {config['version']}, and gemm is read"
    if method == "auto-round":
        packing = config.get("packing_format", _PACKINGS[0])
        if packing not in _PACKINGS or config.get("data_type", "int") != "int":
            return (
                f" packed as {packing} of type {config.get('data_type', 'int')}, and {' and '.join(_PACKINGS)} are read"
            )
    one_group = (config.get("group_size") or config.get("q_group_size")) == -1
    if method == "gptq" and config.get("desc_act") and not config.get("static_groups") and not one_group:
        return (
            " in the order of activations (desc_act), whose groups are not of neighbouring inputs; use a checkpoint made "
            "with desc_act false or with static groups"
        )
    return None


def packed_refusal(weights: Mapping[str, Any], format: str) -> str | None:
    """Why compressed-tensors' weights of 4 bits cannot be read, as the end of a sentence; None if they can.

    Args:
        weights: how they were quantised.
        format: in which they are stored.
    """
    type_, strategy, size = (weights.get(key) for key in ("type", "strategy", "group_size"))
    if weights.get("actorder") in ("group", "dynamic", True):
        return " in the order of activations (actorder), whose groups are not of neighbouring inputs"
    known: dict[tuple[Any, Any], str] = {
        ("int", "group"): "pack-quantized",
        ("int", "channel"): "pack-quantized",
        ("float", "tensor_group"): "nvfp4-pack-quantized",
        ("float", "group"): "mxfp4-pack-quantized",
    }
    if known.get((type_, strategy)) != format or (type_ == "float" and size not in (16, 32)):
        return f" (type {type_}, 4 bits, a scale per {strategy} of {size}, stored as {format}), which is not read"
    return None


class _Parts(NamedTuple):
    """What a weight is made of, whole: [O, I], [O, G], [O, G] and [O, 1]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    factor: Tensor | None


class FourBitTensor(CheckpointTensor):
    """A weight in 4 bits, taken together with all that belongs to it. What ranks keep of one is cut from it whole."""

    def __init__(self, name: str, shape: tuple[int, int], format: FourBit, read: Callable[[], _Parts]) -> None:
        """Args:
        name: of the weight.
        shape: [O, I].
        format: that keeps it as it is.
        read: gives its parts.
        """
        self.name, self.shape, self.quantization = name, shape, format.encoding
        self.nbytes = shape[0] * shape[1] // 2
        self._format, self._read = format, read

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        return take(dequantize(self._weight(None), self.shape[1]), part).to(device).to(dtype)

    def packed(self, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.packed`; the bytes are those of `stepgraph.layers.formats.four_bit.pack`."""
        return pack(self._weight(part))

    def _weight(self, part: Part | None) -> FourBitWeight:
        parts, size = self._read(), self._format.group_size
        codes, scale, zero, factor = (None if tensor is None else _rows(tensor, part) for tensor in parts)
        assert codes is not None
        assert scale is not None
        if part is not None and part.columns is not None and not part.columns.is_whole:
            begin, end = part.columns.begin, part.columns.begin + part.columns.length
            assert begin % size == 0, part
            groups = slice(begin // size, -(-end // size))
            codes, scale = codes[:, begin:end], scale[:, groups]
            zero = None if zero is None else zero[:, groups]
        return FourBitWeight(interleave(codes), scale, zero, factor, size, self._format.is_e2m1)


def _rows(tensor: Tensor, part: Part | None) -> Tensor:
    return tensor if part is None else take(tensor, Part(part.rows, Cut.whole(tensor.shape[1])))


def join_codes(
    tensors: Iterable[CheckpointTensor], quantization: Callable[[], Mapping[str, Any]]
) -> Iterator[CheckpointTensor]:
    """A checkpoint's tensors, those in codes of 4 bits taken together with what belongs to them.

    Args:
        tensors: of the checkpoint.
        quantization: gives its `quantization_config`; called only if there are such weights.

    Raises:
        ModelError: a weight lacks what belongs to it, or shapes do not fit.
    """
    tensors = list(tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    if not any(name.endswith((".qweight", ".weight_packed")) or _is_modelopt(name, by_name) for name in by_name):
        yield from tensors
        return
    config = quantization()
    used: set[str] = set()
    joined: list[CheckpointTensor] = []
    for name in by_name:
        path, _, kind = name.rpartition(".")
        own = _Own(path, by_name, used)
        if kind == "qweight":
            joined.append(_of_words(own, config))
        elif kind == "weight_packed":
            own.drop("weight_shape", *_UNUSED)
            is_bytes = own.get("weight_packed").stored(_first_row(own.get("weight_packed"))).dtype == torch.uint8
            joined.append(_of_bytes(own, "weight_packed") if is_bytes else _of_packed(own))
        elif _is_modelopt(name, by_name):
            own.drop(*_UNUSED)
            joined.append(_of_bytes(own, "weight"))
    yield from joined
    yield from (tensor for tensor in tensors if tensor.name not in used)


class _Own:
    """Tensors of one layer, by the last part of their names; those that are asked for are marked as used."""

    def __init__(self, path: str, by_name: Mapping[str, CheckpointTensor], used: set[str]) -> None:
        self.path, self._by_name, self._used = path, by_name, used

    def find(self, kind: str) -> CheckpointTensor | None:
        """A tensor; None if there is none."""
        name = f"{self.path}.{kind}"
        if name in self._by_name:
            self._used.add(name)
        return self._by_name.get(name)

    def get(self, kind: str) -> CheckpointTensor:
        """A tensor; ModelError if there is none."""
        tensor = self.find(kind)
        if tensor is None:
            raise ModelError(
                f"{self.path} is quantised to 4 bits, and lacks its {kind}; download the checkpoint again."
            )
        return tensor

    def drop(self, *kinds: str) -> None:
        """Leave tensors out, if they are there."""
        for kind in kinds:
            self.find(kind)


def _is_modelopt(name: str, by_name: Mapping[str, CheckpointTensor]) -> bool:
    """Whether a tensor holds two codes a byte under the name of a weight: only those have scales of two levels, and others that
    are not of 8 bits have none."""
    return name.endswith(".weight") and f"{name}_scale_2" in by_name and not by_name[name].is_e4m3


def _of_words(own: _Own, config: Mapping[str, Any]) -> FourBitTensor:
    """What AWQ and GPTQ write: codes in int32, inputs before outputs; of AWQ those of eight outputs, of GPTQ of eight inputs."""
    words, scales, zeros, order = own.get("qweight"), own.get("scales"), own.get("qzeros"), own.find("g_idx")
    groups, outputs = scales.shape
    is_awq = words.shape[1] * _PER_WORD == outputs
    inputs = words.shape[0] * (1 if is_awq else _PER_WORD)
    if not is_awq and words.shape[1] != outputs:
        raise _odd(words, scales)
    size = _group_size(words, inputs, groups)
    # A version without a number has them less one, as the first had.
    one = 0 if is_awq or config.get("checkpoint_format") == "gptq_v2" else 1
    is_symmetric = not is_awq and bool(config.get("sym"))

    def read() -> _Parts:
        words_, zeros_ = words.stored(), zeros.stored()
        if is_awq:
            codes_OI, zero_OG = _awq_outputs(words_), _awq_outputs(zeros_)
        else:
            codes_OI, zero_OG = _unpacked(words_.t()), _unpacked(zeros_)[:, :outputs].t() + one
        if order is not None and not torch.equal(order.stored().long(), torch.arange(inputs) // size):
            raise ModelError(
                f"{order.name} puts inputs in groups by the order of activations, and groups of neighbours are read; use a "
                "checkpoint that was made with desc_act false."
            )
        if is_symmetric and not (zero_OG == 8).all():
            raise ModelError(
                f"{zeros.name} holds zeros other than 8, and the config says that there are none (sym); correct it."
            )
        return _Parts(codes_OI, scales.stored().t(), None if is_symmetric else zero_OG.contiguous(), None)

    format = FourBit(size, _dtype(scales), None if is_symmetric else torch.uint8)
    return FourBitTensor(f"{own.path}.weight", (outputs, inputs), format, read)


def _of_packed(own: _Own) -> FourBitTensor:
    """What llm-compressor writes of integers: codes of eight inputs in an int32, which stand for numbers from -8 to 7."""
    words, scales, zeros, shape = (
        own.get("weight_packed"),
        own.get("weight_scale"),
        own.find("weight_zero_point"),
        own.get("weight_shape"),
    )
    outputs, inputs = (int(size) for size in shape.stored().flatten())
    if own.find("weight_g_idx") is not None or words.shape != (outputs, -(-inputs // _PER_WORD)):
        raise _odd(words, scales)
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    size = _group_size(words, inputs, groups)

    def read() -> _Parts:
        codes_OI = _unpacked(words.stored())[:, :inputs]
        zero = None if zeros is None else _unpacked(zeros.stored().t())[:, :outputs].t().contiguous()
        return _Parts(codes_OI, scales.stored().view(outputs, groups), zero, None)

    format = FourBit(size, _dtype(scales), None if zeros is None else torch.uint8)
    return FourBitTensor(f"{own.path}.weight", (outputs, inputs), format, read)


def _of_bytes(own: _Own, kind: str) -> FourBitTensor:
    """Two codes of E2M1 a byte, with a scale of 8 bits for every 16 or 32 of them, and perhaps one for all: NVFP4 and MXFP4."""
    codes, scales = own.get(kind), own.get("weight_scale")
    factor, divisor = own.find("weight_scale_2"), own.find("weight_global_scale")
    outputs, inputs = codes.shape[0], 2 * codes.shape[1]
    if len(scales.shape) != 2 or own.find("pre_quant_scale") is not None:
        raise _odd(codes, scales)
    size = _group_size(codes, inputs, scales.shape[1])
    dtype = torch.float8_e4m3fn if scales.is_e4m3 else torch.uint8

    def read() -> _Parts:
        bytes_ = codes.stored()
        if bytes_.dtype != torch.uint8 or (scale := scales.stored()).dtype != dtype:
            raise ModelError(f"{codes.name} and its scales are not of 8 bits; download the checkpoint again.")
        codes_OI = torch.stack((bytes_ & 15, bytes_ >> 4), 2).flatten(1)
        of_all = None if factor is None else factor.stored()
        of_all = of_all if divisor is None else 1 / divisor.stored().float()
        wide = None if of_all is None else of_all.float().view(1, 1).expand(outputs, 1)
        return _Parts(codes_OI, scale, None, wide)

    format = FourBit(size, dtype, None, factor is not None or divisor is not None, is_e2m1=True)
    return FourBitTensor(f"{own.path}.weight", (outputs, inputs), format, read)


def _unpacked(words: Tensor) -> Tensor:
    """Codes of int32 words, from the lowest bits on: [R, C] -> [R, 8C] uint8."""
    bytes_ = words.contiguous().view(torch.uint8)
    return torch.stack((bytes_ & 15, bytes_ >> 4), 2).flatten(1)


def _awq_outputs(words: Tensor) -> Tensor:
    """Codes of AWQ's words, [R, O / 8], in the order of outputs: [O, R] uint8."""
    return _unpacked(words).unflatten(1, (-1, _PER_WORD))[:, :, list(_AWQ_PLACES)].flatten(1).t().contiguous()


def _group_size(codes: CheckpointTensor, inputs: int, groups: int) -> int:
    """Inputs of a group: the power of two of which so many make up the inputs. ModelError if there is none."""
    size = CHUNK
    while -(-inputs // size) > groups:
        size *= 2
    if -(-inputs // size) != groups:
        raise ModelError(
            f"{codes.name} has {groups} groups of its {inputs} inputs, and groups of a power of two from {CHUNK} on are read."
        )
    return size


def _dtype(tensor: CheckpointTensor) -> torch.dtype:
    return tensor.stored(_first_row(tensor)).dtype


def _first_row(tensor: CheckpointTensor) -> Part:
    columns = None if len(tensor.shape) == 1 else Cut.whole(tensor.shape[1])
    return Part((Cut(tensor.shape[0], 0, 1),), columns)


def _odd(codes: CheckpointTensor, scales: CheckpointTensor) -> ModelError:
    return ModelError(
        f"{codes.name} has shape {list(codes.shape)}, and {scales.name} {list(scales.shape)}, which is no layout of 4 bits that "
        "is read (docs/quantization.md lists those)."
    )
