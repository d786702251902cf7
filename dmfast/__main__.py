"""``python -m dmfast``."""

import sys

from .cli import main

sys.exit(main())
