"""OPSDC itself: batches, the teacher, the loss, one update."""
