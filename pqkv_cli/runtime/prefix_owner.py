"""Whose cache a stored prefix is: the model, the codes and the settings that must all be the same to go on with it."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from pqkv_cli.errors import CacheError
from pqkv_cli.models.identity import rotary_sha256, tokenizer_sha256
from pqkv_cli.runtime.attach import Attached

# Field: what messages call it, and what to do where it differs.
_WORDS = {
    "artifact_sha256": ("artifact", "attach the artifact that it was stored with"),
    "config_sha256": ("configuration of the model", "load the model that it was stored with"),
    "weights_sha256": ("weights of the model", "load the model that it was stored with"),
    "rotary_sha256": ("rotary settings", "load the model with the settings it was stored with"),
    "tokenizer_sha256": ("tokenizer", "use the tokenizer that it was stored with"),
    "num_sinks": ("number of sinks", "attach with the same CacheSpec"),
    "window_tokens": ("window", "attach with the same CacheSpec"),
    "dtype": ("number format", "load the model in that format"),
}
_SHOWN = 12  # digits of a hash


@dataclass(frozen=True, slots=True)
class PrefixOwner:
    """What a stored prefix belongs to: hashes, and the settings of its cache.

    `tokenizer_sha256` is empty where no tokenizer was named; then it is not compared, because token ids are.
    """

    artifact_sha256: str
    config_sha256: str
    weights_sha256: str
    rotary_sha256: str
    tokenizer_sha256: str
    num_sinks: int
    window_tokens: int
    dtype: str

    def differences(self, own: "PrefixOwner") -> tuple[str, ...]:
        """Return one sentence for everything in which `own`, of the model at hand, is another than this one."""
        found = []
        for field in fields(self):
            stored, here = getattr(self, field.name), getattr(own, field.name)
            if stored == here or (field.name == "tokenizer_sha256" and not (stored and here)):
                continue
            what, hint = _WORDS[field.name]
            found.append(f"{what}: stored with {_short(stored)}, here {_short(here)}; expected the same: {hint}")
        return tuple(found)

    def without_tokenizer(self) -> dict[str, Any]:
        """Return what distinguishes two prefixes of the same tokens."""
        return asdict(self) | {"tokenizer_sha256": ""}


def owner_of(attached: Attached, tokenizer: Any = None) -> PrefixOwner:
    """Return what caches of `attached` belong to; `tokenizer` may be left out.

    Raises
    ------
    CacheError
        If the model was prepared without an artifact.
    """
    if attached.artifact is None or attached.identity is None:
        raise CacheError(
            "the model was attached without an artifact; expected one, to know whose codes these are: use attach()"
        )
    return PrefixOwner(
        artifact_sha256=attached.artifact.header.sha256,
        config_sha256=attached.identity.config_sha256,
        weights_sha256=attached.identity.weights_sha256,
        rotary_sha256=rotary_sha256(attached.model.config),
        tokenizer_sha256="" if tokenizer is None else tokenizer_sha256(tokenizer),
        num_sinks=attached.spec.num_sinks,
        window_tokens=attached.spec.window_tokens,
        dtype=str(attached.model.dtype).removeprefix("torch."),
    )


def _short(value: str | int) -> str:
    return value[:_SHOWN] if isinstance(value, str) else str(value)
