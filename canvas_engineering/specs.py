"""What a region's program is made of: clock, learning recipe, constraints."""

from __future__ import annotations

from dataclasses import dataclass

from canvas_engineering._checks import check_int, check_number, check_strings


@dataclass(frozen=True)
class ClockSpec:
    """When a region updates.

    Args:
        domain: ``external``: the environment's time; ``boundary``: events in the life of an episode.
        mode: ``periodic``: every ``period`` steps; ``on_event``: when a summary exceeds a threshold;
            ``boundary``: at a named event.
        period: Steps between updates.
        event_source: ``<region>.<kind>`` for ``on_event``, the event's name for ``boundary``.
        event_threshold: Summary above which ``on_event`` fires.
        cooldown: Steps without update after one.
        max_silence: Steps after which an update is forced.
        max_inner_steps: Most inner iterations per step.

    Raises:
        CanvasError: a period below 1, a negative count, or a threshold that is not finite.
    """

    domain: str = "external"
    mode: str = "periodic"
    period: int = 1
    event_source: str | None = None
    event_threshold: float = 0.0
    cooldown: int = 0
    max_silence: int | None = None
    max_inner_steps: int | None = None

    def __post_init__(self) -> None:
        check_int(self.period, "ClockSpec.period", minimum=1)
        check_number(self.event_threshold, "ClockSpec.event_threshold")
        for name in ("cooldown", "max_silence", "max_inner_steps"):
            if getattr(self, name) is not None:
                check_int(getattr(self, name), f"ClockSpec.{name}", minimum=0)


@dataclass(frozen=True)
class LearningSpec:
    """How a region learns.

    Args:
        mode: ``supervised``, ``ssl_prediction``, ``posterior_match``, ``retrieval``, ``calibration``, ``none``.
        losses: Names of losses, for the training loop to interpret.
        compile_mode: What becomes of the region at deployment.
    """

    mode: str = "supervised"
    losses: tuple[str, ...] = ()
    compile_mode: str = "runtime"

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", check_strings(self.losses, "LearningSpec.losses"))


@dataclass(frozen=True)
class ConstraintSpec:
    """What the dynamics of a region should respect; None leaves it free. See ``validate_constraints``.

    Args:
        equivariance: ``translation``, ``rotation`` or ``permutation``.
        conservation: ``capacity`` or ``energy``.
        causal_direction: ``acyclic``: no path of connections leads back to the region; ``forward_only``: its
            connections lead to regions that start no earlier.
        monotonicity: ``non_decreasing`` or ``non_increasing``.
    """

    equivariance: str | None = None
    conservation: str | None = None
    causal_direction: str | None = None
    monotonicity: str | None = None


CONSTRAINT_VALUES = {
    "equivariance": ("permutation", "rotation", "translation"),
    "conservation": ("capacity", "energy"),
    "causal_direction": ("acyclic", "forward_only"),
    "monotonicity": ("non_decreasing", "non_increasing"),
}
"""What each field of a :class:`ConstraintSpec` may be, None aside."""
