"""What can go wrong while harvesting.

GranaryError
└── HarvestError              every expected failure: `sae-harvest` prints it in one line and exits with 2
    ├── SourceError           a dataset, file or column that is not found
    │   └── SourceStoppedError    a source that broke off half-way: the harvest can be continued
    ├── NoRowsError           a dataset of which nothing is fit to harvest
    └── SpaceError            not enough room on the disk for what is planned (also an OSError)

Invalid settings are a `ConfigError` of `sae_granary.common.errors`, models that cannot be used a `ModelError` of
`sae_granary.models.errors`.
"""

from sae_granary.common.errors import GranaryError


class HarvestError(GranaryError):
    """Every expected failure of a harvest."""


class SourceError(HarvestError):
    """A dataset, file or text column that is not found."""


class SourceStoppedError(SourceError):
    """A source that broke off half-way; the same command continues the harvest."""


class NoRowsError(HarvestError):
    """A dataset of which nothing is fit to harvest."""

    def __init__(self, dataset: str, skipped: str, columns: tuple[str, ...]) -> None:
        found = f"all its records were skipped ({skipped})" if skipped else "it holds no records"
        remedy = f", or name another column than {', '.join(columns)} with --text-column" if columns else ""
        super().__init__(f"no rows were harvested from dataset {dataset}: {found}; give data with text{remedy}")


class SpaceError(HarvestError, OSError):
    """Not enough room on the disk for what is planned."""
