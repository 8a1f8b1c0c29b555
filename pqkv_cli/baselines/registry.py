"""All rivals by name and rate, and how people ask for them. Knows names; fits nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pqkv_cli.baselines.aqua import AquaKV
from pqkv_cli.baselines.higgs import Higgs
from pqkv_cli.baselines.kvarn import KVarN
from pqkv_cli.baselines.kvquant import KVQuant
from pqkv_cli.baselines.million import CODES, Million
from pqkv_cli.baselines.nsnquant import NSNQuant
from pqkv_cli.baselines.protocol import Rival
from pqkv_cli.baselines.rotatekv import RotateKV
from pqkv_cli.baselines.rtn import Kivi, RoundToNearest
from pqkv_cli.baselines.transformers_cache import LibraryCache
from pqkv_cli.baselines.turboquant import TurboQuant
from pqkv_cli.baselines.vecinfer import VecInfer
from pqkv_cli.errors import UsageError, did_you_mean

ALL = "all"


@dataclass(frozen=True, slots=True)
class Method:
    """A method: how to make it for a native rate, and its rates.

    `at_rest` says that nothing can attend to its codes: layers are rebuilt in order before any is read.
    """

    make: Callable[[int], Rival]
    rates: tuple[int, ...]
    at_rest: bool = False


METHODS: Mapping[str, Method] = {
    "rtn": Method(RoundToNearest, (4, 3, 2)),
    "rtn-g128": Method(partial(RoundToNearest, group_size=128, name="rtn-g128"), (4, 3, 2)),
    "kivi": Method(Kivi, (4, 3, 2, 1)),
    "kivi-g128": Method(partial(Kivi, group_size=128, name="kivi-g128"), (4, 3, 2, 1)),
    "million": Method(Million, tuple(CODES)),
    "kvquant": Method(KVQuant, (4, 3, 2, 1)),
    "kvquant-dense": Method(partial(KVQuant, outlier_share=0.0, name="kvquant-dense"), (4, 3, 2, 1)),
    "turboquant": Method(TurboQuant, (4, 3, 2, 1)),
    "rotatekv": Method(RotateKV, (4, 3, 2)),
    "higgs": Method(Higgs, (4, 3, 2)),
    "aqua-kv": Method(AquaKV, (4, 3, 2), at_rest=True),
    "nsnquant": Method(NSNQuant, (2, 1)),
    "kvarn": Method(KVarN, (4, 3, 2)),
    "kvarn-k4v2": Method(partial(KVarN, key_bits=4, value_bits=2, name="kvarn-k4v2"), (3,)),
    "vecinfer": Method(VecInfer, (4, 3, 2, 1)),
    "quanto": Method(partial(LibraryCache, backend="quanto"), (4, 2)),
    "hqq": Method(partial(LibraryCache, backend="hqq"), (4, 3, 2, 1)),
}


def is_at_rest(name: str) -> bool:
    """Return whether the method `name` stores caches that have to be rebuilt before anyone attends to them."""
    return name in METHODS and METHODS[name].at_rest


def parse_rivals(text: str) -> list[Rival]:
    """Return the rivals that `text` asks for: ``all``, or names such as ``kivi:2,million``; a name alone is all its rates.

    Raises
    ------
    UsageError
        If a name or rate is unknown, or one is asked for twice.
    """
    words = [word.strip() for word in text.split(",")]
    chosen = [pair for word in words for pair in _expand(word)]
    twice = sorted({f"{name}:{nbits}" for name, nbits in chosen if chosen.count((name, nbits)) > 1})
    if twice:
        raise UsageError(f"--peers names {', '.join(twice)} more than once; expected each rival once")
    return [METHODS[name].make(nbits) for name, nbits in chosen]


def _expand(word: str) -> Sequence[tuple[str, int]]:
    if word == ALL:
        return [(name, nbits) for name, method in METHODS.items() for nbits in method.rates]
    name, colon, rate = word.partition(":")
    if name not in METHODS:
        known = ", ".join((ALL, *METHODS))
        raise UsageError(f"--peers names {word!r}{did_you_mean(name, (ALL, *METHODS))}; expected {known}, or NAME:BITS")
    rates = METHODS[name].rates
    if not colon:
        return [(name, nbits) for nbits in rates]
    if rate not in map(str, rates):
        raise UsageError(
            f"--peers asks for {word!r}; expected {name} at {', '.join(map(str, rates))} bits, such as {name}:{rates[0]}"
        )
    return [(name, int(rate))]
