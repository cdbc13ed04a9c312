"""Loading models, their heads and adapters."""
