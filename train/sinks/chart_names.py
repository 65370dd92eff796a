"""Metric names in wandb and TensorBoard: those of SAELens, so that its dashboards work."""

from __future__ import annotations

from sae_granary.train.sinks.sink import Metrics

# Ours -> theirs; other names stay as they are.
NAMES = {
    "loss": "losses/overall_loss",
    "l0": "metrics/l0",
    "fvu": "metrics/fvu",
    "explained_variance": "metrics/explained_variance",
    "dead": "sparsity/dead_fraction",
    "n_dead": "sparsity/dead_features",
    "mean_passes_since_fired": "sparsity/mean_passes_since_fired",
    "density/rare": "sparsity/below_dead_threshold",
    "density/never_fired": "sparsity/never_fired",
    "resampled": "sparsity/resampled",
    "mean_log10_density": "metrics/mean_log10_feature_sparsity",
    "log10_density": "plots/feature_density_line_chart",
    "tokens_since_fired": "sparsity/tokens_since_fired",
    "mse": "metrics/mse",
    "losses/mse": "losses/mse_loss",
    "losses/l1": "losses/l1_loss",
    "losses/l0": "losses/l0_loss",
    "losses/auxk": "losses/auxiliary_reconstruction_loss",
    "losses/dead": "losses/pre_act_loss",
    "grad_norm": "details/grad_norm",
    "lr": "details/current_learning_rate",
    "tokens": "details/n_training_samples",
    "tokens_per_second": "details/tokens_per_second",
    "epoch": "details/epoch",
    "rejected": "details/rejected_batches",
    "seconds": "details/seconds",
}


NOT_CHARTED = ("step", "cursor")


def chart_name(name: str) -> str:
    """The name under which a metric of ours is charted."""
    return f"details/{name}" if name.startswith("grad_norm/") else NAMES.get(name, name)


def charted(metrics: Metrics) -> dict[str, float | int]:
    """One line of metrics under the names of the charts; `losses/mse_loss` is there whatever loss is minimized."""
    named = {chart_name(name): value for name, value in metrics.items() if name not in NOT_CHARTED}
    if "mse" in metrics:
        named.setdefault("losses/mse_loss", metrics["mse"])
    return named
