"""What a shard of a model must hold, cut out of the whole model by hand, and a step of ranks that are all in one process."""

import torch
from stepping import Stepper

from stepgraph.layers.formats import FP8


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

    if path.endswith("qkv_proj"):
        D, H, G = config.head_dim, config.num_heads, config.num_kv_heads
        first, count = kv_head_of(config, rank, size)
        queries = span(0, rank * H // size * D, H // size * D)
        return queries + span(H * D, first * D, count * D) + span((H + G) * D, first * D, count * D)
    M = config.intermediate_size
    part = M // size
    return span(0, rank * part, part) + span(M, rank * part, part)


def expected_parameters(model, rank, size):
    """The parameters of a shard by name, of the whole model's."""
    expected = {}
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        if path.endswith(("qkv_proj", "gate_up_proj")):
            parameter = parameter[rows_of(path, model.config, rank, size)]
        elif path.endswith(("o_proj", "down_proj")):
            if kind == "bias" and rank > 0:
                continue
            if kind == "weight" or (isinstance(module.format, FP8) and module.format.grouped and kind == "scale"):
                parameter = parameter.chunk(size, 1)[rank]
        expected[name] = parameter
    return expected


def assert_is_shard(shard, whole, rank, size) -> None:
    """Every parameter has the bits of its part of the whole model's."""
    expected, found = expected_parameters(whole, rank, size), dict(shard.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.shape == expected[name].shape, name
        assert torch.equal(as_bytes(parameter), as_bytes(expected[name])), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name


def as_bytes(values):
    return values.detach().contiguous().view(torch.uint8)


class ShardedStepper(Stepper):
    """A Stepper over the shards of a model, which adds up what they compute where ranks would."""

    def __init__(self, models, max_len: int) -> None:
        super().__init__(models[0], max_len)
        self.ranks = [Stepper(model, max_len) for model in models]

    def run(self, tokens):
        """See `Stepper.run`."""
        ranks = [(stepper.model, stepper.inputs(tokens)) for stepper in self.ranks]
        first = self.model
        residual = first.embed(tokens.token_ids)
        multiplier = first.config.residual_multiplier
        for index, layer in enumerate(first.layers):
            layers = [(model.layers[index], inputs) for model, inputs in ranks]
            table = first.get_buffer(first._table_names[index])
            attended = sum(
                each.self_attn.o_proj(
                    each.self_attn(each.input_layernorm, residual, table, inputs.caches[index], inputs)
                )
                for each, inputs in layers
            )
            norms = layer.post_attention_layernorm, layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
            residual = residual + (multiplier * attended if norms[1] is None else norms[0](attended))
            before = norms[0] if norms[1] is None else norms[1]
            fed = sum(each.mlp.down_proj(each.mlp.hidden(before, residual)) for each, _ in layers)
            residual = residual + (multiplier * fed if norms[2] is None else norms[2](fed))
        hidden = first.norm(residual)
        return first.logits(hidden, out=hidden.new_empty(len(hidden), first.config.vocab_size))
