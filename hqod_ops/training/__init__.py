"""Training and evaluating detectors: settings, runs, reports; what ``hqod train`` does."""


class ConfigError(ValueError):
    """A setting, a path or a file of the user's is wrong; the message is one clear line."""
