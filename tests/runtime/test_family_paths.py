"""Every family on every way to generate, token for token against a dense cache of the decoded values."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import FAMILIES, family_model
from generation_paths import PATHS, UNSUPPORTED
from tiny_chain import tokens

from pqkv_cli.models.families import family
from pqkv_cli.runtime import Attached, attach

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
from oracle import generate, oracle_of

# A page is coded while the prompt is read, and one more at the second new token.
PROMPT, PADDING = 190, 70


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: Any, family_case: Callable[[str], Any]) -> Iterator[tuple[str, Attached]]:
    with attach(*family_case(request.param)) as made:
        yield request.param, made


@cache
def assistant(name: str) -> Any:
    return family_model(name)


@pytest.mark.parametrize("path", list(PATHS))
def test_tokens_are_the_oracles(case: tuple[str, Attached], path: str) -> None:
    (name, attached), options = case, dict(PATHS[path])
    ids = tokens(options.pop("rows"), PROMPT, seed=7)
    if options.pop("padded", False):
        options["attention_mask"] = (torch.arange(PROMPT) >= torch.tensor([[PADDING], [0]])).long()
    if "assistant_model" in options:
        options["assistant_model"] = assistant(options["assistant_model"])
    held = attached.new_cache()
    message = UNSUPPORTED.get((name, path))
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        found = generate(attached, held, ids, **options)
        assert found.shape[1] == PROMPT + 5
        assert torch.equal(found, generate(attached, oracle_of(attached), ids, **options))
        if family(attached.model.config.model_type).tier == "codes":
            assert held.num_materialized == 0


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten())

    def end(self) -> None:
        self.seen.append(torch.tensor([-1]))


def test_turns_go_on_after_streaming_and_from_a_copy(case: tuple[str, Attached]) -> None:
    attached, collector, ends = case[1], Collector(), []
    for held in (attached.new_cache(), oracle_of(attached)):
        own = not ends
        ids = generate(attached, held, tokens(1, PROMPT, seed=9), streamer=collector if own else None)
        if own:
            assert torch.equal(torch.cat(collector.seen), torch.cat((ids[0], torch.tensor([-1]))))
        ids = torch.cat((ids, tokens(1, 20, seed=1)), dim=1)
        twin = copy.deepcopy(held)
        ends.append(generate(attached, held, ids))
        if own:
            assert torch.equal(generate(attached, twin, ids), ends[0])
    assert torch.equal(*ends)


def test_codes_in_the_memory_of_the_cpu_and_a_reset_change_nothing(case: tuple[str, Attached]) -> None:
    attached, ids = case[1], tokens(2, PROMPT, seed=11)
    held = attached.new_cache(offload=True)
    found = generate(attached, held, ids)
    assert torch.equal(found, generate(attached, oracle_of(attached), ids))
    layer = held.quantized_layers[0]
    before = [view.clone() for view in layer.pages["keys"].views()]
    layer.prefetch()
    assert before and all(torch.equal(a, b) for a, b in zip(before, layer.pages["keys"].views(), strict=True))
    layer.offload()
    held.reset()
    assert held.get_seq_length() == 0 and held.num_bytes().codes == 0
    homes = {store.home for layer in held.quantized_layers for store in layer.pages.values()}
    assert homes == {torch.device("cpu")}, "an emptied cache keeps its codes where it was told to"
    assert torch.equal(found, generate(attached, held, ids))
