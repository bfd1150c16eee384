"""Pictures and one self-contained page from run folders: reads records and results, loads no model."""

from come_pl.report.layers import importance, merge_map, shares
from come_pl.report.page import write_report

__all__ = ["importance", "merge_map", "shares", "write_report"]
