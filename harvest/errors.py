"""What can go wrong while harvesting.

GranaryError
└── HarvestError              every expected failure: `sae-harvest` prints it in one line and exits with 2
    ├── ConfigError           a flag or a combination of flags (also a ValueError)
    ├── ModelError            a model that is not found, or cannot be used
    ├── HookError             a layer or module that the model does not have (also a LookupError)
    ├── SourceError           a data set, file or column that is not found
    │   └── SourceStoppedError    a source that broke off half-way: the harvest can be continued
    ├── NoRowsError           a data set of which nothing is fit to harvest
    ├── SpaceError            not enough room on the disk for what is planned (also an OSError)
    └── MemoryLimitError      a single window does not fit the device's memory
KeyboardInterrupt
└── InterruptedHarvest        SIGINT or SIGTERM, carries the exit code 130 or 143
"""

from sae_granary.common.errors import GranaryError


class HarvestError(GranaryError):
    """Every expected failure of a harvest."""


class ConfigError(HarvestError, ValueError):
    """A flag or a combination of flags that cannot be."""


class ModelError(HarvestError):
    """A model that is not found or cannot be used."""


class HookError(HarvestError, LookupError):
    """A layer or module that the model does not have."""


class SourceError(HarvestError):
    """A data set, file or text column that is not found."""


class SourceStoppedError(SourceError):
    """A source that broke off half-way; the same command continues the harvest."""


class NoRowsError(HarvestError):
    """A data set of which nothing is fit to harvest."""

    def __init__(self, dataset: str, skipped: str, columns: tuple[str, ...]) -> None:
        found = f"all its records were skipped ({skipped})" if skipped else "it holds no records"
        remedy = f", or name another column than {', '.join(columns)} with --text-column" if columns else ""
        super().__init__(f"no rows were harvested from data set {dataset}: {found}; give data with text{remedy}")


class SpaceError(HarvestError, OSError):
    """Not enough room on the disk for what is planned."""


class MemoryLimitError(HarvestError):
    """A single window does not fit the device's memory."""


class InterruptedHarvest(KeyboardInterrupt):
    """A signal ended the harvest; what is committed stays."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"interrupted (exit code {exit_code})")
        self.exit_code = exit_code
