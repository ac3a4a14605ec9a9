"""One problem shape in plain torch operations: what torch's own attention does not offer.

Log-sum-exps with gradients, sigmoid, and dropout by the portable hash. Scores are made in pieces, so that
temporary memory stays bounded, in float32 for half precision; the backward pass makes them again.
Operands are ``q (C, G, R, D)``, ``k`` and ``v (C, G, K, D)``: ``C`` batch elements and kv heads, ``G`` problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Scores that exist at once, in elements: on a CPU what its caches hold, elsewhere what keeps a device busy.
CPU_SCORES, DEVICE_SCORES = 1 << 20, 1 << 26


@dataclass(frozen=True)
class Dropout:
    """The portable dropout mask of one batch; its definition is in ``kernels/reference/dropout.py``."""

    probability: float
    seed: int
    batch_head: Tensor  # (C, 1, R or 1, 1) int32, batch and query head of each row
    row_token: Tensor  # (G, R) int32
    key_token: Tensor  # (G, K) int32

    def kept(self, problems: slice, rows: slice) -> Tensor:
        """``(C, g, r, K)`` bool: the pairs that are not left out."""
        low, high = _int32(self.seed), _int32(self.seed >> 32)
        head = self.batch_head if self.batch_head.shape[2] == 1 else self.batch_head[:, :, rows]
        row = _fmix(low ^ head * _int32(0x9E3779B1))
        row = row ^ self.row_token[problems, rows, None] * _int32(0x85EBCA77) ^ _int32(high * 0x27D4EB2F)
        bits = _fmix(_fmix(row) ^ self.key_token[problems, None] * _int32(0xC2B2AE3D))
        threshold = min(math.floor(self.probability * 2**32), 0xFFFFFFFF)
        # Unsigned order is signed order with the top bit flipped.
        return bits.bitwise_xor_(-(2**31)) >= threshold - 2**31

    @property
    def scale(self) -> float:
        """Factor of the kept probabilities."""
        return 1 / (1 - self.probability)


def _int32(value: int) -> int:
    """The low 32 bits as a signed number; torch has no arithmetic on uint32."""
    return (value + 2**31) % 2**32 - 2**31


def _fmix(h: Tensor) -> Tensor:
    """Murmur3's finaliser, in place; shifts of signed numbers are arithmetic, so copies of the sign are masked off."""
    shifted = h >> 16
    h.bitwise_xor_(shifted.bitwise_and_(0xFFFF)).mul_(_int32(0x85EBCA6B))
    torch.bitwise_right_shift(h, 13, out=shifted)
    h.bitwise_xor_(shifted.bitwise_and_(0x7FFFF)).mul_(_int32(0xC2B2AE35))
    torch.bitwise_right_shift(h, 16, out=shifted)
    return h.bitwise_xor_(shifted.bitwise_and_(0xFFFF))


@dataclass(frozen=True)
class Scoring:
    """What turns scores into probabilities, the same forward and backward."""

    scale: float
    sigmoid: bool
    bias: Tensor | None  # (1, G, R, K) in the wide dtype, 0 where allowed and -inf elsewhere
    dropout: Dropout | None


def forward(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Output ``(C, G, R, D)`` in q's dtype and log-sum-exp ``(C, G, R)`` (0 for sigmoid)."""
    to = wide(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.zeros(q.shape[:-1], dtype=to, device=q.device)
    for g, r in _pieces(q, k):
        k_wide, v_wide = k[:, g].to(to), v[:, g].to(to)
        prob = _scores(q[:, g, r].to(to), k_wide, scoring, g, r)
        if scoring.sigmoid:
            prob.sigmoid_()
        else:
            largest = prob.amax(-1, keepdim=True)
            prob.sub_(largest).exp_()
            total = prob.sum(-1, keepdim=True)
            prob.div_(total)
            lse[:, g, r] = (largest + total.log_()).squeeze(-1)
        if scoring.dropout is not None:
            prob.mul_(scoring.dropout.kept(g, r))  # several times faster than filling by a mask
            v_wide = v_wide * scoring.dropout.scale
        out[:, g, r] = prob @ v_wide
    return out, lse


def backward(
    grad: Tensor,  # (C, G, R, D)
    grad_lse: Tensor | None,  # (C, G, R)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in float32 (float64 for float64)."""
    to = wide(q)
    dq = torch.empty(q.shape, dtype=to, device=q.device)
    dk, dv = torch.zeros(k.shape, dtype=to, device=k.device), torch.zeros(v.shape, dtype=to, device=v.device)
    for g, r in _pieces(q, k):
        q_wide, k_wide, v_wide, do = q[:, g, r].to(to), k[:, g].to(to), v[:, g].to(to), grad[:, g, r].to(to)
        prob = _scores(q_wide, k_wide, scoring, g, r)
        prob = prob.sigmoid_() if scoring.sigmoid else prob.sub_(lse[:, g, r, None]).exp_()
        if scoring.dropout is None:
            dp = do @ v_wide.transpose(-1, -2)
            dv[:, g] += prob.transpose(-1, -2) @ do
        else:
            kept, scaled = scoring.dropout.kept(g, r), do * scoring.dropout.scale
            dp = (scaled @ v_wide.transpose(-1, -2)).mul_(kept)
            dv[:, g] += (prob * kept).transpose(-1, -2) @ scaled
        if scoring.sigmoid:
            dz = dp.mul_(prob).mul_(1 - prob)
        else:
            # Dropout included, the output is (p m) v, so its product with the gradient is sum_k(p dp).
            total = (do * out[:, g, r].to(to)).sum(-1, keepdim=True)
            if grad_lse is not None:
                total.sub_(grad_lse[:, g, r, None])
            dz = dp.sub_(total).mul_(prob)
        dz.mul_(scoring.scale)
        dq[:, g, r] = dz @ k_wide
        dk[:, g] += dz.transpose(-1, -2) @ q_wide
    return dq, dk, dv


def wide(x: Tensor) -> torch.dtype:
    """The dtype of scores and sums: float32 for half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(q: Tensor, k: Tensor, scoring: Scoring, problems: slice, rows: slice) -> Tensor:
    """Scaled scores, ``-inf`` where not allowed."""
    scores = (q @ k.transpose(-1, -2)).mul_(scoring.scale)
    if scoring.bias is not None:
        scores.add_(scoring.bias[:, problems, rows])
    return scores


def _pieces(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of problems and rows whose scores fit the limit."""
    heads, problems, num_rows, _ = q.shape
    limit = CPU_SCORES if q.device.type == "cpu" else DEVICE_SCORES
    per_row = heads * k.shape[2]
    rows = max(1, min(num_rows, limit // per_row))
    together = max(1, limit // (per_row * num_rows)) if rows == num_rows else 1
    for g in range(0, problems, together):
        for r in range(0, num_rows, rows):
            yield slice(g, min(g + together, problems)), slice(r, min(r + rows, num_rows))
