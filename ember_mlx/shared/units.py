"""Numbers with their units, in words."""

__all__ = ["format_bytes"]

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def format_bytes(nbytes: float) -> str:
    """Bytes, as people write them: four digits, and kB, MB, GB and so on of powers of 1000."""
    unit = 0
    while nbytes >= 999.95 and unit < len(UNITS) - 1:
        nbytes /= 1000
        unit += 1
    places = 0 if unit == 0 else 3 if nbytes < 9.9995 else 2 if nbytes < 99.995 else 1
    return f"{nbytes:,.{places}f} {UNITS[unit]}"
