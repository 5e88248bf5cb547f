"""Draws the pictures of docs/laws.md for noise, comparison and design, as SVG, by running the functions themselves on known truths.

Run from the repository root: python docs/figures/draw_decisions.py (needs Chromium on the PATH, which turns figures into SVG).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from draw_knob_laws import write_svgs

from analysis import promotion_test, suggest_runs
from analysis.noise import estimate_noise
from analysis.report.figures import theme
from analysis.report.figures.marks import band, line
from analysis.table import table_from_frame

NOISE = 0.003  # relative standard deviation of the loss over seeds
SURFACE = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}  # Hoffmann et al., arXiv 2203.15556


def noise_figure(trials: int = 400) -> go.Figure:
    """What an estimate of the seed noise is worth: its 90% range and median over `trials` draws, by degrees of freedom."""
    rng = np.random.default_rng(0)
    dfs = [1, 2, 3, 4, 6, 8, 12, 16, 24]
    rows = []
    for df in dfs:
        sds = []
        for _ in range(trials):
            loss = 3.0 * np.exp(NOISE * rng.standard_normal(df + 1))
            frame = pd.DataFrame({"N": 1e8, "D": 2e9, "L": loss, "seed": np.arange(df + 1.0)})
            found = estimate_noise(table_from_frame(frame, source="draw").frame)
            assert found is not None
            sds.append(100 * found.sd)
        rows.append(np.quantile(sds, [0.05, 0.5, 0.95]))
    low, middle, high = np.array(rows).T.tolist()
    traces = [
        band(dfs, low, high, theme.colour("accent"), "90% of estimates", showlegend=True),
        line(dfs, middle, theme.colour("accent"), "median estimate", width=2.4),
        line(dfs, [100 * NOISE] * len(dfs), theme.colour("soft"), "truth", dash="dash", width=1.5),
    ]
    x = theme.log_axis("degrees of freedom (replicates beyond the first of each cell)", dfs, lambda v: f"{v:.0f}", 8)
    return theme.figure(traces, x, theme.axis("estimated seed noise, % of the loss", range=[0, 1.05 * max(high)]))


def comparison_figure(trials: int = 300) -> go.Figure:
    """How often promotion_test adopts a candidate, by its true gain and the number of paired seeds."""
    rng = np.random.default_rng(0)
    gains = np.linspace(-0.004, 0.014, 19)
    traces = []
    for i, seeds in enumerate((3, 5, 8)):
        shares = []
        for gain in gains:
            base = 3.0 * np.exp(NOISE * rng.standard_normal((trials, seeds)))
            other = 3.0 * np.exp(NOISE * rng.standard_normal((trials, seeds)) - gain)
            pairs = zip(base, other, strict=True)
            found = [promotion_test(dict(enumerate(a)), dict(enumerate(b))).verdict for a, b in pairs]
            shares.append(100 * found.count("adopt") / trials)
        traces.append(line((100 * gains).tolist(), shares, theme.ramp(i, 3), f"{seeds} seeds", width=2.4))
    traces.append(line([-0.4, 1.4], [5, 5], theme.colour("soft"), "5%", dash="dash", width=1.5))
    x = theme.axis("true gain, % of the loss (one seed moves it by 0.3%)", range=[-0.42, 1.42])
    return theme.figure(traces, x, theme.axis("adopted, % of candidates", range=[-2, 102]))


def optimal_size(flops: float) -> float:
    a, b = SURFACE["alpha"], SURFACE["beta"]
    return (a * SURFACE["A"] / (b * SURFACE["B"])) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b))


def design_figure() -> go.Figure:
    """Two budgets done; the standard deviation of log D/N at 1e21 FLOPs against compute spent, for three sums to spend."""
    sizes = [(c, optimal_size(c) * f) for c in (1e18, 3e18) for f in (0.4, 0.63, 1.0, 1.6, 2.5)]
    done = pd.DataFrame([(n, c / 6 / n, c) for c, n in sizes], columns=["N", "D", "C"])
    traces, spent = [], [1e18]
    for i, flops in enumerate((1e19, 6e19, 3e20)):
        design = suggest_runs(done, SURFACE, target_flops=1e21, remaining_flops=flops, noise_sd=0.002)
        x = np.cumsum([r.C for r in design.runs]).tolist()
        spent += x
        y = [r.sd_after for r in design.runs]
        drawn = line(x, y, theme.ramp(i, 3), f"{flops:.0e} FLOPs: {len(x)} runs".replace("e+", "e"), width=2.4)
        traces.append(drawn.update(mode="lines+markers"))
    traces.insert(0, line([min(spent), max(spent)], [design.sd_before] * 2, theme.colour("soft"), "before", dash="dash", width=1.5))
    x_axis = theme.log_axis("FLOPs spent on the suggested runs", spent, lambda v: f"{v:.0e}".replace("e+", "e"), 6)
    return theme.figure(traces, x_axis, theme.axis("sd of log D/N at the target", range=[0, 1.08 * design.sd_before]))


if __name__ == "__main__":
    write_svgs({"law_noise": noise_figure(), "law_comparison": comparison_figure(), "law_design": design_figure()})
