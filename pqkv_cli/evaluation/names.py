"""Names of the lines in a list to be remembered: an adjective and a noun. Knows no prompts."""

from collections.abc import Callable

import numpy as np

_ADJECTIVES = (
    "able amber ancient ashen bald bitter blank bold brave brisk broad calm civil clean clever cold crisp curly daring dear "
    "dry dusty eager early elder empty even exact faint fair false fancy fast fierce final firm flat fluffy fond free fresh "
    "frosty gentle giant glad golden grand great green happy harsh hasty heavy hollow honest hot huge humble hungry icy idle"
).split()
_NOUNS = (
    "acorn anchor apple arrow badge barn basin beach bell bench berry blade boat bonnet book boot bottle bowl brick bridge "
    "brush bucket button cabin camel candle canoe carpet castle cave chain chair cherry circle cliff cloud coat coin comb "
    "coral cottage crane dagger desk diamond dish dock door dragon drum eagle engine falcon feather fence ferry field"
).split()


def line_names(count: int, rng: np.random.Generator) -> list[str]:
    """Return `count` different names in random order; beyond the pairs that there are, numbered ones."""
    size = len(_ADJECTIVES) * len(_NOUNS)
    chosen = np.concatenate([rng.permutation(size) + turn * size for turn in range(count // size + 1)])[:count]
    return [_name(int(index), size) for index in chosen]


def _name(index: int, size: int) -> str:
    turn, index = divmod(index, size)
    name = f"{_ADJECTIVES[index // len(_NOUNS)]}-{_NOUNS[index % len(_NOUNS)]}"
    return f"{name}-{turn + 1}" if turn else name


def longest_name(length: Callable[[str], int]) -> str:
    """Return the name whose words are the longest, by `length`."""
    return f"{max(_ADJECTIVES, key=length)}-{max(_NOUNS, key=length)}"
