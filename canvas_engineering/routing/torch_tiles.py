"""Which tile sizes ``"auto"`` chooses from: those of the plans' default table, or those of the GPU's kernel table."""

from __future__ import annotations

import torch

from canvas_engineering.kernels.triton import backend as triton_backend
from canvas_engineering.kernels.triton.config import recommended_tiles
from canvas_engineering.plan.auto import AUTO_TILES, TileTable


def tiles_of(backend: str, head_dim: int) -> TileTable:
    """The table for what a torch dispatcher with this ``backend`` will run on: the current GPU, if it may run there.

    A dispatcher is made before its parameters are moved, so the GPU is the machine's, not the parameters'; and
    before its dtype is settled (autocast), so 16 bit is assumed, which is what canvases are trained in.
    """
    if backend not in ("auto", "triton") or not torch.cuda.is_available():
        return AUTO_TILES
    supported = triton_backend.MIN_HEAD_DIM <= head_dim <= triton_backend.MAX_HEAD_DIM
    if not supported or not triton_backend.availability()[0] or triton_backend.interpreted():
        return AUTO_TILES
    from canvas_engineering.kernels.triton.launch import architecture

    device = torch.device("cuda", torch.cuda.current_device())
    return recommended_tiles(architecture(device), head_dim, "float16", torch.cuda.get_device_name(device))
