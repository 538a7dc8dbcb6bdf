"""When a recursive mixture trains which of its components."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """A stretch of training: ``component`` is None where all are trained together.

    ``kind`` is "first", "propose", "refine", "cycle" or "joint".
    """

    kind: str
    component: int | None
    steps: int


@dataclass(frozen=True)
class Schedule:
    """How a mixture grows, in training steps.

    The ``first`` component is trained alone, or all that come from paths together. Each further one
    is found with the proposal objective (``propose`` steps, the mixture fixed), then refined in the
    mixture together with its weight (``refine`` steps, the last of which is the acceptance test).
    Then follow ``cycles`` rounds of refitting each component in turn (``cycle`` steps each), and
    ``joint`` steps of all together; training that goes on stays joint.

    Args:
        confidence: a component is kept if its gain is more than so many standard errors.
        patience: how often a dropped component is proposed again, with new initial weights.
        min_gain: a component is kept only if it gains more than this, in nats over the data, and
            growth ends where a proposal could not.
        draws: of each component in the acceptance test, over all rows; at least 32 for each row.

    >>> [stage.kind for stage in Schedule(first=10, propose=5, refine=5, joint=10).stages(2)]
    ['first', 'propose', 'refine', 'joint']
    """

    first: int = 1000
    propose: int = 300
    refine: int = 700
    cycles: int = 0
    cycle: int = 300
    joint: int = 0
    confidence: float = 2.0
    patience: int = 1
    min_gain: float = 0.0
    draws: int = 2000

    def __post_init__(self) -> None:
        """Check that there is nothing negative, and something to do."""
        for name, value in vars(self).items():
            least = 1 if name in ("first", "propose", "refine") else 0
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")

    @classmethod
    def fractions(
        cls,
        num_steps: int,
        num_components: int,
        *,
        first: float = 0.05,
        propose: float = 0.015,
        refine: float = 0.035,
        **options: Any,
    ) -> "Schedule":
        """Return the schedule of a training of ``num_steps`` steps, stages as fractions of it.

        What the growth leaves is for all components together: with the default, 90 % of the steps
        of two components. This is for a model that learns at the same time, whose earlier encoders
        are held while a component is added. Each stage has at least one step.

        Args:
            first, propose, refine: of the steps, the last two for each further component.
            options: other arguments of `Schedule`, but ``joint``.

        Raises:
            ValueError: growth takes more than all steps.

        >>> [stage.steps for stage in Schedule.fractions(1000, 2).stages(2)]
        [50, 15, 35, 900]
        """
        steps = {
            name: max(1, round(fraction * num_steps))
            for name, fraction in (("first", first), ("propose", propose), ("refine", refine))
        }
        schedule = cls(joint=0, **steps, **options)
        joint = num_steps - sum(stage.steps for stage in schedule.stages(num_components))
        if joint < 0:
            raise ValueError(
                f"Growth of {num_components} components takes {num_steps - joint} of {num_steps} "
                "steps. Lower the fractions, or train longer."
            )
        return replace(schedule, joint=joint)

    def stages(self, num_components: int) -> tuple[Stage, ...]:
        """Return all stages in order, as if every component were kept."""
        found = [Stage("first", 0, self.first)]
        for m in range(1, num_components):
            found += [Stage("propose", m, self.propose), Stage("refine", m, self.refine)]
        cycle = [Stage("cycle", m, self.cycle) for m in range(num_components)]
        found += [*self.cycles * cycle, Stage("joint", None, self.joint)]
        return tuple(stage for stage in found if stage.steps)
