"""The reference model's curriculum, as data. Knows nothing of torch.

A stage ends when its goal is met on held-out probes, never after a fixed number of steps; the last two share what is left
of the token budget. Short rows with many recall tasks come first: started at 512 tokens on text alone, a model of this size
learns no recall within millions of tokens.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """Exact-match accuracy on probes of one kind and length that ends a stage."""

    kind: str
    length: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage trains on.

    `lengths` and `kinds` map to their probabilities; `answer_weight` is the loss weight of an answer token; `max_position`
    bounds the random position gaps; `until` is the share of the token budget after which the stage ends regardless.
    """

    name: str
    lengths: dict[int, float]
    kinds: dict[str, float]
    tokens_per_step: int
    answer_weight: float
    max_position: int
    until: float
    goals: tuple[Goal, ...] = ()
    decays: bool = False


STAGES = (
    Stage(
        name="induction",
        lengths={128: 1.0},
        kinds={"text": 0.3, "copy": 0.3, "passkey": 0.2, "lookup": 0.2},
        tokens_per_step=4096,
        answer_weight=8.0,
        max_position=2048,
        until=0.25,
        goals=(Goal("passkey", 128, 0.97), Goal("lookup", 128, 0.8)),
    ),
    Stage(
        name="recall",
        lengths={256: 0.5, 512: 0.5},
        kinds={"text": 0.4, "copy": 0.15, "passkey": 0.1, "lookup": 0.35},
        tokens_per_step=8192,
        answer_weight=8.0,
        max_position=8192,
        until=0.5,
        goals=(Goal("passkey", 512, 0.98), Goal("passkey", 2048, 0.8), Goal("lookup", 512, 0.8)),
    ),
    Stage(
        name="long",
        lengths={512: 0.6, 1024: 0.2, 2048: 0.2},
        kinds={"text": 0.65, "copy": 0.05, "passkey": 0.1, "lookup": 0.2},
        tokens_per_step=8192,
        answer_weight=8.0,
        max_position=8192,
        until=0.75,
    ),
    Stage(
        name="decay",
        lengths={512: 0.5, 1024: 0.2, 2048: 0.15, 4096: 0.15},
        kinds={"text": 0.65, "copy": 0.05, "passkey": 0.1, "lookup": 0.2},
        tokens_per_step=8192,
        answer_weight=8.0,
        max_position=8192,
        until=1.0,
        decays=True,
    ),
)

# Token budgets: one CPU core for at most two hours, or a data-centre GPU for ten minutes.
BUDGETS = {"cpu": 22_000_000, "gpu": 400_000_000, "smoke": 200_000}
