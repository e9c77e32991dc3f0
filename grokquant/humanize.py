"""Sizes and times as people read them."""


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
