"""`python -m opsdc` is the command `opsdc`."""

import sys

from opsdc.cli import main

sys.exit(main())
