"""``dmfast report``: runs beside one another on one self-contained HTML page. Needs matplotlib, and no trainer."""

from .page import page
from .runs import Run, read

__all__ = ["Run", "page", "read"]
