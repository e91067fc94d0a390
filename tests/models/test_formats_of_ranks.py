"""Engines of two ranks, in processes, with weights of each kind: the log-probabilities of one rank. One worker serves all."""

import pytest
import torch
from checkpoints import SIZES, random_hf_model
from four_bit_folders import write_four_bits
from test_adapters import matrices, save_adapter
from test_shards import write_blocks
from tiny import drain
from transformers import Glm4Config, LlamaConfig

from stepgraph import native
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ModelError
from stepgraph.executor.ranked import build_ranked_executor
from stepgraph.executor.workers import Workers
from stepgraph.models import resolve

SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "capture_sizes": (4, 24),
    "num_kv_blocks": 33,
}
WIDE = SIZES | {"vocab_size": 203, "intermediate_size": 128, "pad_token_id": 0, "head_dim": 32}
PROMPTS = [[(7 * i + 3) % 90 + 4 for i in range(length)] for length in (5, 40, 17)]


@pytest.fixture(scope="module")
def workers():
    workers = Workers(2)
    yield workers
    workers.close()


@pytest.fixture
def engines(workers):
    """Makes the same engine of one rank and of two."""
    made = []

    def make(model, **settings):
        for num_ranks in (1, 2):
            values = SETTINGS | {"model": str(model), "tensor_parallel_size": num_ranks} | settings
            config, executor = EngineConfig.from_settings(**values), None
            if num_ranks > 1:
                executor = build_ranked_executor(config, resolve(str(model)), workers=workers)
            made.append(build_engine(config, executor=executor))
        return made[-2:]

    yield make
    for engine in made:
        engine.shutdown()


def logprobs(engine, adapters=(None, None, None)):
    """Of answers, of which any token is as good as another, and of their prompts."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    requests = [
        engine.add_request(str(i), prompt, params, adapter=adapter)
        for i, (prompt, adapter) in enumerate(zip(PROMPTS, adapters, strict=True))
    ]
    drain(engine)
    assert [request.error for request in requests] == [None] * len(requests)
    return torch.tensor(
        [token.logprob for request in requests for token in (*request.prompt_logprobs[1:], *request.output_logprobs)]
    )


def assert_same(one, two, **options):
    found, expected = logprobs(two, **options), logprobs(one, **options)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    return expected


@pytest.mark.parametrize("kind", ["rounded to 8 bits", "rounded to 4 bits", "4 bits", "dummy", "blocks"])
def test_ranks_give_the_log_probabilities_of_one(kind, engines, tmp_path) -> None:
    config = LlamaConfig(**WIDE, attention_bias=True)
    settings = {
        "rounded to 8 bits": {"quantization": "fp8"},
        "rounded to 4 bits": {"quantization": "int4"},
        "dummy": {"load_format": "dummy"},
    }.get(kind, {})
    folder = tmp_path / "model"
    if kind == "blocks":
        if not native.available():
            pytest.skip(f"no kernels: {native.missing()}")
        folder = write_blocks(LlamaConfig(**WIDE), tmp_path / "model.gguf")
    else:
        sizes = {"intermediate_size": 256, "hidden_size": 128, "head_dim": 64} if "4 bits" in kind else {}
        random_hf_model(LlamaConfig(**config.to_dict() | sizes)).save_pretrained(folder)
    if kind == "4 bits":
        write_four_bits(folder, folder := tmp_path / "packed", "gptq with zeros")
    assert_same(*engines(folder, **settings))


def test_ranks_take_adapters_and_new_weights(engines, tmp_path) -> None:
    hf_model = random_hf_model(LlamaConfig(**WIDE))
    hf_model.save_pretrained(tmp_path / "old")
    adapters = [save_adapter(tmp_path / f"adapter{seed}", matrices(hf_model, rank=5, seed=seed)) for seed in (1, 2)]
    one, two = engines(tmp_path / "old", enable_lora=True, max_loras=2)
    plain = assert_same(one, two)
    assert (assert_same(one, two, adapters=(adapters[0], None, adapters[1])) - plain).abs().max() > 0.1
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.mul_(0.7)
    hf_model.save_pretrained(tmp_path / "new")
    tensors = dict(hf_model.state_dict())
    for engine in (one, two):
        with pytest.raises(ModelError, match=r"1 .*missing"):
            engine.update_weights(list(tensors.items())[1:])
    assert torch.equal(assert_same(one, two), plain), "all fit or none is written"
    for weights in (tensors.items(), str(tmp_path / "old"), str(tmp_path / "new")):
        for engine in (one, two):
            engine.update_weights(weights)
        changed = (assert_same(one, two) - plain).abs().max() > 0.1
        assert changed == (weights != str(tmp_path / "old"))


def test_ranks_run_what_transformers_runs(engines, tmp_path) -> None:
    hf_model = random_hf_model(Glm4Config(**WIDE | {"intermediate_size": 96}))
    hf_model.save_pretrained(tmp_path / "old")
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.mul_(0.7)
    hf_model.save_pretrained(tmp_path / "new")
    one, two = engines(tmp_path / "old")
    before = assert_same(one, two)
    for engine in (one, two):
        engine.update_weights(str(tmp_path / "new"))
    assert (assert_same(one, two) - before).abs().max() > 0.1
