"""What the attention functions share: argument checks, the four projections, the head layout, dense softmax.

Every function is a module with ``forward(queries, keys, values)``, shapes ``(B, N, d)``, ``(B, M, d)``,
``(B, M, d)`` to ``(B, N, d)``. Each batch element is computed on its own, so equally shaped groups of a
canvas may be stacked along the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from canvas_engineering.attention.key_pattern import KeyPattern
from canvas_engineering.errors import CanvasError

#: Logits (or gathered key elements) that one step of a chunked function may hold at once.
CHUNK_ELEMENTS = 1 << 22


def check_positive(name: str, value: int) -> None:
    """Raise ``CanvasError`` unless ``value`` is at least 1."""
    if value < 1:
        raise CanvasError(f"{name} must be at least 1, got {name}={value}")


def check_head_count(d_model: int, n_heads: int) -> None:
    """Raise ``CanvasError`` unless ``n_heads`` divides ``d_model``."""
    check_positive("n_heads", n_heads)
    if d_model % n_heads:
        raise CanvasError(f"d_model must be divisible by n_heads, got d_model={d_model}, n_heads={n_heads}")


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32 when it is of half precision, else ``x`` itself: long sums need the mantissa."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A region in which autocast does not send matrix products back to half precision."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """``(B, N, H * hd)`` to ``(B, H, N, hd)``, a view."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``(B, H, N, hd)`` to ``(B, N, H * hd)``."""
    return x.transpose(1, 2).flatten(2)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """``softmax(q kᵀ scale) v``: ``q (B, H, N, hd)``, ``k, v (B, H, M, hd)``; zeros without keys.

    ``mask`` is boolean, broadcastable to ``(B, H, N, M)``, True where a pair is allowed; every row of it
    needs at least one True.
    """
    if k.shape[-2] == 0 or q.numel() == 0:
        # Matrix products over an empty axis are zeros, and part of the graph: gradients exist and are 0.
        return (q @ k.transpose(-2, -1)) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)


def map_query_chunks(
    fn: Callable[..., Tensor],
    by_row: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    row_elements: int,
    *,
    draws_random: bool = False,
) -> Tensor:
    """``fn(*by_row, *shared)``, computed over slices of the query axis where it would hold too much at once.

    Args:
        fn: gives ``(..., rows, hd)`` for ``by_row`` tensors cut to those rows.
        by_row: tensors whose axis -2 is the query axis.
        shared: tensors that every slice needs whole.
        row_elements: elements of the largest intermediate result per query row.
        draws_random: whether ``fn`` uses the random number generator (dropout).

    With gradients, each slice is recomputed in the backward pass, so that memory stays bounded there too.
    """
    n_rows = by_row[0].shape[-2]
    rows = max(1, CHUNK_ELEMENTS // max(1, row_elements))
    if rows >= n_rows:
        return fn(*by_row, *shared)
    recompute = torch.is_grad_enabled() and any(t.requires_grad for t in (*by_row, *shared))
    parts = []
    for piece in zip(*(t.split(rows, dim=-2) for t in by_row), strict=True):
        if recompute:
            parts.append(checkpoint(fn, *piece, *shared, use_reentrant=False, preserve_rng_state=draws_random))
        else:
            parts.append(fn(*piece, *shared))
    return torch.cat(parts, dim=-2)


class AttentionFunction(nn.Module):
    """Base of all attention functions: keeps ``d_model``, ``n_heads`` and ``dropout``, checks the inputs.

    Args:
        d_model: width of queries, keys and values.
        n_heads: number of heads; functions without heads take it for a uniform signature only.
        dropout: probability with which an attention probability is dropped in training; functions without
            attention probabilities take it for a uniform signature only.

    Raises:
        CanvasError: ``d_model`` or ``n_heads`` below 1, ``dropout`` outside ``[0, 1)``.
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        check_positive("d_model", d_model)
        check_positive("n_heads", n_heads)
        if not 0.0 <= dropout < 1.0:
            raise CanvasError(f"dropout must be in [0, 1), got dropout={dropout}")
        self.d_model = d_model
        self.n_heads = n_heads
        self.dropout = nn.Dropout(dropout)

    @property
    def active_dropout(self) -> float:
        """The dropout probability that applies now: 0 outside training."""
        return self.dropout.p if self.training else 0.0

    def check_inputs(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Raise ``CanvasError`` unless the three are ``(B, N, d)``, ``(B, M, d)``, ``(B, M, d)``."""
        for name, x in (("queries", queries), ("keys", keys), ("values", values)):
            if x.ndim != 3 or x.shape[-1] != self.d_model:
                raise CanvasError(f"{name} must have shape (B, N, {self.d_model}), got {tuple(x.shape)}")
        if keys.shape != values.shape or keys.shape[0] != queries.shape[0]:
            raise CanvasError(
                "queries, keys and values must agree in batch, keys and values in length, got "
                f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}"
            )

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)``, ``values (B, M, d)`` to ``(B, N, d)``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(queries, keys, values)")


class ProjectedAttention(AttentionFunction):
    """Attention with the projections ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj`` (with bias) over heads.

    The computation is split so that a caller may project a whole canvas once and run any kernel between:
    ``finish(kernel(heads_q(x), *heads_kv(x)))``, where the kernel computes
    ``activation(q kᵀ kernel_scale) v`` over the keys that ``key_pattern`` allows.

    Raises:
        CanvasError: as ``AttentionFunction``, and when ``n_heads`` does not divide ``d_model``.
    """

    activation: Literal["softmax", "sigmoid"] = "softmax"

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__(d_model, n_heads, dropout)
        check_head_count(d_model, n_heads)
        self.head_dim = d_model // n_heads
        self.kernel_scale: float = self.head_dim**-0.5
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    @property
    def scale(self) -> float:
        """The factor on the logits, as 0.5.0 named it."""
        return self.kernel_scale

    def project_q(self, x: Tensor) -> Tensor:
        """``x (B, N, d)`` to queries ``(B, N, d)``, heads side by side."""
        return self.q_proj(x)

    def project_kv(self, x: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x (B, M, d)`` to keys and values ``(B, M, d)``; ``values`` if they have another source."""
        return self.k_proj(x), self.v_proj(x if values is None else values)

    def heads_q(self, x: Tensor) -> Tensor:
        """``x (B, N, d)`` to the kernel's queries ``(B, H, N, hd)``."""
        return split_heads(self.project_q(x), self.n_heads)

    def heads_kv(self, x: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x (B, M, d)`` to the kernel's keys and values, each ``(B, H, M, hd)``."""
        k, v = self.project_kv(x, values)
        return split_heads(k, self.n_heads), split_heads(v, self.n_heads)

    def merge(self, out: Tensor) -> Tensor:
        """The kernel's result ``(B, H, N, hd)`` to ``(B, N, d)``, before ``out_proj``."""
        return merge_heads(out)

    def finish(self, out: Tensor) -> Tensor:
        """The kernel's result ``(B, H, N, hd)`` to the function's output ``(B, N, d)``."""
        return self.out_proj(self.merge(out))

    def key_pattern(self, n_queries: int, n_keys: int, group_id: int = 0) -> KeyPattern | None:
        """Which keys the queries of a group may read; None: every query reads every key."""
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The kernel: ``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        return softmax_attention(q, k, v, scale=self.kernel_scale, dropout_p=self.active_dropout)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)``, ``values (B, M, d)`` to ``(B, N, d)``."""
        self.check_inputs(queries, keys, values)
        k, v = self.heads_kv(keys, values)
        return self.finish(self.attend(self.heads_q(queries), k, v))
