"""The options of all types as flags, without torch: written by `make regenerate`."""

# ruff: noqa: E501
# fmt: off
from __future__ import annotations

from dataclasses import dataclass

from sae_granary.common.settings.declare import setting


@dataclass(frozen=True)
class TypeOptions:
    """What is not given is None; the type that is trained knows its options, and their types and ranges."""

    d_sae: str | None = setting(None, help="Number of latents.", panel="Model", common=True, default_words="8 * d_in")
    normalize: str | None = setting(None, panel="Options of the types", help="Input normalization.", choices=('dataset', 'mean', 'mean+dataset', 'unit_norm', 'none'))
    loss: str | None = setting(None, panel="Options of the types", help="Reconstruction loss; kl and ce go through the language model.", choices=('fvu', 'mse', 'nmse', 'ce', 'kl'))
    b_dec_init: str | None = setting(None, help="Initialization of b_dec.", panel="Options of the types", choices=('geometric_median', 'mean', 'zero'), default_words="geometric_median")
    dead_after_tokens: str | None = setting(None, help="A latent that has not fired for this long is dead.", panel="Options of the types", unit="rows", default_words="5 % of the run")
    k: str | None = setting(None, panel="Model", short="-k", common=True, help="Active latents per row. Not for gated, jumprelu, vanilla.")
    auxk_coef: str | None = setting(None, panel="Options of the types", default_words="0.03125", help="Weight of the AuxK loss. Not for gated, matching_pursuit, route, route_matryoshka, vanilla.")
    k_aux: str | None = setting(None, help="Number of dead latents per row in the AuxK loss. Not for gated, jumprelu, matching_pursuit, route, route_matryoshka, vanilla.", panel="Options of the types", default_words="half of d_out")
    multi_topk: bool | None = setting(None, help="Add 1/8 of the loss at 4k, so that the SAE still works at a larger k. Not for gated, jumprelu, matching_pursuit, route, route_matryoshka, vanilla.", panel="Options of the types")
    k_start: str | None = setting(None, help="k at the start of the run; it falls to k during k_anneal. Not for gated, jumprelu, matching_pursuit, route, route_matryoshka, vanilla.", panel="Options of the types", default_words="off")
    k_anneal: str | None = setting(None, help="Share of the run over which k falls from k_start. Not for gated, jumprelu, matching_pursuit, route, route_matryoshka, vanilla.", panel="Options of the types", default_words="0.1")
    l1_coef: str | None = setting(None, panel="Options of the types", default_words="5", help="Weight of |ReLU(p_gate)|_1, for rows scaled to E|x|^2 = d_in. For gated, vanilla.")
    l1_warmup: str | None = setting(None, help="Share of the run over which l1_coef rises from 0. For gated, vanilla.", panel="Options of the types", default_words="0.05")
    p_end: str | None = setting(None, help="Exponent of the penalty at the end of the run; 1 is plain L1. For gated, vanilla.", panel="Options of the types", default_words="1")
    p_anneal_from: str | None = setting(None, help="Share of the run after which the exponent falls to p_end. For gated, vanilla.", panel="Options of the types", default_words="0.5")
    recipe: str | None = setting(None, help="How thresholds are trained: L0 as a constraint, or a penalty with a coefficient. For jumprelu.", panel="Options of the types", choices=('constraint', 'l0_penalty', 'tanh_penalty', 'gemma', 'anthropic', 'tanh', 'l0', 'l0_target'), default_words="constraint")
    l0_target: str | None = setting(None, help="Target L0 of constraint and l0_target; the L0 at which l0_penalty and tanh_penalty start. For jumprelu.", panel="Options of the types", unit="latents per row", default_words="32")
    l0_coef: str | None = setting(None, help="Weight of the penalty, for rows scaled to E|x|^2 = d_in; not for constraint. For jumprelu.", panel="Options of the types", default_words="0.3 for l0_penalty and tanh_penalty, 10 for anthropic and tanh, else 1")
    l0_warmup: str | None = setting(None, help="Share of the run over which l0_coef rises from 0. For jumprelu.", panel="Options of the types", default_words="0.25 for l0_penalty and tanh_penalty, 10,000 steps for gemma, else 1")
    tanh_scale: str | None = setting(None, help="c in tanh(c z |W_dec|). For jumprelu.", panel="Options of the types", default_words="4")
    dead_coef: str | None = setting(None, help="Weight of the pre-activation loss: of dead latents for tanh, of all for anthropic. For jumprelu.", panel="Options of the types", default_words="3e-06")
    threshold_init: str | None = setting(None, help="Initial threshold. For jumprelu.", panel="Options of the types", default_words="0.1 for tanh and anthropic, 0.001 sqrt(d_in) for l0, l0_target and gemma, else from l0_target")
    bandwidth: str | None = setting(None, help="Width of the kernel through which thresholds get a gradient. For jumprelu.", panel="Options of the types", default_words="2 for tanh and anthropic, 0.001 sqrt(d_in) for l0, l0_target and gemma, else 0.3 * threshold")
    fractions: str | None = setting(None, panel="Options of the types", help="Ends of the nested prefixes, as shares of d_sae; the last is 1. For matryoshka, temporal.")
    group_sizes: str | None = setting(None, help="Latents per group, which sum to d_sae; instead of fractions. For matryoshka, temporal.", panel="Options of the types", default_words="from fractions")
    base: str | None = setting(None, help="Type of the shared SAE. For route, route_matryoshka.", panel="Options of the types")
    base_options: str | None = setting(None, help="Further options of the base, as a mapping. For route, route_matryoshka.", panel="Options of the types")
    routing: str | None = setting(None, help="hard: one layer per row; soft: a mixture of layers. For route, route_matryoshka.", panel="Options of the types", choices=('hard', 'soft'), default_words="hard")
    aggregate: str | None = setting(None, help="How the router combines the layers that it sees. For route, route_matryoshka.", panel="Options of the types", choices=('sum', 'mean'), default_words="sum")
    detach_target: bool | None = setting(None, help="Detach the target of the loss; false: the loss of the paper, whose target moves with the router. For route, route_matryoshka.", panel="Options of the types", default_words="true")
    temporal_coef: str | None = setting(None, help="Weight of the contrastive loss, in units of FVU. For temporal.", panel="Options of the types", default_words="0.1")
    temperature: str | None = setting(None, help="Temperature of the contrastive loss, which divides its cosines. For temporal.", panel="Options of the types", default_words="1")
    max_pairs: str | None = setting(None, help="Rows of a batch that the contrastive loss compares. For temporal.", panel="Options of the types", unit="rows", default_words="1024")
