"""The batch that every step is timed on."""

import argparse

import torch
from torch import Tensor


def rows(args: argparse.Namespace) -> Tensor:
    """One batch: a cache's rows, or sparse mixtures, whose pre-activations have the heavy tail of real ones."""
    if args.cache:
        from sae_granary import open_cache
        from sae_granary.cache.load.loader import Loader

        with Loader(open_cache(args.cache), batch_size=args.batch_size, device=args.device) as loader:
            x = next(loader).x
            assert isinstance(x, Tensor)
            return x
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2048, args.d_in, generator=generator)
    weights = torch.rand(args.batch_size, 2048, generator=generator)
    weights = weights * (torch.rand(args.batch_size, 2048, generator=generator) < 0.02)
    return (weights @ directions + 0.1 * torch.randn(args.batch_size, args.d_in, generator=generator)).to(args.device)
