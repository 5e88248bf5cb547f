"""All laws of one table of runs, with warnings in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pandas as pd

from analysis.allocation import fit_allocation
from analysis.allocation.bootstrap import SEED
from analysis.batch import fit_batch_size
from analysis.errors import DataError
from analysis.law import Law
from analysis.laws_file import Laws
from analysis.learning_rate import fit_learning_rate
from analysis.noise import SeedNoise, estimate_noise
from analysis.purposes import assign_purposes, select, tuned_envelope
from analysis.table import RunTable
from analysis.weight_decay import WeightDecayLaw, fit_weight_decay
from analysis.words import is_are, plural, was_were

NUM_BOOTSTRAP = 10_000  # with 1000 the standard error of Epoch's B wanders by 10%, with 10,000 by 3%
MOSTLY_EMBEDDINGS = 0.5  # above this share of look-up tables the loss says little about larger models
ENOUGH_SEED_DF = 2
AnyLaw = TypeVar("AnyLaw", Law, WeightDecayLaw)


def fit_laws(
    table: RunTable,
    *,
    target_flops: float | None = None,
    n_boot: int = NUM_BOOTSTRAP,
    seed: int = SEED,
    level: float = 0.9,
    force_comparable: Sequence[str] = (),
) -> Laws:
    """Fit every law that the table's runs can tell.

    `target_flops`: compute of the run that is planned. `force_comparable`: comparable hashes to use (one), or to mix in spite of
    the difference (several). DataError on runs that are not comparable and on a table too small for any law; a law that no run
    varies is null, one that the runs cannot settle has a status that says why.
    """
    if target_flops is not None and not 0 < target_flops < float("inf"):
        raise DataError(f"target_flops {target_flops} must be positive and finite")
    table = table.only_comparable(force_comparable)
    purposes = assign_purposes(table.frame)
    noise = estimate_noise(table.frame)
    knobs: dict[str, Any] = {"noise": noise, "level": level, "source_hash": table.hash}
    runs = {
        "batch_size": select(table.frame, purposes, "batch_size"),
        "learning_rate": select(table.frame, purposes, "batch_size", "learning_rate"),
        "weight_decay": select(table.frame, purposes, "weight_decay"),
    }
    batch = _some(fit_batch_size(runs["batch_size"], **knobs))
    rate = _some(fit_learning_rate(runs["learning_rate"], **knobs))
    decay = _some(fit_weight_decay(runs["weight_decay"], **knobs))
    sizes, set_aside = tuned_envelope(select(table.frame, purposes, "allocation"))
    allocation, refusal = _allocation(table, sizes, target_flops, n_boot, seed, noise)
    if refusal and batch is None and rate is None and decay is None:
        raise DataError(refusal)
    warnings = [
        *([f"no allocation: {refusal}"] if refusal else []),
        *((allocation or {}).get("warnings") or []),
        *_table_warnings(table, sizes, set_aside),
        *_noise_warnings(noise),
        *(w for law in (batch, rate) if law is not None for w in _law_warnings(law)),
        *(_decay_warnings(decay) if decay is not None else []),
    ]
    used = {"allocation": len(sizes), **{k: len(v) for k, v in runs.items()}}
    used["noise"] = 0 if noise is None else noise.num_runs
    return Laws(
        source_hash=table.hash,
        source=table.source,
        n_runs=len(table),
        convention=table.convention,
        target_flops=target_flops,
        allocation=allocation,
        batch_size=batch,
        learning_rate=rate,
        weight_decay=decay,
        noise=None if noise is None else noise.as_dict(),
        runs_used=used,
        warnings=tuple(dict.fromkeys(warnings)),
        notes=table.notes,
        left_out=tuple(x.as_dict() for x in table.left_out),
    )


def _some(law: AnyLaw) -> AnyLaw | None:
    """Null for a law that no cell speaks about."""
    return law if law.cells else None


def _allocation(
    table: RunTable, sizes: pd.DataFrame, target_flops: float | None, n_boot: int, seed: int, noise: SeedNoise | None
) -> tuple[dict[str, Any] | None, str]:
    """The allocation block, or None and the reason why the runs do not carry one."""
    if sizes.empty:
        return None, f"{table.source}: no run serves the allocation (sizes over compute budgets)"
    try:
        block = fit_allocation(sizes, convention=table.convention, target_flops=target_flops, n_boot=n_boot, seed=seed, noise=noise)
    except DataError as e:
        return None, str(e)
    return {**block, "loss_name": table.loss_name}, ""


def _table_warnings(table: RunTable, sizes: pd.DataFrame, set_aside: int) -> list[str]:
    out = []
    if table.left_out:
        out.append(f"{plural(len(table.left_out), 'row')} {is_are(len(table.left_out))} left out, each with its reason")
    flagged = int(table.frame["outlier"].sum())
    if flagged:
        what = f"{plural(flagged, 'run')} flagged as {'an outlier' if flagged == 1 else 'outliers'} by the publisher"
        out.append(f"{what} {was_were(flagged)} used; see how the laws move without")
    if sizes.empty:
        return out
    if set_aside:
        what = f"{plural(set_aside, 'run')} at worse settings than the best of the same (N, D) cell"
        out.append(f"{what} {is_are(set_aside)} set aside in the allocation")
    share = sizes["embedding_share"].dropna()
    if len(share) and share.median() > MOSTLY_EMBEDDINGS:
        out.append(
            f"embeddings are {share.median():.0%} of the parameters of the middle model: the loss says little about larger models"
        )
    variants = sizes["variant"][sizes["variant"] != ""].nunique()
    if variants > 1:
        out.append(f"the allocation mixes {variants} recipes (architecture, optimizer or schedule differ)")
    return out


def _noise_warnings(noise: SeedNoise | None) -> list[str]:
    if noise is None:
        return ["no run was repeated with another seed: the noise is unknown; run 3 seeds at one middle cell"]
    if noise.df < ENOUGH_SEED_DF:
        return [f"seed noise rests on {plural(noise.df, 'degree')} of freedom; run 3 seeds at one middle cell"]
    return []


def _law_warnings(law: Law) -> list[str]:
    name = law.name.replace("_", " ")
    out = []
    edges = [c for c in law.cells if c["edge"] in ("low", "high")]
    flat = [c for c in law.cells if c["edge"] == "flat"]
    if edges:
        sides = ", ".join(sorted({c["edge"] for c in edges}))
        what = f"{len(edges)} of {plural(len(law.cells), 'optimum', 'optima')}"
        out.append(f"{name}: {what} at the edge of the grid ({sides}); extend it on that side")
    if flat:
        out.append(f"{name}: no valley above the noise in {len(flat)} of {plural(len(law.cells), 'cell')}")
    if law.status != "converged":
        out.append(f"{name}: {law.status.replace('_', ' ')}: {law.message}")
    elif law.tests.get("N_term") and law.tests["N_term"]["significant"]:
        out.append(f"{name}: {law.message}")
    return out


def _decay_warnings(law: WeightDecayLaw) -> list[str]:
    out = []
    edges = [c for c in law.cells if c["edge"] != "interior"]
    if edges:
        out.append(f"weight decay: no optimum inside the grid in {len(edges)} of {plural(len(law.cells), 'cell')}")
    if law.status != "converged":
        out.append(f"weight decay: {law.verdict}")
    return out
