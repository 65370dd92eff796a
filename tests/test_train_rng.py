"""Random generators of a run: those of the CPU and of its own device."""

import pytest
import torch
from torch import Tensor

from sae_granary.train.state.rng import Rng


def test_states_of_gpus_in_a_checkpoint_are_left_out_on_a_cpu() -> None:
    states = {"cpu": torch.get_rng_state(), "cuda:0": torch.zeros(16, dtype=torch.uint8)}
    drawn = []
    for _ in range(2):
        with Rng("cpu", states) as rng:
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert set(rng.tensors) == {"cpu"}


@pytest.mark.parametrize(
    ("device", "stored", "restored"),
    [
        ("cuda:1", {"cuda:0": 10, "cuda:1": 11}, 11),  # a checkpoint of an earlier version has all GPUs
        ("cuda", {"cuda:0": 10, "cuda:1": 11}, 10),
        ("cuda:1", {"cuda:0": 10}, 10),  # resumed on another GPU
        ("cuda:1", {}, None),
    ],
)
def test_only_the_generator_of_the_own_gpu_is_set_and_read(
    device: str, stored: dict[str, int], restored: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []

    def read(device: torch.device) -> Tensor:
        calls.append((f"read {device}", 7))
        return torch.tensor(7)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_rng_state", read)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: calls.append((f"set {device}", int(state))))
    states = {name: torch.tensor(number) for name, number in stored.items()}
    with Rng(device, {"cpu": torch.get_rng_state(), **states}) as rng:
        pass
    assert calls == [(f"set {device}", restored)] * (restored is not None) + [(f"read {device}", 7)]
    assert set(rng.tensors) == {"cpu", "cuda:1" if device == "cuda:1" else "cuda:0"}
