"""SAE: what every variant shares, and the few methods in which variants differ.

Shapes: N rows, D = d_in, F = d_sae. A training step calls, in this order:

    sae.begin_step(progress); out = sae(x); losses = sae.losses(out, progress); sum(losses).backward()
    sae.track(out); sae.project_gradients(); clip; optimizer.step(); sae.after_step()
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_granary.sae_core.autograd import Centered, center, decode, empty_encoder, encode_at
from sae_granary.sae_core.auxk import Dictionary, auxk_loss
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.data import Activation, Inputs, Reads, Rows, SAEOutput, Source, as_rows, take_hooks
from sae_granary.sae_core.errors import NonFiniteError, OptionError
from sae_granary.sae_core.functional import geometric_median, remove_parallel, to_unit_norm
from sae_granary.sae_core.normalize import MODES, Normalized, Normalizer
from sae_granary.sae_core.options import Progress, check, option
from sae_granary.sae_core.pre_acts import PreActs

MAX_INIT_ROWS = 2**15  # rows that the geometric median looks at
MAX_FIT_ROWS = 2**20  # rows that mean, scale and V are taken from
LM_LOSSES = ("ce", "kl")  # through a language model: the trainer puts them in the place of `reconstruction_name`
LOSSES = ("fvu", "mse", "nmse", *LM_LOSSES)
B_DEC_INITS = ("geometric_median", "mean", "zero")


class SAE(nn.Module):
    """Base of all sparse autoencoders; a variant overrides `activate`, `penalties` and what else differs."""

    type_name: ClassVar[str] = ""
    reads: ClassVar[Reads] = Reads()
    unit_decoder: ClassVar[bool] = False  # rows of W_dec kept at unit norm
    signed_codes: ClassVar[bool] = False  # latents stand for both directions: no ReLU, the largest magnitudes count
    has_encoder: ClassVar[bool] = True  # False: the dictionary is its own encoder, there is no W_enc
    subtracts_b_dec: ClassVar[bool] = True  # the decoder bias is taken off the input before it is encoded
    needs_calibration: ClassVar[bool] = False
    saelens_architecture: ClassVar[str] = ""  # the SAELens architecture that computes the same inference
    unscaled_latent_tensors: ClassVar[frozenset[str]] = frozenset()  # those not in units of the pre-activations
    reads_saelens: ClassVar[str] = ""  # the SAELens architecture that is loaded as this variant
    sparsify_flags: ClassVar[tuple[bool, bool] | None] = None  # transcode, skip_connection; not inherited

    @dataclass(frozen=True)
    class Config:
        """Options of every variant."""

        d_in: int = option(help="width of the activations", gt=0)
        d_sae: int = option(help="number of latents", gt=0)
        normalize: str = option("dataset", help="input normalisation", choices=MODES)
        loss: str = option("fvu", help="reconstruction loss, or one through the model", choices=LOSSES)
        b_dec_init: str = option("geometric_median", help="start of b_dec", choices=B_DEC_INITS)
        dead_after_tokens: int = option(10_000_000, help="rows without firing after which a latent is dead", gt=0)

        def __post_init__(self) -> None:
            check(self)
            self.validate()

        def validate(self) -> None:
            """Check what spans several options; raise OptionError."""

    config: "SAE.Config"
    loss_variance: Tensor
    loss_mean_square: Tensor
    num_tokens_since_fired: Tensor

    def __init__(self, config: "SAE.Config") -> None:
        super().__init__()
        self.config = config
        self.build()

    def build(self) -> None:
        """Create the normaliser, the parameters and the buffers."""
        # V = E|x - mean|^2 and E|x|^2 of the normalised rows: the scales that losses are divided by.
        self.register_buffer("loss_variance", torch.ones(()))
        self.register_buffer("loss_mean_square", torch.ones(()))
        self.register_buffer("num_tokens_since_fired", torch.zeros(self.config.d_sae, dtype=torch.int64))
        self.build_parameters()

    def build_parameters(self) -> None:
        """Create the normaliser and the parameters."""
        d_sae = self.config.d_sae
        self.normalizer = Normalizer(self.config.normalize, self.d_encoded)
        self.W_enc = nn.Parameter(empty_encoder(self.d_encoded, d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.build_latent_parameters()
        self.reset_weights(torch.Generator().manual_seed(0))

    def build_latent_parameters(self) -> None:
        """Create the parameters that each latent has one number of."""
        self.b_enc = nn.Parameter(torch.zeros(self.config.d_sae))

    @property
    def core(self) -> "SAE":
        """The SAE that holds W_enc and W_dec: this one, or the one that a wrapping variant feeds."""
        return self

    @property
    def encoder_bias(self) -> Tensor:
        """(F,) what is added to the encoder product."""
        return self.b_enc

    @property
    def d_encoded(self) -> int:
        """Width of what enters the encoder."""
        return self.config.d_in

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.config.d_in

    @classmethod
    def recommended(cls) -> dict[str, Any]:
        """Trainer settings that suit the variant better than the trainer's defaults."""
        return {}

    # -- start -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_weights(self, generator: torch.Generator) -> None:
        """Isotropic decoder rows of unit norm, the encoder their transpose, no encoder bias."""
        rows = torch.randn(self.W_dec.shape, generator=generator, device=generator.device)
        self.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        self.W_enc.copy_(self.W_dec.t())
        self.encoder_bias.zero_()

    @torch.no_grad()
    def initialize(self, sample: Inputs, generator: torch.Generator) -> None:
        """Fit the normalisation and the loss scale to a sample of raw rows (N, D), then draw the weights.

        The sample holds rows that the run will train on; at most 2**20 of them are used.
        Raises NonFiniteError if it holds NaN or Inf.
        """
        x = as_rows(sample, self.b_dec)
        self.fit_normalization(x)
        target = self.prepare(x).target[:MAX_FIT_ROWS]
        if not bool(torch.isfinite(target).all()):
            raise NonFiniteError("the sample that the normalisation is fitted to holds NaN or Inf: verify the cache")
        rows = target.double()
        centred = (rows - rows.mean(0)).square().sum(1).mean()
        self.loss_variance.copy_(centred.clamp_min(1e-30))
        self.loss_mean_square.copy_(rows.square().sum(1).mean().clamp_min(1e-30))
        self.reset_weights(generator)
        if self.config.b_dec_init == "geometric_median":
            self.b_dec.copy_(geometric_median(rows[:MAX_INIT_ROWS]))
        elif self.config.b_dec_init == "mean":
            self.b_dec.copy_(rows.mean(0))
        else:
            self.b_dec.zero_()

    def fit_normalization(self, x: Rows) -> None:
        """Fit what is in front of the encoder to a sample of raw rows."""
        self.normalizer.fit(take_hooks(x, 1)[0][:MAX_FIT_ROWS])

    # -- forward -----------------------------------------------------------------------------------------------

    def prepare(self, x: Rows) -> Source:
        """Normalise raw rows into what is encoded and what is to be reconstructed."""
        rows = take_hooks(x, 1)[0]
        normalized: Normalized = self.normalizer(rows)
        return Source(normalized.values, normalized.values, normalized.undo, rows)

    def center(self, rows: Tensor) -> Centered:
        """Subtract the decoder bias from normalised rows (N, D) before they are encoded."""
        core = self.core
        return center(rows, core.b_dec) if core.subtracts_b_dec else Centered(rows)

    def pre_acts(self, h: Centered) -> PreActs:
        """Pre-activations (N, F) of centered rows h (N, D), without gradients: `encode_at` adds them where needed."""
        return PreActs(h.values, self.W_enc, self.encoder_bias)

    def encode_at(self, h: Centered, kept: Codes) -> Tensor:
        """The pre-activations that were kept, with gradients: (nnz,), or (N, F) for a full pattern."""
        return encode_at(h, self.W_enc, self.encoder_bias, kept)

    def activate(self, h: Centered) -> Activation:
        """Turn centered, normalised rows h (N, D) into codes. In training mode as trained, else as in inference."""
        raise NotImplementedError(f"{type(self).__name__} does not define activate()")

    def reconstruct(self, codes: Codes) -> Tensor:
        """Decode in the normalised space: (N, D_out)."""
        return decode(codes, self.W_dec) + self.b_dec

    def reconstruct_for_losses(self, activation: Activation, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction, and beside it what a variant's losses need of the decoder; target (N, D_out)."""
        return self.reconstruct(activation.codes), {}

    def complete(self, recon: Tensor, source: Source) -> Tensor:
        """Add to a reconstruction (N, D_out) what does not pass through the codes."""
        return recon

    def forward(self, x: Inputs) -> SAEOutput:
        """Encode and decode raw rows (N, D), or several hook points' by name."""
        source = self.prepare(as_rows(x, self.core.b_dec))
        activation = self.activate(self.center(source.input))
        recon, extras = self.reconstruct_for_losses(activation, source.target)
        recon = self.complete(recon, source)
        return SAEOutput(
            x_hat=source.undo(recon),
            x=source.reference,
            codes=activation.codes,
            recon=recon,
            source=source,
            pre_acts=activation.pre_acts,
            extras={**source.extras, **activation.extras, **extras},
        )

    def encoder_input(self, x: Inputs) -> Centered:
        """Return raw rows (N, D) as they enter the encoder."""
        return self.center(self.prepare(as_rows(x, self.core.b_dec)).input)

    def encode(self, x: Inputs) -> Codes:
        """Return the codes of raw rows (N, D)."""
        return self.activate(self.encoder_input(x)).codes

    def decode(self, codes: Codes, like: Inputs | None = None) -> Tensor:
        """Return the reconstruction (N, D_out) of codes in raw space.

        `unit_norm` needs the rows that were encoded (`like`), since each row has its own mean and scale.
        """
        recon = self.reconstruct(codes)
        if like is not None:
            return self.prepare(as_rows(like, self.core.b_dec)).undo(recon)
        if self.normalizer.per_row:
            raise OptionError("normalize='unit_norm' undoes each row's own scale: call decode(codes, like=x)")
        return self.normalizer.undo_fixed(recon)

    # -- losses ------------------------------------------------------------------------------------------------

    def losses(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """Return the weighted terms by name; a run minimises their sum."""
        losses = {self.reconstruction_name: self.reconstruction_loss(out.recon, out.source.target)}
        losses.update(self.penalties(out, progress))
        return losses

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """What a variant adds to the reconstruction loss, weighted and on the scale of `loss_unit`."""
        return {}

    @property
    def reconstruction_name(self) -> str:
        """The term of `losses` that compares with the input; with a loss through a language model it is fvu."""
        return "fvu" if self.config.loss in LM_LOSSES else self.config.loss

    @property
    def loss_unit(self) -> Tensor:
        """What a squared error summed over D is divided by: V (fvu), E|x|^2 (nmse) or 1 (mse)."""
        if self.reconstruction_name == "fvu":
            return self.loss_variance
        return self.loss_mean_square if self.reconstruction_name == "nmse" else torch.ones_like(self.loss_variance)

    @property
    def fvu_unit(self) -> Tensor:
        """What a term without a dimension, such as AuxK, is multiplied by: V (mse) or 1."""
        return self.loss_variance if self.config.loss == "mse" else torch.ones_like(self.loss_variance)

    def reconstruction_loss(self, recon: Tensor, target: Tensor) -> Tensor:
        """Mean over rows of |target - recon|^2, divided by V (fvu), by each row's |x|^2 (nmse) or by nothing (mse)."""
        if self.reconstruction_name == "nmse":
            return self.mean_error((target - recon).square().sum(-1), target)
        return F.mse_loss(recon, target, reduction="sum") / (self.loss_unit * len(target))

    def mean_error(self, errors: Tensor, target: Tensor) -> Tensor:
        """Mean over rows of squared errors (N,), divided as `reconstruction_loss` does; target (N, D_out)."""
        if self.reconstruction_name == "nmse":
            return (errors / target.square().sum(-1).clamp_min(1e-12)).mean()
        return errors.mean() / self.loss_unit

    def auxk_term(self, out: SAEOutput, k_aux: int, coef: float) -> Tensor | None:
        """AuxK on the dead latents, on the loss's scale; None while no latent is dead or the term is off."""
        dead = self.dead_mask
        if coef == 0 or not bool(dead.any()):
            return None
        error = (out.source.target - out.recon).detach()
        weights = Dictionary(self.W_enc, self.encoder_bias, self.W_dec)
        loss = auxk_loss(error, out.pre_acts, weights, dead, k_aux, signed=self.signed_codes)
        return coef * loss * self.fvu_unit

    def monitor(self, out: SAEOutput) -> dict[str, float]:
        """What is worth logging beside losses and metrics, by name."""
        return {}

    # -- around the optimizer step -------------------------------------------------------------------------------

    def begin_step(self, progress: Progress) -> None:
        """Set what an annealed option needs before the forward pass of a step."""

    @property
    def dead_mask(self) -> Tensor:
        """(F,) which latents have been silent for `dead_after_tokens` rows of training."""
        return self.num_tokens_since_fired >= self.config.dead_after_tokens

    @torch.no_grad()
    def track(self, out: SAEOutput) -> None:
        """Update the counters that later steps and resuming need."""
        self.num_tokens_since_fired += out.codes.shape[0]
        self.num_tokens_since_fired[out.codes.fired() > 0] = 0

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove the gradient component parallel to each decoder row, which renormalising would undo."""
        if self.unit_decoder and self.W_dec.grad is not None:
            remove_parallel(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def after_step(self) -> None:
        """Return the decoder rows to unit norm."""
        if self.unit_decoder:
            to_unit_norm(self.W_dec)

    @torch.no_grad()
    def reset_latents(self, latents: Tensor) -> None:
        """Return what latents (n,) have besides their encoder and decoder rows to where it starts."""
        if self.has_encoder:
            self.encoder_bias[latents] = 0.0

    def calibrate(self, batches: Iterable[Inputs]) -> None:
        """Set what only inference needs (a threshold) from batches of training rows."""

    # -- inference form ------------------------------------------------------------------------------------------

    def input_scaling(self) -> tuple[Tensor, Tensor]:
        """(scale, mean), each (D,): what is encoded is (x - mean) * scale. Not for per-row normalisation."""
        return self.normalizer.scaling()

    def output_scaling(self) -> tuple[Tensor, Tensor]:
        """(scale, mean), each (D_out,): the reconstruction is undone as y / scale + mean."""
        return self.normalizer.scaling()

    def output_bias(self) -> Tensor:
        """(D_out,) what the decoder adds in the normalised space."""
        return self.b_dec

    def extra_tensors(self) -> dict[str, Tensor]:
        """Tensors of the inference form that SAELens has no name for; kept in a file of our own."""
        return {}

    def set_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `extra_tensors` gave."""

    def latent_tensors(self) -> dict[str, Tensor]:
        """Tensors (F,) of the inference form by SAELens name, in units of the pre-activations."""
        return {"b_enc": self.b_enc.detach()}

    @torch.no_grad()
    def set_latent_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `latent_tensors` gave."""
        self.b_enc.copy_(tensors["b_enc"])

    def saelens_fields(self) -> dict[str, Any]:
        """Entries of cfg.json that only this variant's architecture has."""
        return {}

    @classmethod
    def config_from_saelens(cls, cfg: Mapping[str, Any], shared: Mapping[str, Any]) -> "SAE.Config":
        """Build the Config for a SAELens cfg.json; `shared` holds d_in, d_sae and normalize."""
        return cls.Config(**shared)
