"""Which operators some code calls, with their arguments by name."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCalls(TorchDispatchMode):
    """Writes down every operator that is called: ``stepgraph.linear(x, weight, None) -> %1``."""

    def __init__(self, **named: Tensor) -> None:
        """Args:
        named: tensors by their names; results are named %1, %2, …
        """
        super().__init__()
        self.calls: list[str] = []
        self._names = {id(tensor): name for name, tensor in named.items()}
        self._results: list[Tensor] = []  # alive, so that no other tensor gets the id of one

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [self._name(arg) for arg in args] + [f"{key}={self._name(arg)}" for key, arg in kwargs.items()]
        result = func(*args, **kwargs)
        call = f"{func._schema.name.replace('::', '.')}({', '.join(given)})"
        if isinstance(result, Tensor) and id(result) not in self._names:
            self._results.append(result)
            self._names[id(result)] = f"%{len(self._results)}"
            call += f" -> {self._names[id(result)]}"
        self.calls.append(call)
        return result

    def _name(self, arg: object) -> str:
        return self._names[id(arg)] if isinstance(arg, Tensor) else str(arg)
