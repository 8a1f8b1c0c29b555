import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_chain import tiny_llama
from torch import nn

from pqkv_cli.errors import UnsupportedModelError, UsageError
from pqkv_cli.hf.wrappers import inner_model


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Adapter(nn.Module):
    """What peft's PeftModel looks like from outside."""

    def __init__(self, model: Any, learns_prompts: bool = False) -> None:
        super().__init__()
        self.held = model
        self.active_peft_config = type("Config", (), {"is_prompt_learning": learns_prompts})()

    def get_base_model(self) -> Any:
        return self.held


class Head(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model = model


def test_a_model_is_itself() -> None:
    model = tiny_llama()
    assert inner_model(model) is model


def test_what_is_wrapped_is_found(process_group: None) -> None:
    model = tiny_llama()
    parallel = nn.parallel.DistributedDataParallel(model)
    for wrapped in (
        torch.compile(model),
        parallel,
        nn.DataParallel(model),
        Adapter(model),
        Adapter(parallel),
        torch.compile(parallel),
    ):
        assert inner_model(wrapped) is model, type(wrapped)


def test_learned_prompts_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Adapter puts learned tokens in front of every prompt.*LoRA"):
        inner_model(Adapter(tiny_llama(), learns_prompts=True))


def test_an_adapter_that_was_taken_off_is_none() -> None:
    class Empty(Adapter):
        @property
        def active_peft_config(self) -> Any:
            raise KeyError("default")

        @active_peft_config.setter
        def active_peft_config(self, value: Any) -> None:
            pass

    model = tiny_llama()
    assert inner_model(Empty(model)) is model


def test_another_wrapper_is_refused_with_the_way_in() -> None:
    with pytest.raises(UsageError, match=r"the model is a Head; expected a causal language model.*give its \.pretrained_model"):
        inner_model(Head(tiny_llama()))


@pytest.mark.skipif(os.name == "nt", reason="gloo needs a POSIX system")
def test_shards_are_refused(process_group: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    shards = object.__new__(FullyShardedDataParallel)
    nn.Module.__init__(shards)
    with pytest.raises(UnsupportedModelError, match="FullyShardedDataParallel.*attach before wrapping"):
        inner_model(shards)
