"""Names that can only mean a file or folder of this machine, and never one on the Hub."""

from __future__ import annotations

import os
from pathlib import Path


def here(name: str | Path) -> Path:
    """Return a name of a file or folder as a path, ~ read as the home folder."""
    return Path(os.path.expanduser(name))


def is_local(name: str) -> bool:
    """Return True for a name that no repository on the Hub can have, or whose parent folder exists.

    Such a name, mistyped, is not asked for over the network.
    """
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or ("/" in name and here(name).parent.is_dir())
    )
