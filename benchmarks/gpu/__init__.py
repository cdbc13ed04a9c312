"""The stages of `benchmarks.gpu_day`, and how they are run."""
