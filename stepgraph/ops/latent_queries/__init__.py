"""What happens between the projections of multi-head latent attention and the attention itself, in one operator: queries are
rotated and turned into queries of latents, and this step's latents are normalised, rotated and cached.

A head's key of a token is a matrix times the token's *latent*, beside a rotated part that all heads share. Multiplying the query
with that matrix instead ("absorbing" it) leaves one key for all heads: the latent and the rotated part, which is what is cached.

Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1 and appendix C.
"""

from torch import Tensor

from stepgraph.ops.latent_queries import cpu
from stepgraph.ops.registry import Inlined, register

_latent_queries = register(
    "latent_queries(Tensor q, Tensor latent, Tensor positions, Tensor kv_slots, Tensor cos_sin, Tensor latent_norm, "
    "Tensor key_weight, Tensor(a!) cache, float eps, bool deterministic) -> Tensor",
    {
        "cpu": Inlined(cpu.latent_queries, recorded=cpu.recorded),
        "cuda": "stepgraph.ops.latent_queries.triton:latent_queries",
    },
)


def latent_queries(
    q: Tensor,
    latent: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    cos_sin: Tensor,
    latent_norm: Tensor,
    key_weight: Tensor,
    cache: Tensor,
    eps: float,
    *,
    deterministic: bool,
) -> Tensor:
    """Rotate and absorb queries; normalise, rotate and cache latents. May run inside a graph.

    Shapes: T tokens, H heads, N dimensions of a head that are not rotated, P that are, R of a latent, B tokens per block.

    Args:
        q: [T, H · (N + P)], rows may lie apart; of each head the N first.
        latent: [T, R + P], dtype of `q`, rows may lie apart; the latent first, then the key that all heads share.
        positions: [T] int32, position of each token in its sequence.
        kv_slots: [T] int32, `block · B + offset` of each token's cache entry; padding tokens name slot 0 (the null block).
        cos_sin: [max positions, P] float32; cosines of the P/2 frequencies, then sines.
        latent_norm: [R] weight of the latents' RMS norm.
        key_weight: [H, N, R], dtype of `q`; heads may lie apart, the rest is contiguous.
        cache: [blocks, B, R + P], dtype of `q` or torch.float8_e4m3fn, whose values are rounded once more and those beyond ±448
            to ±448; written at `kv_slots`.
        eps: of the RMS norm.
        deterministic: a token's queries depend, bit for bit, on the token and the weights only.

    Returns:
        [T, H, R + P] contiguous, dtype of `q`. The rotation is computed in float32 and rounded once; so is the product.
    """
    return _latent_queries(q, latent, positions, kv_slots, cos_sin, latent_norm, key_weight, cache, eps, deterministic)
