"""A dense cache that holds what the quantized cache should stand for, written as plainly as possible."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from pqkv_cli.cache.cache import PositionedCache
from pqkv_cli.cache.positions import SlotPositions
from pqkv_kernels.reference.encode import dequantize, from_code_space, quantize, round_trip, to_code_space

PAGE = 64


class OracleLayer(DynamicLayer):
    """Dense keys and values; in each row, `coded` slots from the left are replaced by their round trip, except sinks."""

    def __init__(self, tables, spec, slots, source):
        super().__init__()
        self.tables, self.spec, self.slots, self.source = tables, spec, slots, source
        self.coded = None

    def update(self, key_states, value_states, *args, **kwargs):
        super().update(key_states, value_states)
        seen = self.keys.clone(), self.values.clone()  # what this step attends to: nothing newly coded
        starts = self.slots.starts()
        self.coded = starts.clone() if self.coded is None else self.coded
        for row, start in enumerate(starts.tolist()):
            self._code(row, start, int(self.coded[row]), max(int(self.coded[row]), self._stop(start)))
        return seen

    def _stop(self, start):
        """A row of n tokens has whole pages of its own coded, as far as whole pages of the cache's are there to hold them."""
        held, window = self.get_seq_length(), self.spec.window_tokens
        own = max(0, held - start - window) // PAGE * PAGE
        pages = min(-(-max(0, held - window) // PAGE), held // PAGE)
        return min(start + own, max(start, pages * PAGE))

    def _code(self, row, start, first, stop):
        text = slice(max(first, start + self.spec.num_sinks), stop)
        self.coded[row] = stop
        if text.start < text.stop:
            keys, values = (t[row : row + 1, :, text] for t in (self.keys, self.values))
            angles = None if self.source is None else self.source(self.slots.positions[row : row + 1, text].long())
            self.keys[row, :, text] = round_trip(keys, self.tables["keys"], angles)[0]
            said = self._said(keys, angles)
            self.values[row, :, text] = (said + round_trip(values - said, self.tables["values"]))[0]

    def _said(self, keys, angles):
        """What the codes of keys say of their values, in model space."""
        own, values = self.tables["keys"], self.tables["values"]
        if values.prediction is None:
            return torch.zeros(())
        codes = quantize(to_code_space(keys, own, angles), own.layout, own.codebooks)
        decoded = dequantize(codes, own.layout, own.codebooks)
        return from_code_space(torch.einsum("hde,bhte->bhtd", values.prediction.float(), decoded), values)

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        self.coded = self.coded.clamp(max=self.get_seq_length() // PAGE * PAGE)

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.coded = self.coded[beam_idx]

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self.coded = self.coded.repeat_interleave(repeats)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.coded = self.coded[indices]


def oracle_cache(config, tables, spec, sources):
    slots = SlotPositions()
    layers = DynamicCache(config=config).layers
    made = [
        layer if t is None else OracleLayer(t, spec, slots, s)
        for layer, t, s in zip(layers, tables[: len(layers)], sources[: len(layers)], strict=True)
    ]
    return PositionedCache(made, slots)


def oracle_of(attached):
    """The oracle that stands beside ``attached.new_cache()``."""
    return oracle_cache(attached.model.config, attached._tables, attached.spec, attached._angles)


def plain_attention(model):
    """The model's own attention for the oracle; that of doge in transformers 5.17 misreads the masks of the eager one."""
    return "sdpa" if model.config.model_type == "doge" else "eager"


def generate(attached, held, ids, **options):
    """Generate over a cache: codes by `pqkv`, an oracle by the model's own attention; greedy where `options` say nothing."""
    attached.model.set_attn_implementation(plain_attention(attached.model) if type(held) is PositionedCache else "pqkv")
    torch.manual_seed(5)
    settings = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, eos_token_id=1)
    if ids is not None:
        settings |= dict(inputs=ids, attention_mask=torch.ones_like(ids))  # answers may contain the pad token
    try:
        return attached.model.generate(past_key_values=held, **{**settings, **options})
    finally:
        attached.model.set_attn_implementation("pqkv")


def reference_angles(model):
    """Angles from the rotary module of a Llama, as it computes them itself."""

    def source(positions):
        cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
        half = cos.shape[-1] // 2
        return cos[..., :half].float(), sin[..., :half].float()

    return source
