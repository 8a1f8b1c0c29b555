"""The operations on a GPU: Triton kernels, which also run in its interpreter."""
