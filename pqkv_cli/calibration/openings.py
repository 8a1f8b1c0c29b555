"""How texts begin that a model writes for its own calibration, and in which order. Knows no models and no tokenizers.

What a chat model reads is of many kinds: prose, code, tables, calls of tools, talk. Each kind has its openings, and texts take
turns between kinds, so that none of them is learned at the cost of the others.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from pqkv_cli.calibration.openings_code import CODE, FORMS
from pqkv_cli.calibration.openings_prose import LANGUAGES, MATHEMATICS, PROSE
from pqkv_cli.calibration.openings_talk import SYSTEMS, TALKS

SELF = "self"  # what text that a model writes is called among the sources of texts

# What stands in angle brackets in an opening: the same opening twice is not the same text twice.
_FILLS = {
    "<name>": "Anna Tomás Mei Jakub Leila Oskar Ruth Ivan Noor Pedro Greta Kenji Amara Louis Sofia Henrik".split(),
    "<place>": "Lisbon Tromsø Nairobi Leipzig Kyoto Quito Bergamo Cork Tbilisi Halifax Valencia Hue Graz Oaxaca".split(),
    "<thing>": "bridge kettle bicycle orchard lantern engine letter glacier piano market compass harbour loom roof".split(),
    "<field>": "soil tides bees steel sleep bread maps vaccines radio forests trade glass rivers memory".split(),
    "<number>": [str(number) for number in (3, 7, 12, 18, 24, 35, 48, 60, 75, 96, 110, 144, 250, 365, 512, 1200, 4096)],
}
_CHANGING = ("<name>", "<number>")


@dataclass(frozen=True, slots=True)
class Opening:
    """How one text begins.

    Attributes
    ----------
    kind
        What the text is to be like.
    parts
        Of a talk what the system says, or nothing, and then what the user says each time; else the first words alone.
    """

    kind: str
    parts: tuple[str, ...]

    @property
    def is_talk(self) -> bool:
        """Whether the model is to answer, in its own template if it has one."""
        return self.kind == "talk"


# Talk stands twice among the kinds: it is what most models are asked for.
KINDS: tuple[tuple[Opening, ...], ...] = (
    tuple(Opening("talk", ("", *turns)) for turns in TALKS),
    tuple(Opening("prose", (text,)) for text in PROSE),
    tuple(Opening("code", (text,)) for text in CODE),
    tuple(Opening("talk", (SYSTEMS[i % len(SYSTEMS)], *turns)) for i, turns in enumerate(TALKS)),
    tuple(Opening("languages", (text,)) for text in LANGUAGES),
    tuple(Opening("forms", (text,)) for text in FORMS),
    tuple(Opening("mathematics", (text,)) for text in MATHEMATICS),
)


def dealt(seed: int, batch: int) -> Iterator[Opening]:
    """Yield openings without end, one of each kind in turn, filled in and in an order that `seed` and `batch` decide."""
    rng = random.Random(seed * 1_000_003 + batch)
    hands: list[list[Opening]] = [[] for _ in KINDS]
    turn = rng.randrange(len(KINDS))
    while True:
        if not hands[turn]:
            hands[turn] = rng.sample(KINDS[turn], len(KINDS[turn]))
        opening = hands[turn].pop()
        yield Opening(opening.kind, _filled(opening.parts, rng))
        turn = (turn + 1) % len(KINDS)


def openings_sha256() -> str:
    """Return what tells these openings from those of another version."""
    return hashlib.sha256(repr((KINDS, _FILLS)).encode()).hexdigest()


def _filled(parts: tuple[str, ...], rng: random.Random) -> tuple[str, ...]:
    """Return `parts` with words for the marks: a name or a number is another one each time, a thing stays what it is."""
    found = list(parts)
    for mark, choices in _FILLS.items():
        word = rng.choice(choices)
        for i, part in enumerate(found):
            while mark in part:
                part = part.replace(mark, word, 1)
                word = rng.choice(choices) if mark in _CHANGING else word
            found[i] = part
    return tuple(found)
