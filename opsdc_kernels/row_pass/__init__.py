"""Raw products of some rows to divergence, statistics and logit gradient: in C, Triton or torch."""
