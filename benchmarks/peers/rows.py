"""The batch that every step is timed on."""

import argparse

from torch import Tensor

from benchmarks.cuda_visit.saes import mixtures


def rows(args: argparse.Namespace) -> Tensor:
    """One batch: a cache's rows, or sparse mixtures, whose pre-activations have the heavy tail of real ones."""
    if args.cache:
        from sae_granary import open_cache
        from sae_granary.cache.load.loader import Loader

        with Loader(open_cache(args.cache), batch_size=args.batch_size, device=args.device) as loader:
            x = next(loader).x
            assert isinstance(x, Tensor)
            return x
    return mixtures(args.batch_size, args.d_in, args.device)
