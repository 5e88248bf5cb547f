"""Errors that a user can mend."""


class ConfigError(ValueError):
    """Something the user gave is wrong. The message states the value, the rule and the remedy in one line."""
