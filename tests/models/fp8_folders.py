"""Checkpoints in 8 bits, made from unquantised ones, in the layouts in which they are published."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from stepgraph.ops.fp8_linear import GROUP_SIZE


def compressed_tensors(strategy, **weights):
    """The `quantization_config` that llm-compressor writes."""
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False} | weights
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


LAYOUTS = {
    "a scale per matrix": ("matrix", "weight_scale", compressed_tensors("tensor")),
    "a scale per output": ("output", "weight_scale", compressed_tensors("channel")),
    "a scale per block": (
        "block",
        "weight_scale",
        compressed_tensors("block", block_structure=[GROUP_SIZE, GROUP_SIZE]),
    ),
    "fp8 with a scale per block": (
        "block",
        "weight_scale_inv",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [GROUP_SIZE, GROUP_SIZE]},
    ),
    "fp8 with static activations": (
        "matrix",
        "weight_scale",
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "fp8 as Mistral writes it": (
        "matrix",
        "weight_scale_inv",
        {"quant_method": "fp8", "activation_scheme": "static", "dequantize": False, "weight_block_size": None},
    ),
    "modelopt with a scale per matrix": (
        "matrix",
        "weight_scale",
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "producer": {"name": "modelopt"},
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
            "ignore": ["lm_head"],
        },
    ),
    "modelopt with a scale per output": (
        "output",
        "weight_scale",
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}},
    ),
    "modelopt with a scale per block": (
        "block",
        "weight_scale",
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "ignore": ["lm_head"]},
    ),
    "fbgemm": (
        "output",
        "weight_scale",
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    ),
}
"""Whose scale a scale is, the end of its name, and the `quantization_config`."""
_LINEAR = ("proj", "proj_with_mqa", "w1", "w2", "w3", "per_layer_input_gate", "per_layer_projection")
EXTRA = {
    "fp8 with static activations": ("input_scale",),
    "fp8 as Mistral writes it": ("activation_scale",),
    "modelopt with a scale per matrix": ("input_scale", "k_scale", "v_scale"),
}
"""Scales for what is not quantised here, beside each weight."""


def encode(values, per):
    """Codes, scales as they are stored, and what the two stand for. Scales are not those that rounding anew would choose."""
    O, I = values.shape  # noqa: E741
    blocks = {"matrix": (O, I), "output": (1, I), "block": (GROUP_SIZE, GROUP_SIZE)}[per]
    rows, columns = torch.arange(O) // blocks[0], torch.arange(I) // blocks[1]
    shape = int(rows[-1]) + 1, int(columns[-1]) + 1
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(O * I)) * 0.002 + 0.003
    wide = scale[rows][:, columns]
    codes = (values / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale.view(1) if per == "matrix" else scale, codes.float() * wide


def write_fp8(source, folder, layout, *, ignored=()):
    """Write the checkpoint in `source` as one in 8 bits.

    Args:
        source: folder with a model.safetensors.
        folder: gets the new one.
        layout: of `LAYOUTS`.
        ignored: layers that stay as they are, beside the output head: parts of their names.

    Returns:
        Folder of a third checkpoint: unquantised, with the values that the codes stand for.
    """
    per, suffix, config = LAYOUTS[layout]
    source, folder, plain = Path(source), Path(folder), Path(f"{folder}-dequantised")
    for target in (folder, plain):
        target.mkdir()
        for file in source.iterdir():
            if file.suffix == ".json" and not file.name.endswith("index.json"):
                (target / file.name).write_bytes(file.read_bytes())
    tensors, values = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if (
            ".layers." in name
            and name.endswith(tuple(f"{kind}.weight" for kind in _LINEAR))
            and not any(part in name for part in ignored)
        ):
            tensors[name], scale, values[name] = encode(tensor.float(), per)
            scale = scale[:, None, :, None].contiguous() if layout == "modelopt with a scale per block" else scale
            tensors[name.removesuffix("weight") + suffix] = scale
            for extra in EXTRA.get(layout, ()):
                tensors[name.removesuffix("weight") + extra] = torch.ones(1)
        else:
            tensors[name] = values[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(written))
    return plain
