"""Which adapter gets which number, over memory that is a dictionary."""

import pytest

from stepgraph.engine.adapters import AdapterTable
from stepgraph.models.adapters import AdapterFile


class Memory:
    """Of adapters by their numbers; fails to write those of some folders."""

    def __init__(self) -> None:
        self.folders: dict[int, str] = {}
        self.unwritable: set[str] = set()

    def write(self, number: int, file: AdapterFile) -> None:
        self.folders[number] = "half of " + file.folder
        if file.folder in self.unwritable:
            raise RuntimeError("the device fell over")
        self.folders[number] = file.folder


@pytest.mark.parametrize("max_loras", [2, 3])
def test_an_adapter_that_cannot_be_written_takes_the_memory_of_no_other(max_loras) -> None:
    memory = Memory()
    table = AdapterTable(lambda folder: AdapterFile(folder, b"", ()), memory.write, max_loras)
    table.load("/a", ())
    kept = table.load("/b", ())
    memory.unwritable.add("/c")
    for _ in range(3):
        with pytest.raises(RuntimeError):
            table.load("/c", (kept,))
        assert not table.holds("/c")
    fourth = table.load("/d", (kept,))
    assert (memory.folders[kept.number], memory.folders[fourth.number]) == ("/b", "/d")
    assert table.load("/b", ()) is kept
