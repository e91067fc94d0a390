"""Captured graphs of models that ranks share, each rank a process that captures by itself."""

from typing import NamedTuple

import torch
from stepping import Stepper
from torch import Tensor

from stepgraph.bench.ranks import run_ranks
from stepgraph.graph.cpu import CpuBackend
from stepgraph.models import load_model, resolve
from stepgraph.parallel.create import create_group
from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.group import Group
from stepgraph.parallel.shard import Shard
from stepgraph.platforms.cpu import CpuPlatform

TOKENS = [(7 * i + 3) % 90 for i in range(24)]
NAMES = ["llama with every bias", "gemma 3", "qwen3 tied", "granite"]


class Logits(NamedTuple):
    value: Tensor


def replayed(path: str, group: Group | None) -> Tensor:
    """Logits of a graph captured on the first half of the tokens and replayed on both."""
    model = load_model(resolve(path), dtype=torch.float32, device=torch.device("cpu"), max_model_len=64, group=group)
    stepper = Stepper(model, 64)
    buffers, later = stepper.build(TOKENS[:12]), stepper.build(TOKENS[12:])

    def program() -> Logits:
        return Logits(stepper.run(buffers))

    if group is None:
        graph = CpuBackend().capture(program, warmups=1)
    else:
        with group.loop_back():
            graph = CpuBackend().capture(program, warmups=group.shard.rank)
    found = [graph.replay().value.clone()]
    for buffer, value in zip(buffers, later, strict=True):
        buffer.copy_(value)
    return torch.cat([found[0], graph.replay().value])


def run(shard: Shard, exchange: Exchange, paths: list[str]) -> list[Tensor]:
    torch.set_num_threads(1)
    group = create_group(
        shard,
        exchange,
        CpuPlatform(),
        dtype=torch.float32,
        hidden_size=96,
        max_tokens=12,
        vocab_size=97,
        max_samples=12,
    )
    return [replayed(path, group) for path in paths]


def test_graphs_of_ranks_give_what_one_devices_give(tmp_path) -> None:
    from checkpoints import HF_CONFIGS, random_hf_model  # imports transformers, which ranks can do without

    paths = []
    for index, name in enumerate(NAMES):
        config = HF_CONFIGS[name]()
        config.num_attention_heads, config.num_key_value_heads, config.hidden_size, config.vocab_size = 6, 3, 96, 97
        random_hf_model(config).save_pretrained(tmp_path / str(index))
        paths.append(str(tmp_path / str(index)))
    ranks = run_ranks(run, 3, paths)
    for path, *found in zip(paths, *ranks, strict=True):
        expected = replayed(path, None)
        assert all(torch.equal(each, found[0]) for each in found)
        assert (found[0] - expected).norm() < 1e-4 * expected.norm()
