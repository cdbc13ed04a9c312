"""vLLM as a sampler: in this process, or in one of its own."""
