import pytest
import torch
from kernel_cases import DEVICE
from tests_support import key_tables, value_tables

from pqkv_kernels.errors import KernelError
from pqkv_kernels.gpu.config import EXACT, DecodeConfig
from pqkv_kernels.tuning import candidates, config_document, format_name, measurer, read_config, tune


def test_the_fastest_that_is_right_wins() -> None:
    def measured(config: DecodeConfig) -> tuple[float, float]:
        if config.num_warps == 4:
            raise RuntimeError("out of resource: registers")
        if config.num_warps == 2:
            return 0.5, 0.001  # fast and wrong
        return 1e-4, 1.0 - config.max_registers / 1000 - 0.02 * (config.programs_per_processor == 24)

    winner, trials = tune(candidates(), measured, "Fake GPU")
    chosen = (winner.num_warps, winner.max_registers, winner.programs_per_processor)
    assert chosen == (1, 168, 24) and winner.origin == "measured on Fake GPU: 0.8120 ms"
    assert len(trials) == len(candidates()) + 2 and len(candidates(looked_up=True)) == 2 * len(candidates())
    faults = {trial.config.num_warps: trial.fault for trial in trials}
    assert faults == {4: "RuntimeError: out of resource: registers", 1: None, 2: faults[2]}
    assert faults[2] == "differs from the reference by 0.5; expected at most 0.01"


def test_nothing_that_is_wrong_everywhere_wins() -> None:
    with pytest.raises(KernelError, match="none of 9 kernel configurations runs and gives right answers: differs from"):
        tune(candidates(), lambda config: (float("nan"), 1.0), "Fake GPU")


def test_configurations_survive_json_and_others_are_named() -> None:
    for config in (DecodeConfig(), EXACT):
        assert read_config(config_document(config)) == config
    for wrong, phrase in (
        ([], "expected an object of"),
        ({"tiles": 3}, "expected an object of"),
        ({"num_warps": "4"}, "expected the types of"),
        ({"num_warps": True}, "expected the types of"),
        ({"num_warps": 5}, "num_warps is 5"),
        ({"tables": "int8"}, "tables are 'int8', which this version no longer has; expected float16 or float32"),
    ):
        with pytest.raises(KernelError, match=phrase):
            read_config(wrong)


def test_a_configuration_is_measured_against_the_reference(generator: torch.Generator) -> None:
    keys, values = key_tables(generator).to(DEVICE), value_tables(generator).to(DEVICE)
    measured = measurer(keys, values, 2, 1, 64, torch.float32, 1)
    error, ms = measured(EXACT)
    assert error < 1e-4 and 0 < ms < float("inf")
    assert "/" in format_name(keys.layout, values.layout)
