"""What a shard of a model must hold, cut out of the whole model by hand."""

import re

import torch

from stepgraph.layers.experts import ExpertLinear
from stepgraph.layers.formats import FP8
from stepgraph.layers.matrix import Matrix


def kv_head_of(config, rank, size):
    """First and number of a rank's key/value heads: those that its query heads use."""
    queries = config.num_heads // size
    group = config.num_heads // config.num_kv_heads
    used = sorted({head // group for head in range(rank * queries, (rank + 1) * queries)})
    return used[0], len(used)


def rows_of(path, config, rank, size):
    """Rows of a column-parallel layer that a rank keeps."""

    def span(start, begin, length):
        return list(range(start + begin, start + begin + length))

    if config.latent is not None and "self_attn" in path:
        sizes, H = config.latent, config.num_heads
        part = {
            "kv_proj": sizes.key_dim + sizes.value_dim,
            "q_proj": sizes.key_dim + sizes.rotated_dim,
            "qkv_proj": 0 if sizes.q_rank else sizes.key_dim + sizes.rotated_dim,
        }[path.rpartition(".")[2]]
        heads = span(0, rank * H // size * part, H // size * part)
        whole = span(H * part, 0, sizes.q_rank + sizes.entry_size)
        return heads + (whole if path.endswith("qkv_proj") else [])
    if path.endswith("qkv_proj"):
        D, H, G = config.head_dim, config.num_heads, config.num_kv_heads
        first, count = kv_head_of(config, rank, size)
        queries = span(0, rank * H // size * D, H // size * D)
        if config.joint_qk_norm:
            return span(0, 0, (H + G) * D) + span((H + G) * D, first * D, count * D)
        if config.output_gate:
            queries += span(H * D, rank * H // size * D, H // size * D)
            H *= 2
        return queries + span(H * D, first * D, count * D) + span((H + G) * D, first * D, count * D)
    shared = next((spec.shared_intermediate_size for spec in config.kinds_of_mlp if spec is not None), None)
    M = shared if "shared" in path else config.intermediate_size
    part = M // size
    gates = [] if config.activation == "relu2" else span(M, rank * part, part)
    return span(0, rank * part, part) + gates


STATEFUL = re.compile(r"\.(linear_attn|conv|mamba)\.(?P<name>\w+)(\.weight|\.bias|\.scale|)$")


def rows_of_states(name, config):
    """Of a parameter of a layer with a state, the numbers of rows that are stacked in it, of each of which a rank keeps its part;
    None: it is not cut along its rows."""
    if config.short_conv is not None:
        return {"in_proj": [config.hidden_size] * 3, "conv": [config.hidden_size]}.get(name)
    if config.mamba is not None:
        projected, (H,) = config.mamba.projected, config.mamba.projected[4:]
        by_name = {"in_proj": projected, "conv1d": projected[1:4], "norm": projected[:1]}
        return [H] if name in ("A_log", "dt_bias", "D") else by_name.get(name)
    sizes = config.delta
    H, keys, values = (
        sizes.num_value_heads,
        sizes.num_key_heads * sizes.key_dim,
        sizes.num_value_heads * sizes.value_dim,
    )
    return {
        "qkvz_proj": [keys, keys, values, values],
        "ba_proj": [H, H],
        "conv1d": [keys, keys, values],
        "A_log": [H],
        "dt_bias": [H],
    }.get(name)


def rows_of_head(vocab_size, rank, size):
    """As many on all ranks but the last, by the sixteen where that leaves the last one some."""
    width = -(-vocab_size // size)
    if (size - 1) * (width + -width % 16) < vocab_size:
        width += -width % 16
    return slice(rank * width, (rank + 1) * width)


def part_of_experts(path, parameter, num_experts, rank, size, *, parts, cuts_inputs, expert_parallel):
    """Of the stacked matrices of a layer's experts: some of them, or of each the gates and what they multiply, or inputs."""
    experts = parameter.unflatten(0, (num_experts, -1))
    if expert_parallel:
        return experts.chunk(size)[rank].flatten(0, 1)
    if path.endswith("gate_up_proj"):
        return experts.unflatten(1, (parts, -1)).chunk(size, 2)[rank].flatten(0, 2)
    return parameter.chunk(size, 1)[rank] if cuts_inputs else parameter


def expected_parameters(model, rank, size, *, expert_parallel=False):
    """The parameters of a shard by name, of the whole model's."""
    expected = {}
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        grouped = isinstance(module, Matrix) and isinstance(module.format, FP8) and module.format.grouped
        cuts_inputs = kind == "weight" or (grouped and kind == "scale")
        if isinstance(module, ExpertLinear):
            if kind == "bias" and path.endswith("down_proj") and rank > 0 and not expert_parallel:
                continue
            of = {"cuts_inputs": cuts_inputs, "expert_parallel": expert_parallel}
            of["parts"] = len(module.parts) // module.num_kept
            parameter = part_of_experts(path, parameter, module.num_kept, rank, size, **of)
        elif (match := STATEFUL.search(name)) and (parts := rows_of_states(match["name"], model.config)):
            parameter = torch.cat([rows.chunk(size)[rank] for rows in parameter.split(parts)])
        elif path.endswith(("qkv_proj", ".q_proj", ".kv_proj", "gate_up_proj")):
            parameter = parameter[rows_of(path, model.config, rank, size)]
        elif path.endswith(("o_proj", "out_proj", "down_proj")):
            if kind == "bias" and rank > 0:
                continue
            if cuts_inputs:
                parameter = parameter.chunk(size, 1)[rank]
        elif kind == "sinks":
            parameter = parameter.chunk(size)[rank]
        elif path == "lm_head":
            parameter = parameter[rows_of_head(len(parameter), rank, size)]
        expected[name] = parameter
    return expected


def assert_is_shard(shard, whole, rank, size, *, expert_parallel=False) -> None:
    """Every parameter has the bits of its part of the whole model's."""
    expected, found = (
        expected_parameters(whole, rank, size, expert_parallel=expert_parallel),
        dict(shard.named_parameters()),
    )
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.shape == expected[name].shape, name
        assert torch.equal(as_bytes(parameter), as_bytes(expected[name])), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name


def as_bytes(values):
    return values.detach().contiguous().view(torch.uint8)


def run_stepper(stepper, tokens):
    """Logits of some tokens, fed in two steps, so that a step's parts meet what another left in the cache."""
    half = len(tokens) // 2 + 1
    return torch.cat([stepper.step(tokens[:half]), stepper.step(tokens[half:])])
