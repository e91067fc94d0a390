"""Fixtures of all tests. Without a GPU, Triton kernels run under its interpreter, chosen before anything imports it."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("stepgraph", deadline=None)  # no test asserts a time
settings.load_profile("stepgraph")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from triton.runtime import interpreter

    # Triton 3.6's interpreter cannot use a scalar as a loop bound with NumPy 2.4 or later (triton-lang/triton#9171).
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_new_numpy(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_for_new_numpy


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run: "cuda", or "cpu" under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
