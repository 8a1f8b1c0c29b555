"""Timings: decode steps, attention, k-means, kernels. Nothing from calibration to generation imports this."""
