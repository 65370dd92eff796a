"""Route: a router picks or mixes several layers per row, and one shared SAE encodes the result (arXiv 2503.08200)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from sae_granary.sae_core import registry
from sae_granary.sae_core.autograd import Centered
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.data import Activation, Inputs, Reads, Repeatable, Rows, SAEOutput, Source, as_rows
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.normalize import Normalizer
from sae_granary.sae_core.options import Progress, SharedConfig, option
from sae_granary.sae_core.registry import register

SHARED = ("d_in", "d_sae", "loss", "b_dec_init", "dead_after_tokens")  # options that the base takes over


def _middle_half(names: Sequence[str], n_layers: int | None) -> tuple[str, ...]:
    """The middle half of the model's layers, as in the paper; all hook points if fewer than two lie there."""
    layers = {name: name.removeprefix("layer_") for name in names}
    n = n_layers or 0
    middle = tuple(name for name, i in layers.items() if i.isdigit() and n <= 4 * int(i) < 3 * n)
    return middle if len(middle) > 1 else tuple(names)


@register("route")
class RouteSAE(SAE):
    """r = softmax(x_agg @ W_router); x_r = p_max * x_argmax (hard) or sum p_l x_l (soft); the base encodes x_r.

    Every hook's row is normalized to mean 0 and variance 1 first. The target is x_r, detached: otherwise the router
    lowers the loss by shrinking what is to be reconstructed. Metrics are in the space of x_r.
    """

    reads = Reads(several=True, default_hooks=_middle_half)

    @dataclass(frozen=True)
    class Config(SAE.Config):
        """Options of route."""

        normalize: str = option(
            "unit_norm", help="Normalization of each row of each hook point.", choices=("unit_norm",)
        )
        loss: str = option("nmse", help="Reconstruction loss.", choices=("nmse", "fvu", "mse"))
        n_hooks: int = option(1, help="Hook points in a batch, set from the cache.", gt=0)
        base: str = option("topk", help="Type of the shared SAE.")
        k: int | None = option(
            None,
            help="Active latents per row of a k-sparse base.",
            default_words="that of the base",
            gt=0,
            short="-k",
            common=True,
        )
        base_options: Mapping[str, Any] | None = option(
            None, help="Further options of the base, as a mapping.", options_of="base"
        )
        routing: str = option(
            "hard", help="hard: one layer per row; soft: a mixture of layers.", choices=("hard", "soft")
        )
        aggregate: str = option("sum", help="How the router combines the layers that it sees.", choices=("sum", "mean"))
        detach_target: bool = option(
            True,
            help="Detach the target of the loss; false: the loss of the paper, whose target moves with the router.",
        )

        def validate(self) -> None:
            """Check that the base exists, reads one hook point and accepts its options."""
            self.base_config()

        def base_config(self) -> SharedConfig:
            """Config of the base SAE, which reads normalized rows."""
            cls = registry.get(self.base)
            if not cls.reads.one_row:
                raise OptionError(f"base={self.base!r} reads several hook points: expected a type that reads one")
            for name in self.base_options or {}:
                if name in (*SHARED, "normalize"):
                    raise OptionError(f"base_options holds {name!r}: set it on route itself, the base takes it over")
            values: dict[str, Any] = {name: getattr(self, name) for name in SHARED}
            values |= {"normalize": "none", **(self.base_options or {})}
            known = {spec.name for spec in fields(cls.Config)}
            if self.k is not None:
                values["k"] = self.k
            for name in values:
                if name not in known:
                    raise OptionError(f"{name}: base {self.base!r} has no such option; it has {', '.join(known)}")
            return cls.Config(**values)

    config: Config

    def build(self) -> None:
        """Create the router and the base."""
        self.normalizer = Normalizer("unit_norm", self.config.d_in)
        self.W_router = nn.Parameter(torch.empty(self.config.d_in, self.config.n_hooks))
        base_config = self.config.base_config()
        self.base_sae = registry.get(self.config.base)(base_config)
        self._reset_router(torch.Generator().manual_seed(0))

    @property
    def core(self) -> SAE:
        """The base."""
        return self.base_sae

    @torch.no_grad()
    def _reset_router(self, generator: torch.Generator) -> None:
        """Uniform in +-1/sqrt(D), torch's default for a linear layer."""
        bound = self.config.d_in**-0.5
        uniform = torch.rand(self.W_router.shape, generator=generator, device=generator.device)
        self.W_router.copy_((2 * uniform - 1) * bound)

    @torch.no_grad()
    def initialize(self, sample: Inputs, generator: torch.Generator) -> None:
        """Draw the router, then fit the base to the routed rows of the sample."""
        self._reset_router(generator)
        self.base_sae.initialize(self.prepare(as_rows(sample, self)).input, generator)

    def prepare(self, x: Rows) -> Source:
        """Normalize each hook's rows and route them; the probabilities (N, L) are among the extras."""
        hooks = self.reads.take(x, self.config.n_hooks)
        layers = torch.stack([self.normalizer(rows).values for rows in hooks], dim=1)
        if layers.shape[1] == 1:  # nothing to choose: no gradient of the rows is built for the router
            return self._source(layers[:, 0], layers.new_ones(len(layers), 1))
        probabilities = self.route(layers)
        if self.config.routing == "soft":
            routed = (probabilities[:, :, None] * layers).sum(1)
        else:
            p_max, chosen = probabilities.max(1)
            routed = p_max[:, None] * layers[torch.arange(len(chosen), device=chosen.device), chosen]
        return self._source(routed, probabilities.detach())

    def _source(self, routed: Tensor, probabilities: Tensor) -> Source:
        target = routed.detach() if self.config.detach_target else routed
        return Source(routed, target, lambda recon: recon, routed.detach(), {"probabilities": probabilities})

    def route(self, layers: Tensor) -> Tensor:
        """Routing probabilities (N, L) of normalized layers (N, L, D)."""
        seen = layers.sum(1) if self.config.aggregate == "sum" else layers.mean(1)
        return torch.softmax(seen @ self.W_router, dim=1)

    def monitor(self, out: SAEOutput) -> dict[str, Tensor | float]:
        """Share of rows per hook point, entropy of these shares in nats, mean p_max, and the base's values."""
        probabilities = out.extras["probabilities"]
        chosen = torch.bincount(probabilities.argmax(1), minlength=self.config.n_hooks) / probabilities.shape[0]
        entropy = -(chosen * chosen.clamp_min(1e-12).log()).sum()
        shares = {f"route_{i}": share for i, share in enumerate(chosen)}
        p_max = probabilities.max(1).values.mean()
        return {"route_entropy": entropy, "p_max": p_max, **shares, **self.base_sae.monitor(out)}

    # -- the base does the rest ------------------------------------------------------------------------------------

    def activate(self, h: Centered) -> Activation:
        """Encode as the base does."""
        return self.base_sae.activate(h)

    def reconstruct(self, codes: Codes) -> Tensor:
        """Decode as the base does."""
        return self.base_sae.reconstruct(codes)

    def reconstruct_for_losses(self, activation: Activation, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode as the base does."""
        return self.base_sae.reconstruct_for_losses(activation, target)

    def decode(self, codes: Codes, like: Inputs | None = None) -> Tensor:
        """Return the reconstruction in the space of x_r."""
        return self.reconstruct(codes)

    def losses(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """The base's losses on x_r."""
        return self.base_sae.losses(out, progress)

    def begin_step(self, progress: Progress) -> None:
        """Anneal as the base does."""
        self.base_sae.begin_step(progress)

    def track(self, out: SAEOutput) -> None:
        """Update the base's counters."""
        self.base_sae.track(out)

    def project_gradients(self) -> None:
        """Project the base's decoder gradient."""
        self.base_sae.project_gradients()

    def after_step(self) -> None:
        """Renormalize the base's decoder."""
        self.base_sae.after_step()

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Inputs]) -> None:
        """Calibrate the base on routed rows."""
        routed = Repeatable(lambda: (self.prepare(as_rows(x, self)).input for x in batches))
        self.base_sae.calibrate(iter(routed) if isinstance(batches, Iterator) else routed)
