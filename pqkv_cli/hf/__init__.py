"""Everything that relies on insides of transformers; no such fact stands elsewhere. ``tests/hf`` holds a test for each.

Other rooms take from transformers only what it exports at its top.
"""
