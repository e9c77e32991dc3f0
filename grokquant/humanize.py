"""Sizes, times and numbers as people read them: digits that the error allows, with units."""

from math import floor, log10

# Keeps a number and its unit on one line.
NBSP = "\u00a0"
MINUS = "−"
# More decimals than these are written as a power of ten.
_MOST_DECIMALS = 7
_MOST_DECIMALS_OF_PERCENT = 5
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def size(count: float) -> str:
    """Bytes in decimal units, three digits: 4.10 MB, 158 GB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{three_digits(count / factor)} {unit}"
    return f"{count:.0f} B"


def three_digits(value: float) -> str:
    """A number from 1 up with three significant digits: 4.10, 15.8, 1,000."""
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def duration(seconds: float) -> str:
    """Seconds as the two largest units: 1 h 05 min, 2 min 10 s, 7 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def number(value: float, error: float = 0.0) -> str:
    """A value to the second digit of its error, or to four digits if it has no error."""
    value = value + 0.0  # no negative zero
    magnitude = error if error > 0 else abs(value)
    if magnitude == 0:
        return "0"
    significant = 2 if error > 0 else 4
    decimals = significant - 1 - floor(log10(magnitude))
    if decimals > _MOST_DECIMALS:
        return _scientific(value)
    text = f"{value:.{max(decimals, 0)}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def percent(share: float, digits: int = 2) -> str:
    """A fraction in percent, to `digits` significant digits: 0.41 %, 12.5 %."""
    shown = share * 100
    if shown == 0:
        return f"0{NBSP}%"
    decimals = max(digits - 1 - floor(log10(abs(shown))), 0)
    exact = decimals <= _MOST_DECIMALS_OF_PERCENT
    text = f"{shown:.{decimals}f}" if exact else _scientific(shown)
    return f"{text}{NBSP}%".replace("-", MINUS)


def tick_percent(share: float) -> str:
    """For ticks and small labels: 5 %, 12.5 %."""
    return f"{share * 100:.4g}{NBSP}%"


def rough(value: float) -> str:
    """Two significant digits, for sentences."""
    return number(value, abs(value))


def short(value: float) -> str:
    """For ticks, which have little room: 0.001, 1, but 10⁻⁶ and 5×10⁻⁴ below a thousandth."""
    if value and abs(value) < 1e-3:
        narrow = _scientific(value).replace(NBSP, "").replace(".0×", "×")
        return narrow.removeprefix("1×")
    return f"{value:.3g}"


def count(things: int) -> str:
    """7.7 million, 314 billion."""
    for word, factor in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if things >= factor:
            return f"{three_digits(things / factor)}{NBSP}{word}"
    return str(things)


def unbroken_size(stored: int) -> str:
    """`size` that stays on one line."""
    return size(stored).replace(" ", NBSP)


def with_unit(text: str, unit: str) -> str:
    return f"{text}{NBSP}{unit}" if unit else text


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(_SUPERSCRIPT)
    return f"{mantissa.replace('-', MINUS)}{NBSP}×{NBSP}10{power}"
