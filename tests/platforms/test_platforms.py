"""Which platform a machine gets."""

import pytest
import torch

from stepgraph.errors import ConfigError
from stepgraph.platforms import create_platform


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_build_of_torch_for_other_gpus_is_refused_and_runs_on_the_cpu_if_asked(monkeypatch, device) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as such builds say
    with pytest.raises(ConfigError, match=r"ROCm.*no platform yet; use device='cpu'"):
        create_platform(device)
    assert create_platform("cpu").name == "cpu"
