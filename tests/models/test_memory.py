"""Weights that do not fit are refused before they take memory; what quantised ones take as numbers is told."""

import logging

import gguf
import pytest
import torch
from checkpoints import HF_CONFIGS, SIZES, random_hf_model
from gguf_files import write_gguf
from transformers import LlamaConfig

from stepgraph import native
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.errors import ConfigError, DeviceMemoryError
from stepgraph.executor import build
from stepgraph.models import load_model, resolve
from stepgraph.models.loader import create_model
from stepgraph.platforms.cpu import CpuPlatform

CPU = torch.device("cpu")
WIDE = SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""Rows of whole blocks of 256, as K-quants have them."""


@pytest.fixture(scope="module")
def k_quants(tmp_path_factory):
    """A file of Q6_K, which the gguf package cannot write: blocks of zeros stand for it."""
    path = tmp_path_factory.mktemp("k") / "model.gguf"
    hf_model = random_hf_model(LlamaConfig(**WIDE))
    parameters = dict(hf_model.named_parameters())
    quantize = gguf.quants.quantize

    def zeros(values, type_):
        if type_ != gguf.GGMLQuantizationType.Q6_K:
            return quantize(values, type_)
        return torch.zeros(len(values), values.shape[1] // 256 * 210, dtype=torch.uint8).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.quants, "quantize", zeros)
        write_gguf(path, hf_model, dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), gguf.GGMLQuantizationType.Q6_K))
    return path, sum(parameter.numel() for name, parameter in parameters.items() if ".mlp." in name)


def load(path, **settings):
    settings = {"dtype": torch.float32, "device": CPU, "max_model_len": 32, "packed": True} | settings
    return load_model(resolve(str(path)), **settings)


@pytest.mark.parametrize("kernels", [True, False])
def test_k_quants_become_numbers_on_a_cpu_with_a_warning_that_says_what_keeps_its_bits(
    k_quants, kernels, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: kernels)
    path, num_weights = k_quants
    with caplog.at_level(logging.WARNING, logger="stepgraph"):
        load(path)
    (line,) = (record.getMessage() for record in caplog.records)
    sizes = (
        f"{num_weights * 4 / 2**20:.1f} MiB of memory instead of the file's {num_weights * 210 / 256 / 2**20:.1f} MiB"
    )
    assert f"tensors of type Q6_K are kept as float32, which takes {sizes}" in line
    assert "Tensors of type Q4_0, Q4_1, Q8_0 keep their bits" in line
    assert ("docs/cpu.md" in line) == (not kernels)


def test_weights_that_were_asked_for_as_numbers_are_no_reason_to_warn(k_quants, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="stepgraph"):
        load(k_quants[0], packed=False, dtype=torch.bfloat16)
    (record,) = (record for record in caplog.records if "Q6_K" in record.getMessage())
    assert record.levelno == logging.INFO
    assert "keep their bits" not in record.getMessage()


@pytest.mark.parametrize("model_impl", ["native", "transformers"])
def test_weights_that_do_not_fit_are_refused_before_they_take_memory(model_impl, tmp_path, monkeypatch) -> None:
    hf_model = random_hf_model(HF_CONFIGS["llama"]())
    hf_model.save_pretrained(tmp_path)
    source = resolve(str(tmp_path), model_impl=model_impl)
    nbytes = 4 * sum(parameter.numel() for parameter in hf_model.parameters())
    settings = {"device": CPU, "max_model_len": 32, "load_format": "dummy"}

    def create(dtype, free_bytes):
        return create_model(source, dtype=dtype, free_bytes=free_bytes, **settings)

    create(torch.float32, nbytes)
    create(torch.bfloat16, nbytes // 2)
    with pytest.raises(
        DeviceMemoryError, match=r"take 0.\d MiB .* dtype float32, and .* MiB are free: set dtype='bfloat16'"
    ):
        create(torch.float32, nbytes - 1)
    with pytest.raises(DeviceMemoryError, match=r"dtype bfloat16.*are free: free some, or choose a smaller model$"):
        create(torch.bfloat16, nbytes // 2 - 1)


def test_an_engine_asks_its_machine_before_it_reads_weights(tmp_path, monkeypatch) -> None:
    random_hf_model(HF_CONFIGS["llama"]()).save_pretrained(tmp_path)
    monkeypatch.setattr(CpuPlatform, "free_memory_bytes", lambda _: 1000)
    with pytest.raises(DeviceMemoryError, match=r"the weights of .* and 0\.0 MiB are free"):
        build_engine(EngineConfig.from_settings(model=str(tmp_path), device="cpu"))


@pytest.mark.parametrize("option", [{"splitwise_role": "decode"}, {"kv_host_cache_gib": 0.01}])
def test_blocks_that_are_not_all_of_a_prefix_are_not_moved_and_no_weights_read_before_that_is_said(
    option, tmp_path, monkeypatch
) -> None:
    random_hf_model(HF_CONFIGS["lfm2"]()).save_pretrained(tmp_path)
    monkeypatch.setattr(build, "_filling", None)
    config = EngineConfig.from_settings(model=str(tmp_path), device="cpu", **option)
    with pytest.raises(ConfigError, match="layers that carry a state") as refusal:
        build_engine(config)
    assert [refusal.value.param] == [*option]
