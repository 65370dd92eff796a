"""Harvest a transformer's activations once, train every sparse autoencoder from them, look at what was learned.

The public API. Names are imported when they are first used: `import sae_granary` loads neither torch nor numpy.

    from sae_granary import harvest_activations, load_sae, open_cache, train_sae

    harvest_activations(model="bert-base-uncased", layers=6, max_tokens="5M", out="cache/bert_l6")
    result = train_sae(cache="cache/bert_l6", type="batchtopk", k=32)
    rows, sae = open_cache("cache/bert_l6"), load_sae(result.folder)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "BatchDataset",
    "CacheWriter",
    "__version__",
    "batches",
    "encode_cache",
    "encode_texts",
    "harvest_activations",
    "load_sae",
    "open_cache",
    "resume_sweep",
    "resume_training",
    "train_sae",
    "train_sweep",
]

if TYPE_CHECKING:
    from sae_granary.analyze.encoding.encode import encode_cache
    from sae_granary.analyze.encoding.texts import encode_texts
    from sae_granary.cache.loops import BatchDataset, batches
    from sae_granary.cache.opening import open_cache
    from sae_granary.cache.vectors.writer import VectorWriter as CacheWriter
    from sae_granary.harvest.run import harvest_activations
    from sae_granary.sae_core import load as load_sae
    from sae_granary.train.run import resume_training, train_sae
    from sae_granary.train.sweeps.sweep import resume_sweep, train_sweep
else:
    # name -> (module, its name there); a test compares this with the imports above
    _LAZY = {
        "BatchDataset": ("cache.loops", "BatchDataset"),
        "batches": ("cache.loops", "batches"),
        "CacheWriter": ("cache.vectors.writer", "VectorWriter"),
        "encode_cache": ("analyze.encoding.encode", "encode_cache"),
        "encode_texts": ("analyze.encoding.texts", "encode_texts"),
        "harvest_activations": ("harvest.run", "harvest_activations"),
        "load_sae": ("sae_core", "load"),
        "open_cache": ("cache.opening", "open_cache"),
        "resume_sweep": ("train.sweeps.sweep", "resume_sweep"),
        "resume_training": ("train.run", "resume_training"),
        "train_sae": ("train.run", "train_sae"),
        "train_sweep": ("train.sweeps.sweep", "train_sweep"),
    }

    def __getattr__(name):
        if name not in _LAZY:
            raise AttributeError(f"module 'sae_granary' has no attribute {name!r}")
        from importlib import import_module

        module, attribute = _LAZY[name]
        value = globals()[name] = getattr(import_module(f"sae_granary.{module}"), attribute)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
