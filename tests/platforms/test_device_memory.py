"""Memory that is given up and taken back: addresses stay, content is kept or lost as promised, and nothing leaks.

`SleepableMemory` runs here on a driver that imitates CUDA's rules over host memory, and on a GPU with the real one.
"""

import gc
import os

import pytest
import torch
from imitated_cuda import GRANULARITY, MIB, ImitatedDriver, imitate_cuda
from tiny import TINY_SETTINGS, drain
from torch import nn

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError
from stepgraph.platforms import cuda_memory
from stepgraph.platforms.cpu import CpuPlatform
from stepgraph.platforms.cuda_memory import Exported, ImportedMemory, SleepableMemory
from stepgraph.platforms.torch_memory import TorchMemory


@pytest.fixture
def driver(monkeypatch) -> ImitatedDriver:
    return imitate_cuda(monkeypatch)


CPU = torch.device("cpu")


def in_use_after_rounding(*sizes: int) -> int:
    total = sum(-(-size // 512) * 512 for size in sizes)
    return -(-total // GRANULARITY) * GRANULARITY


def test_tensors_keep_their_addresses_and_lose_or_keep_their_content(driver) -> None:
    sizes = [3 * MIB, 2 * 1000, 5 * MIB]
    memory = SleepableMemory(sizes, CPU)
    assert driver.in_use == 0
    tensors = [
        memory.zeros((3, MIB), torch.uint8),
        memory.zeros((10, 100), torch.bfloat16),
        memory.zeros((5 * MIB // 4,), torch.float32),
    ]
    assert all(not tensor.any() for tensor in tensors)
    assert driver.in_use == in_use_after_rounding(*sizes)
    assert [tensor.data_ptr() % 512 for tensor in tensors] == [0, 0, 0]
    for number, tensor in enumerate(tensors, start=1):
        tensor.fill_(number)
    addresses = [tensor.data_ptr() for tensor in tensors]
    for keep in (True, True, False):
        memory.release(keep_content=keep)
        assert driver.in_use == 0
        memory.release(keep_content=keep)
        memory.restore()
        memory.restore()
        assert driver.in_use == in_use_after_rounding(*sizes)
        assert [tensor.data_ptr() for tensor in tensors] == addresses
        assert [bool((t == number).all()) for number, t in enumerate(tensors, start=1)] == [keep] * 3
    assert driver.handles == {}


def test_kept_content_can_still_be_dropped(driver) -> None:
    memory = SleepableMemory([100], CPU)
    tensor = memory.zeros((100,), torch.uint8).fill_(7)
    memory.release(keep_content=True)
    memory.release(keep_content=False)
    memory.restore()
    assert (tensor == 0xDD).all()


def test_adopted_parameters_stay_the_same_objects_with_the_same_values_and_share_as_before(driver) -> None:
    merged, tied = torch.randn(64, 32), nn.Parameter(torch.randn(7, 5, dtype=torch.bfloat16), requires_grad=False)
    parameters = [
        tied,
        nn.Parameter(merged[:16], requires_grad=False),
        nn.Parameter(merged[16:].t(), requires_grad=False),
        nn.Parameter(torch.empty(0), requires_grad=False),
        nn.Parameter(tied.detach(), requires_grad=False),
    ]
    before = [parameter.clone() for parameter in parameters]
    memory = SleepableMemory([parameter.untyped_storage().nbytes() for parameter in parameters], CPU)
    memory.adopt(parameters)
    [(start, size)] = driver.reserved.items()
    for parameter, value in zip(parameters, before, strict=True):
        assert isinstance(parameter, nn.Parameter)
        assert torch.equal(parameter, value)
        assert parameter.numel() == 0 or start <= parameter.data_ptr() < start + size
    assert parameters[1].data_ptr() + 16 * 32 * 4 == parameters[2].data_ptr()
    assert tied.data_ptr() == parameters[4].data_ptr()
    assert parameters[2].stride() == (1, 32)
    memory.release(keep_content=True)
    memory.restore()
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))


def shared_memory(*sizes: int) -> tuple[SleepableMemory, list[torch.Tensor]]:
    memory = SleepableMemory(sizes, CPU, is_shared=True)
    tensors = [memory.zeros((size,), torch.uint8).fill_(number) for number, size in enumerate(sizes, start=1)]
    return memory, tensors


def imported(memory: SleepableMemory) -> ImportedMemory:
    exported = memory.export()
    try:
        return ImportedMemory(exported, CPU)
    finally:
        os.close(exported.descriptor)


def test_shared_memory_is_mapped_elsewhere_and_both_see_what_is_written(driver) -> None:
    memory, tensors = shared_memory(3 * MIB, 1000, 5 * MIB)
    assert len(driver.mappings) == 1
    there = imported(memory)
    views = [there.tensor(memory.offset(tensor), tensor.shape, torch.uint8) for tensor in tensors]
    assert [int(view.unique()) for view in views] == [1, 2, 3]
    tensors[1].fill_(9)
    assert (views[1] == 9).all()
    numbers = there.tensor(memory.offset(tensors[0]), (2, 3), torch.float32)
    assert numbers.shape == (2, 3)
    assert (numbers.view(torch.uint8) == 1).all()
    assert driver.handles == {}


def test_what_others_have_mapped_outlives_its_owner_and_is_let_go_of_once(driver) -> None:
    memory, tensors = shared_memory(100)
    there = imported(memory)
    view = there.tensor(0, (100,), torch.uint8)
    memory.free()
    assert driver.in_use == GRANULARITY
    assert (view == 1).all()
    del tensors
    there.close()
    there.close()
    assert driver.reserved == driver.mappings == driver.handles == {}


def test_after_a_sleep_shared_memory_is_another_one(driver) -> None:
    memory, [tensor] = shared_memory(100)
    before = imported(memory)
    memory.release(keep_content=True)
    memory.restore()
    tensor.fill_(7)
    assert int(imported(memory).tensor(0, (100,), torch.uint8).unique()) == 7
    assert int(before.tensor(0, (100,), torch.uint8).unique()) == 1


@pytest.mark.parametrize(("offset", "size"), [(-512, 1), (512, GRANULARITY), (GRANULARITY, 1), (8, 1)])
def test_what_lies_outside_of_imported_memory_is_refused(driver, offset, size) -> None:
    memory, _ = shared_memory(100)
    with pytest.raises(ValueError, match="are not in 2097152"):
        imported(memory).tensor(offset, (size,), torch.uint8)


def test_what_cannot_be_mapped_leaves_nothing_behind(driver) -> None:
    memory, tensors = shared_memory(100)
    descriptor, num_bytes = memory.export()
    for size in (num_bytes + GRANULARITY, 100, num_bytes):
        driver.failing = "access" if size == num_bytes else ""
        with pytest.raises(RuntimeError, match="failed"):
            ImportedMemory(Exported(descriptor, size), CPU)
    os.close(descriptor)
    memory.free()
    del tensors
    assert driver.reserved == driver.mappings == driver.handles == {}


def test_memory_that_others_took_is_asked_for_again_later(driver) -> None:
    memory = SleepableMemory([4 * MIB, 4 * MIB], CPU)
    tensors = [memory.zeros((4 * MIB,), torch.uint8).fill_(number) for number in (1, 2)]
    memory.release(keep_content=True)
    driver.budget = 5 * MIB
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"4 MiB more of the device's memory are needed .* 1 MiB are free"):
            memory.restore()
    driver.budget = 8 * MIB
    memory.restore()
    assert [int(tensor.unique()) for tensor in tensors] == [1, 2]


def test_memory_that_was_taken_back_in_part_can_be_given_up_again_with_its_content_kept(driver) -> None:
    memory = SleepableMemory([4 * MIB, 4 * MIB], CPU)
    tensors = [memory.zeros((4 * MIB,), torch.uint8).fill_(number) for number in (1, 2)]
    memory.release(keep_content=True)
    driver.budget = 5 * MIB
    with pytest.raises(ConfigError):
        memory.restore()
    assert driver.in_use == 4 * MIB
    memory.release(keep_content=True)
    assert driver.in_use == 0
    driver.budget = 8 * MIB
    memory.restore()
    assert [int(tensor.unique()) for tensor in tensors] == [1, 2]


def test_memory_that_torch_keeps_for_later_is_used_before_giving_up(driver, monkeypatch) -> None:
    driver.budget = 2 * MIB
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(driver, "budget", 8 * MIB))
    memory = SleepableMemory([4 * MIB], CPU)
    memory.zeros((4 * MIB,), torch.uint8)
    assert driver.in_use == 4 * MIB


def test_memory_goes_back_on_free_or_with_its_last_tensor(driver) -> None:
    memory = SleepableMemory([100, 100], CPU)
    tensors = [memory.zeros((100,), torch.uint8) for _ in range(2)]
    memory.free()
    memory.free()
    assert driver.reserved == driver.mappings == {}
    del memory, tensors

    memory = SleepableMemory([100, 100], CPU)
    first, second = (memory.zeros((100,), torch.uint8) for _ in range(2))
    del memory, first
    gc.collect()
    assert driver.in_use == GRANULARITY
    assert not second.any()
    del second
    gc.collect()
    assert driver.reserved == driver.mappings == {}


def test_a_driver_call_that_fails_is_named_and_leaks_nothing(driver) -> None:
    driver.failing = "access"
    memory = SleepableMemory([100], CPU)
    with pytest.raises(RuntimeError, match="cuMemSetAccess failed: 999"):
        memory.zeros((100,), torch.uint8)
    assert driver.mappings == driver.handles == {}


def test_sleep_mode_without_the_drivers_bindings_says_what_to_install(monkeypatch) -> None:
    def missing(name: str):
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(cuda_memory.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install cuda-bindings, or leave enable_sleep_mode off"):
        SleepableMemory([1], CPU)


def test_an_engine_in_such_memory_wakes_up_to_the_same_answers(driver, tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(CpuPlatform, "memory", lambda self, sizes, *, sleepable: SleepableMemory(sizes, CPU))
    settings = {"model": tiny_model, "device": "cpu"} | TINY_SETTINGS
    engine = build_engine(EngineConfig.from_settings(**settings))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = engine.add_request("a", [1, 2, 3], params)
    drain(engine)
    again = engine.add_request("b", [1, 2, 3], params)
    for _ in range(7):
        engine.step()
    for level in (1, 2):
        engine.sleep(level)
        assert driver.in_use == 0
        engine.wake_up()
    engine.update_weights(tiny_model)
    drain(engine)
    assert again.output_token_ids == expected.output_token_ids
    engine.shutdown()
    assert driver.reserved == driver.mappings == {}


def test_torchs_own_memory_is_given_up_through_its_storages() -> None:
    memory = TorchMemory(CPU, releasable=True)
    tensor, weight = memory.zeros((4, 100), torch.float16), torch.ones(10, 10)
    memory.adopt([weight[:5], weight[5:]])
    memory.release(keep_content=True)
    assert weight.sum() == 100
    memory.release(keep_content=False)
    assert tensor.untyped_storage().nbytes() == weight.untyped_storage().nbytes() == 0
    memory.restore()
    weight.fill_(2)
    assert weight.sum() == 200
    assert tensor.fill_(1).sum() == 400


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the real driver needs a GPU")
def test_on_a_gpu_the_devices_memory_is_free_while_content_sleeps() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="needs the Python bindings of the CUDA driver")
    device = torch.device("cuda", torch.cuda.current_device())
    size = 512 * MIB
    memory = SleepableMemory([size, size], device)
    first, second = memory.zeros((size // 2,), torch.bfloat16), memory.zeros((size,), torch.uint8)
    first.copy_(torch.arange(size // 2, device=device) % 251)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        second.add_(1)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info(device)[0]
    checksum, second_before = first.float().sum().item(), int(second[0])
    torch.cuda.empty_cache()
    memory.release(keep_content=True)
    assert torch.cuda.mem_get_info(device)[0] >= free + 2 * size - 4 * MIB
    memory.restore()
    assert first.float().sum().item() == checksum
    graph.replay()
    assert (second == second_before + 1).all()
    memory.free()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the real driver needs a GPU")
def test_on_a_gpu_shared_memory_is_mapped_twice() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="needs the Python bindings of the CUDA driver")
    device = torch.device("cuda", torch.cuda.current_device())
    memory = SleepableMemory([1000, 4 * MIB], device, is_shared=True)
    first, second = memory.zeros((500,), torch.bfloat16).fill_(3), memory.zeros((MIB,), torch.float32)
    exported = memory.export()
    there = ImportedMemory(exported, device)
    os.close(exported.descriptor)
    second.copy_(torch.arange(MIB, device=device))
    view = there.tensor(memory.offset(second), (MIB,), torch.float32)
    assert view.device == device
    assert torch.equal(view, second)
    assert torch.equal(there.tensor(memory.offset(first), (500,), torch.bfloat16), first)
    memory.free()
    assert view[-1] == MIB - 1
    torch.cuda.synchronize()
    there.close()
