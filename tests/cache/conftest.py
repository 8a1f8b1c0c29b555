import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests_support import key_tables, value_tables
from transformers import LlamaConfig, LlamaForCausalLM

from pqkv_cli.cache.cache import quantized_cache
from pqkv_cli.hf.steps import install_step_hook
from pqkv_cli.runtime.attention import register_attention

sys.path.insert(0, str(Path(__file__).parent))


class Bench:
    """A tiny model with random tables, hooked so that caches know their steps."""

    def __init__(self, spec_factory):
        from oracle import oracle_cache, reference_angles

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
            pad_token_id=0,
            eos_token_id=None,
        )
        self.model = LlamaForCausalLM(config).eval()
        with torch.no_grad():  # sharper attention than at initialization, so that a wrong key changes the tokens
            for layer in self.model.model.layers:
                layer.self_attn.q_proj.weight *= 6
                layer.self_attn.k_proj.weight *= 6
        generator = torch.Generator().manual_seed(1)
        self.tables = [None if i == 1 else {"keys": key_tables(generator), "values": value_tables(generator)} for i in range(3)]
        # The last layer predicts its values from its keys.
        values = self.tables[2]["values"]
        prediction = torch.randn(values.num_heads, 16, 16, generator=generator) / 4
        self.tables[2]["values"] = replace(values, prediction=prediction.half())
        self.source = reference_angles(self.model)
        self.spec = spec_factory
        self._oracle = oracle_cache

    def quantized(self):
        return quantized_cache(self.model.config, self.tables, self.spec, [self.source] * 3)

    def oracle(self):
        return self._oracle(self.model.config, self.tables, self.spec, [self.source] * 3)

    def tokens(self, *shape, seed=0):
        return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))

    def use(self, name):
        self.model.set_attn_implementation(name)


@pytest.fixture(params=[(4, 64), (0, 0), (3, 100)], ids=["sinks4-window64", "nothing-exact", "sinks3-window100"])
def bench(request):
    from pqkv_cli.specs import CacheSpec

    made = Bench(CacheSpec(*request.param))
    register_attention()
    hook = install_step_hook(made.model)
    yield made
    hook.remove()
