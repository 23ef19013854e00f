"""Runs the command line: `python -m storyllm`."""

import sys

from .cli import main

sys.exit(main())
