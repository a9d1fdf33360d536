"""Numbers and lists as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jfhpo_core.study.trial import Value

MINUTE, HOUR = 60.0, 3600.0

MINUS = "\N{MINUS SIGN}"

SPACE = "\N{NO-BREAK SPACE}"
"""Between a number and its unit."""


_CREDENTIALS = re.compile(r"(?<=://)(?:([^/@:\s]*):)?[^/@\s]+(?=@)")


def without_credentials(text: str) -> str:
    """A text whose URIs show no password and no token.

    >>> without_credentials("postgresql://me:secret@host/db and https://token@host")
    'postgresql://me:***@host/db and https://***@host'
    """
    return _CREDENTIALS.sub(lambda found: "***" if found[1] is None else f"{found[1]}:***", text)


def duration_unit(seconds: float) -> tuple[float, str]:
    """The unit that suits a duration: its length in seconds, and its name."""
    if seconds < 3 * MINUTE:
        return 1.0, "seconds"
    return (MINUTE, "minutes") if seconds < 3 * HOUR else (HOUR, "hours")


def duration(seconds: float) -> str:
    r"""A duration with its unit.

    >>> duration(97.2), duration(754), duration(40000)
    ('97.2\xa0s', '12.6\xa0min', '11.1\xa0h')
    """
    length, unit = duration_unit(seconds)
    amount = seconds / length
    return f"{amount:.{0 if amount >= 100 else 1}f}{SPACE}{({'seconds': 's', 'minutes': 'min', 'hours': 'h'})[unit]}"


def parameters(count: int) -> str:
    """A parameter count.

    >>> parameters(104_000), parameters(1_800_000), parameters(7_600_000_000)
    ('104k', '1.8M', '7.6B')
    """
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{suffix}"
    return str(count)


def share(value: float) -> str:
    r"""A share in percent.

    >>> share(0.2)
    '20\xa0%'
    """
    return f"{100 * value:.0f}{SPACE}%"


def number(value: float, digits: int = 3) -> str:
    """A score or correlation; a value that is not finite is named as such.

    >>> number(0.71875), number(float("nan"))
    ('0.719', 'nan')
    """
    return f"{value:.{digits}f}".replace("-", MINUS)


def figures(value: float) -> str:
    """A measured quantity to three significant digits.

    >>> figures(0.123456), figures(51234.0)
    ('0.123', '51200')
    """
    return f"{float(f'{value:.3g}'):g}"


def signed(value: float) -> str:
    """A difference of scores.

    >>> signed(0.5439)
    '+0.544'
    """
    return f"{value:+.3f}".replace("-", MINUS)


def setting(value: Value) -> str:
    """A hyperparameter's value.

    >>> setting(True), setting(0.00033455612), setting("cosine"), setting(8)
    ('true', '0.0003346', 'cosine', '8')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def listed(parts: Iterable[str], last: str = "and") -> str:
    """Parts of a sentence: 'a', 'a and b', 'a, b and c'; with `last` in place of 'and'."""
    items = list(parts)
    return f" {last} ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
