"""What a run left on disk, as one HTML file: curves, time per phase, and completions with their rewards."""

from .page import write_report

__all__ = ["write_report"]
