"""A problem or a step under the lens."""
