"""The calibration run: settings and forward passes in, a store out. Knows models and files; no k-means."""

import hashlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.calibration.fisher import GradientObserver, LayerGradients, fisher_directions, fisher_weight, frozen, pairs_only
from pqkv_cli.calibration.observer import BatchObserver, LayerBatch, draw_queries, draw_sample
from pqkv_cli.calibration.parts import MOMENT_FIELDS, Moments, Parts, check_same, present
from pqkv_cli.calibration.ranks import Ranks, current_ranks
from pqkv_cli.calibration.rotation_check import check_rotation
from pqkv_cli.calibration.store import SCHEMA, WINDOWS_FILE, layer_file, read_json, write_json, write_tensors
from pqkv_cli.errors import DataError, RunError, UsageError
from pqkv_cli.hf.modules import attention_modules, output_weight
from pqkv_cli.hf.taps import tap
from pqkv_cli.models.geometry import check_quantizable, geometry
from pqkv_cli.models.identity import model_identity
from pqkv_cli.reporter import Advance
from pqkv_cli.specs import LayerGeometry, ModelGeometry
from pqkv_kernels.format.layout import RotaryLayout

# A commit waits for the disk: small models would spend more time there than in their forward passes.
PART_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class CollectSettings:
    """All that decides the result of `collect`, beside the model and the windows.

    Attributes
    ----------
    data_sha256
        Hash of the text the windows were cut from.
    num_samples, seq_len
        Number and length of the windows, held-out ones included.
    batch_size
        Windows per forward pass (the order of sums depends on it).
    reservoir_size
        Most tokens kept as samples.
    seed
        Of the sample and of the query positions that measure attention.
    held_out_share
        Share of the windows that no statistics come from; at least one window.
    queries_per_window
        Query positions per window that measure attention mass.
    fisher_draws
        Backward passes per batch that measure what errors of keys and values cost; 0 leaves them out.

    Raises
    ------
    UsageError
        If a number is out of range.
    """

    data_sha256: str
    num_samples: int
    seq_len: int
    batch_size: int = 1
    reservoir_size: int = 24576
    seed: int = 0
    held_out_share: float = 1 / 8
    queries_per_window: int = 32
    fisher_draws: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len", "batch_size", "reservoir_size", "queries_per_window"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.fisher_draws < 0:
            raise UsageError(f"fisher_draws is {self.fisher_draws}; expected at least 0")
        if not 0 <= self.held_out_share < 1:
            raise UsageError(f"held_out_share is {self.held_out_share}; expected at least 0 and below 1")
        if self.num_samples < 2:
            raise DataError(
                f"calibration has {self.num_samples} window; expected at least 2, since one is held out. Ask for more samples."
            )

    @property
    def num_held_out(self) -> int:
        """Windows at the end that are kept for choosing between candidates."""
        return max(1, int(self.num_samples * self.held_out_share))

    @property
    def num_windows(self) -> int:
        """Windows that statistics come from."""
        return self.num_samples - self.num_held_out

    @property
    def windows_per_part(self) -> int:
        """Windows between two commits to disk: whole batches, at least `PART_TOKENS` tokens."""
        return self.batch_size * max(1, PART_TOKENS // (self.batch_size * self.seq_len))


def kept_bytes(geometry: ModelGeometry, settings: CollectSettings) -> int:
    """Return what the samples of a calibration take on disk, moments and windows left out.

    Of every kept token keys and values in fp16 and the mass of attention in fp32; with Fisher draws their gradients in bf16,
    which become one weight each.
    """
    tokens = min(settings.reservoir_size, settings.num_windows * settings.seq_len)
    weights = 12 if settings.fisher_draws else 4
    return sum(
        tokens * layer.num_kv_heads * (4 * layer.head_dim + weights) for layer in geometry.layers if not layer.dense_reason
    )


def collect(model: Any, windows: torch.Tensor, directory: Path, settings: CollectSettings, on_progress: Advance) -> None:
    """Run `windows` [num_samples, seq_len] int64 through `model` and write the calibration to `directory`.

    May be killed at any moment and called again: it goes on behind the last finished part and ends with the same bytes.
    A finished calibration with the same settings is left alone. ``on_progress(done, total)`` counts windows. Called by all
    processes of a process group, each runs its share and the first one writes: the same samples as one process gives, and the
    same moments but for the order of additions.

    Raises
    ------
    RunError
        If the directory holds a calibration with other settings, or cannot be written.
    DataError
        If activations are not finite or do not fit fp16, or the windows do not fit the settings or the model.
    UnsupportedModelError
        If the model's cache cannot be quantized or observed, or its keys do not end with their rotation.
    """
    shape = geometry(model.config)
    check_quantizable(shape)
    _check_windows(windows, settings, shape)
    identity = _identity(model, windows, settings)
    ranks = current_ranks()
    parts = Parts(directory, ranks)
    share = ranks.share(settings.num_windows, settings.batch_size)
    if ranks.broadcast(ranks.is_first and _is_finished(directory, identity)):
        parts.remove()  # A kill may have come between the manifest and the clean-up.
        on_progress(len(share), len(share))
        return
    check_rotation(model, shape, windows[0])
    _prepare(directory)
    sample = draw_sample(settings.num_windows, settings.seq_len, settings.reservoir_size, settings.seed)
    run = _Run(model, windows, directory, settings, shape, sample, parts, ranks, share)
    moments = run.pass_windows(parts.open(identity), on_progress)
    run.merge(moments)
    if not ranks.is_first:
        parts.remove()
        return
    dense = [layer.dense_reason for layer in shape.layers]
    counts = {"num_windows": settings.num_windows, "num_held_out": settings.num_held_out, "num_sampled": len(sample)}
    write_json(directory / "manifest.json", {"schema": SCHEMA, **identity, "layers": dense, **counts})
    parts.remove()


def _is_finished(directory: Path, identity: dict[str, Any]) -> bool:
    if not (directory / "manifest.json").is_file():
        return False
    manifest = read_json(directory / "manifest.json")
    check_same({key: manifest.get(key) for key in identity}, identity, directory)
    return True


@dataclass(frozen=True, slots=True)
class _Run:
    """What all steps of one calibration share."""

    model: Any
    windows: torch.Tensor
    directory: Path
    settings: CollectSettings
    shape: ModelGeometry
    sample: torch.Tensor
    parts: Parts
    ranks: Ranks
    share: range

    def pass_windows(self, num_done: int, on_progress: Advance) -> Moments:
        """Run the parts of this process's share that are not on disk yet; return the sums over all."""
        settings, share = self.settings, self.share
        moments = self.parts.moments(num_done)
        starts = share[:: settings.windows_per_part]
        on_progress(min(num_done * settings.windows_per_part, len(share)), len(share))
        for part, start in list(enumerate(starts))[num_done:]:
            batches: list[dict[int, LayerBatch]] = []
            end = min(start + settings.windows_per_part, share.stop)
            for first in range(start, end, settings.batch_size):
                last = min(first + settings.batch_size, end)
                batches.append(self._observe(first, last))
                # In window order, whatever the parts: resuming must not change a bit.
                new = {
                    f"{i}.{field}": getattr(batch, field)
                    for i, batch in batches[-1].items()
                    for field in present(batch, MOMENT_FIELDS)
                }
                moments = {name: moments[name] + moment for name, moment in new.items()} if moments else new
                if last < end:
                    on_progress(last - share.start, len(share))
            self.parts.add(part, batches, moments)
            on_progress(end - share.start, len(share))
        return moments

    def _observe(self, first: int, last: int) -> dict[int, LayerBatch]:
        """Run windows ``first..last - 1`` in one pass."""
        settings, length = self.settings, self.settings.seq_len
        low, high = torch.searchsorted(self.sample, torch.tensor([first, last]) * length).tolist()
        local = self.sample[low:high] - first * length
        queries = [draw_queries(w, length, settings.queries_per_window, settings.seed) for w in range(first, last)]
        observer = BatchObserver(self.shape, local // length, local % length, torch.stack(queries))
        ids = self.windows[first:last].to(self.model.device)
        was_training = self.model.training
        self.model.eval()
        try:
            if settings.fisher_draws:
                return self._with_gradients(observer, ids, range(first, last), local)
            # The decoder without its head: no statistics come from logits, and they are the largest tensor of a pass.
            decoder = getattr(self.model, "base_model", self.model)
            with torch.no_grad(), tap(self.model, observer):
                decoder(input_ids=ids, use_cache=False)
        finally:
            self.model.train(was_training)
        return observer.finish()

    def _with_gradients(
        self, observer: BatchObserver, ids: torch.Tensor, numbers: range, local: torch.Tensor
    ) -> dict[int, LayerBatch]:
        """Run the windows called `numbers` in one pass and `fisher_draws` passes back."""
        settings = self.settings
        gradients = GradientObserver(self.shape, local // settings.seq_len, local % settings.seq_len)
        with (
            frozen(self.model),
            torch.enable_grad(),
            tap(self.model, observer),
            tap(self.model, gradients, differentiable=True),
        ):
            logits = self.model(input_ids=ids, use_cache=False).logits
            batches = observer.finish()
            found = gradients.finish(logits, fisher_directions(logits, numbers, settings.fisher_draws, settings.seed))
        return {
            i: replace(batch, **{field.name: getattr(found[i], field.name) for field in fields(LayerGradients)})
            for i, batch in batches.items()
        }

    def merge(self, moments: Moments) -> None:
        """Bring the shares together; the first process writes the store's tensors from them."""
        settings, moments = self.settings, self.ranks.reduce_sum(moments)
        attention = attention_modules(self.model)
        num_tokens = settings.num_windows * settings.seq_len
        for i in (index for index, layer in enumerate(self.shape.layers) if not layer.dense_reason):
            tensors = self.ranks.gather(self.parts.samples(i), self._sample_counts())
            if not self.ranks.is_first:
                continue
            for field in (field for field in MOMENT_FIELDS if f"{i}.{field}" in moments):
                count = settings.num_windows * settings.queries_per_window if field == "pair_moment" else num_tokens
                tensors[field] = moments[f"{i}.{field}"] / count
            if settings.fisher_draws:
                _weigh(tensors, self.shape.layers[i].rotary)
            readers = [j for j in attention if self.shape.kv_source(j) == i]
            tensors["output_gram"] = torch.stack([output_gram(attention[j], self.shape.layers[i]) for j in readers]).sum(0)
            write_tensors(self.directory / layer_file(i), tensors)
        if not self.ranks.is_first:
            return
        held_out = self.windows[settings.num_windows :].to("cpu", torch.int64)
        positions = (self.sample % settings.seq_len).int()
        write_tensors(self.directory / WINDOWS_FILE, {"positions": positions, "held_out": held_out})

    def _sample_counts(self) -> dict[int, int]:
        """Return how many sampled tokens lie in the share of each process."""
        counts = {}
        for rank in range(self.ranks.size):
            share = Ranks(rank, self.ranks.size).share(self.settings.num_windows, self.settings.batch_size)
            ends = torch.tensor([share.start, share.stop]) * self.settings.seq_len
            low, high = torch.searchsorted(self.sample, ends).tolist()
            counts[rank] = high - low
        return counts


def _weigh(tensors: dict[str, torch.Tensor], rotary: RotaryLayout | None) -> None:
    """Put the weights of samples in the place of their gradients, in the metrics that codecs can have."""
    moment = tensors["key_fisher"] if rotary is None else pairs_only(tensors["key_fisher"], rotary)
    tensors["key_weight"] = fisher_weight(tensors.pop("key_gradients"), moment)
    tensors["value_weight"] = fisher_weight(tensors.pop("value_gradients"), tensors["value_fisher"])


def output_gram(attention: torch.nn.Module, layer: LayerGeometry) -> torch.Tensor:
    """Return [Hkv, D, D] fp64: the sum over each group's heads of ``W^T W`` with `W` [hidden, D] the head's output weight."""
    weight = output_weight(attention, layer.num_heads, layer.head_dim).cpu().double()
    heads = weight.T.reshape(layer.num_kv_heads, layer.group_size, layer.head_dim, -1)
    # One head of each group at a time: the intermediate stays as small as the result.
    gram = torch.zeros(layer.num_kv_heads, layer.head_dim, layer.head_dim, dtype=torch.float64)
    for of_head in heads.unbind(1):
        gram += of_head @ of_head.transpose(-1, -2)
    return gram


def _identity(model: Any, windows: torch.Tensor, settings: CollectSettings) -> dict[str, Any]:
    raw = windows.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False)
    return {
        "model": {**asdict(model_identity(model)), "dtype": str(model.dtype).removeprefix("torch.")},
        "settings": asdict(settings),
        "windows_sha256": hashlib.sha256(raw.tobytes()).hexdigest(),
    }


def _check_windows(windows: torch.Tensor, settings: CollectSettings, shape: ModelGeometry) -> None:
    if tuple(windows.shape) != (settings.num_samples, settings.seq_len):
        raise DataError(f"the windows are {list(windows.shape)}; expected [{settings.num_samples}, {settings.seq_len}].")
    if shape.max_positions and settings.seq_len > shape.max_positions:
        raise DataError(
            f"the windows have {settings.seq_len} tokens; the model reads at most {shape.max_positions}. "
            "Ask for shorter windows."
        )


def _prepare(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{directory} cannot be made ({error.strerror}); expected a directory to write to.") from error
