import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_chain import byte_tokenizer, fit_artifact, tiny_llama

from pqkv_cli.evaluation.settings import Subject
from pqkv_cli.runtime import load

TEXT = "".join(random.Random(3).choices("abcdefghijklmnopqrstuvwxyz ,.\n", k=6000))


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Subject]:
    """Return a maker of subjects: a tiny model beside an artifact of the bits asked for."""
    directory, made = tmp_path_factory.mktemp("tiny"), {}

    def make(bits: int = 4, text: str = TEXT) -> Subject:
        model = tiny_llama()
        if bits not in made:
            made[bits] = load(fit_artifact(model, Path(directory), bits))
        return Subject(model, byte_tokenizer(), made[bits], text)

    return make
