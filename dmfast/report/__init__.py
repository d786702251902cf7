"""Show runs beside one another on one self-contained HTML page, for ``dmfast report``.

This needs matplotlib, and no trainer.
"""

from .page import page
from .runs import Run, read

__all__ = ["Run", "page", "read"]
