"""How long the experts of a layer take on the CPU: by our own kernels, by the library, and in transformers.

    python scripts/time_cpu_experts.py [--tokens 1 8 64 256] [--hidden 512] [--width 256] [--experts 32] [--top 4] [--threads 1]

Each token draws its experts uniformly. Milliseconds, the best of some calls, without the router; transformers' with it, by the
fastest of its ways.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from stepgraph import native
from stepgraph.layers.formats.packed import round_to_q8_0
from stepgraph.ops import Chosen, expert_work, packed_gated_experts, packed_sum_experts
from stepgraph.ops.experts import ExpertDispatch, cpu

DTYPES = (torch.float32, torch.bfloat16)


def best_ms(call: Callable[[], object]) -> float:
    """Of at least 5 calls, and of as many as half a second allows."""
    times: list[float] = []
    while len(times) < 5 or sum(times) < 0.5:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1000 * min(times)


def layer(args: argparse.Namespace, dtype: torch.dtype) -> Qwen3MoeSparseMoeBlock:
    config = Qwen3MoeConfig(
        hidden_size=args.hidden,
        moe_intermediate_size=args.width,
        num_experts=args.experts,
        num_experts_per_tok=args.top,
        norm_topk_prob=True,
    )
    block = Qwen3MoeSparseMoeBlock(config).to(dtype).eval()
    for parameter in block.parameters():
        parameter.normal_(0.0, 0.05)
    return block


def by_kernels(gate_up: Tensor, down: Tensor, x: Tensor, chosen: Chosen, *, natively: bool) -> Tensor:
    work = expert_work(chosen, 0, len(gate_up), ExpertDispatch.TILES)
    pairs = work.expert, work.first, work.order, work.ends
    out = torch.empty_like(x)
    gated, add_up = cpu.gated_experts_natively, cpu.sum_experts_natively
    if not natively:
        gated, add_up = cpu.gated_experts_by_library, cpu.sum_experts_by_library
    hidden = gated(x, gate_up, None, *pairs, False, False)
    add_up(hidden, down, None, work.expert, work.weight, *pairs[1:], out, False, 1.0, False)
    return out


def in_blocks(gate_up: Tensor, down: Tensor, x: Tensor, chosen: Chosen) -> Tensor:
    work, out = expert_work(chosen, 0, len(gate_up), ExpertDispatch.TILES), torch.empty_like(x)
    hidden = packed_gated_experts(x, gate_up, work, gelu=False, exact_tokens=None)
    packed_sum_experts(hidden, down, work, out, add=False, multiplier=1.0, exact_tokens=None)
    return out


def in_transformers(block: Qwen3MoeSparseMoeBlock, x: Tensor) -> float:
    times = []
    for way in ("eager", "grouped_mm"):
        block.experts.config._experts_implementation = way
        times.append(best_ms(partial(block, x[None])))
    return min(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256])
    for name, default in {"hidden": 512, "width": 256, "experts": 32, "top": 4, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"kernels: {native.describe()}; {args.threads} threads")
    print(f"{'dtype':10}{'tokens':>8}{'our own':>10}{'library':>10}{'Q8_0':>10}{'transformers':>14}")
    for dtype in DTYPES:
        block = layer(args, dtype)
        gate_up, down = block.experts.gate_up_proj.data, block.experts.down_proj.data
        blocks = [round_to_q8_0(w.float().flatten(0, 1)).view(*w.shape[:2], -1) for w in (gate_up, down)]
        for tokens in args.tokens:
            x = torch.randn(tokens, args.hidden, dtype=dtype)
            expert = torch.stack([torch.randperm(args.experts)[: args.top] for _ in range(tokens)]).to(torch.int32)
            chosen = Chosen(expert, torch.rand(tokens, args.top))
            exact, found = (by_kernels(gate_up, down, x, chosen, natively=natively) for natively in (False, True))
            torch.testing.assert_close(found, exact, atol=0.02 * float(exact.abs().max()), rtol=0)
            times = [best_ms(partial(by_kernels, gate_up, down, x, chosen, natively=n)) for n in (True, False)]
            times.append(best_ms(partial(in_blocks, *blocks, x.float(), chosen)))
            cells = "".join(f"{ms:10.2f}" for ms in times)
            print(
                f"{str(dtype).removeprefix('torch.'):10}{tokens:8}{cells}{in_transformers(block, x):14.2f}", flush=True
            )


if __name__ == "__main__":
    main()
