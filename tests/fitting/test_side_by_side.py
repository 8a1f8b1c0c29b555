"""Layers fitted by several threads: order, errors, threads of torch, and an end that does not wait for all."""

import threading
import time

import fitting_support as support
import pytest
import torch

from pqkv_cli.fitting.side_by_side import side_by_side, stop_point

GEOMETRY = support.plan()[0]


@pytest.fixture(autouse=True)
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_keep_their_order_and_every_thread_computes_alone() -> None:
    both, seen = threading.Barrier(2, timeout=30), []

    def work(layer: int) -> tuple[int, int, str]:
        both.wait()
        return layer, torch.get_num_threads(), threading.current_thread().name

    found = side_by_side(work, [7, 3, 5, 1], GEOMETRY, lambda *n: seen.append(n))
    assert [layer for layer, _, _ in found] == [7, 3, 5, 1]
    assert {threads for _, threads, _ in found} == {1} and len({name for _, _, name in found}) == 2
    assert seen == [(done, 4) for done in range(5)]
    assert torch.get_num_threads() == 2


def test_no_layer_is_no_work() -> None:
    assert side_by_side(lambda layer: layer, [], GEOMETRY) == []


def test_an_error_ends_the_others_at_their_next_stop_point() -> None:
    begun = []

    def work(layer: int) -> None:
        begun.append(layer)
        if layer == 1:
            raise ValueError("layer 1")
        for _ in range(3000):
            stop_point()
            time.sleep(0.01)

    with pytest.raises(ValueError, match="layer 1"):
        side_by_side(work, [0, 1, 2, 3], GEOMETRY)
    assert sorted(begun) == [0, 1] and torch.get_num_threads() == 2


def test_an_interruption_ends_all() -> None:
    def interrupted(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    begun = []

    def work(layer: int) -> None:
        begun.append(layer)
        while layer:
            stop_point()
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, range(50), GEOMETRY, interrupted)
    assert len(begun) < 50


def test_outside_there_is_nothing_to_stop() -> None:
    stop_point()
