"""Weights sent in pieces: every rank gets what it would read itself, in buckets of bounded size, and nothing before all fits."""

import pickle

import pytest
import torch
from checkpoints import HF_CONFIGS, random_hf_model
from shards import as_bytes, assert_is_shard
from test_shards import load

from stepgraph.errors import ModelError
from stepgraph.models.tensor_stream import Announced, Arriving, announce, buckets
from stepgraph.models.update import plan_update
from stepgraph.parallel.shard import Shard

LIMIT = 5000


def tensors_of(hf_model, dtype=torch.float32):
    return {name: values.detach().to(dtype) for name, values in hf_model.state_dict().items()}


def send(update, models):
    """Have other ranks' models take an update, and return the sizes of its buckets."""
    arriving = [Arriving(model, pickle.loads(pickle.dumps(announce(update)))) for model in models]
    sizes = []
    for bucket in buckets(update, LIMIT):
        message = pickle.dumps(bucket)
        sizes.append(len(message))
        for rank in arriving:
            rank.take(pickle.loads(message))
    for rank in arriving:
        rank.finish()
    return sizes


@pytest.mark.parametrize("quantization", ["auto", "fp8"])
@pytest.mark.parametrize("name", ["llama with every bias", "qwen3 tied", "phi 4 with long rope"])
def test_ranks_take_what_they_would_read(name, quantization, tmp_path) -> None:
    new = random_hf_model(HF_CONFIGS[name]())
    new.save_pretrained(tmp_path / "old")
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.normal_()
    new.save_pretrained(tmp_path / "new")
    whole, expected = (load(tmp_path / folder, quantization=quantization) for folder in ("old", "new"))
    ranks = [load(tmp_path / "old", quantization=quantization, shard=Shard(rank, 2)) for rank in range(2)]
    sizes = send(plan_update(whole, tensors_of(new).items()), ranks)
    assert len(sizes) > 10
    assert max(sizes) < 2 * LIMIT, "values are bounded, and names and places are small"
    for rank, model in enumerate(ranks):
        assert_is_shard(model, expected, rank, 2)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path) -> None:
    random_hf_model(HF_CONFIGS["llama"]()).save_pretrained(tmp_path)
    model = load(tmp_path, shard=Shard(1, 2))
    before = {name: as_bytes(values).clone() for name, values in model.named_parameters()}
    heads = announce(plan_update(load(tmp_path), tensors_of(random_hf_model(HF_CONFIGS["llama"]())).items()))
    for wrong, message in (
        (heads[1:], r"1 \(.*\) missing, none left over"),
        ([*heads, Announced("model.more.weight", (1,))], "none missing, 1 .*model.more.weight.* left over"),
        ([heads[0]._replace(shape=(7, 64)), *heads[1:]], r"has shape \[7, 64\]"),
    ):
        with pytest.raises(ModelError, match=message):
            Arriving(model, wrong)
    assert all(torch.equal(as_bytes(values), before[name]) for name, values in model.named_parameters())


def test_what_is_lost_on_the_way_is_told(tmp_path) -> None:
    hf_model = random_hf_model(HF_CONFIGS["llama"]())
    hf_model.save_pretrained(tmp_path)
    model = load(tmp_path)
    update = plan_update(model, tensors_of(hf_model, torch.bfloat16).items())
    arriving, sent = Arriving(model, announce(update)), list(buckets(update, LIMIT))
    arriving.take(sent[0])
    with pytest.raises(ModelError, match="another order"):
        arriving.take(sent[2])
    for bucket in sent[1:-1]:
        arriving.take(bucket)
    with pytest.raises(ModelError, match="did not arrive"):
        arriving.finish()
