"""Token chunks with full vocabulary rows resident: the backend for every device."""
