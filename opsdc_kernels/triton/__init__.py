"""Device functions that the row pass and the fused kernels share. Importing its modules, but for
`launch`, imports triton, so callers do it on first use."""
