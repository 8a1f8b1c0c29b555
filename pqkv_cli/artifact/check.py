"""Does an artifact belong to a model? Compares hashes and geometry; knows no model class."""

from dataclasses import replace

from pqkv_cli.artifact.faults import listed
from pqkv_cli.artifact.store import Artifact
from pqkv_cli.errors import ArtifactError
from pqkv_cli.specs import LayerGeometry, ModelGeometry, ModelIdentity

EARLIER = (
    "the artifact is of an earlier version, which noted the attention weights of three layers only; that other weights are the "
    "same could not be checked: export it again from a new calibration to have all checked"
)


def check_model(
    artifact: Artifact,
    identity: ModelIdentity,
    geometry: ModelGeometry,
    *,
    label: str = "the loaded model",
    force: bool = False,
) -> tuple[str, ...]:
    """Refuse an artifact that was made for another model than `identity`.

    Parameters
    ----------
    label
        How messages name the model at hand.
    force
        Accept another model of the same geometry; the caller must show the returned warnings.

    Returns
    -------
    tuple of str
        One warning per difference that `force` let pass, and one where less could be checked because the artifact is of an
        earlier version; empty for the right model.

    Raises
    ------
    ArtifactError
        If the geometry differs (`force` cannot help) or, without `force`, if a hash does.
    """
    faults = _geometry_faults(artifact, geometry)
    if faults:
        found = f"{artifact.path} was made for {artifact.header.model.label}, whose attention is not that of {label}"
        raise ArtifactError(listed(found, faults, "use that model, or calibrate and export an artifact for this one"))
    differences = _hash_differences(artifact, identity, label)
    if differences and not force:
        hint = "use that model, export an artifact for this one, or pass --force to try it at the cost of quality"
        raise ArtifactError(listed(f"{artifact.path} was made for another model", differences, hint))
    return (*differences, EARLIER) if _is_earlier(artifact, identity) else differences


def _is_earlier(artifact: Artifact, identity: ModelIdentity) -> bool:
    return artifact.header.model.weights_sha256 == identity.former_weights_sha256


def _hash_differences(artifact: Artifact, identity: ModelIdentity, label: str) -> tuple[str, ...]:
    model = artifact.header.model
    weights = model.weights_sha256 if _is_earlier(artifact, identity) else identity.weights_sha256
    pairs = (
        ("configuration", model.config_sha256, identity.config_sha256),
        ("weights", model.weights_sha256, weights),
    )
    return tuple(
        f"{what}: the artifact is for {model.label} ({expected[:12]}), {label} has {found[:12]}"
        for what, expected, found in pairs
        if expected != found
    )


def _geometry_faults(artifact: Artifact, geometry: ModelGeometry) -> list[str]:
    header = artifact.header
    if len(header.geometry) != len(geometry.layers):
        return [f"it has {len(geometry.layers)} layers; expected {len(header.geometry)}"]
    return [
        f"layer {i} has {_described(found)}; expected {_described(expected)}"
        for i, (expected, found) in enumerate(zip(header.geometry, geometry.layers, strict=True))
        if _shape(expected) != _shape(found)
    ][:5]


def _shape(layer: LayerGeometry) -> LayerGeometry:
    """Return `layer` without the words of its reason, which versions may put differently."""
    return replace(layer, dense_reason="dense" if layer.dense_reason else "")


def _described(layer: LayerGeometry) -> str:
    rotary = layer.rotary
    words = [f"{layer.num_heads} heads", f"{layer.num_kv_heads} key/value heads", f"head_dim {layer.head_dim}"]
    interleaved = " interleaved" if rotary is not None and rotary.interleaved else ""
    words.append("no rotary embedding" if rotary is None else f"rotary_dim {rotary.rotary_dim}{interleaved}")
    return ", ".join(words + ([f"dense ({layer.dense_reason})"] if layer.dense_reason else []))
