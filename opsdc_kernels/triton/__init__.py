"""Triton kernels. Importing this package's modules imports triton; `fused` does so on first use."""
