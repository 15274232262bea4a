"""Numbers with their units, in words."""

__all__ = ["format_bytes", "in_units"]

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


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
