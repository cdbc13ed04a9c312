"""`python -m opsdc.config > docs/SETTINGS.md` writes the page of settings."""

from opsdc.config.describe import page

print(page(), end="")
