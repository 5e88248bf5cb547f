"""Fitted laws into a recipe: a usable law replaces a rule, and each value can tell which of the two it came from.

A law whose status is not "converged" blocks a launch until the user names it: `accept` uses it all the same, `without`
keeps the recipe's own rule in its place. `accept` with "prediction" lets a launch go against a refused prediction of its loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanochat_model.config import GPTConfig
from nanochat_model.counts import CONVENTIONS, Convention, count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.recipe import PowerRule, Recipe

GOOD = "converged"
LAW_NAMES = ("allocation", "batch_size", "learning_rate", "weight_decay")
PREDICTION = "prediction"  # accepted by name like a law, though it is what laws say of one run
Laws = Mapping[str, Any]  # laws.json as plain data; its schema is analysis/laws.schema.json


@dataclass(frozen=True, kw_only=True)
class RuleUse:
    """Which law or rule a quantity comes from."""

    quantity: str
    kind: str  # "law", "rule", or "given" by the user
    source: str
    status: str
    blocking: str = ""  # why a launch must stop here; empty: it need not


@dataclass(frozen=True, kw_only=True)
class LawRecipe:
    """A recipe with the laws put in, and where each quantity comes from."""

    recipe: Recipe
    uses: tuple[RuleUse, ...]
    allocation: Mapping[str, Any] | None = None  # the block to take sizes and horizons from; null: the recipe's ratio
    predictor: Mapping[str, Any] | None = None  # the block to predict losses from; its prediction has its own verdict
    accepts_prediction: bool = False  # whatever its verdict

    @property
    def blocking(self) -> tuple[str, ...]:
        return tuple(use.blocking for use in self.uses if use.blocking)

    def given(self, quantity: str, source: str) -> LawRecipe:
        """The user gives `quantity` itself, so its law is not used and cannot stop a launch; sizes' law still predicts the loss."""
        uses = (
            replace(u, kind="given", source=source, blocking=u.blocking if quantity == "allocation" else "")
            if u.quantity == quantity
            else u
            for u in self.uses
        )
        return replace(self, uses=tuple(uses))

    def use(self, quantity: str) -> RuleUse:
        return next(use for use in self.uses if use.quantity == quantity)


def recipe_from_laws(laws: Laws | None, base: Recipe, *, accept: Collection[str] = (), without: Collection[str] = ()) -> LawRecipe:
    """`base` with every usable law of `laws` in place of its rule. Raises ConfigError on a name that is no law's
    (nor, in `accept`, "prediction")."""
    for name in (*(set(accept) - {PREDICTION}), *without):
        if name not in LAW_NAMES:
            raise ConfigError(f"law {name!r} is unknown; laws are {', '.join(LAW_NAMES)}")
    changes: dict[str, Any] = {}
    uses = [_allocation_use(laws, base, accept, without)]
    for name, field, rule_of in _RULES:
        law = _usable(laws, name)
        use = _use(name, law, getattr(base, field), accept, without)
        uses.append(use)
        if use.kind == "law":
            assert law is not None
            changes[field] = rule_of(law, base)
    return LawRecipe(
        recipe=replace(base, name=f"{base.name} with laws", **changes) if changes else base,
        uses=tuple(uses),
        allocation=laws["allocation"] if laws and uses[0].kind == "law" else None,
        predictor=laws.get("allocation") if laws and "allocation" not in without else None,
        accepts_prediction=PREDICTION in accept,
    )


def optimal_horizon(allocation: Mapping[str, Any], model: GPTConfig) -> Horizon:
    """The horizon for which `model` is the compute-optimal size.

    On L = E + A/N^α + B/D^β with C ∝ N·D, the optimum has α·A/N^α = β·B/D^β (Hoffmann et al., arXiv 2203.15556, eq. 4).
    Where the surface is not good, the isoFLOP minima's N*(C) is solved for the compute.
    """
    n = float(count_params(model).by_convention(convention_of(allocation)))
    fit = allocation.get("parametric") or {}
    if _has_surface(allocation):
        alpha, beta = fit["alpha"], fit["beta"]
        log_tokens = (math.log(beta * fit["B"]) - math.log(alpha * fit["A"]) + alpha * math.log(n)) / beta
        return Horizon(num_tokens=math.exp(log_tokens))
    law = allocation["isoflop"]["N"]
    return Horizon(train_flops=(n / law["coefficient"]) ** (1 / law["exponent"]))


def best_model(
    flops: float, models: Iterable[GPTConfig], *, allocation: Mapping[str, Any] | None, tokens_per_param: float
) -> GPTConfig:
    """The model to train with `flops`: lowest loss on the laws' surface; else the size nearest to the isoFLOP minima's N*(C);
    without laws the ratio nearest to `tokens_per_param`."""

    def badness(model: GPTConfig) -> float:
        tokens = flops / flops_per_token(model)
        if allocation is None:
            return abs(math.log(tokens / count_params(model).scaling / tokens_per_param))
        if _has_surface(allocation):
            return surface_loss(allocation, model, tokens)
        law = allocation["isoflop"]["N"]
        best = law["coefficient"] * flops ** law["exponent"]
        return abs(math.log(count_params(model).by_convention(convention_of(allocation)) / best))

    return min(models, key=badness)


def _has_surface(allocation: Mapping[str, Any]) -> bool:
    """Whether sizes are chosen by the surface: when it is good, and when (accepted by name) there is nothing better."""
    fit, minima = allocation.get("parametric") or {}, allocation.get("isoflop") or {}
    return fit.get("status") == GOOD or (fit.get("alpha") is not None and not (minima.get("N") or {}).get("exponent"))


