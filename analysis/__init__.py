"""Scaling laws from run records, with intervals. numpy, scipy, pandas and plotly only."""
