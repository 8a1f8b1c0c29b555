"""Geometry, loading and observation of transformers models."""
