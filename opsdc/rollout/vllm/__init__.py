"""vLLM as a sampler, in this process or in a server."""
