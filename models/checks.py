"""Checks of a model's settings."""


def check_positive_integer(name: str, value: object) -> None:
    """Booleans are no integers here."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")
