"""How something on the hub is named. Knows words only."""

import re
from dataclasses import dataclass

_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository ``org/name`` and, where one is asked for, its revision: a branch, a tag or a full commit."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_hub_name(text: str) -> HubName | None:
    """Return what ``org/name`` or ``org/name@revision`` names, None where `text` is neither."""
    found = _NAME.fullmatch(text)
    return None if found is None else HubName(found["repository"], found["revision"])
