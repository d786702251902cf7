"""Run the command line as ``python -m dmfast``."""

import sys

from .cli import main

sys.exit(main())
