"""Prepares a model to run on quantized caches, and undoes it without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self
from weakref import WeakSet

import torch

from pqkv_cli.artifact.check import check_model
from pqkv_cli.artifact.store import Artifact
from pqkv_cli.artifact.summary import calibration_errors
from pqkv_cli.cache.cache import PositionedCache, QuantizedCache, quantized_cache
from pqkv_cli.cache.drift import DriftAlarm, Errors
from pqkv_cli.cache.simulated import simulated_cache
from pqkv_cli.errors import CacheError, UnsupportedModelError, UsageError
from pqkv_cli.hf.attention import attention_of
from pqkv_cli.hf.steps import install_step_hook
from pqkv_cli.hf.wrappers import inner_model
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.identity import model_identity
from pqkv_cli.models.rotary import AngleSource, rotary_angles, rotary_key
from pqkv_cli.quantizers.codec import ProductCodec, VectorCodec
from pqkv_cli.runtime.attention import ATTENTION_NAME, register_attention
from pqkv_cli.runtime.self_test import check_step, self_test
from pqkv_cli.runtime.tuned import use_tuned
from pqkv_cli.specs import SIDES, CacheSpec, ModelIdentity, Side
from pqkv_kernels.dispatch import BackendRequest, Choice, choose_backend
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.tables import CodecTables


def backend_for(requested: BackendRequest, device: torch.device, tables: Sequence[Mapping[Side, CodecTables] | None]) -> Choice:
    """Return what attends to the codes of the layers that have `tables`, on `device`.

    Raises
    ------
    CacheError
        If the backend is unknown, or was asked for by name and cannot run.
    """
    try:
        return choose_backend(requested, device, [(t[SIDES[0]], t[SIDES[1]]) for t in tables if t is not None])
    except KernelError as error:
        raise CacheError(str(error)) from error


_attached: WeakSet[torch.nn.Module] = WeakSet()


class Attached:
    """A model that can use quantized caches, until `detach`. Also a context manager. `attach` makes it.

    Attributes
    ----------
    model
        The transformers model: the one that was given to `attach`, or the one inside the wrapper that was given.
    spec
        How many first and recent tokens of each row its caches keep exact.
    backend
        What attends to codes on the model's device, and why.
    artifact, identity
        Where the codecs come from, and the hashes of the model when it was attached; None where `attach` did not make it.
    """

    artifact: Artifact | None = None
    identity: ModelIdentity | None = None

    def __init__(
        self,
        model: Any,
        tables: Sequence[Mapping[Side, CodecTables] | None],
        spec: CacheSpec,
        errors: Errors | None = None,
        backend: BackendRequest = "auto",
    ) -> None:
        self.model, self.spec = model, spec
        self.backend = backend_for(backend, torch.device(model.device), tables)
        self._tables, self._errors, self._alarm = tables, errors, DriftAlarm()
        self._angles = _angle_sources(model, [None if t is None else t["keys"].rotary is not None for t in tables])
        self._previous = attention_of(model)
        self._is_attached = True
        register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        if attention_of(model) != ATTENTION_NAME:
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps its own attention ({attention_of(model)}) and cannot attend over "
                "codes; expected a model that dispatches through transformers' attention interface"
            )
        self._hook = install_step_hook(model)
        _attached.add(model)

    def new_cache(self, *, offload: bool = False) -> QuantizedCache:
        """Return an empty quantized cache for ``model(...)`` or ``model.generate(..., cache=cache)``.

        The model takes it under the name ``past_key_values`` as well, whatever its version of transformers calls it.

        It holds one batch of texts: `QuantizedCache.reset` empties it for the next, another call of `generate` goes on with it.
        `QuantizedCache.num_bytes` says what it weighs.

        Parameters
        ----------
        offload
            Keep the codes in the memory of the CPU; they visit the device one layer at a time.
        """
        cache = quantized_cache(
            self.model.config,
            self._tables,
            self.spec,
            self._angles,
            self._errors,
            alarm=self._alarm,
            backend=self.backend.name,
        )
        cache.bind(self.model.base_model)
        if offload:
            for layer in cache.quantized_layers:
                layer.offload()
        return cache

    def self_test(self) -> None:
        """Send a probe through every code format on the model's device; `attach` does it once.

        Raises
        ------
        CacheError
            If the device or the backend gives wrong answers.
        """
        device = torch.device(self.model.device)
        tested = device if device.type != "meta" else torch.device("cpu")
        self_test(self._tables, self._angles, tested, self.backend.name)

    def detach(self) -> None:
        """Remove every hook and restore the attention implementation; harmless when repeated."""
        if self._is_attached:
            self._is_attached = False
            self._hook.remove()
            self.model.set_attn_implementation(self._previous)
            _attached.discard(self.model)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()


class Simulation:
    """A model that can use caches of mode `all`, until the context is left. Attention stays what it was."""

    def __init__(self, model: Any, codecs: Sequence[dict[Side, VectorCodec] | None]) -> None:
        self.model = model
        self._codecs = codecs
        self._angles = _angle_sources(model, [None if c is None else c["keys"].rotary is not None for c in codecs])
        self._hook = install_step_hook(model)

    def new_cache(self) -> PositionedCache:
        """Return an empty cache that quantizes every key and value before anyone attends to it."""
        cache = simulated_cache(self.model.config, self._codecs, self._angles)
        cache.bind(self.model.base_model)
        return cache

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hook."""
        self._hook.remove()


