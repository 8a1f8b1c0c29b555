"""Captured steps on a CPU, by a tape that does operations again as a CUDA graph does."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tape import Capturer
from tiny_chain import byte_tokenizer, tokens
from transformers.cache_utils import DynamicLayer

from pqkv_cli.errors import CacheError, UsageError
from pqkv_cli.runtime import Artifact, attach
from pqkv_cli.runtime.cuda_graph import capture_cuda, choose_graph, step_graph
from pqkv_cli.runtime.generate import GenerateSettings, generate
from pqkv_cli.specs import SIDES
from pqkv_kernels.format.layout import PAGE_TOKENS

OPTIONS = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def plain_and_captured(model: Any, artifact: Artifact, ids: torch.Tensor, **options: Any) -> tuple[Any, Any, Any, Any]:
    with attach(model, artifact, backend="torch") as attached, torch.no_grad():
        caches = [attached.new_cache() for _ in range(2)]
        plain = model.generate(ids, past_key_values=caches[0], **OPTIONS, **options)
        with step_graph(attached, caches[1], Capturer()) as graph:
            found = model.generate(ids, past_key_values=caches[1], **OPTIONS, **options)
    return plain, found, graph, caches


def pages(cache: Any) -> list[torch.Tensor]:
    return [torch.cat(store.views(), dim=1) for layer in cache.quantized_layers for store in layer.pages.values()]


def test_tokens_are_those_of_plain_steps_and_each_flush_is_captured_anew(model: Any, artifact: Artifact) -> None:
    ids = tokens(2, 150)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    plain, found, graph, caches = plain_and_captured(model, artifact, ids, attention_mask=mask, max_new_tokens=112)
    assert torch.equal(plain, found)
    # A captured step adds up its whole window, so what comes after attention rounds otherwise and may tip a code between two
    # centroids as near as each other: in the first layer none, in others less than the codes of one token.
    for place, (a, b) in enumerate(zip(*map(pages, caches), strict=True)):
        assert a.shape == b.shape and (a != b).sum() * PAGE_TOKENS < (a[0, 0].numel() if place >= len(SIDES) else 1)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 261
    # 86 tokens are exact after the prompt, 128 are flushed: with the 42nd token after it and with every 64th from there on.
    assert (graph.num_captured, graph.num_plain, graph.num_replayed) == (3, 1 + 2, 111 - 2)
    assert "forward" not in vars(model)


def test_a_capture_is_only_used_while_the_cache_holds_the_same_tensors(model: Any, artifact: Artifact) -> None:
    ids, one = tokens(2, 201), dict(use_cache=True)
    with attach(model, artifact, backend="torch") as attached, torch.no_grad():
        caches = [attached.new_cache() for _ in range(2)]
        changes = [
            (lambda c: None, 1),
            (lambda c: None, 1),
            (lambda c: c.crop(-3), 1),
            (lambda c: c.crop(-90), 2),
            (lambda c: c.reorder_cache(torch.tensor([1, 0])), 3),
            (lambda c: [layer.offload() for layer in c.quantized_layers], 3),
        ]
        for cache in caches:
            model(ids[:, :200], past_key_values=cache)
        with step_graph(attached, caches[1], Capturer()) as graph:
            for change, captured in changes:
                for cache in caches:
                    change(cache)
                expected = attached.model.__class__.forward(model, input_ids=ids[:, 200:], past_key_values=caches[0], **one)
                found = model(input_ids=ids[:, 200:], past_key_values=caches[1], **one)
                torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-4)
                assert graph.num_captured == captured and graph.num_plain == 0


def test_other_steps_run_as_ever(model: Any, artifact: Artifact) -> None:
    ids = tokens(1, 210)
    with attach(model, artifact, backend="torch") as attached, torch.no_grad():
        cache, other = attached.new_cache(), attached.new_cache()
        with step_graph(attached, cache, Capturer()) as graph:
            model(input_ids=ids[:, :100], past_key_values=cache)  # nothing is coded yet
            model(input_ids=ids[:, 100:101], past_key_values=cache)
            model(input_ids=ids[:, 101:200], past_key_values=cache)
            model(input_ids=ids[:, 200:203], past_key_values=cache)
            model(input_ids=ids[:, :1], past_key_values=other)
            model(ids[:, 203:204], past_key_values=cache)
            assert (graph.num_plain, graph.num_replayed) == (6, 0)
            model(input_ids=ids[:, 204:205], past_key_values=cache)
            assert (graph.num_plain, graph.num_replayed) == (6, 1)
        model(input_ids=ids[:, 205:206], past_key_values=cache)
        assert graph.num_replayed == 1 and cache.get_seq_length() == 206


def test_the_comparison_sees_a_capture_that_is_not_replayed(model: Any, artifact: Artifact) -> None:
    ids = tokens(1, 150)
    with attach(model, artifact, backend="torch") as attached, torch.no_grad():
        cache, capturer = attached.new_cache(), Capturer(spoil=True)
        with step_graph(attached, cache, capturer):
            model.generate(ids, past_key_values=cache, max_new_tokens=4, **OPTIONS)
        assert capturer.output.logits.isnan().all()


def test_where_steps_are_not_captured_the_reason_is_told(model: Any, artifact: Artifact) -> None:
    with attach(model, artifact, backend="torch") as attached:
        cache = attached.new_cache()
        choice = choose_graph("auto", attached, cache)
        assert not choice.used and choice.reason == "the device is cpu and graphs are CUDA's"
        assert choose_graph("off", attached, cache).reason == "switched off"
        with pytest.raises(CacheError, match="asked for, but the device is cpu and graphs are CUDA's; choose auto or off"):
            choose_graph("on", attached, cache)

        class Gpu:
            backend = attached.backend
            model = type("Model", (), {"device": "cuda", "hf_device_map": {"a": 0, "b": 1}})

        assert "the backend is torch" in choose_graph("auto", Gpu, cache).reason
        Gpu.backend = type("Choice", (), {"name": "triton"})
        assert "several devices" in choose_graph("auto", Gpu, cache).reason
        Gpu.model.hf_device_map = {"": 0}
        assert choose_graph("on", Gpu, cache).used
        assert "memory of the CPU" in choose_graph("auto", Gpu, attached.new_cache(offload=True)).reason
        dense = attached.new_cache()
        dense.layers.append(DynamicLayer())
        assert "not every layer is quantized" in choose_graph("auto", Gpu, dense).reason


def test_generate_says_whether_it_captured(model: Any, artifact: Artifact) -> None:
    with attach(model, artifact) as attached:
        made = generate(attached, byte_tokenizer(), "once upon a time", GenerateSettings(2))
        assert not made.graph.used and "the device is cpu" in made.graph.reason
        with pytest.raises(CacheError, match="choose auto or off"):
            generate(attached, byte_tokenizer(), "once", GenerateSettings(2, graph="on"))
    with pytest.raises(UsageError, match="expected one of auto, on, off"):
        GenerateSettings(graph="maybe")  # type: ignore[arg-type]


def test_what_no_graph_holds_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            log.append("wait")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def entered(thing: Any) -> Any:
        log.append(f"enter {type(thing).__name__}")
        yield
        log.append("leave")

    fakes = {"Stream": Stream, "current_stream": Stream, "stream": entered, "CUDAGraph": Graph, "graph": entered}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    captured = capture_cuda(lambda: log.append("run") or len(log))
    captured.replay()
    assert log == ["wait", "enter Stream", "run", "leave", "wait", "enter Graph", "run", "leave", "replay"]
    assert captured.output == 7, "what the capture gave, not the run before it"

    def asks() -> None:
        if "enter Graph" in log[9:]:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(CacheError, match="cannot be captured in a CUDA graph: operation not permitted.*graph='off'"):
        capture_cuda(asks)
