"""Sparse autoencoders as torch modules, with their losses, metrics and files.

sae = sae_core.load("runs/bert_l6_batchtopk")
codes = sae.encode(x)  # sparse: values, indices, indptr
x_hat = sae(x).x_hat
"""

from sae_granary.sae_core import registry
from sae_granary.sae_core.autograd import Centered
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.data import Activation, Reads, Rows, SAEOutput, Source, as_rows
from sae_granary.sae_core.errors import SAEError
from sae_granary.sae_core.files.io import load, load_native, save, save_native
from sae_granary.sae_core.files.sparsify import save_sparsify
from sae_granary.sae_core.latents import PerLatent
from sae_granary.sae_core.options import FREE, PRE_ACTS, Progress, option
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.registry import make_config, register

__all__ = [
    "FREE",
    "PRE_ACTS",
    "SAE",
    "Activation",
    "Centered",
    "Codes",
    "Pattern",
    "PerLatent",
    "PreActs",
    "Progress",
    "Reads",
    "Rows",
    "SAEError",
    "SAEOutput",
    "Source",
    "as_rows",
    "load",
    "load_native",
    "make_config",
    "option",
    "register",
    "registry",
    "save",
    "save_native",
    "save_sparsify",
]
