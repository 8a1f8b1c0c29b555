"""What a cache refuses, and what it warns of once. Knows shapes; reads no values."""

import warnings
from collections.abc import Mapping

import torch

from pqkv_cli.errors import CacheError
from pqkv_cli.specs import Side


def check_states(states: Mapping[Side, torch.Tensor], held: Mapping[Side, torch.Tensor], num_held: int, num_known: int) -> None:
    """Refuse new `states` [B, Hkv, T, D] beside `held` ones of another kind, or at unknown positions.

    Parameters
    ----------
    num_held
        Tokens that the layer holds.
    num_known
        Tokens whose positions are known, those of the states included.

    Raises
    ------
    CacheError
        If shape, dtype or device differ, or positions are missing.
    """
    for side, tensor in states.items():
        other = held[side]
        given = (*tensor.shape[:2], tensor.shape[3], tensor.dtype, tensor.device)
        expected = (*other.shape[:2], other.shape[3], other.dtype, other.device)
        if given != expected:
            raise CacheError(
                f"{side} of shape, dtype and device {given} on a cache of {expected}; "
                "a cache serves one model, dtype, device and batch: make a new one with Attached.new_cache()"
            )
    needed = num_held + states["keys"].shape[2]
    if num_known != needed:
        raise CacheError(
            f"positions of {num_known} tokens are known and {needed} are needed; "
            "the model must be prepared with `pqkv_cli.runtime.attach` before this cache is used"
        )


def check_crop(tokens_to_remove: int, num_held: int) -> int:
    """Return how many of `num_held` tokens stay where the last ``-tokens_to_remove`` go.

    Raises
    ------
    CacheError
        If the number is positive or larger than what is held.
    """
    if tokens_to_remove > 0 or num_held + tokens_to_remove < 0:
        raise CacheError(f"crop({tokens_to_remove}) on {num_held} tokens; expected minus the number of tokens to remove")
    return int(num_held + tokens_to_remove)  # older versions of transformers count in tensors


def check_gradients(*lost: torch.Tensor) -> None:
    """Refuse states that autograd follows, where it will lose them: gradients would be zero without a word.

    Raises
    ------
    CacheError
        If it does.
    """
    if torch.is_grad_enabled() and any(states.requires_grad for states in lost):
        raise CacheError(
            "gradients are asked for through quantized keys and values, and none pass through codes; expected a call under "
            "torch.no_grad(), or a model none of whose parameters asks for gradients: model.requires_grad_(False)"
        )


DECODED = (
    "keys and values are decoded as a whole at every step, because another attention function than 'pqkv' reads them: right, "
    "but slow; use the model as attach() prepared it, or expect this where `pqkv inspect` says so"
)


class WarnOnce:
    """Warnings that a cache gives once in its life, however many layers and steps would repeat them."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, key: str, text: str) -> None:
        """Warn with `text` unless a warning was given under `key` before."""
        if key not in self._given:
            self._given.add(key)
            warnings.warn(text, stacklevel=3)
