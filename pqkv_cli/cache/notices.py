"""Warnings that a cache gives once in its life, however many layers and steps would repeat them."""

import warnings

DECODED = (
    "keys and values are decoded as a whole at every step, because another attention function than 'pqkv' reads them: right, "
    "but slow; use the model as attach() prepared it, or expect this where `pqkv inspect` says so"
)


class Notices:
    """What has been said already."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, key: str, text: str) -> None:
        """Warn with `text` unless something was said under `key` before."""
        if key not in self._said:
            self._said.add(key)
            warnings.warn(text, stacklevel=3)
