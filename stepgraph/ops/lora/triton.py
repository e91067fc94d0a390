"""CUDA kernels of `lora`: inputs to ranks, then ranks to outputs.

A program takes a block of tokens and goes through the adapters, of which it computes those that some of its tokens use: as
tokens of one request lie side by side, that is mostly one, or in a decode as many as there are. Blocks without adapters
end at once. The inputs are cut at fixed places, so that one token keeps more than a program busy; the second kernel adds up
the parts in order. No sum depends on another token.

Shapes: T tokens of a block, I inputs of an iteration, R ranks, N outputs of a block.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.launched import launched

BLOCK_TOKENS = 16
SPLIT_INPUTS = 512
BLOCK_INPUTS = 128
BLOCK_OUTPUTS = 64


@triton.jit
def _token_block(index_ptr, num_tokens, BLOCK_T: tl.constexpr):
    """Tokens of this program as int64, and their adapters, 0 beyond the last token."""
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    return token_T.to(tl.int64), tl.load(index_ptr + token_T, mask=token_T < num_tokens, other=0)


@launched
@triton.jit(do_not_specialize=["num_tokens"])
def _shrink_kernel(
    x_ptr,
    a_ptr,
    index_ptr,
    hidden_ptr,
    num_tokens,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """hidden[split, token, part] = a[adapter, part] @ x[token], over the inputs of the split."""
    token_T, adapter_T = _token_block(index_ptr, num_tokens, BLOCK_T)
    part = tl.program_id(1)
    split = tl.program_id(2)
    rank_R = tl.arange(0, RANK)
    hidden_TR = hidden_ptr + ((split * num_tokens + token_T)[:, None] * PARTS + part) * RANK + rank_R[None, :]
    for adapter in range(1, ADAPTERS):
        uses_T = adapter_T == adapter
        if tl.max(uses_T.to(tl.int32), 0) > 0:
            line_R = ((adapter * PARTS + part) * RANK + rank_R).to(tl.int64) * INPUTS
            sum_TR = tl.zeros([BLOCK_T, RANK], tl.float32)
            for start in range(0, SPLIT, BLOCK_I):
                input_I = split * SPLIT + start + tl.arange(0, BLOCK_I)
                inside_I = input_I < INPUTS
                x_TI = tl.load(
                    x_ptr + token_T[:, None] * INPUTS + input_I[None, :],
                    mask=uses_T[:, None] & inside_I[None, :],
                    other=0.0,
                )
                a_IR = tl.load(a_ptr + line_R[None, :] + input_I[:, None], mask=inside_I[:, None], other=0.0)
                sum_TR = tl.dot(x_TI, a_IR, sum_TR, input_precision="ieee")
            tl.store(hidden_TR, sum_TR, mask=uses_T[:, None])


@launched
@triton.jit(do_not_specialize=["num_tokens"])
def _expand_kernel(
    hidden_ptr,
    b_ptr,
    index_ptr,
    out_ptr,
    num_tokens,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ENDS: tl.constexpr,  # of each part's outputs
    ADAPTERS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[token] += b[adapter] @ (hidden[token] of the output's part)."""
    token_T, adapter_T = _token_block(index_ptr, num_tokens, BLOCK_T)
    first_output = tl.program_id(1) * BLOCK_N
    output_N = first_output + tl.arange(0, BLOCK_N)
    rank_R = tl.arange(0, RANK)
    if tl.max(adapter_T, 0) > 0:
        sum_TN = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for adapter in range(1, ADAPTERS):
            uses_T = adapter_T == adapter
            if tl.max(uses_T.to(tl.int32), 0) > 0:
                line_N = (adapter * OUTPUTS + output_N).to(tl.int64) * RANK
                for part in tl.static_range(PARTS):
                    begin = 0 if part == 0 else ENDS[part - 1]
                    if (first_output < ENDS[part]) & (first_output + BLOCK_N > begin):
                        hidden_TR = tl.zeros([BLOCK_T, RANK], tl.float32)
                        for split in range(SPLITS):
                            line_T = ((split * num_tokens + token_T) * PARTS + part) * RANK
                            hidden_TR += tl.load(
                                hidden_ptr + line_T[:, None] + rank_R[None, :], mask=uses_T[:, None], other=0.0
                            )
                        of_part_N = (output_N >= begin) & (output_N < ENDS[part])
                        b_RN = tl.load(b_ptr + line_N[None, :] + rank_R[:, None], mask=of_part_N[None, :], other=0.0)
                        sum_TN = tl.dot(hidden_TR.to(b_RN.dtype), b_RN, sum_TN, input_precision="ieee")
        out_TN = out_ptr + token_T[:, None] * OUTPUTS + output_N[None, :]
        updated_TN = (adapter_T > 0)[:, None] & (output_N < OUTPUTS)[None, :]
        sum_TN += tl.load(out_TN, mask=updated_TN, other=0.0).to(tl.float32)
        tl.store(out_TN, sum_TN.to(out_ptr.dtype.element_ty), mask=updated_TN)


def lora(
    x: Tensor, a: Tensor, b: Tensor, index: Tensor, parts: Sequence[int], deterministic: bool, out: Tensor
) -> None:
    """See `stepgraph.ops.lora.lora`."""
    (tokens, inputs), (adapters, outputs, rank) = x.shape, b.shape
    splits = triton.cdiv(inputs, SPLIT_INPUTS)
    ends = tuple(sum(parts[: i + 1]) for i in range(len(parts)))
    hidden = torch.empty(splits, tokens, len(parts), rank, dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(tokens, BLOCK_TOKENS)
    _shrink_kernel[(blocks, len(parts), splits)](
        x,
        a,
        index,
        hidden,
        tokens,
        INPUTS=inputs,
        RANK=rank,
        PARTS=len(parts),
        ADAPTERS=adapters,
        SPLIT=SPLIT_INPUTS,
        BLOCK_T=BLOCK_TOKENS,
        BLOCK_I=BLOCK_INPUTS,
        num_warps=4,
    )
    _expand_kernel[(blocks, triton.cdiv(outputs, BLOCK_OUTPUTS))](
        hidden,
        b,
        index,
        out,
        tokens,
        OUTPUTS=outputs,
        RANK=rank,
        PARTS=len(parts),
        ENDS=ends,
        ADAPTERS=adapters,
        SPLITS=splits,
        BLOCK_T=BLOCK_TOKENS,
        BLOCK_N=BLOCK_OUTPUTS,
        num_warps=4,
    )
