"""The canvas tensor: positions filled with embeddings, regions written and read by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from canvas_engineering.canvas import UnknownRegionError
from canvas_engineering.errors import CanvasError
from canvas_engineering.nn.embedding import (
    INIT_STD,
    FamilyCarrierEmbedding,
    PeriodEmbedding,
    SinusoidalPositionalEncodingND,
)

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout
    from canvas_engineering.nn.semantic import SemanticConditioner
    from canvas_engineering.program import CanvasProgram


class SpatiotemporalCanvas(nn.Module):
    """Makes the canvas tensor ``(B, num_positions, d_model)`` of a layout, and places and reads regions.

    An empty position holds ``empty_token`` + positional encoding + the embeddings of the regions it lies in
    (period; semantic conditioning and family + carrier where given). A placed region holds the placed data +
    the region's identity (a learned modality embedding, or its semantic conditioning) + the same embeddings;
    the positional encoding is the caller's data's business there.

    Args:
        layout: the geometry; regions added to it later are not known here.
        semantic_conditioner: replaces the learned modality embeddings.
        program: adds family + carrier embeddings for the regions that it describes.
        legacy_period_buckets: the period buckets of canvas-engineering 0.5.0; see ``PeriodEmbedding``.

    Parameters: ``empty_token`` (d), ``period_embedding.embedding.weight``, and ``modality_embeddings.<region>``
    (d), where dots and brackets in a region's name become underscores, or ``semantic_conditioner.*``; with a
    program ``family_carrier_embedding.*``. Buffer ``pos_enc.pe``. Indices are buffers that are not saved.

    Example:
        >>> canvas_module = SpatiotemporalCanvas(layout)
        >>> canvas = canvas_module.create_empty(batch_size=4)  # (4, num_positions, d_model)
        >>> canvas = canvas_module.place(canvas, frames, "visual")
        >>> actions = canvas_module.extract(canvas, "action")
    """

    _labels: Tensor
    _membership: Tensor
    _bucket_rows: Tensor

    def __init__(
        self,
        layout: CanvasLayout,
        semantic_conditioner: SemanticConditioner | None = None,
        program: CanvasProgram | None = None,
        *,
        legacy_period_buckets: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.semantic_conditioner = semantic_conditioner
        d_model = layout.d_model
        self.pos_enc = SinusoidalPositionalEncodingND(d_model, max_T=layout.T, max_spatial=layout.spatial_shape)
        self.period_embedding = PeriodEmbedding(d_model, legacy_buckets=legacy_period_buckets)
        self.empty_token = nn.Parameter(torch.randn(d_model) * INIT_STD)
        self.modality_embeddings: nn.ParameterDict | None = None
        if semantic_conditioner is None:
            self.modality_embeddings = nn.ParameterDict(
                {_parameter_key(name): nn.Parameter(torch.randn(d_model) * INIT_STD) for name in layout.regions}
            )
        self.family_carrier_embedding = None if program is None else FamilyCarrierEmbedding(d_model)

        self._row = {name: row for row, name in enumerate(layout.regions)}
        for name, row in self._row.items():
            index = torch.from_numpy(np.ascontiguousarray(layout.region_index_array(name)))
            self.register_buffer(f"_index_{row}", index, persistent=False)
        labels, membership = _label_positions(layout)
        self.register_buffer("_labels", torch.from_numpy(labels), persistent=False)
        self.register_buffer("_membership", torch.from_numpy(membership), persistent=False)
        buckets = [self.period_embedding.bucket(layout.region_spec(name).period) for name in self._row]
        self.register_buffer("_bucket_rows", torch.tensor(buckets, dtype=torch.long), persistent=False)
        described = {} if program is None else program.regions
        self._family_carrier = {
            name: (described[name].family, described[name].carrier) for name in self._row if name in described
        }

    def create_empty(self, batch_size: int) -> Tensor:
        """A canvas without data, ``(batch_size, num_positions, d_model)``.

        Raises:
            CanvasError: ``batch_size`` is negative.
        """
        if batch_size < 0:
            raise CanvasError(f"batch_size must be at least 0, got batch_size={batch_size}")
        # Positions in the same set of regions get the same vector: one row per set, looked up per position.
        table = self.empty_token + self._membership @ self._region_vectors()  # (sets, d)
        canvas = F.embedding(self._labels, table)  # (num_positions, d)
        canvas += self.pos_enc(self.layout.T, self.layout.spatial_shape).reshape(canvas.shape)
        return canvas.expand(batch_size, -1, -1).contiguous()

    def place(self, canvas: Tensor, embeddings: Tensor, region_name: str) -> Tensor:
        """A copy of ``canvas`` with a region's positions holding ``embeddings`` + the region's own vectors.

        Args:
            canvas: (B, num_positions, d_model).
            embeddings: (B or 1, n, d_model) in the order of ``layout.region_indices``; what exceeds the region
                is dropped, what it lacks is zero.
            region_name: the region.

        Raises:
            UnknownRegionError: the layout had no such region when this module was made.
            CanvasError: a tensor of another shape.
        """
        index = self._region_index(region_name)
        self._check_canvas(canvas)
        if (
            embeddings.ndim != 3
            or embeddings.shape[0] not in (1, canvas.shape[0])
            or (embeddings.shape[2] != self.layout.d_model)
        ):
            raise CanvasError(
                f"embeddings must have shape (B, n, d_model) = ({canvas.shape[0]}, n, {self.layout.d_model}), "
                f"got {tuple(embeddings.shape)}"
            )
        missing = index.numel() - embeddings.shape[1]
        fitted = F.pad(embeddings, (0, 0, 0, missing)) if missing else embeddings  # a negative pad cuts
        placed = (fitted + self._identity(region_name)).to(canvas.dtype)
        return canvas.index_copy(1, index, placed.expand(canvas.shape[0], -1, -1))

    def extract(self, canvas: Tensor, region_name: str) -> Tensor:
        """A region's vectors, ``(B, region_numel, d_model)``, in the order of ``layout.region_indices``.

        Raises:
            UnknownRegionError: the layout had no such region when this module was made.
            CanvasError: ``canvas`` has another shape.
        """
        self._check_canvas(canvas)
        return canvas.index_select(1, self._region_index(region_name))

    def _region_index(self, name: str) -> Tensor:
        if name not in self._row:
            known = ", ".join(map(repr, self._row)) or "none"
            raise UnknownRegionError(f"unknown region {name!r}; the layout has {known}")
        return self.get_buffer(f"_index_{self._row[name]}")

    def _check_canvas(self, canvas: Tensor) -> None:
        expected = (self.layout.num_positions, self.layout.d_model)
        if canvas.ndim != 3 or tuple(canvas.shape[1:]) != expected:
            raise CanvasError(
                f"canvas must have shape (B, num_positions, d_model) = (B, {expected[0]}, {expected[1]}), "
                f"got {tuple(canvas.shape)}"
            )

    def _conditioned(self, name: str) -> bool:
        return self.semantic_conditioner is not None and name in self.semantic_conditioner.region_names

    def _region_vectors(self) -> Tensor:
        """What lying in a region adds to an empty position, (regions, d)."""
        vectors = self.period_embedding.embedding.weight[self._bucket_rows]
        if not self._family_carrier and self.semantic_conditioner is None:
            return vectors
        added = []
        for name in self._row:
            vector = torch.zeros_like(self.empty_token)
            if self.family_carrier_embedding is not None and name in self._family_carrier:
                vector = vector + self.family_carrier_embedding(*self._family_carrier[name])
            if self.semantic_conditioner is not None and self._conditioned(name):
                vector = vector + self.semantic_conditioner.get_conditioning(name)
            added.append(vector)
        return vectors + torch.stack(added) if added else vectors

    def _identity(self, name: str) -> Tensor:
        """What is added to data placed in a region, (d)."""
        vector = self.period_embedding(self.layout.region_spec(name).period)
        if self.modality_embeddings is not None:
            vector = vector + self.modality_embeddings[_parameter_key(name)]
        elif self.semantic_conditioner is not None and self._conditioned(name):
            vector = vector + self.semantic_conditioner.get_conditioning(name)
        if self.family_carrier_embedding is not None and name in self._family_carrier:
            vector = vector + self.family_carrier_embedding(*self._family_carrier[name])
        return vector


def _parameter_key(name: str) -> str:
    """A region's name as a parameter's name: no dots, nothing that ``ParameterDict`` uses itself."""
    key = name.replace(".", "__").replace("[", "_").replace("]", "_")
    return f"{key}_" if hasattr(nn.ParameterDict, key) else key


def _label_positions(layout: CanvasLayout) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Number the sets of regions that positions lie in.

    Returns:
        The number of every position's set, (num_positions,), and which regions each set holds, (sets, regions)
        of 0 and 1.
    """
    labels = np.zeros(layout.num_positions, dtype=np.int64)
    sets: list[tuple[int, ...]] = [()]
    for row, name in enumerate(layout.regions):
        index = layout.region_index_array(name)
        here = labels[index]
        present = np.flatnonzero(np.bincount(here, minlength=len(sets)))
        renumber = np.zeros(len(sets), dtype=np.int64)
        renumber[present] = len(sets) + np.arange(present.size)
        sets += [(*sets[label], row) for label in present]
        labels[index] = renumber[here]
    used, labels = np.unique(labels, return_inverse=True)
    membership = np.zeros((used.size, len(layout.regions)), dtype=np.float32)
    for number, label in enumerate(used):
        membership[number, list(sets[label])] = 1.0
    return labels.astype(np.int64), membership
