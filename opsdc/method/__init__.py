"""The method itself: batches, the teacher, the loss, one update."""
