"""Lines of SlotState for tests."""

import torch
from torch import Tensor

from stepgraph.ops import slot_line as line


def slot_line(
    *,
    length: int = 5,
    computed: int = 4,
    active: bool = True,
    generation: int = 1,
    max_length: int = 1 << 20,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: tuple[int, ...] = (),
) -> Tensor:
    """One line, [LINE_WIDTH] int32. `seed`: 64 bits, unsigned."""
    line_L = torch.zeros(line.LINE_WIDTH, dtype=torch.int32)
    line_L[line.LENGTH] = length
    line_L[line.COMPUTED] = computed
    line_L[line.ACTIVE] = int(active)
    line_L[line.GENERATION] = generation
    line_L[line.MAX_LENGTH] = max_length
    line_L[line.TOP_K] = top_k
    line_L.view(torch.float32)[line.TEMPERATURE] = temperature
    line_L.view(torch.float32)[line.TOP_P] = top_p
    line_L[[line.SEED_LOW, line.SEED_HIGH]] = torch.tensor([seed & 0xFFFFFFFF, seed >> 32]).to(torch.int32)
    line_L[line.STOP_TOKENS :] = -1
    line_L[line.STOP_TOKENS : line.STOP_TOKENS + len(stop_tokens)] = torch.tensor(stop_tokens, dtype=torch.int32)
    return line_L


def slot_lines(*lines: Tensor) -> Tensor:
    """The null slot's line, then the given ones: [1 + len(lines), LINE_WIDTH] int32."""
    return torch.stack((torch.zeros(line.LINE_WIDTH, dtype=torch.int32), *lines))
