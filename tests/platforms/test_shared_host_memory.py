"""Memory that other processes map: the same bytes, and never others than were meant."""

import os
import subprocess
import sys

import pytest
import torch

from stepgraph.platforms.shared_memory import Address, SharedFile, SharedMemory, SharedMemoryError, map_shared_file

READ = """
import sys
from stepgraph.platforms.shared_memory import Address, map_shared_file
memory = map_shared_file(Address(*map(int, sys.argv[1:4]), sys.argv[4]))
print(memory[5], flush=True)
sys.stdin.readline()
print(memory[5], flush=True)
memory[5] = 9
sys.stdin.readline()
"""


def test_another_process_sees_what_is_written_and_writes_nothing() -> None:
    file = SharedFile(10_000)
    file.memory[5] = 7
    with subprocess.Popen(
        [sys.executable, "-c", READ, *map(str, file.address)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "7\n"
        file.memory[5] = 8
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "8\n"
        other.communicate("\n")
    assert file.memory[5] == 8


def test_what_was_mapped_outlives_its_owner() -> None:
    file = SharedFile(10)
    file.memory[0] = 3
    memory, fd = map_shared_file(file.address), file.fd
    address = file.address
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert memory[0] == 3
    with pytest.raises(SharedMemoryError):
        map_shared_file(address)


def test_other_memory_than_was_meant_is_refused(tmp_path) -> None:
    file, other = SharedFile(100), SharedFile(100)
    good = file.address
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # another open for reading alone would wait
    wrong = [
        (good._replace(fd=other.fd), "other memory"),
        (good._replace(token="00"), "other memory"),
        (good._replace(num_bytes=50), "bytes"),
        (good._replace(num_bytes=-16), "bytes"),
        (good._replace(fd=pipe), "shares"),
        (good._replace(fd=1 << 20), "cannot be mapped"),
        (good._replace(pid=1 << 30), "cannot be mapped"),
    ]
    try:
        for address, message in wrong:
            with pytest.raises(SharedMemoryError, match=message):
                map_shared_file(Address(*address))
    finally:
        os.close(pipe)


def test_tensors_keep_their_place_and_give_their_pages_up() -> None:
    memory = SharedMemory([4096 * 4, 6, 0])
    large, small = memory.zeros((4, 1024), torch.float32), memory.zeros((3,), torch.bfloat16)
    assert memory.zeros((0, 2), torch.int8).shape == (0, 2)
    large.fill_(1)
    small.fill_(2)
    seen = map_shared_file(memory.file.address)
    start = memory.offset(small)
    assert torch.equal(torch.frombuffer(seen, dtype=torch.bfloat16, count=3, offset=start), small)
    assert os.fstat(memory.file.fd).st_blocks * 512 >= large.nbytes
    memory.release(keep_content=True)
    memory.restore()
    assert (large == 1).all()
    memory.release(keep_content=False)
    assert os.fstat(memory.file.fd).st_blocks * 512 < large.nbytes
    memory.restore()
    large.fill_(3)
    assert torch.equal(torch.frombuffer(seen, dtype=torch.float32, count=4096).view(4, 1024), large)
    memory.free()
    with pytest.raises(SharedMemoryError):
        map_shared_file(memory.file.address)
