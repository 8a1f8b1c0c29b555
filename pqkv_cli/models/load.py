"""Loading a model and its tokenizer, and giving memory back. Knows transformers and the hub's cache; nothing of quantization.

Remote code is never run. A hub id is looked up in the local cache first, so a run without network is as fast as can be.
"""

import gc
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants as hub
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from pqkv_cli.errors import ModelError, first_line
from pqkv_cli.hf.loading import NO_CODE, foreign_tokenizer, leave_own_attention, needs_own_code, no_progress_bar
from pqkv_cli.models.converted import Note, conversion, converted, gguf_config, nobody
from pqkv_cli.models.geometry import check_quantizable, geometry
from pqkv_cli.models.gguf import is_gguf
from pqkv_cli.models.resolve import ADAPTER, MERGE, ResolvedModel, check_model_directory, check_weights
from pqkv_cli.models.structure import check_structure

_PROBE_TIMEOUT_S = 10.0


def settled(resolved: ResolvedModel, note: Note = nobody) -> ResolvedModel:
    """Return `resolved` as what transformers loads quickly: of a GGUF file the directory that it was converted into.

    Raises
    ------
    ModelError, UnsupportedModelError
        If the file cannot be converted. `note` is told beforehand that this happens.
    """
    path = Path(resolved.path_or_id)
    if not (resolved.is_local and is_gguf(path)):
        return resolved
    return ResolvedModel(str(converted(path, note)), True, resolved.label)


def load_model(resolved: ResolvedModel, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """Return ``(model, tokenizer)``; the model in eval mode on `device`, in `dtype` or, if None, its checkpoint's.

    Raises
    ------
    ModelError
        If anything of it is missing, unreadable, or the hub cannot be reached.
    UnsupportedModelError
        If its cache cannot be quantized; found from the config, before weights are read.
    """
    resolved = settled(resolved)
    config, local_only = _config(resolved)
    check_quantizable(geometry(config))
    check_structure(config)
    if resolved.is_local:
        check_weights(Path(resolved.path_or_id))
    try:
        tokenizer = _tokenizer(resolved, local_only)
        model = _weights(resolved, config, dtype, device, local_only)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # bytes that are no weights can make any library raise anything
        raise _unreadable(resolved, error) from error
    return model.eval(), tokenizer


def _tokenizer(resolved: ResolvedModel, local_only: bool) -> Any:
    place = resolved.path_or_id
    loader: Any = AutoTokenizer
    if resolved.is_local:
        _check_tokenizer(resolved)
    tokenizer = loader.from_pretrained(place, local_files_only=local_only, trust_remote_code=NO_CODE)
    _check_tokenizer(resolved)  # of the hub it is here only now
    return tokenizer


def _check_tokenizer(resolved: ResolvedModel) -> None:
    names, place = ("tokenizer_config.json", "config.json"), resolved.path_or_id
    cached = (f"{place}/{name}" if resolved.is_local else huggingface_hub.try_to_load_from_cache(place, name) for name in names)
    if name := foreign_tokenizer(*(Path(path) for path in cached if isinstance(path, str))):
        raise _own_code(resolved, f"its tokenizer {name} is not one of transformers")


def load_config(resolved: ResolvedModel) -> PretrainedConfig:
    """Return the config alone; a GGUF file is not converted for it.

    Raises
    ------
    ModelError
        If it is missing, unreadable, or the hub cannot be reached.
    """
    path = Path(resolved.path_or_id)
    if resolved.is_local and is_gguf(path):
        done = conversion(path)
        if not done.is_dir():
            config: PretrainedConfig = gguf_config(path)
            return config
        resolved = ResolvedModel(str(done), True, resolved.label)
    return _config(resolved)[0]


def _config(resolved: ResolvedModel) -> tuple[PretrainedConfig, bool]:
    if resolved.is_local:
        check_model_directory(Path(resolved.path_or_id))
        return _read_config(resolved, local_only=True), True
    # The whole snapshot or nothing: a cached config without its weights must not stop the download.
    if _is_cached(resolved.path_or_id):
        return _read_config(resolved, local_only=True), True
    _check_hub(resolved)
    return _read_config(resolved, local_only=False), False


def _read_config(resolved: ResolvedModel, local_only: bool) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            resolved.path_or_id, local_files_only=local_only, trust_remote_code=NO_CODE
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(resolved, error) from error
    leave_own_attention(config)
    return config


def _is_cached(repository: str) -> bool:
    config = huggingface_hub.try_to_load_from_cache(repository, "config.json")
    if not isinstance(config, str):
        return False
    try:
        check_model_directory(Path(config).parent)
    except ModelError:
        return False
    return True


def _check_hub(resolved: ResolvedModel) -> None:
    # One request that is not retried: the loader itself would wait half a minute for a network that is not there.
    looked = f"looked for {resolved.path_or_id!r} in the cache {hub.HF_HUB_CACHE}"
    remedy = (
        "Download it on a machine with network and copy it, then name its directory instead of the id, "
        "or point HF_HOME at a cache that holds it."
    )
    if hub.HF_HUB_OFFLINE:
        raise ModelError(
            f"model {resolved.path_or_id} is not on this machine ({looked}), and HF_HUB_OFFLINE forbids the hub. {remedy}"
        )
    try:
        found = huggingface_hub.HfApi().model_info(resolved.path_or_id, timeout=_PROBE_TIMEOUT_S)
    except Exception as error:  # Any transport library may sit below; every failure means the same to the user.
        raise ModelError(
            f"model {resolved.path_or_id} is not on this machine ({looked}), and the hub did not give it: "
            f"{first_line(error)}. {remedy}"
        ) from error
    if ADAPTER in {file.rfilename for file in getattr(found, "siblings", None) or ()}:
        raise ModelError(f"{resolved.path_or_id} holds an adapter ({ADAPTER}); expected a whole model: {MERGE}.")


def _weights(
    resolved: ResolvedModel, config: PretrainedConfig, dtype: torch.dtype | None, device: str, local_only: bool
) -> Any:
    placement = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
    loader: Any = AutoModelForCausalLM
    with no_progress_bar():
        model, report = loader.from_pretrained(
            resolved.path_or_id,
            config=config,
            dtype="auto" if dtype is None else dtype,
            local_files_only=local_only,
            trust_remote_code=NO_CODE,
            output_loading_info=True,
            **placement,
        )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place.
        raise ModelError(
            f"the weights of {resolved.label} lack {len(missing)} tensors ({', '.join(missing[:3])}, ...); "
            "expected all that its config asks for. Copy the whole checkpoint again."
        )
    return model


def _own_code(resolved: ResolvedModel, found: str) -> ModelError:
    return ModelError(
        f"{resolved.label} needs code of its own, which pqkv never runs: {found}; expected a model that transformers "
        f"{transformers.__version__} knows. Use a version of the model converted for transformers, or a newer transformers "
        "that knows it."
    )


def _unreadable(resolved: ResolvedModel, error: Exception) -> ModelError:
    if needs_own_code(error):
        return _own_code(resolved, "it comes with Python files that would have to be run")
    place = resolved.path_or_id if resolved.is_local else f"{resolved.path_or_id} (cache {hub.HF_HUB_CACHE})"
    return ModelError(
        f"the model {place} cannot be loaded: {first_line(error)} Expected config.json, weights and tokenizer of a "
        "transformers model. Copy it again, or name another directory."
    )


def free_memory() -> None:
    """Drop what nobody refers to any more, and hand devices' unused blocks back to them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.xpu.is_available():
        torch.xpu.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
