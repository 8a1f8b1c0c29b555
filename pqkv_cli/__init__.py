"""pqkv compresses the key/value caches of language models by product quantization. Knows its own version, nothing else."""

__version__ = "0.1.0"