def surface_loss(allocation: Mapping[str, Any], model: GPTConfig, num_tokens: float) -> float:
    """Loss of the parametric surface, to rank sizes at one budget; predictions come from the frontier."""
    n = float(count_params(model).by_convention(convention_of(allocation)))
    fit = allocation["parametric"]
    return fit["E"] + fit["A"] / n ** fit["alpha"] + fit["B"] / num_tokens ** fit["beta"]


def convention_of(allocation: Mapping[str, Any]) -> Convention:
    """How N is counted in these laws. ConfigError for a table of somebody else's own counting: a model cannot be placed on it."""
    name = allocation.get("convention", CONVENTIONS[0])
    if name not in CONVENTIONS:
        raise ConfigError(
            f"these laws count parameters {name!r}, which says nothing about a model here; fit again and name the column by what "
            "it counts (--params-all, --params-matrices-lm-head or --params-matrices in place of --params), or plan "
            "--without-law allocation"
        )
    return name


def _usable(laws: Laws | None, name: str) -> Mapping[str, Any] | None:
    """The law-shaped block of a quantity: for weight decay the average of its candidates."""
    block = (laws or {}).get(name)
    if block and name == "weight_decay":
        average = block.get("average") or {}
        return {**average, "status": block.get("status", "not_fitted"), "method": "average of the candidates"}
    return block or None


def _use(name: str, law: Mapping[str, Any] | None, rule: PowerRule, accept: Collection[str], without: Collection[str]) -> RuleUse:
    status = law.get("status", "not_fitted") if law else "not_fitted"
    fitted = bool(law) and law.get("coefficient") is not None  # type: ignore[union-attr]
    if fitted and name not in without and (status == GOOD or name in accept):
        assert law is not None
        return RuleUse(quantity=name, kind="law", source=law_text(law), status=status)
    blocking = ""
    if law and status not in (GOOD, "not_fitted") and name not in without:
        accepting = f"use it with --accept-law {name}, or" if fitted else "it has no value to use: take"
        blocking = f"law {name} has status {status!r}; {accepting} the recipe's rule with --without-law {name}"
    return RuleUse(quantity=name, kind="rule", source=rule.source, status=rule.status, blocking=blocking)


def _allocation_use(laws: Laws | None, base: Recipe, accept: Collection[str], without: Collection[str]) -> RuleUse:
    """The surface when it is good, else the isoFLOP minima when they are; anything else blocks until it is named."""
    rule = f"{base.tokens_per_param:g} tokens per parameter, recipe {base.name}"
    block = (laws or {}).get("allocation")
    if not block or "allocation" in without:
        return RuleUse(quantity="allocation", kind="rule", source=rule, status="assumed")
    fit, minima = block.get("parametric") or {}, block.get("isoflop") or {}
    status = fit.get("status", "not_fitted")
    if status == GOOD:
        source = f"L = {fit['E']:.4g} + {fit['A']:.4g}/N^{fit['alpha']:.3f} + {fit['B']:.4g}/D^{fit['beta']:.3f}, n = {fit['n']}"
        return RuleUse(quantity="allocation", kind="law", source=source, status=status)
    law = minima.get("N") or {}
    if "allocation" in accept and _has_surface(block):
        return RuleUse(quantity="allocation", kind="law", source="the surface, accepted by name", status=status)
    if law.get("exponent") and (minima.get("status") == GOOD or "allocation" in accept):
        source = f"isoFLOP minima, N* = {law['coefficient']:.3g} · C^{law['exponent']:.3f} (the surface is {status})"
        return RuleUse(quantity="allocation", kind="law", source=source, status=minima.get("status", "not_fitted"))
    blocking = (
        f"law allocation has status {status!r}; use it with --accept-law allocation, or the recipe's ratio with "
        "--without-law allocation"
    )
    return RuleUse(quantity="allocation", kind="rule", source=rule, status="assumed", blocking=blocking)


def law_text(law: Mapping[str, Any]) -> str:
    """A power law in one line, for example "1.2e+04 · (D/2e+06)^0.41, n = 9, two-dimensional quadratics"."""
    references = law.get("references", {})
    factors = [
        f"({symbol}/{references[symbol]:.3g})^{exponent:.3g}" if symbol in references else f"{symbol}^{exponent:.3g}"
        for symbol, exponent in law["exponents"].items()
    ]
    tail = [f"n = {law['n']}"] if law.get("n") is not None else []
    tail += [law["method"]] if law.get("method") else []
    return ", ".join([" · ".join([f"{law['coefficient']:.4g}", *factors]), *tail])


def _power_rule(law: Mapping[str, Any], scale: float = 1.0) -> PowerRule:
    return PowerRule(
        coefficient=law["coefficient"] * scale,
        exponents=law["exponents"],
        references=law.get("references", {}),
        source=f"fitted: {law_text(law)}",
        status="fitted",
    )


def _plain_rule(law: Mapping[str, Any], base: Recipe) -> PowerRule:
    return _power_rule(law)


def _lr_rule(law: Mapping[str, Any], base: Recipe) -> PowerRule:
    """The learning-rate law gives the matrix rate; all rates keep their proportions to it."""
    return _power_rule(law, 1.0 / base.optimizer.matrix_lr)


_RULES: tuple[tuple[str, str, Callable[[Mapping[str, Any], Recipe], PowerRule]], ...] = (
    ("batch_size", "batch_size", _plain_rule),
    ("learning_rate", "lr_multiplier", _lr_rule),
    ("weight_decay", "weight_decay", _plain_rule),
)
