"""Text windows, and statistics of keys, values and queries over them."""