def attach(
    model: Any,
    artifact: Artifact,
    *,
    cache: CacheSpec | None = None,
    force: bool = False,
    backend: BackendRequest = "auto",
) -> Attached:
    """Prepare `model` to generate over the codes of `artifact`.

    Parameters
    ----------
    model
        A transformers causal language model, or what wraps one: an adapter of peft, torch.compile, DistributedDataParallel.
    artifact
        As `pqkv_cli.runtime.load` returns it.
    cache
        What stays exact; by default what the artifact says.
    force
        Attach although the artifact was made for another model.
    backend
        What attends to codes: ``torch``, ``native``, ``triton``, or ``auto`` for the best that can run; see
        `Attached.backend`.

    Raises
    ------
    UsageError
        If `model` or `artifact` is something else.
    ArtifactError
        If the artifact is of another model, or kernel configurations beside it are unreadable.
    CacheError
        If the model is attached already, the backend cannot run here, or this machine computes wrong answers (see
        `Attached.self_test`).
    UnsupportedModelError
        If the model cannot use the attention function, or a step of one token over an empty cache does not work.
    """
    _require_artifact(artifact)
    model = inner_model(model)
    if model in _attached:
        raise CacheError("the model is attached already; call detach() on what the first attach returned")
    identity = _require_match(model, artifact, force)
    spec = artifact.header.plan.cache if cache is None else cache
    use_tuned(artifact.tables, artifact.path.parent, torch.device(model.device))
    attached = Attached(model, artifact.tables, spec, calibration_errors(artifact.header), backend)
    attached.artifact, attached.identity = artifact, identity
    try:
        attached.self_test()
        check_step(model, attached.new_cache())
    except BaseException:
        attached.detach()
        raise
    return attached


def simulate(model: Any, codecs: Sequence[dict[Side, VectorCodec] | None]) -> Simulation:
    """Prepare `model` for caches of mode `all` with one pair of codecs per layer (None: the layer stays dense)."""
    return Simulation(inner_model(model), codecs)


def simulate_artifact(model: Any, artifact: Artifact, *, force: bool = False) -> Simulation:
    """Prepare `model` for caches of mode `all` with the codecs of `artifact`.

    Raises
    ------
    ArtifactError
        If the artifact is of another model.
    """
    _require_match(inner_model(model), artifact, force)
    return simulate(model, artifact_codecs(artifact))


def artifact_codecs(artifact: Artifact) -> list[dict[Side, VectorCodec] | None]:
    """Return the codecs of `artifact` as `simulate` takes them."""
    return [None if t is None else {side: ProductCodec(t[side]) for side in SIDES} for t in artifact.tables]


def _require_artifact(artifact: Any) -> None:
    if not isinstance(artifact, Artifact):
        raise UsageError(f"the artifact is a {type(artifact).__name__}; expected what pqkv_cli.runtime.load(path) returns")


def _require_match(model: Any, artifact: Artifact, force: bool) -> ModelIdentity:
    identity = model_identity(model)
    for difference in check_model(artifact, identity, geometry(model.config), force=force):
        warnings.warn(difference, stacklevel=3)
    return identity


def _angle_sources(model: Any, rotary: Sequence[bool | None]) -> list[AngleSource | None]:
    # Layers that share a rotary module share one source, so that a step computes their angles once.
    shared: dict[object, AngleSource] = {}
    sources: list[AngleSource | None] = []
    for index, needed in enumerate(rotary):
        key = rotary_key(model, index) if needed else None
        sources.append(shared.setdefault(key, rotary_angles(model, index)) if key is not None else None)
    return sources
