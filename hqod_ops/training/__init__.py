"""Training and evaluating detectors: settings, runs, reports; what ``hqod train`` does."""


class WorkerError(RuntimeError):
    """A process that loads images died; a run can be resumed from its last checkpoint."""


class ConfigError(ValueError):
    """A setting, a path or a file of the user's is wrong; the message is one clear line."""
