"""The operations on a CPU: compiled loops, and torch where there is no compiler."""
