"""What a line of the recipe says of its setting, beside type and default. Knows no recipe and no command line."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["calibrate", "fit-codebooks", "export", "eval"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a setting means, which stages depend on it, and how a command line gives it.

    Attributes
    ----------
    help
        One sentence for editors, for the page of recipes and for the help of the verbs.
    stage
        The stage, or the stages, that a change of the setting does again; empty where it does none again.
    option
        How a command line spells it, such as ``--samples`` or ``--refine/--no-refine``; None where it has no option of its own.
    also
        Verbs that take the option, beside those of its stages.
    metavar
        What stands for the value in a help text; None leaves it to the type.
    offers
        Words that a shell may complete the value with.
    by_content
        Whether the setting says where something lies: its stage depends on what lies there, and not on the setting itself.
    came_later
        Whether there are runs and artifacts from before the setting: it counts for them only where it has another value than
        its default.
    """

    help: str
    stage: Stage | tuple[Stage, ...]
    option: str | None = None
    also: tuple[str, ...] = ()
    metavar: str | None = None
    offers: tuple[str, ...] = ()
    by_content: bool = False
    came_later: bool = False

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that depend on the setting, the first one first."""
        return (self.stage,) if isinstance(self.stage, str) else self.stage

    @property
    def verbs(self) -> tuple[str, ...]:
        """The verbs that take the option."""
        return () if self.option is None else (*self.stages, *self.also)
