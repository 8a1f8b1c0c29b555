"""What is taken for granted about the insides of transformers, one test per fact: the one that fails says what moved."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import FAMILIES, family_config, family_model
from tiny_gguf import vocabulary, write_gguf
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Cache, DynamicCache, DynamicLayer
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pqkv_cli.cache.layer import QuantizedLayer
from pqkv_cli.hf.attention import CAUSAL, IRRELEVANT, SINK_LOGITS, SOFTCAP, attention_of
from pqkv_cli.hf.gguf_files import (
    is_unknown_architecture,
    read_config,
    read_model,
    read_tokenizer,
    readable_architectures,
    save,
)
from pqkv_cli.hf.layer_state import can_crop, one_row, put_together, taken_apart
from pqkv_cli.hf.modules import attention_modules, forward_globals, output_weight
from pqkv_cli.hf.names import CACHE_KEYWORDS, cache_argument, cache_keyword
from pqkv_cli.hf.taps import tap
from pqkv_cli.models.rotary import rotary_module

MODELS = Path(transformers.__file__).parent / "models"
# Keywords of attention that no model we serve may use: each changes what is attended to, and is refused when it comes.
REFUSED = {
    "block_indices": "a sparse choice of blocks",
    "indices": "a sparse choice of tokens",
    "position_bias": "a learned bias of positions",
    "sinks": "sinks that depend on the token",
    "cu_seq_lens_q": "packed texts",
    "cu_seq_lens_k": "packed texts",
    "max_length_q": "packed texts",
    "max_length_k": "packed texts",
    "cu_seqlens": "packed texts",
    "seq_idx": "packed texts",
}
_OWN_PLACES = {"dropout", "scaling", "attention_mask", "query", "key", "value", "module"}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(family_config(request.param))


def test_every_family_takes_the_cache_under_a_name_we_know(family: Any) -> None:
    for module in (family, family.base_model, *attention_modules(family).values()):
        names = set(inspect.signature(module.forward).parameters)
        assert names & set(CACHE_KEYWORDS), f"{type(module).__name__}.forward takes {sorted(names)}"


def test_generate_takes_the_cache_under_the_name_that_forward_has(recwarn: pytest.WarningsRecorder) -> None:
    model = family_model("llama")
    cache = DynamicCache(config=model.config)
    model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2, **{cache_keyword(model): cache})
    assert cache.get_seq_length() >= 4
    assert [str(w.message) for w in recwarn if issubclass(w.category, FutureWarning)] == []


def test_every_family_has_rotary_modules_attention_modules_and_output_projections_by_names_we_know() -> None:
    for name in ("llama", "qwen3", "gemma2", "phi3", "glm4", "gpt_oss", "olmo2"):
        model = family_model(name)
        text = model.config.get_text_config()
        for index, module in attention_modules(model).items():
            assert "Rotary" in type(rotary_module(model, index)).__name__
            weight = output_weight(module, text.num_attention_heads, module.head_dim)
            assert weight.shape[1] == text.num_attention_heads * module.head_dim
            names = forward_globals(module)
            assert {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"} <= set(names)


def test_attention_modules_are_given_cosine_and_sine_as_position_embeddings() -> None:
    seen: list[bool] = []

    class Observer:
        def attention(self, layer_index: int, step: Any) -> None:
            seen.append(step.cos is not None and step.sin is not None)

    model = family_model("llama")
    with tap(model, Observer()), torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64))
    assert seen == [True] * model.config.num_hidden_layers


def _attention_calls() -> dict[str, set[str]]:
    """Return the keywords that models of the installed transformers hand to their attention function, and which models do."""
    found: dict[str, set[str]] = {}
    for path in MODELS.glob("*/modeling_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface":
                for keyword in node.keywords:
                    if keyword.arg is not None:
                        found.setdefault(keyword.arg, set()).add(path.parent.name)
    return found


def test_every_keyword_that_attention_is_called_with_is_known() -> None:
    found = _attention_calls()
    known = IRRELEVANT | set(REFUSED) | {SOFTCAP, SINK_LOGITS, CAUSAL} | _OWN_PLACES
    assert {name: sorted(models) for name, models in found.items() if name not in known} == {}
    assert SOFTCAP in found and "gemma2" in found[SOFTCAP], "soft caps have another name"
    assert SINK_LOGITS in found and "gpt_oss" in found[SINK_LOGITS], "learned sink logits have another name"
    assert not IRRELEVANT & set(REFUSED)


def test_learned_sinks_and_soft_caps_are_declared_by_the_names_we_look_for() -> None:
    sinks = attention_modules(family_model("gpt_oss"))[0]
    assert "sinks" in dict(sinks.named_parameters(recurse=False))
    assert family_model("gemma2").config.attn_logit_softcapping == 2.0


def test_a_cache_layer_needs_what_ours_has() -> None:
    assert CacheLayerMixin.__abstractmethods__ == {
        "lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"
    }  # fmt: skip
    assert not QuantizedLayer.__abstractmethods__
    for name in ("is_compileable", "is_croppable", "offload", "prefetch", "reset", "reorder_cache"):
        assert hasattr(CacheLayerMixin, name), f"CacheLayerMixin has no {name} any more"
    for name in ("crop", "batch_repeat_interleave", "batch_select_indices"):
        assert hasattr(DynamicLayer, name) and hasattr(Cache, name), f"caches have no {name} any more"


def test_full_attention_gets_a_plain_growing_layer_and_a_window_gets_another() -> None:
    layers = DynamicCache(config=family_config("gemma3_text")).layers
    assert [type(layer) for layer in layers] == [DynamicSlidingWindowLayer, DynamicLayer] * 2


@pytest.mark.parametrize("name", ["gemma3_text", "gemma3n_text", "qwen3_next", "lfm2"])
def test_layers_keep_all_they_hold_in_attributes_and_choose_rows_by_reordering(name: str) -> None:
    model, ids = family_model(name), torch.randint(2, 200, (2, 70), generator=torch.Generator().manual_seed(0))
    held, twin = (DynamicCache(config=model.config) for _ in range(2))
    with torch.no_grad():
        model(ids[:, :60], **cache_argument(model, held), use_cache=True)
        for layer, other in zip(held.layers, twin.layers, strict=True):
            put_together(other, *taken_apart(one_row(layer, 1, 2)), torch.device("cpu"))
        found, expected = (
            model(rows, **cache_argument(model, cache), use_cache=True).logits
            for rows, cache in ((ids[1:, 60:], twin), (ids[:, 60:], held))
        )
    torch.testing.assert_close(found[0], expected[1])
    kinds = {type(layer).__name__: can_crop(layer) for layer in held.layers}
    wanted = {"DynamicLayer": True, "DummyLayer": True, "DynamicSlidingWindowLayer": False, "LinearAttentionLayer": False}
    assert kinds.items() <= wanted.items(), "windows of 40 tokens are full"


def test_update_is_called_with_keys_values_and_the_layers_index() -> None:
    calls: list[tuple[Any, ...]] = []

    class Spy(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return super().update(*args, **kwargs)

    model = family_model("llama")
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64), **{cache_keyword(model): Spy(config=model.config)})
    assert [args[2] for args in calls] == list(range(model.config.num_hidden_layers))
    assert all(args[0].shape == args[1].shape == (1, 2, 4, 16) for args in calls)


def test_attention_is_chosen_by_name_and_registered_in_two_registries() -> None:
    model = family_model("llama")
    model.set_attn_implementation("eager")
    assert attention_of(model) == "eager" == model.config._attn_implementation_internal
    for registry in (AttentionInterface, AttentionMaskInterface):
        assert "sdpa" in registry._global_mapping


def test_the_mask_of_sdpa_takes_the_arguments_that_ours_hands_on() -> None:
    assert {"q_length", "kv_length", "allow_is_causal_skip"} <= set(inspect.signature(sdpa_mask).parameters)
    assert {"dropout", "scaling", "is_causal"} <= set(inspect.signature(sdpa_attention_forward).parameters)


def test_torch_has_the_private_functions_that_handles_and_checks_use() -> None:
    assert callable(torch.Tensor._make_wrapper_subclass) and callable(torch._assert_async)


@pytest.fixture
def gguf_file(tiny: Any, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", tiny("llama", vocab_size=len(vocabulary())), "Q8_0")


def test_the_reader_of_gguf_draws_its_bar_with_a_name_of_its_module(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = read_config(gguf_file)
    model, missing = read_model(gguf_file, config, torch.float32)
    assert capfd.readouterr() == ("", "") and missing == []
    assert model.dtype == torch.float32 and not any("Gguf" in type(module).__name__ for module in model.modules())


def test_a_model_from_gguf_is_saved_as_any_other(gguf_file: Path, tmp_path: Path) -> None:
    config = read_config(gguf_file)
    model, _ = read_model(gguf_file, config, torch.float32)
    tokenizer, _ = read_tokenizer(gguf_file, {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 2})
    assert tokenizer.eos_token == "</s>"
    save(model, tokenizer, tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))


def test_the_reader_of_gguf_leaves_out_scaled_rotary_embedding(tiny: Any, tmp_path: Path) -> None:
    # Once it reads them itself, `models/converted.py` has nothing to do any more.
    model = tiny("llama", vocab_size=len(vocabulary()))
    file = write_gguf(tmp_path / "m.gguf", model, rope_freqs=[1.0] * 4 + [8.0] * 4, llama__rope__scaling__type="yarn")
    assert read_config(file).rope_parameters["rope_type"] == "default"


def test_kinds_of_models_that_gguf_is_not_read_for_are_told_in_these_words(tiny: Any, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", tiny("llama", vocab_size=len(vocabulary())), architecture="rwkv7")
    with pytest.raises(Exception) as raised:
        read_config(file)
    assert is_unknown_architecture(raised.value), raised.value
    assert {"llama", "qwen2", "gemma2"} <= set(readable_architectures())
