"""Tensor operations over product-quantized key/value caches: bit layout, rotary embedding, encode, decode, attention.

Knows tensors and numbers only; it never imports `pqkv_cli`.
"""
