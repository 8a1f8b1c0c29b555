"""Does a text quantize as well as the calibration text did? Samples one page in sixteen and warns. Knows no models."""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch

from pqkv_cli.cache.async_scalar import AsyncScalar
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.dispatch import to_code_space
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import Angles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import decode_codes
from pqkv_kernels.reference.prediction import decode_values

RATIO = 2.0
_SAMPLED = 16  # pages between two samples

Errors = Sequence[Mapping[Side, float] | None]
"""Per layer, the relative squared error of keys and of values in code space at calibration; None for dense layers."""


class DriftWarning(UserWarning):
    """A text quantizes far worse than the calibration text did."""


class DriftAlarm:
    """Warns for all caches of a model: of the first text that quantizes badly, then only of one that does twice as badly."""

    def __init__(self) -> None:
        self._worst: dict[Side, float] = {}

    def compare(self, side: Side, live: float, calibrated: float) -> None:
        """Warn if `live`, a text's relative squared error, is beyond `RATIO` times what was `calibrated` or said before."""
        ratio = live / calibrated if calibrated else math.inf * live
        if not ratio > RATIO * self._worst.get(side, 1.0):
            return
        self._worst[side] = ratio
        fault = (
            f"the {side} of this text quantize {ratio:.1f} times as badly as those of the calibration text "
            f"(relative squared error {live:.3g}, then {calibrated:.3g})"
            if calibrated
            else f"the {side} of this text lose {live:.3g} of their squares, those of the calibration text were all zero"
        )
        warnings.warn(
            f"{fault}; answers may be worse than measured: calibrate on text like this one",
            DriftWarning,
            stacklevel=3,
        )


class DriftMeter:
    """Relative errors of one cache's sampled pages, beside those of calibration.

    Parameters
    ----------
    expected
        The errors of calibration.
    alarm
        Where warnings go.
    """

    def __init__(self, expected: Errors, alarm: DriftAlarm) -> None:
        self._expected, self._alarm = expected, alarm
        self._last = max((index for index, errors in enumerate(expected) if errors), default=-1)
        self._errors: dict[Side, list[AsyncScalar]] = {side: [] for side in SIDES}
        self._unread: dict[Side, list[AsyncScalar]] = {}

    def layer(self, index: int) -> "LayerDrift":
        """Return the part of the meter that layer `index` feeds."""
        return LayerDrift(self, index)

    def add(self, index: int, side: Side, error: torch.Tensor) -> None:
        """Take the error of one page, a scalar; with the last layer's values all layers are compared and forgotten."""
        self._judge()
        self._errors[side].append(AsyncScalar(error))  # layers may lie on several devices
        if (index, side) != (self._last, "values"):
            return
        self._unread, self._errors = self._errors, {kind: [] for kind in SIDES}
        if not error.is_cuda:  # a GPU's answer is read with the next sample: nothing waits for it
            self._judge()

    def _judge(self) -> None:
        for kind, copies in self._unread.items():
            errors = [value for value in (float(copy.read()) for copy in copies) if not math.isnan(value)]
            live = sum(errors) / len(errors) if errors else 0.0
            expected = [layer[kind] for layer in self._expected if layer]
            calibrated = sum(expected) / len(expected)
            self._alarm.compare(kind, live, calibrated)
        self._unread = {}


class LayerDrift:
    """One layer's view of a `DriftMeter`."""

    def __init__(self, meter: DriftMeter, index: int) -> None:
        self._meter, self._index = meter, index

    def observe(
        self,
        side: Side,
        states: torch.Tensor,
        pages: Mapping[Side, torch.Tensor],
        tables: Mapping[Side, CodecTables],
        angles: Angles | None,
        first_slot: int,
        text_start: torch.Tensor,
    ) -> None:
        """Measure the last of new pages if a sample is due.

        Parameters
        ----------
        states
            Keys or values that were encoded, [B, Hkv, 64 * P, D] in model space.
        pages, tables
            The codes of keys and values, [B, P, Hkv, page_bytes], and what they stand for.
        angles
            Of all of `states`, where the codec works before rotary embedding.
        first_slot
            Slot of the first of `states`.
        text_start
            First slot of each row that counts, [B]: padding and sinks are no text.
        """
        first_page = first_slot // PAGE_TOKENS
        last_page = first_page + pages[side].shape[1] - 1
        if last_page // _SAMPLED == (first_page - 1) // _SAMPLED:
            return
        angles = None if angles is None else (angles[0][:, -PAGE_TOKENS:], angles[1][:, -PAGE_TOKENS:])
        exact = to_code_space(states[:, :, -PAGE_TOKENS:], tables[side], angles)
        keys, values = (pages[each][:, -1:] for each in SIDES)
        if side == "keys":
            decoded = decode_codes(keys, tables["keys"])
        else:
            decoded = decode_values(keys, values, tables["keys"], tables["values"])
        slots = last_page * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=states.device)
        counted = (slots >= text_start[:, None])[:, None, :, None]
        lost = ((exact - decoded).square() * counted).sum((0, 2, 3))
        self._meter.add(self._index, side, (lost / (exact.square() * counted).sum((0, 2, 3))).mean())
