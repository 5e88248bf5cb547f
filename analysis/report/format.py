"""Numbers as people read them: parameters, tokens, FLOPs, losses, durations, intervals, and the ticks of log axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeGuard

from analysis.words import plural as plural

SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
SI_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
MISSING = "–"
Formatter = Callable[[float], str]


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def significant(value: float | None, digits: int = 3) -> str:
    """Plain decimal with `digits` significant digits, scientific outside 1e-4..1e6."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return scientific(value, digits)
    value = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return minus(f"{value:,.{decimals}f}")


def scientific(value: float | None, digits: int = 3) -> str:
    """1.6×10¹³; an exact power of ten is written 10¹³."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    if mantissa in ("1", "-1"):
        return minus(mantissa[:-1]) + power
    return f"{minus(mantissa)}×{power}"


def flops(value: float | None) -> str:
    return scientific(value, 3)


def count(value: float | None, digits: int = 3) -> str:
    """Parameters and tokens: 85.3k, 124M, 3.81B, 1.2T (B is 10⁹, as the field writes it)."""
    if value is None or not math.isfinite(value):
        return MISSING
    rounded = float(f"{value:.{digits}g}")
    for unit, letter in SI_UNITS:
        if abs(rounded) >= unit:
            return significant(value / unit, digits) + letter
    return significant(value, digits) if value != int(value) else minus(f"{int(value):,}")


def whole(value: float | None) -> str:
    """A batch in tokens: every digit up to 100,000, then as a count."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{round(value):,}" if value < 1e5 else count(value)


def loss(value: float | None) -> str:
    """Four decimals: seed noise of a language model's loss lies in the third or fourth."""
    return MISSING if value is None or not math.isfinite(value) else minus(f"{value:.4f}")


def percent(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """A share as per cent with `digits` significant digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = significant(100 * value, digits) if abs(value) >= 1e-6 else "0"
    return ("+" if signed and value > 0 else "") + text + "%"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{significant(seconds, 2)} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def minus(text: str) -> str:
    return text.replace("-", "−")


def exponent(value: float) -> str:
    """'−0.53'."""
    return minus(f"{value:.2f}")


def interval(low: float | None, high: float | None, formatter: Formatter) -> str:
    """'11.2 to 14.9'; 'no interval' where an end is unknown."""
    if not is_number(low) or not is_number(high):
        return "no interval"
    return f"{formatter(low)} to {formatter(high)}"


def level(value: float | None) -> str:
    return "90%" if value is None else f"{100 * value:.0f}%"


def join(words: list[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def log_ticks(low: float, high: float, formatter: Formatter, most: int = 6) -> tuple[list[float], list[str]]:
    """Tick positions and labels of a log axis over low..high: decades, or 1-2-5, or finer, whichever gives at most `most`.

    A narrow axis (less than a factor of two) gets evenly spaced round numbers.
    """
    assert 0 < low <= high
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    inside: list[float] = []
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        values = [m * 10.0**e for e in range(first, last + 1) for m in mantissas]
        finer = [v for v in values if low * 0.999 <= v <= high * 1.001]
        if len(finer) > most and (len(inside) >= 2 or len(finer) > most + 2):
            break
        inside = finer
    if not inside:
        inside = [10.0**e for e in range(first, last + 1) if low <= 10.0**e <= high]
    if len(inside) > most:
        inside = inside[:: math.ceil(len(inside) / most)]
    if len(inside) < 2:
        inside = linear_ticks(low, high, most)
    return inside, [formatter(v) for v in inside]


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most about `most` round numbers in low..high."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [k * step for k in range(start, math.floor(high / step + 1e-9) + 1)]


def tick_flops(value: float) -> str:
    return scientific(value, 2)


def tick_count(value: float) -> str:
    return _trim(count(value, 3))


def tick_plain(value: float) -> str:
    return _trim(significant(value, 3))


def _trim(text: str) -> str:
    """1.50k -> 1.5k, 10.0 -> 10: ticks are round numbers."""
    number, unit = (text[:-1], text[-1]) if text[-1:].isalpha() else (text, "")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + unit
