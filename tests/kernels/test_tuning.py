import pytest
import torch
from kernel_cases import DEVICE
from tests_support import key_tables, value_tables

from pqkv_kernels.errors import KernelError
from pqkv_kernels.kernel_config import EXACT, DecodeConfig
from pqkv_kernels.tuning import candidates, config_document, format_name, measurer, read_config, tune


def test_the_fastest_that_is_right_wins() -> None:
    def measured(config: DecodeConfig) -> tuple[float, float]:
        if config.tile_tokens == 16:
            raise RuntimeError("out of resource: shared memory")
        if config.tile_tokens == 64:
            return 0.5, 0.001  # fast and wrong
        return 1e-4, 1.0 / config.num_warps + 0.01 * config.num_stages - 0.02 * (config.programs_per_processor == 8)

    winner, trials = tune(candidates(128), measured, "Fake GPU")
    chosen = (winner.tile_tokens, winner.num_warps, winner.num_stages, winner.programs_per_processor)
    assert chosen == (32, 8, 2, 8) and winner.origin == "measured on Fake GPU: 0.1250 ms"
    assert len(trials) == len(candidates(128)) + 2 and len(candidates(128, looked_up=True)) == 2 * len(candidates(128))
    faults = {trial.config.tile_tokens: trial.fault for trial in trials}
    assert faults == {16: "RuntimeError: out of resource: shared memory", 32: None, 64: faults[64]}
    assert faults[64] == "differs from the reference by 0.5; expected at most 0.01"


def test_nothing_that_is_wrong_everywhere_wins() -> None:
    with pytest.raises(KernelError, match="none of 8 kernel configurations runs and gives right answers: differs from"):
        tune(candidates(256), lambda config: (float("nan"), 1.0), "Fake GPU")


def test_configurations_survive_json_and_others_are_named() -> None:
    for config in (DecodeConfig(), EXACT):
        assert read_config(config_document(config)) == config
    for wrong, phrase in (
        ([], "expected an object of"),
        ({"tiles": 3}, "expected an object of"),
        ({"num_warps": "4"}, "expected the types of"),
        ({"num_warps": True}, "expected the types of"),
        ({"num_warps": 5}, "num_warps is 5"),
    ):
        with pytest.raises(KernelError, match=phrase):
            read_config(wrong)


def test_a_configuration_is_measured_against_the_reference(generator: torch.Generator) -> None:
    keys, values = key_tables(generator).to(DEVICE), value_tables(generator).to(DEVICE)
    measured = measurer(keys, values, 2, 1, 64, torch.float32, 1)
    error, ms = measured(EXACT)
    assert error < 1e-4 and 0 < ms < float("inf")
    assert "/" in format_name(keys.layout, values.layout)
