"""Conditioning of canvas positions on what their region means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from canvas_engineering.canvas import UnknownRegionError
from canvas_engineering.errors import CanvasError

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout


class SemanticConditioner(nn.Module):
    """A vector per region: its text embedding through a shared projection, plus a learned correction.

    Regions with similar embeddings start with similar vectors, so one set of weights can serve regions that it
    never saw; the corrections, zero at first, hold what the text does not say.

    Args:
        d_model: width of the canvas.
        embed_dim: length of the text embeddings.
        region_embeddings: region name to embedding.
        freeze_embeddings: keep the embeddings fixed (a buffer); else they are trained (a parameter).
        learn_residuals: whether there are corrections.
        projector_bias: whether the projection has a bias.

    Parameters: ``projector`` Linear(embed_dim, d), ``residuals`` (regions, d), buffer or parameter
    ``_embeddings`` (regions, embed_dim); rows in sorted order of the names.

    Raises:
        CanvasError: an embedding of another length.
    """

    _embeddings: Tensor
    residuals: Tensor | None

    def __init__(
        self,
        d_model: int,
        embed_dim: int,
        region_embeddings: Mapping[str, Sequence[float] | Tensor],
        freeze_embeddings: bool = True,
        learn_residuals: bool = True,
        projector_bias: bool = False,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.embed_dim = embed_dim
        self.projector = nn.Linear(embed_dim, d_model, bias=projector_bias)
        self._region_names = sorted(region_embeddings)
        self._rows = {name: row for row, name in enumerate(self._region_names)}
        embeddings = torch.zeros(len(self._region_names), embed_dim)
        for name, row in self._rows.items():
            vector = torch.as_tensor(region_embeddings[name], dtype=torch.float32)
            if vector.shape != (embed_dim,):
                raise CanvasError(
                    f"region_embeddings[{name!r}] must have embed_dim={embed_dim} numbers, got shape "
                    f"{tuple(vector.shape)}"
                )
            embeddings[row] = vector.detach()
        if freeze_embeddings:
            self.register_buffer("_embeddings", embeddings)
        else:
            self.register_parameter("_embeddings", nn.Parameter(embeddings))
        corrections = nn.Parameter(torch.zeros(len(self._region_names), d_model)) if learn_residuals else None
        self.register_parameter("residuals", corrections)

    @property
    def n_regions(self) -> int:
        """Number of regions."""
        return len(self._region_names)

    @property
    def region_names(self) -> list[str]:
        """The regions, sorted."""
        return list(self._region_names)

    def get_conditioning(self, region_name: str) -> Tensor:
        """The vector of one region, ``(d_model,)``.

        Raises:
            UnknownRegionError: the region has no embedding here.
        """
        if region_name not in self._rows:
            known = ", ".join(map(repr, self._region_names)) or "none"
            raise UnknownRegionError(f"unknown region {region_name!r}; this conditioner has {known}")
        row = self._rows[region_name]
        projected = self.projector(self._embeddings[row])
        return projected if self.residuals is None else projected + self.residuals[row]

    def get_all_conditioning(self) -> Tensor:
        """The vectors of all regions, ``(n_regions, d_model)``, in the order of ``region_names``."""
        projected = self.projector(self._embeddings)
        return projected if self.residuals is None else projected + self.residuals

    def condition_canvas(self, canvas: Tensor, layout: CanvasLayout) -> Tensor:
        """A copy of ``canvas (B, num_positions, d_model)`` with every region's vector added to its positions.

        Regions without an embedding here stay as they are; where regions overlap, their vectors add up.
        """
        conditioned = canvas.clone()
        vectors = self.get_all_conditioning().to(canvas)
        for name in layout.regions:
            if name in self._rows:
                index = torch.from_numpy(layout.region_index_array(name)).to(canvas.device)
                vector = vectors[self._rows[name]].expand(canvas.shape[0], index.numel(), -1)
                conditioned.index_add_(1, index, vector)
        return conditioned

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        frozen = not isinstance(self._embeddings, nn.Parameter)
        return (
            f"d_model={self.d_model}, embed_dim={self.embed_dim}, n_regions={self.n_regions}, "
            f"frozen={frozen}, residuals={self.residuals is not None}"
        )
