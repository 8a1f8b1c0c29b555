"""Any weight that keys or values may depend on is part of a model's identity."""

import os
from typing import Any

import pytest
import torch

from pqkv_cli.models.identity import all_weights_sha256, model_identity


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_every_weight_counts(tiny: Any, model_type: str) -> None:
    model = tiny(model_type)
    before = model_identity(model).weights_sha256
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name == "lm_head.weight":
            continue
        with torch.no_grad():
            kept = parameter.view(-1)[-1].item()
            parameter.view(-1)[-1] = kept + 1
            assert model_identity(model).weights_sha256 != before, name
            parameter.view(-1)[-1] = kept
    assert model_identity(model).weights_sha256 == before


def test_swapped_layers_are_another_model(tiny: Any) -> None:
    model = tiny("llama")
    before = model_identity(model).weights_sha256
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    model.model.layers[0].mlp, model.model.layers[1].mlp = second, first
    assert model_identity(model).weights_sha256 != before


class Twins(torch.nn.Module):
    """Tensors whose names end alike, as those of experts, adapters and projections in lists do."""

    def __init__(self, seeds: tuple[int, int]) -> None:
        super().__init__()
        for name, seed in zip(("one", "two"), seeds, strict=True):
            torch.manual_seed(seed)
            self.add_module(name, torch.nn.ModuleList([torch.nn.Linear(4, 4)]))


def test_tensors_whose_names_end_alike_are_told_apart() -> None:
    hashes = [all_weights_sha256(Twins(seeds)) for seeds in ((1, 2), (2, 1), (1, 2))]
    assert hashes[0] == hashes[2] != hashes[1]
    assert all_weights_sha256(torch.nn.ModuleDict({"in_front": Twins((1, 2))})) == hashes[0]


def test_number_format_and_head_do_not_count(tiny: Any) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    before = model_identity(model).weights_sha256
    with torch.no_grad():
        model.lm_head.weight += 1
    assert model_identity(model).weights_sha256 == before
    assert model_identity(model.to(torch.bfloat16)).weights_sha256 == before


def test_the_weights_of_a_process_made_by_fork(tiny: Any) -> None:
    # torch's own threads do not live on in such a process, and must not be made anew by several of ours at once.
    model = tiny("llama", hidden_size=512, num_hidden_layers=4)
    (torch.rand(256, 256) @ torch.rand(256, 256)).sum()
    expected = all_weights_sha256(model)
    for _ in range(5):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(write, all_weights_sha256(model).encode())
            except BaseException as error:
                os.write(write, str(error).encode()[:200])
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(read, 1000).decode() == expected
