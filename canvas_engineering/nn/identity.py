"""Identity slots: a region's observations gathered into a fixed number of learned slots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from canvas_engineering.attention.base import check_positive
from canvas_engineering.attention.dense import CrossAttention
from canvas_engineering.errors import CanvasError


class SlotBindingModule(nn.Module):
    """Learned slots read the observations by cross attention and keep what they held, layer-normalised.

    ``slots' = layer_norm(slots + binding_attn(slots, observations))``, times a gate in (0, 1) per slot with
    ``birth_death`` (slots as object memory: Locatello et al., 2020, arXiv:2006.15055).

    Args:
        d_model: width of slots and observations.
        n_slots: number of slots.
        n_heads: heads of the cross attention; must divide ``d_model``.
        birth_death: whether slots have a gate that says if they are alive.

    Parameters: ``slots`` (n_slots, d), ``binding_attn.{q,k,v,out}_proj``, ``layer_norm``, and with
    ``birth_death`` ``life_gate.0`` Linear(d, d // 2), ``life_gate.2`` Linear(d // 2, 1).

    Raises:
        CanvasError: ``n_slots`` below 1, or ``n_heads`` does not divide ``d_model``.
    """

    def __init__(self, d_model: int, n_slots: int, n_heads: int = 4, birth_death: bool = False) -> None:
        super().__init__()
        check_positive("n_slots", n_slots)
        self.d_model = d_model
        self.n_slots = n_slots
        self.slots = nn.Parameter(torch.randn(n_slots, d_model) * 0.02)
        self.binding_attn = CrossAttention(d_model, n_heads)
        self.layer_norm = nn.LayerNorm(d_model)
        self.life_gate: nn.Sequential | None = None
        if birth_death:
            self.life_gate = nn.Sequential(
                nn.Linear(d_model, d_model // 2), nn.GELU(), nn.Linear(d_model // 2, 1), nn.Sigmoid()
            )

    def forward(self, observations: Tensor) -> Tensor:
        """``observations (B, n, d_model)`` to slots ``(B, n_slots, d_model)``; dead slots are scaled towards 0."""
        slots = self._bound(observations)
        return slots if self.life_gate is None else slots * self.life_gate(slots)

    def alive_mask(self, observations: Tensor) -> Tensor:
        """Which slots are alive (gate above one half), ``(B, n_slots)`` bool; all without ``birth_death``."""
        if self.life_gate is None:
            shape = (observations.shape[0], self.n_slots)
            return torch.ones(shape, dtype=torch.bool, device=observations.device)
        return self.life_gate(self._bound(observations)).squeeze(-1) > 0.5

    def _bound(self, observations: Tensor) -> Tensor:
        """Slots that have read the observations, before the gate, (B, n_slots, d)."""
        if observations.ndim != 3 or observations.shape[2] != self.d_model:
            raise CanvasError(
                f"observations must have shape (B, n, d_model) = (B, n, {self.d_model}), "
                f"got {tuple(observations.shape)}"
            )
        attention = self.binding_attn
        # The slots are the same for the whole batch, so their queries are projected once.
        q = attention.heads_q(self.slots.unsqueeze(0)).expand(observations.shape[0], -1, -1, -1)
        read = attention.finish(attention.attend(q, *attention.heads_kv(observations)))
        return self.layer_norm(read + self.slots)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"d_model={self.d_model}, n_slots={self.n_slots}, birth_death={self.life_gate is not None}"
