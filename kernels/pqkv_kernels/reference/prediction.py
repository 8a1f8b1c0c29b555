"""Values predicted from keys: what the decoded key of a token says of its value. Plain fp32 torch; defines the meaning.

A head's values are largely a linear function of its keys before rotary embedding. With ``v = P k + r`` only `r` is coded, and
attention with weights `a` needs no more of it than one other sum: ``sum a v = P (sum a k) + sum a r``.
"""

import torch

from pqkv_kernels.format.pairs import planes_of
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import REFERENCE, decode_codes, from_code_space


def predicted(keys: torch.Tensor, values: CodecTables) -> torch.Tensor:
    """Return what decoded `keys` say of the values of their tokens, both [B, Hkv, T, D] fp32 in their code spaces."""
    assert values.prediction is not None  # or nothing is predicted
    said: torch.Tensor = keys @ values.prediction.float().mT
    return said


def left_over(
    values: torch.Tensor, key_pages: torch.Tensor, key_tables: CodecTables, value_tables: CodecTables
) -> torch.Tensor:
    """Return what is to be coded of model-space `values` [B, Hkv, 64 * P, D]: what `key_pages` do not say of them.

    They are `values` themselves where nothing is predicted, else fp32 in model space.
    """
    if value_tables.prediction is None:
        return values
    said = predicted(decode_codes(key_pages, key_tables), value_tables)
    return values.float() - from_code_space(said, value_tables)


def decode_values(
    key_pages: torch.Tensor, value_pages: torch.Tensor, key_tables: CodecTables, value_tables: CodecTables
) -> torch.Tensor:
    """Return the values [B, Hkv, 64 * P, D] fp32 in code space that pages of keys and values stand for together."""
    coded = decode_codes(value_pages, value_tables)
    if value_tables.prediction is None:
        return coded
    return coded + predicted(decode_codes(key_pages, key_tables), value_tables)


def plane_prediction(keys: CodecTables, values: CodecTables) -> torch.Tensor:
    """Return what turns sums of keys, with channels in the order of `planes_of`, into what they say of values in code space.

    It is [Hkv, D, D] fp32, a row for every channel of a key; made once for a pair of tables.
    """
    kept = values.derived.get("plane_prediction")
    if kept is None or kept[0] is not keys:
        with torch.inference_mode(False):  # or gradients could not pass later
            kept = values.derived["plane_prediction"] = keys, _plane_prediction(keys, values)
    made: torch.Tensor = kept[1]
    return made


def _plane_prediction(keys: CodecTables, values: CodecTables) -> torch.Tensor:
    planes = planes_of(keys)
    assert planes is not None and values.prediction is not None  # or nobody would read planes, or nothing is predicted
    heads, dim = keys.num_heads, keys.layout.head_dim
    if keys.rotary is None:  # planes hold the code space
        return values.prediction.float().mT.contiguous()
    # Planes hold pairs in model space, and prediction is linear: what it makes of the channels one by one.
    channels = torch.eye(dim, device=planes.channels.device).expand(1, heads, dim, dim)
    said = predicted(REFERENCE.code_space(channels, keys, None), values)[0]
    order = planes.channels.flatten(1)
    return said.gather(1, order[..., None].expand(said.shape)).contiguous()
