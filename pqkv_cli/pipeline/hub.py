"""Artifacts on the hub: their names, and how one comes into the hub's cache. Knows no verbs and opens no artifact."""

import re
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants as hub
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pqkv_cli.artifact.schema import ARTIFACT_FILE
from pqkv_cli.errors import ArtifactError, first_line
from pqkv_cli.pipeline.rundir import MODEL_FILE, RECIPE_FILE, kind_of
from pqkv_cli.pipeline.target import HubName, Target

_TIMEOUT_S = 10.0
_LONGEST_REASON = 200
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REFUSED = (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError)


@dataclass(frozen=True, slots=True)
class Fetched:
    """An artifact in the hub's cache, of one commit altogether: its file, beside it what else belongs to it."""

    file: Path
    commit: str


def located(target: Target) -> Target:
    """Return `target`, or, where it names something on the hub that is no run here, the artifact behind that name.

    A repository that holds no artifact, or that the cache knows as a model, stays what it is: a model.

    Raises
    ------
    ArtifactError
        If it can only be an artifact and there is none, or as `fetch_artifact`.
    """
    name = target.hub
    if name is None or target.path is not None:
        return target
    if name.revision is None and (kind_of(target.run.path) == "run" or _is_cached_model(name.repository)):
        return target
    found = fetch_artifact(name)
    if found is not None:
        return replace(target, kind="artifact", path=found.file)
    if name.revision is not None:
        raise ArtifactError(f"{name} holds no artifact (no {ARTIFACT_FILE}); name a repository that pqkv export has pushed to")
    return target


def results_place(target: Target) -> Path | None:
    """Return where results about an artifact from the hub go, None for any other target, which keeps its results itself."""
    return None if target.hub is None or target.path is None else Path("results") / str(target.hub).replace("/", "--")


def fetch_artifact(name: HubName) -> Fetched | None:
    """Return the artifact that the hub holds under `name`, None where there is such a repository but no artifact in it.

    A full commit that is in the cache is taken from there; otherwise the hub is asked, because a branch moves. Where the hub
    cannot be reached, what the cache holds of the name is taken, with a warning.

    Raises
    ------
    ArtifactError
        If there is no such repository or revision, it may not be read, or the hub cannot be reached and the cache holds none.
    """
    revision = name.revision or hub.DEFAULT_REVISION
    cached = _cached(name.repository, revision)
    if cached is not None and _COMMIT.fullmatch(revision):
        return cached
    api = huggingface_hub.HfApi()
    url = huggingface_hub.hf_hub_url(name.repository, ARTIFACT_FILE, revision=revision, endpoint=api.endpoint)
    try:
        api.get_hf_file_metadata(url=url, timeout=_TIMEOUT_S)
        return _download(api, name.repository, revision)
    except RemoteEntryNotFoundError:
        return None
    except _REFUSED as error:
        raise _refused(name, error) from error
    except Exception as error:  # Any transport library may sit below; every other failure means the same to the user.
        if cached is None:
            raise _unreachable(name, error) from error
        warnings.warn(
            f"the hub did not answer ({first_line(error)[:_LONGEST_REASON]}); taken from the cache: {name} of commit "
            f"{cached.commit[:12]}",
            stacklevel=2,
        )
        return cached


def _download(api: huggingface_hub.HfApi, repository: str, revision: str) -> Fetched:
    file = Path(api.hf_hub_download(repository, ARTIFACT_FILE, revision=revision))
    commit = file.parent.name
    with suppress(RemoteEntryNotFoundError):  # then whoever uses it has to name the model
        api.hf_hub_download(repository, RECIPE_FILE, revision=commit)
    return Fetched(file, commit)


def _is_cached_model(repository: str) -> bool:
    return isinstance(huggingface_hub.try_to_load_from_cache(repository, MODEL_FILE), str)


def _cached(repository: str, revision: str) -> Fetched | None:
    found = huggingface_hub.try_to_load_from_cache(repository, ARTIFACT_FILE, revision=revision)
    return Fetched(Path(found), Path(found).parent.name) if isinstance(found, str) else None


def _refused(name: HubName, error: Exception) -> ArtifactError:
    what = f"the hub has no revision {name.revision!r} of {name.repository}"
    if not isinstance(error, RevisionNotFoundError):
        what = f"the hub has no repository {name.repository}, or does not show it to you"
    return ArtifactError(f"{what}; check the name, or log in to the hub (HF_TOKEN) if it is private")


def _unreachable(name: HubName, error: Exception) -> ArtifactError:
    why = "HF_HUB_OFFLINE forbids the hub" if isinstance(error, OfflineModeIsEnabled) else first_line(error)[:_LONGEST_REASON]
    return ArtifactError(
        f"{name} is no run here, is not in the cache {hub.HF_HUB_CACHE}, and the hub did not give it: {why}. Fetch it on a "
        f"machine with network and copy {ARTIFACT_FILE} and {RECIPE_FILE}, then name their directory instead of the id"
    )
