"""Numbers with their units, in words, and read from words."""

import re
from decimal import Decimal

__all__ = ["A_SIZE", "counted", "format_bytes", "in_units", "parse_size"]

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")
SIZE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([MG]?|[MG]I?B)")
FACTORS = {"": 1, "M": 10**6, "MB": 10**6, "MIB": 2**20, "G": 10**9, "GB": 10**9, "GIB": 2**30}
A_SIZE = "a size of at least 1MB, in MB, GB, MiB or GiB: such as 16GB or 512MB"
LEAST_SIZE = 10**6  # bytes: "16" is 16GB without its unit
LARGEST_SIZE = 2**63 - 1  # bytes: what MLX takes


def counted(count: int, noun: str) -> str:
    """ "1 row" or "1,000 rows", for a noun whose plural ends in s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def in_units(nbytes: float) -> str:
    """Bytes with four digits, for columns that are compared, and kB, MB, GB and so on of powers of 1000."""
    unit = 0
    while nbytes >= 999.95 and unit < len(UNITS) - 1:
        nbytes /= 1000
        unit += 1
    places = 0 if unit == 0 else 3 if nbytes < 9.9995 else 2 if nbytes < 99.995 else 1
    return f"{nbytes:,.{places}f} {UNITS[unit]}"


def format_bytes(count: int) -> str:
    """Bytes in powers of 1000 with two places, as macOS and mlx-lm count memory."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"


def parse_size(text: str, or_zero: bool = False) -> int:
    """Bytes of "2GB" or "512MiB"; a bare number is of bytes. Case and blanks do not matter.

    Args:
        text: As an option gives it.
        or_zero: Whether 0 is a size, too.

    Raises:
        ValueError: for text that is no size from 1MB; it says all but the option.
    """
    found = SIZE.fullmatch(text.strip().upper())
    size = int(Decimal(found[1]) * FACTORS[found[2]]) if found else -1
    if size < LEAST_SIZE and not (or_zero and size == 0):
        raise ValueError(f"{text}: must be {A_SIZE}{', or 0' if or_zero else ''}")
    return min(size, LARGEST_SIZE)
