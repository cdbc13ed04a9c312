"""Heads sharded over the vocabulary: every rank of a process group holds some rows of W."""

from opsdc_kernels.vocab_parallel.shards import HEADER_BYTES, Shard, agree, bytes_per_token

__all__ = ["HEADER_BYTES", "Shard", "agree", "bytes_per_token"]
