"""`sae-analyze encode`, `stats`, `show`, ... Heavy imports are inside the commands that need them."""

from __future__ import annotations

from sae_granary.analyze.commands.encode import encode
from sae_granary.analyze.commands.evaluate import evaluate
from sae_granary.analyze.commands.report import report
from sae_granary.analyze.commands.search import search
from sae_granary.analyze.commands.show import show
from sae_granary.analyze.commands.stats import stats
from sae_granary.common.app import make_app

app = make_app("sae-analyze", "Look at what an SAE learned: codes, latents, metrics, report.")

app.command()(encode)
app.command(name="eval")(evaluate)
app.command()(stats)
app.command()(show)
app.command()(report)
app.command()(search)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
