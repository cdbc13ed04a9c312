"""Answers to held-out problems, scored and compared."""
