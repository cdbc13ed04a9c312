"""Triton kernels that compute the loss without a logit in memory."""
