"""SAE: the base class of every variant, and the methods in which variants differ.

Shapes: N rows, D = d_in, F = d_sae. A training step calls, in this order:

    sae.begin_step(progress); out = sae(x); losses = sae.losses(out, progress); sum(losses).backward()
    sae.track(out); sae.project_gradients(); clip; optimizer.step(); sae.after_step()

A variant defines `Config`, `activate` and `penalties`, and rarely more; its files follow from these declarations.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from sae_granary.sae_core.autograd import Centered, center, decode, empty_encoder, encode_at
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.data import Activation, Inputs, Reads, Rows, SAEOutput, Source, as_rows
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.functional import remove_parallel, to_unit_norm, typical_row
from sae_granary.sae_core.latents import PerLatent
from sae_granary.sae_core.losses import LossScale
from sae_granary.sae_core.normalize import Affine, Normalizer, moments
from sae_granary.sae_core.options import Progress, SharedConfig
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.ranks.reduce import ALONE, Alone
from sae_granary.sae_core.ranks.sharded import normal_rows, sum_gradients, sum_values

MAX_FIT_ROWS = 2**20  # rows that mean, scale and V are taken from


class SAE(nn.Module):
    """Base of all sparse autoencoders."""

    type_name: ClassVar[str] = ""
    reads: ClassVar[Reads] = Reads()
    # Numbers of each latent, by the attribute that holds them; the first are added to the encoder product.
    latents: ClassVar[Mapping[str, PerLatent]] = {"b_enc": PerLatent()}
    linear_paths: ClassVar[tuple[str, ...]] = ()  # parameters (D, D_out) from the encoder's input past the codes
    unclipped: ClassVar[tuple[str, ...]] = ()  # parameters whose gradients a global clip neither counts nor scales
    unit_decoder: bool = False  # rows of W_dec kept at unit norm
    keeps_unit_rows: bool = True  # by `project_gradients` and `after_step`; False: the optimizer's step does it
    splits_batches: ClassVar[bool] = True  # losses are means over rows, so that ranks may share a batch
    ranks: Alone = ALONE  # those that this SAE shares its batches with, in training
    shards: Alone = ALONE  # those that its latents are divided over: it then has d_sae of them, after lower ranks'
    shards_latents: ClassVar[bool] = False  # whether they can be; see `register`
    has_encoder: ClassVar[bool] = True  # False: the dictionary is its own encoder, there is no W_enc
    subtracts_b_dec: ClassVar[bool] = True  # the decoder bias is taken off the input before it is encoded
    selects_in_batch: ClassVar[bool] = False  # which latents of a row are active depends on the other rows
    recommended: ClassVar[Mapping[str, Any]] = {}  # trainer settings that suit the variant better than the defaults

    Config: TypeAlias = SharedConfig
    config: SharedConfig
    b_enc: nn.Parameter
    loss_variance: Tensor
    loss_mean_square: Tensor
    num_tokens_since_fired: Tensor

    def __init__(self, config: SharedConfig) -> None:
        super().__init__()
        self.config = config
        self.build()

    def build(self) -> None:
        """Create the normalizer, the parameters and the buffers; linear paths start at zero."""
        config, d_out = self.config, self.d_out
        self.register_buffer("loss_variance", torch.ones(()))  # V = E|x - mean|^2 of the normalized target
        self.register_buffer("loss_mean_square", torch.ones(()))
        self.register_buffer("num_tokens_since_fired", torch.zeros(config.d_sae, dtype=torch.int64))
        self.normalizer = Normalizer(config.normalize, self.d_encoded)
        if self.has_encoder:
            self.W_enc = nn.Parameter(empty_encoder(self.d_encoded, config.d_sae))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        for name, declared in self.latents.items():
            setattr(self, name, declared.make(config))
        for name in self.linear_paths:
            setattr(self, name, nn.Parameter(torch.zeros(self.d_encoded, d_out)))
        if not self.W_dec.is_meta:
            self.reset_weights(torch.Generator().manual_seed(0))

    @property
    def core(self) -> "SAE":
        """The SAE that holds W_enc and W_dec: itself, or the inner SAE of a variant that wraps one."""
        return self

    @property
    def encoder_bias(self) -> Tensor:
        """Bias (F,) added to the encoder product: the first entry of `latents`."""
        return getattr(self, next(iter(self.latents)))  # type: ignore[no-any-return]

    @property
    def d_encoded(self) -> int:
        """Width of the encoder's input."""
        return self.config.d_in

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.config.d_in

    @torch.no_grad()
    def reset_weights(self, generator: torch.Generator) -> None:
        """Draw isotropic unit decoder rows, set the encoder to their transpose, reset each latent's numbers."""
        rows = normal_rows(self.W_dec.shape, generator, self.shards)
        self.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        if self.has_encoder:
            self.W_enc.copy_(self.W_dec.t())
        for name, declared in self.latents.items():
            declared.reset(getattr(self, name), self.config)

    @torch.no_grad()
    def initialize(self, sample: Inputs, generator: torch.Generator) -> None:
        """Fit the normalization and the loss scale to a sample of raw rows (N, D), then draw the weights.

        The sample holds rows that the run will train on (2**20 at most). Raises NonFiniteError if none can be fitted.
        """
        x = as_rows(sample, like=self)
        for normalizer, hook in zip(self.normalizers, self.reads.take(x, len(self.normalizers)), strict=True):
            normalizer.fit(hook[:MAX_FIT_ROWS])
        rows = self.prepare(x).target[:MAX_FIT_ROWS]
        for scale, value in zip((self.loss_variance, self.loss_mean_square), moments(rows), strict=True):
            scale.copy_(value)
        self.reset_weights(generator)
        self.b_dec.copy_(typical_row(rows, self.config.b_dec_init))

    @property
    def normalizers(self) -> Sequence[Normalizer]:
        """One per hook point of a batch."""
        return (self.normalizer,)

    def scalings(self) -> tuple[Affine, Affine]:
        """Affine maps before the encoder (D) and their inverses after the decoder (D_out)."""
        return self.normalizers[0].scaling(), self.normalizers[-1].scaling()

    def prepare(self, x: Rows) -> Source:
        """Normalize raw rows: the encoder's input and the target of the reconstruction."""
        rows = self.reads.take(x, 1)[0]
        normalized = self.normalizer(rows)
        return Source(normalized.values, normalized.values, normalized.undo, rows)

    def center(self, rows: Tensor) -> Centered:
        """Subtract the decoder bias from normalized rows (N, D) before they are encoded."""
        b_dec = sum_gradients(self.core.b_dec, self.shards)
        return center(rows, b_dec) if self.core.subtracts_b_dec else Centered(rows)

    def encoder_input(self, x: Inputs) -> Centered:
        """Return raw rows (N, D) normalized and centered, as the encoder reads them."""
        return self.center(self.prepare(as_rows(x, self)).input)

    def pre_acts(self, h: Centered) -> PreActs:
        """Pre-activations (N, F) of centered rows h (N, D), without gradients: `encode_at` adds them where needed."""
        return PreActs(h.values, self.W_enc, self.encoder_bias)

    def encode_at(self, h: Centered, kept: Codes) -> Tensor:
        """Pre-activations of a pattern, differentiable: (nnz,), or (N, F) for a full pattern."""
        return encode_at(h, self.W_enc, self.encoder_bias, kept)

    def activate(self, h: Centered) -> Activation:
        """Return the codes of centered, normalized rows h (N, D), by the rule of the current mode (train or eval)."""
        raise NotImplementedError(f"{type(self).__name__} does not define activate()")

    def reconstruct(self, codes: Codes) -> Tensor:
        """Decode in the normalized space: (N, D_out)."""
        return sum_values(decode(codes, self.W_dec), self.shards) + self.b_dec

    def reconstruct_for_losses(self, activation: Activation, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruct target (N, D_out), and return what the variant's losses need from the decoder."""
        return self.reconstruct(activation.codes), {}

    def complete(self, recon: Tensor, source: Source) -> Tensor:
        """Add the linear paths, which bypass the codes, to a reconstruction (N, D_out)."""
        for name in self.linear_paths:
            recon = recon + source.input @ getattr(self, name)
        return recon

    def forward(self, x: Inputs) -> SAEOutput:
        """Encode and decode raw rows (N, D), or several hook points' by name."""
        source = self.prepare(as_rows(x, self))
        activation = self.activate(self.center(source.input))
        recon, extras = self.reconstruct_for_losses(activation, source.target)
        recon, extras = self.complete(recon, source), {**source.extras, **activation.extras, **extras}
        return SAEOutput(source.reference, activation.codes, recon, source, activation.pre_acts, extras)

    def encode(self, x: Inputs) -> Codes:
        """Return the codes of raw rows (N, D); of one row (D,) or sequences (..., D) as of all their rows in order."""
        return self.activate(self.encoder_input(x)).codes

    def decode(self, codes: Codes, like: Inputs | None = None) -> Tensor:
        """Return the reconstruction (N, D_out) of codes in raw space.

        Raises OptionError without the rows that were encoded (`like`) where it depends on them.
        """
        recon = self.reconstruct(codes)
        if like is not None:
            source = self.prepare(as_rows(like, self))
            return source.undo(self.complete(recon, source))
        if self.normalizer.per_row or self.linear_paths:
            raise OptionError("the reconstruction depends on the rows beside their codes: call decode(codes, like=x)")
        return self.scalings()[1].undo(recon)

    @property
    def loss_scale(self) -> LossScale:
        """Divisors of errors and penalties."""
        return LossScale(self.config.loss, self.loss_variance, self.loss_mean_square)

    def losses(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """Return the weighted terms by name; a run minimizes their sum."""
        reconstruction = self.loss_scale.reconstruction(out.recon, out.source.target)
        return {self.loss_scale.name: reconstruction, **self.penalties(out, progress)}

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """Weighted penalties by name, divided by `loss_scale.unit`, added to the reconstruction loss."""
        return {}

    def monitor(self, out: SAEOutput) -> dict[str, Tensor | float]:
        """Scalars to log beside losses and metrics, by name."""
        return {}

    def begin_step(self, progress: Progress) -> None:
        """Set annealed options (k, coefficients) before the forward pass of a step."""

    @property
    def dead_mask(self) -> Tensor:
        """(F,) which latents have been silent for `dead_after_tokens` rows of training."""
        return self.core.num_tokens_since_fired >= self.core.config.dead_after_tokens

    @torch.no_grad()
    def track(self, out: SAEOutput) -> None:
        """Update counters (steps since each latent fired, thresholds) that training and resuming need."""
        fired, (n_rows,) = self.ranks.total(out.codes.fired(), out.codes.shape[0])
        self.num_tokens_since_fired += n_rows
        self.num_tokens_since_fired.masked_fill_(fired > 0, 0)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove the gradient component parallel to each decoder row, which renormalization would undo."""
        if self.unit_decoder and self.keeps_unit_rows and self.W_dec.grad is not None:
            remove_parallel(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def after_step(self) -> None:
        """Return the decoder rows to unit norm."""
        if self.unit_decoder and self.keeps_unit_rows:
            to_unit_norm(self.W_dec)

    def calibrate(self, batches: Iterable[Inputs]) -> None:
        """Fit what only inference needs, such as a threshold, on batches of rows: faster if these are no iterator."""
