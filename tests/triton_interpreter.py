"""Mends Triton's interpreter, which stands in for a GPU. Imported by all processes of tests that use it."""

import torch

if not torch.cuda.is_available():
    from triton.runtime import interpreter

    # Triton 3.6's interpreter cannot use a scalar as a loop bound with NumPy 2.4 or later (triton-lang/triton#9171).
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_new_numpy(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_for_new_numpy
