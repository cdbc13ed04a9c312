"""The plan of a run's memory, and a trial of one step, before it starts."""
