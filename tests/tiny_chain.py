"""A tiny random Llama that attends sharply, a tokenizer of bytes, and artifacts fitted on random tokens."""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pqkv_cli.artifact.schema import CalibrationInfo, Header, LayerError, ModelInfo
from pqkv_cli.artifact.store import save_artifact
from pqkv_cli.calibration.collect import CollectSettings, collect
from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.fitting.plan import uniform_plan
from pqkv_cli.fitting.run import fit_codebooks, load_fitted
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.hf.cache_layers import InPlaceLayer
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.identity import model_identity
from pqkv_cli.rates import USUAL_STYLE, CodeStyle
from pqkv_cli.specs import CacheSpec

NUM_IDS = 258
SPEC = CacheSpec(num_sinks=4, window_tokens=64)
_SETTINGS = CollectSettings("0" * 64, num_samples=24, seq_len=64, batch_size=8, queries_per_window=8)


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=NUM_IDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():  # sharper than at initialization, so that a wrong key changes the tokens
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight *= 8
        model.lm_head.weight *= 20
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, NUM_IDS, shape, generator=torch.Generator().manual_seed(seed))


@cache
def byte_tokenizer() -> Any:
    """One token per byte, in front of all a beginning-of-sequence token that it adds only where it is asked to."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def quiet(done: int, total: int) -> None:
    """Take progress and say nothing."""


def fit_artifact(model: Any, directory: Path, bits: int = 4, spec: CacheSpec = SPEC, style: CodeStyle = USUAL_STYLE) -> Path:
    """Calibrate on random tokens, fit and save; return the artifact's file."""
    windows = tokens(_SETTINGS.num_samples, _SETTINGS.seq_len, seed=1)
    collect(model, windows, directory / "calibration", _SETTINGS, quiet)
    shape = geometry(model.config)
    plan = uniform_plan(shape, bits, spec, style)
    store = CalibrationStore(directory / "calibration")
    record = fit_codebooks(store, shape, plan, directory / f"codebooks{bits}", FitSettings(iterations=6))
    identity = asdict(model_identity(model))
    header = Header(
        model=ModelInfo("tiny", shape.model_type, identity["config_sha256"], identity["weights_sha256"]),
        geometry=shape.layers,
        plan=plan,
        relative_error=tuple(LayerError(e["keys"], e["values"]) if e else None for e in record.relative_error),
        calibration=CalibrationInfo("0" * 64, _SETTINGS.num_samples, 3, _SETTINGS.seq_len, _SETTINGS.reservoir_size, 0),
        recipe_sha256="0" * 64,
        pqkv_version="0",
    )
    file = directory / f"k{bits}-s{spec.num_sinks}-w{spec.window_tokens}.safetensors"
    save_artifact(file, header, [layer.tables or None for layer in load_fitted(directory / f"codebooks{bits}")])
    return file


def is_uncompressed(cache: Any) -> bool:
    """Whether an evaluation asks its uncompressed side when it passes `cache`."""
    return isinstance(cache.layers[0], InPlaceLayer)
