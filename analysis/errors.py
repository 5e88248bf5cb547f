"""Errors that a user can mend."""


class DataError(ValueError):
    """A table, a file or a request cannot be analysed. The message states the value, the rule and the remedy in one line."""
