"""Checkpoints in 4 bits, made from unquantised ones, in the layouts in which they are published.

Layouts are written here word by word, as their makers' packages define them: AutoAWQ's WQLinear_GEMM, GPTQModel's linear layers,
compressed-tensors' compressors, modelopt's export.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_LINEAR = ("proj", "w1", "w2", "w3")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each four bits of a word have, from the lowest on."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def words(codes, order=range(8)):
    """Codes [R, 8C] as [R, C] int32."""
    packed = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, index in enumerate(order):
        packed |= codes[:, index::8].long() << 4 * place
    return packed.sub(packed.ge(2**31) * 2**32).to(torch.int32)


def padded(codes, dim):
    """With zeros up to a multiple of 8."""
    size = list(codes.shape)
    size[dim] = -codes.shape[dim] % 8
    return torch.cat((codes, torch.zeros(size, dtype=codes.dtype)), dim)


def integers(values, size, *, symmetric, dtype=torch.float16):
    """Codes [O, I], scales and zeros [O, G], and what they stand for, in float64."""
    (O, I), size = values.shape, size if size > 0 else values.shape[1]  # noqa: E741
    G = -(-I // size)
    generator = torch.Generator().manual_seed(O * I)
    scale = (values.abs().max() / 6 * (1 + torch.rand(O, G, generator=generator))).to(dtype)
    zero = torch.full((O, G), 8) if symmetric else torch.randint(5, 12, (O, G), generator=generator)
    wide_scale, wide_zero = (t.repeat_interleave(size, 1)[:, :I] for t in (scale, zero))
    codes = (values / wide_scale.float() + wide_zero).round().clamp(0, 15).to(torch.int64)
    return codes, scale, zero, (codes - wide_zero).double() * wide_scale.double()


def write_awq(values, size, **kwargs):
    """AutoAWQ, version gemm."""
    codes, scale, zero, exact = integers(values, size, symmetric=False)
    tensors = {"qweight": words(codes.t(), _AWQ_ORDER), "qzeros": words(zero.t(), _AWQ_ORDER), "scales": scale.t()}
    return tensors, exact


def write_gptq(values, size, *, symmetric, less_one=1):
    """GPTQModel: format gptq, whose zeros are stored less one, or gptq_v2."""
    codes, scale, zero, exact = integers(values, size, symmetric=symmetric)
    groups = torch.arange(values.shape[1], dtype=torch.int32) // (size if size > 0 else values.shape[1])
    tensors = {"qweight": words(codes).t(), "qzeros": words(zero.t() - less_one), "scales": scale.t(), "g_idx": groups}
    return tensors, exact


def write_packed(values, size, *, symmetric, dtype=torch.bfloat16):
    """compressed-tensors, format pack-quantized."""
    codes, scale, zero, exact = integers(values, size, symmetric=symmetric, dtype=dtype)
    tensors = {"weight_packed": words(padded(codes, 1)), "weight_scale": scale}
    tensors["weight_shape"] = torch.tensor(values.shape)
    if not symmetric:
        tensors["weight_zero_point"] = words(padded(zero, 0).t()).t()
    return tensors, exact


def e2m1(values, scale, size):
    """The nearest codes, packed two a byte, and their numbers."""
    wide = scale.double().repeat_interleave(size, 1)[:, : values.shape[1]]
    magnitude = (values.double().abs() / wide).unsqueeze(2)
    index = (magnitude - torch.tensor(_E2M1, dtype=torch.float64)).abs().argmin(2)
    exact = torch.tensor(_E2M1, dtype=torch.float64)[index] * wide * values.sign()
    codes = (index + 8 * (values < 0)).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, exact


def write_nvfp4(values, size, *, modelopt):
    """modelopt, or compressed-tensors' nvfp4-pack-quantized, which divides by the scale of all."""
    of_all = values.abs().max() / 6 / 448
    stored = 1 / of_all
    of_all = of_all if modelopt else 1 / stored
    largest = values.unflatten(1, (-1, 16)).abs().amax(2)
    scale = (largest / 6 / of_all).clamp(2**-6, 448).to(torch.float8_e4m3fn)
    codes, exact = e2m1(values, scale.double() * of_all.double(), 16)
    if modelopt:
        return {
            "weight": codes,
            "weight_scale": scale,
            "weight_scale_2": of_all,
            "input_scale": torch.tensor(0.1),
        }, exact
    tensors = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": stored.view(1)}
    return tensors | {"input_global_scale": torch.tensor([7.0])}, exact


