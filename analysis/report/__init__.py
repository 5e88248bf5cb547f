"""The report: one HTML file that decides, and the same facts as a dict or Markdown."""

from analysis.report.facts import report_facts
from analysis.report.figures import build_figures
from analysis.report.markdown import to_markdown
from analysis.report.write import write_report

__all__ = ["build_figures", "report_facts", "to_markdown", "write_report"]
