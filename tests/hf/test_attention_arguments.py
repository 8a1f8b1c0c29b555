from typing import Any

import pytest
import torch
from family_models import family_model
from torch import nn

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.hf.attention import IRRELEVANT, read_arguments
from pqkv_cli.hf.modules import attention_modules

QUERY = torch.zeros(1, 2, 3, 16)


@pytest.mark.parametrize("name", ["block_indices", "position_bias", "indices", "cu_seq_lens_q", "something_new"])
def test_a_keyword_that_is_not_known_is_named(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"Linear hands '{name}' to its attention.*another model"):
        read_arguments(nn.Linear(1, 1), QUERY, None, {name: torch.zeros(1), "softcap": None})


@pytest.mark.parametrize("name", [*sorted(IRRELEVANT), "something_new"])
def test_what_changes_nothing_may_come(name: str) -> None:
    value = None if name == "something_new" else 7
    assert read_arguments(nn.Linear(1, 1), QUERY, None, {name: value}).scaling == 0.25


@pytest.mark.parametrize(
    ("family", "keyword", "declared"), [("gemma2", "softcap", "a soft cap of 2"), ("gpt_oss", "s_aux", "sinks")]
)
def test_what_a_model_declares_must_arrive(family: str, keyword: str, declared: str) -> None:
    module = attention_modules(family_model(family))[0]
    for keywords in ({}, {keyword: None}):
        with pytest.raises(UnsupportedModelError, match=f"declares .*{declared}.*without '{keyword}'.*pqkv doctor"):
            read_arguments(module, QUERY, None, keywords)
    given: Any = 2.0 if keyword == "softcap" else module.sinks
    found = read_arguments(module, QUERY, None, {keyword: given})
    assert (found.softcap if keyword == "softcap" else found.sink_logits) is given


def test_causality_is_what_the_keyword_says_or_else_the_module() -> None:
    module = nn.Linear(1, 1)
    assert read_arguments(module, QUERY, None, {}).is_causal
    assert not read_arguments(module, QUERY, None, {"is_causal": False}).is_causal
    module.is_causal = False  # type: ignore[assignment]
    assert not read_arguments(module, QUERY, None, {}).is_causal
    assert read_arguments(module, QUERY, None, {"is_causal": True}).is_causal
