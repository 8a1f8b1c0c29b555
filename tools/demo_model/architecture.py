"""The shape of the reference model. Knows nothing of training or text."""

from transformers import LlamaConfig

from tools.demo_model.tokenizer import VOCAB_SIZE

MAX_POSITIONS = 8192


def reference_config() -> LlamaConfig:
    """Return a 3.6-million-parameter Llama: 4 layers, 4 query and 2 key/value heads of 64 channels."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=736,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
