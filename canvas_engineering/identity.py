"""Object identity: regions that hold a bank of slots which observations bind to.

``SlotBindingModule``, the torch module that does the binding, is importable from here and loads torch on
first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from canvas_engineering._checks import check_bool, check_choice, check_int, check_str
from canvas_engineering._forward import torch_attribute

if TYPE_CHECKING:
    from canvas_engineering.nn.identity import SlotBindingModule as SlotBindingModule

IDENTITY_MODES = ("persistent", "ephemeral", "tracklet")
"""What ``IdentitySpec.mode`` may be."""


def __getattr__(name: str) -> Any:
    return torch_attribute(__name__, {"SlotBindingModule": "canvas_engineering.nn.identity"}, name)


@dataclass(frozen=True)
class IdentitySpec:
    """How a region keeps track of objects.

    Args:
        mode: ``persistent``: slots live on from step to step. ``ephemeral``: slots are made anew each step.
            ``tracklet``: as persistent, with slots that are born and die.
        slot_capacity: Number of slots.
        binding_fn: How observations bind to slots.
        birth_death: Learn a gate per slot that switches it off; for ``tracklet``.

    Raises:
        CanvasError: an unknown mode, a capacity below 1, or a field of the wrong type.
    """

    mode: str = "persistent"
    slot_capacity: int = 64
    binding_fn: str = "cross_attention"
    birth_death: bool = False

    def __post_init__(self) -> None:
        check_choice(self.mode, "IdentitySpec.mode", IDENTITY_MODES)
        object.__setattr__(
            self, "slot_capacity", check_int(self.slot_capacity, "IdentitySpec.slot_capacity", minimum=1)
        )
        check_str(self.binding_fn, "IdentitySpec.binding_fn")
        check_bool(self.birth_death, "IdentitySpec.birth_death")
