"""Stands in for flash_attn, which needs a GPU: the same function by PyTorch's own attention, in the inputs' dtype."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of sequences that lie one behind the other, each to itself.

    Args:
        q: `[T, H, E]`.
        k: `[S, K, E]`; H is a multiple of K.
        v: likewise.
        cu_seqlens_q: where each sequence begins in `q`, and the end of the last.
        cu_seqlens_k: likewise in `k`.
        max_seqlen_q: not needed here.
        max_seqlen_k: not needed here.
        causal: the last query sees all keys, each query before it one less.

    Returns:
        `[T, H, E]`.
    """
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return torch.cat(
        [
            _one(q[ends_q[i] : ends_q[i + 1]], k[ends_k[i] : ends_k[i + 1]], v[ends_k[i] : ends_k[i + 1]], causal)
            for i in range(len(ends_q) - 1)
        ]
    )


def _one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    (queries, heads, width), (keys, groups, _) = q.shape, k.shape
    mask = None
    if causal and 1 < queries < keys:  # PyTorch's own causal mask lets the first query see one key
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    # The queries that share keys are a batch over a view of them: on a CPU faster than `enable_gqa`, which copies.
    out = scaled_dot_product_attention(
        q.reshape(queries, groups, -1, width).permute(2, 1, 0, 3),
        *(x.transpose(0, 1).expand(heads // groups, -1, -1, -1) for x in (k, v)),
        attn_mask=mask,
        is_causal=causal and 1 < queries == keys,
    )
    return out.permute(2, 1, 0, 3).reshape(queries, heads, width)
