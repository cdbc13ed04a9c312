"""The record of a run on disk: its lines, its checkpoints, and the way it goes on from them."""
