"""Encoding runs beside the model: nothing may depend on when a job is done."""

import copy
import gc
import random
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch

from pqkv_cli.cache import encoder
from pqkv_cli.cache.cache import quantized_cache
from pqkv_cli.cache.encoder import EncoderQueue


class Held:
    """A job that runs when it is waited for, or earlier."""

    def __init__(self, job):
        self.job, self.done = job, False

    def wait(self):
        if not self.done:
            self.done = True
            self.job()

    finish = wait


class Latest(EncoderQueue):
    """Does every job at the last permitted moment; until then its pages hold rubbish."""

    max_pending = 1 << 30

    def start(self, job, device):
        for parts in job.room.values():
            for part in parts:
                part.fill_(0xA5)
        return Held(job)


class Whenever(Latest):
    """Does some jobs early, in order, whenever anything happens."""

    def __init__(self):
        super().__init__()
        self.random = random.Random(7)

    def submit(self, job, device):
        number = super().submit(job, device)
        for _, running in list(self._pending)[: self.random.randint(0, 3)]:
            running.wait()
        return number


class Forgetful(Latest):
    """Lets readers pass although their pages are not written."""

    def wait(self, number):
        pass


CHANGES = {
    "nothing": lambda cache: cache,
    "crop in the window": lambda cache: cache.crop(-1),
    "crop into pages": lambda cache: cache.crop(-170),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    "copy": copy.deepcopy,
    "offload": lambda cache: [layer.offload() for layer in cache.quantized_layers],
    "prefetch": lambda cache: [layer.prefetch() for layer in cache.quantized_layers],
    "reset": lambda cache: cache.reset(),
}


@torch.no_grad()
def story(bench, queue):
    """Flush pages, change the cache at once, go on; return all logits, pages and warnings, and which changes met a job."""
    bench.use("pqkv")
    errors = [{"keys": 1e-6, "values": 1e-6}, None, {"keys": 1e-6, "values": 1e-6}]
    cache = quantized_cache(bench.model.config, bench.tables, bench.spec, [bench.source] * 3, errors, queue)
    rows, seen, met = 2, [], set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, (name, change) in enumerate(CHANGES.items()):
            fed = bench.tokens(rows, 209, seed=number).split([137, 70, 2], dim=1)
            seen += [bench.model(piece, past_key_values=cache).logits for piece in fed[:2]]
            if queue._pending:
                met.add(name)
            changed = change(cache)
            cache = changed if name == "copy" else cache
            queue = cache.quantized_layers[0].encoder
            rows = {"repeat": 4, "select": 2}.get(name, rows)
            seen.append(bench.model(fed[2][:rows].repeat(rows // len(fed[2]) or 1, 1), past_key_values=cache).logits)
            queue.finish()
            stores = [store for layer in cache.quantized_layers for store in layer.pages.values()]
            seen += [torch.cat(store.views(), dim=1) for store in stores if store.num_pages]
    return [tensor.clone() for tensor in seen], [str(w.message) for w in caught], met


def same(a, b):
    return a[1] == b[1] and len(a[0]) == len(b[0]) and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


@pytest.mark.parametrize("bench", [(3, 100)], indirect=True)
def test_results_do_not_depend_on_when_encoding_is_done(bench) -> None:
    at_once = story(bench, EncoderQueue())
    assert any("quantize" in text for text in at_once[1]) and at_once[2] == set()
    latest = story(bench, Latest())
    assert latest[2] == set(CHANGES), "every change found jobs that were not done"
    assert same(at_once, latest)
    assert same(at_once, story(bench, Whenever()))
    assert not same(at_once, story(bench, Forgetful())), "the comparison sees pages that were read too early"


class Fault(EncoderQueue):
    def start(self, job, device):
        raise torch.OutOfMemoryError("no memory left")


@pytest.mark.parametrize("bench", [(4, 64)], indirect=True)
@torch.no_grad()
def test_a_job_that_cannot_begin_leaves_keys_and_values_as_they_were(bench) -> None:
    bench.use("pqkv")
    cache, twin = (bench.quantized() for _ in range(2))
    ids, more = bench.tokens(1, 150), bench.tokens(1, 200, seed=1)
    for each in (cache, twin):
        bench.model(ids, past_key_values=each)
    right = cache.quantized_layers[0].encoder
    for layer in cache.quantized_layers:
        layer.encoder = Fault()
    with pytest.raises(torch.OutOfMemoryError):
        bench.model(more, past_key_values=cache)
    for layer in cache.quantized_layers:
        layer.encoder = right
    assert cache.get_seq_length() == 150
    assert torch.equal(*(bench.model(more, past_key_values=each).logits for each in (cache, twin)))


class Cuda:
    """Notes in which order streams were given what."""

    def __init__(self, monkeypatch):
        self.log, self.model = [], Stream(self, "model")
        self.current = self.model
        side = Stream(self, "side")
        for name, made in {
            "Stream": lambda device: side,
            "current_stream": lambda device: self.current,
            "stream": self.on,
            "Event": lambda: Event(self),
        }.items():
            monkeypatch.setattr(torch.cuda, name, made)
        monkeypatch.setattr(encoder, "_side_stream", lambda device: torch.cuda.Stream(device))

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    device = torch.device("cuda", 0)

    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.cuda.log.append(f"{self.name} waits for event {event.number}")


class Event:
    def __init__(self, cuda):
        self.cuda, self.number = cuda, None

    def record(self, stream):
        self.number = sum("records" in line for line in self.cuda.log)
        self.cuda.log.append(f"{stream.name} records event {self.number}")

    def synchronize(self):
        self.cuda.log.append(f"host waits for event {self.number}")


class Job:
    def __init__(self, cuda):
        self.cuda = cuda

    def __call__(self):
        self.cuda.log.append(f"job on {self.cuda.current.name}")


BEGUN = ["side waits for model", "job on side"]


def test_on_a_gpu_readers_wait_for_the_side_stream_and_memory_lives_until_then(monkeypatch) -> None:
    cuda, queue = Cuda(monkeypatch), EncoderQueue()
    job = Job(cuda)
    alive = weakref.ref(job)
    number = queue.submit(job, Stream.device)
    del job
    gc.collect()
    assert cuda.log == [*BEGUN, "side records event 0"] and cuda.current is cuda.model
    assert alive() is not None, "what the side stream reads belongs to nobody else"
    queue.wait(number - 1)
    assert alive() is not None
    queue.wait(number)
    gc.collect()
    assert cuda.log[3:] == ["model waits for event 0"] and alive() is None
    queue.wait(number)
    assert len(cuda.log) == 4


def test_on_a_gpu_at_most_one_layer_is_held_and_changes_stop_the_host(monkeypatch) -> None:
    cuda, queue = Cuda(monkeypatch), EncoderQueue()
    first = queue.submit(Job(cuda), Stream.device)
    queue.submit(Job(cuda), Stream.device)
    assert cuda.log[3:] == ["model waits for event 0", *BEGUN, "side records event 1"]
    queue.wait(first)
    cuda.current = Stream(cuda, "another")
    queue.finish()
    assert cuda.log[7:] == ["model waits for event 1", "another waits for event 1", "host waits for event 1"]
    queue.finish()
    assert len(cuda.log) == 10
