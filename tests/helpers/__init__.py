"""Tiny models, runs in processes of their own, ranks: what several tests build on."""
