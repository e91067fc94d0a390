"""Mends Triton's interpreter, which stands in for a GPU. Imported by all processes of tests that use it."""

from dataclasses import replace
from functools import cache

import torch

if not torch.cuda.is_available():
    from triton.language import core
    from triton.runtime import interpreter

    # Triton 3.6's interpreter cannot use a scalar as a loop bound with NumPy 2.4 or later (triton-lang/triton#9171).
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_new_numpy(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_for_new_numpy

    # It looks through all of Triton's language at each launch, and at each call of a function from a kernel, to have what is
    # there interpreted.
    patch_language = interpreter._patch_lang

    @cache
    def patch_language_once(function) -> interpreter._LangPatchScope:
        patch_language(function)
        return interpreter._LangPatchScope()  # which restores nothing

    interpreter._patch_lang = patch_language_once

    # It makes a table of all types whenever it asks for NumPy's name of one.
    find_numpy_type = interpreter._get_np_dtype
    numpy_types = {}

    def numpy_type(triton_type):
        scalar = triton_type.scalar
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = find_numpy_type(scalar)
        return numpy_types[scalar.name]

    interpreter._get_np_dtype = numpy_type

    # It computes whether sums and products of integers overflow, and says so only when debugging.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)

    # It works out anew for each value what follows from its type, and for each type of a block what follows from its shape.
    initialise_tensor, initialise_block_type = core.tensor.__init__, core.block_type.__init__
    of_tensors, of_block_types = {}, {}

    def initialise_tensor_once(self, handle, type) -> None:
        if type.name not in of_tensors:
            initialise_tensor(self, handle, type)
            of_tensors[type.name] = vars(self) | {"handle": None}
        vars(self).update(of_tensors[type.name])
        self.handle = handle

    def initialise_block_type_once(self, element_ty, shape) -> None:
        key = element_ty.name, *[size.value if isinstance(size, core.constexpr) else size for size in shape]
        if key not in of_block_types:
            initialise_block_type(self, element_ty, shape)
            of_block_types[key] = dict(vars(self))
        vars(self).update(of_block_types[key])

    core.tensor.__init__, core.block_type.__init__ = initialise_tensor_once, initialise_block_type_once

    # It makes a new shape of any two, compares types by the names of what both are unwrapped from, and calls each function of the
    # language through two others.
    semantic = interpreter.interpreter_semantic
    broadcast, are_equal = semantic.broadcast_impl_value, core.dtype.__eq__

    def broadcast_unless_alike(lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and list(lhs.type.shape) == list(rhs.type.shape):
            return lhs, rhs
        return broadcast(lhs, rhs)

    def patch_function(module, name, function, _builder, scope) -> None:
        body = getattr(function, "__wrapped__", function)
        scope.set_attr(module, name, lambda *args, **kwargs: body(*args, **kwargs | {"_semantic": semantic}))

    semantic.broadcast_impl_value = broadcast_unless_alike
    core.dtype.__eq__ = lambda self, other: self is other or are_equal(self, other)
    interpreter._patch_attr = patch_function
