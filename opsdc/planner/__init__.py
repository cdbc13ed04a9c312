"""Where the bytes of a run go, before it starts."""
