"""How fast is the bootstrap of the parametric fit, and is every resample as good as a careful fit of its own?

    python bench/bootstrap.py [--resamples 1000] [--careful 200]

Table: the 240 runs of arXiv 2404.10102 (tests/data). Reference speed: the published autograd and BFGS bootstrap, one start, takes
29.7 s per 1000 resamples on two cores. Target: 1000 resamples in 3.5 s with 99.9% of them no worse than a careful fit.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.allocation import bootstrap_parametric, fit_parametric
from analysis.allocation.bootstrap import SEED, minimize_resamples, resample_weights
from analysis.allocation.parametric import make_problem
from analysis.allocation.starts import search

TABLE = Path(__file__).parents[1] / "tests" / "data" / "chinchilla_epoch.csv"
PUBLISHED_SECONDS = 29.7
PUBLISHED_SE = {"A": 124.5, "B": 1293.0, "E": 0.0257, "alpha": 0.0154, "beta": 0.0206, "a": 0.020}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--careful", type=int, default=200, help="resamples to fit again with the whole search")
    args = parser.parse_args()
    t = pd.read_csv(TABLE)
    t = t[~t["epoch_outlier"]]
    columns = tuple(t[k].to_numpy() for k in ("N", "D", "L"))
    start = time.perf_counter()
    fit = fit_parametric(*columns)
    print(f"one fit, whole search      {time.perf_counter() - start:6.2f} s   objective {fit.objective_log:.7e}")
    problem, _ = make_problem(*columns, fit.delta)
    weights, _, _ = resample_weights(len(t), args.resamples, None, SEED)
    start = time.perf_counter()
    _, value = minimize_resamples(problem, weights, fit.minima)
    seconds = time.perf_counter() - start
    per_thousand = seconds * 1000 / args.resamples
    print(f"{args.resamples} resamples            {seconds:6.2f} s   {PUBLISHED_SECONDS / per_thousand:.0f}x the published speed")
    some = min(args.careful, args.resamples)
    start = time.perf_counter()
    careful = np.array([search(problem, weights[i])[1][0] for i in range(some)])
    good = float(np.mean(value[:some] <= careful * (1 + 1e-6)))
    print(f"{some} careful fits         {time.perf_counter() - start:6.2f} s   {good:.2%} of the resamples are no worse")
    boot = bootstrap_parametric(fit, *columns)
    print(f"\nstandard errors, {boot.n_boot} resamples\n{'':8}{'here':>10}{'published':>11}{'ratio':>8}")
    for name, published in PUBLISHED_SE.items():
        print(f"{name:8}{boot.se[name]:>10.4g}{published:>11.4g}{boot.se[name] / published:>8.3f}")


if __name__ == "__main__":
    main()
