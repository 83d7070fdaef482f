"""How numbers are written for people: one form for the terminal, the report and the progress line."""

from __future__ import annotations

import math

NONE = "-"


def percent(fraction: float | None) -> str:
    """A fraction as a percentage with two decimals."""
    return NONE if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f} %"


def points(difference: float | None) -> str:
    """A difference of two fractions in percentage points, with its sign."""
    return NONE if difference is None or math.isnan(difference) else f"{100 * difference:+.2f} points"


def number(value: float | None) -> str:
    """A plain number with four digits."""
    return NONE if value is None or math.isnan(value) else f"{value:.4g}"


def whole(value: int | None) -> str:
    """A whole number with a comma after each thousand."""
    return NONE if value is None else f"{value:,}"


def counted(value: int, noun: str, plural: str | None = None) -> str:
    """How many there are of something: 1 sample, 2 samples, 1,024 samples."""
    return f"{whole(value)} {noun if value == 1 else plural or f'{noun}s'}"


def count(value: int | None) -> str:
    """A large count with four digits and its unit: 11.17 M."""
    return NONE if value is None else _scaled(value, "").rstrip()


def size(value: int | None) -> str:
    """A number of bytes with four digits, in powers of 1000."""
    return NONE if value is None else _scaled(value, "B")


def milliseconds(value: float | None) -> str:
    """A short time."""
    return NONE if value is None or math.isnan(value) else f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def ratio(larger: float | None, smaller: float | None) -> str:
    """How many times `smaller` goes into `larger`."""
    if not larger or not smaller:
        return NONE
    times = larger / smaller
    return f"{times:.3g}x" if times < 100 else f"{times:,.0f}x"


def _scaled(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if value < 999.95:
            return f"{value:.4g} {prefix}{unit}"
        value /= 1000
    return f"{value:,.4g} T{unit}"
