"""Numbers that a processor is slow with are 0 in a training, and as before after it."""

import pytest
import torch

from sae_granary.common.denormals import DENORMAL, flushed_denormals, flushes_denormals

if not torch.set_flush_denormal(False):
    pytest.skip("this processor does not flush denormals", allow_module_level=True)


def test_a_mean_gradient_that_fades_becomes_zero_within_and_not_outside() -> None:
    faded = torch.full((100,), DENORMAL)
    with flushed_denormals():
        assert float((0.9 * faded).sum()) == 0.0
    assert float((0.9 * faded).sum()) > 0.0


def test_what_was_set_before_is_set_after_even_an_error() -> None:
    with flushed_denormals():
        with pytest.raises(RuntimeError, match="stop"), flushed_denormals():
            raise RuntimeError("stop")
        assert flushes_denormals()
    assert not flushes_denormals()
