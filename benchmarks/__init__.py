"""Measurements that anyone can repeat. Each module is one command: `python -m benchmarks.NAME`."""
