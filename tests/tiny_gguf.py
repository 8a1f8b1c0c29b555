"""Writes a tiny Llama as a GGUF file, as llama.cpp's converter would: its weights, a byte-level tokenizer, a chat template."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
_NORMAL, _CONTROL = 1, 3
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def vocabulary() -> list[str]:
    """Three control tokens, the 256 bytes as byte-level vocabularies spell them, and words of two and of four spaces."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "ĠĠ", "ĠĠĠĠ"]


def write_gguf(path: Path, model: Any, kind: str = "F32", **facts: Any) -> Path:
    """Write `model`, a Llama of `len(vocabulary())` tokens, with matrices of the type `kind`; return `path`.

    `facts` are more keys of the file, or others than the usual ones (a double underscore for a dot); None leaves one out.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, facts.pop("architecture", "llama"))
    usual: dict[str, Any] = {
        "general.name": "Tiny",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.tokens": vocabulary(),
        "tokenizer.ggml.token_type": [_CONTROL] * 3 + [_NORMAL] * 258,
        "tokenizer.ggml.merges": ["Ġ Ġ", "ĠĠ ĠĠ"],
        "tokenizer.chat_template": TEMPLATE,
    }
    factors = facts.pop("rope_freqs", None)
    for key, value in {**usual, **{name.replace("__", "."): value for name, value in facts.items()}}.items():
        if value is not None:
            _add(writer, key, value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    for name, tensor in _tensors(model):
        _add_tensor(writer, name, tensor.detach().float().contiguous().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    if values.ndim == 1 or kind == "F32":
        writer.add_tensor(name, values)
        return
    wanted = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)


def _tensors(model: Any) -> Any:
    state, config = model.state_dict(), model.config
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    yield "output.weight", state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for name, module in _LAYER.items():
            tensor = state[f"model.layers.{layer}.{module}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
            yield f"blk.{layer}.{name}.weight", tensor if heads is None else _interleaved(tensor, heads)


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels, transformers the two halves of a head."""
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
