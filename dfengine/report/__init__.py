"""What a person looks at: heatmap overlays and the self-contained HTML report."""

from dfengine.report.overlay import heatmap_overlay
from dfengine.report.report import ReportItem, write_report

__all__ = ["ReportItem", "heatmap_overlay", "write_report"]