def write_mxfp4(values, size, **kwargs):
    """compressed-tensors, format mxfp4-pack-quantized."""
    exponent = values.unflatten(1, (-1, 32)).abs().amax(2).log2().floor() - 2
    codes, exact = e2m1(values, 2.0**exponent, 32)
    return {"weight_packed": codes, "weight_scale": (exponent + 127).to(torch.uint8)}, exact


def compressed_tensors(format, **weights):
    """The `quantization_config` that llm-compressor writes."""
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "dynamic": False} | weights
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "format": format}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def gptq(size, **kwargs):
    """The `quantization_config` that GPTQModel writes."""
    return {"quant_method": "gptq", "bits": 4, "group_size": size, "desc_act": False, "sym": True} | kwargs


def auto_round(size, packing, **kwargs):
    """The `quantization_config` that AutoRound writes."""
    return {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": size,
        "data_type": "int",
        "packing_format": packing,
    } | kwargs


def awq(size):
    """The `quantization_config` that AutoAWQ writes."""
    return {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}


LAYOUTS = {
    "awq": (write_awq, 64, {}, awq(64)),
    "awq, groups of 16": (write_awq, 16, {}, awq(16)),
    "gptq": (write_gptq, 32, {"symmetric": True}, gptq(32, checkpoint_format="gptq")),
    "gptq with zeros": (write_gptq, 32, {"symmetric": False}, gptq(32, sym=False)),
    "gptq v2 with zeros": (
        write_gptq,
        64,
        {"symmetric": False, "less_one": 0},
        gptq(64, sym=False, checkpoint_format="gptq_v2"),
    ),
    "gptq, one group": (write_gptq, -1, {"symmetric": True}, gptq(-1, desc_act=True)),
    "auto-round as gptq": (write_gptq, 32, {"symmetric": True}, auto_round(32, "auto_round:auto_gptq", sym=True)),
    "auto-round as awq": (write_awq, 32, {}, auto_round(32, "auto_round:auto_awq", sym=False)),
    "compressed-tensors": (
        write_packed,
        64,
        {"symmetric": True},
        compressed_tensors("pack-quantized", group_size=64),
    ),
    "compressed-tensors with zeros": (
        write_packed,
        128,
        {"symmetric": False, "dtype": torch.float16},
        compressed_tensors("pack-quantized", group_size=128, symmetric=False),
    ),
    "compressed-tensors, a scale per output": (
        write_packed,
        -1,
        {"symmetric": True},
        compressed_tensors("pack-quantized", strategy="channel"),
    ),
    "compressed-tensors nvfp4": (
        write_nvfp4,
        16,
        {"modelopt": False},
        compressed_tensors("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16),
    ),
    "compressed-tensors mxfp4": (
        write_mxfp4,
        32,
        {},
        compressed_tensors("mxfp4-pack-quantized", type="float", group_size=32),
    ),
    "modelopt nvfp4": (
        write_nvfp4,
        16,
        {"modelopt": True},
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]},
    ),
}
"""What writes a weight, inputs of a group, options, and the `quantization_config`."""


def write_four_bits(source, folder, layout, *, ignored=()):
    """Write the checkpoint in `source` as one in 4 bits.

    Args:
        source: folder with a model.safetensors.
        folder: gets the new one.
        layout: of `LAYOUTS`.
        ignored: layers that stay as they are, beside the output head: parts of their names.

    Returns:
        Folder of a third checkpoint: unquantised, in float32, with the values that the codes stand for.
    """
    write, size, options, config = LAYOUTS[layout]
    source, folder, plain = Path(source), Path(folder), Path(f"{folder}-dequantised")
    for target in (folder, plain):
        target.mkdir()
        for file in source.iterdir():
            if file.suffix == ".json" and not file.name.endswith("index.json"):
                (target / file.name).write_bytes(file.read_bytes())
    tensors, values = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        path, _, kind = name.rpartition(".")
        if ".layers." in name and kind == "weight" and path.endswith(_LINEAR) and not any(p in name for p in ignored):
            stored, exact = write(tensor.float(), size, **options)
            tensors |= {f"{path}.{kind}": t.contiguous() for kind, t in stored.items()}
            values[name] = exact.float()
        else:
            tensors[name] = values[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(described))
    return plain
