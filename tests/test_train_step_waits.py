"""How often a step makes the host wait for a GPU. Counted on the CPU, where the steps are told that reading costs."""

import copy
import sys

import pytest
import torch
from step_kit import D_SAE, N_ROWS, Bytes, Launches, Waits, batch, count_reads, make_run
from torch import distributed

from sae_granary.sae_core import Progress, losses, pre_acts, registry
from sae_granary.sae_core.kernels import deferred, gpu_screen, padded
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.ranks.reduce import Ranks
from sae_granary.train.config.merge import make_config
from sae_granary.train.loop import train_step
from sae_granary.train.memory import capacity


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_reads(monkeypatch)


@pytest.mark.parametrize("n_parts", [1, 2])
@pytest.mark.parametrize("name", registry.names())
def test_a_step_waits_once_and_computes_the_same(name: str, n_parts: int, reading: list[int], monkeypatch) -> None:
    run, plain = (make_run(name, grad_acc_steps=n_parts) for _ in range(2))
    for step in range(6):
        with Waits() as waits:
            result = train_step(run, batch(name, step))
        assert result.accepted
        if step >= 1:  # the first step counts what the others expect
            assert dict(waits.places) == {}
            assert len(reading) == step + 1
    with monkeypatch.context() as patched:
        for module in [m for name, m in sys.modules.items() if name.startswith("sae_granary.")]:
            if hasattr(module, "host_waits"):
                patched.setattr(module, "host_waits", lambda tensor: False)
        for step in range(6):
            expected = train_step(plain, batch(name, step))
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    for key, value in plain.sae.state_dict().items():
        torch.testing.assert_close(run.sae.state_dict()[key], value, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert run.sae.dead_mask.any() == plain.sae.dead_mask.any()


@pytest.mark.parametrize("name", ["vanilla", "jumprelu", "gated"])
def test_a_selection_without_room_is_taken_again(name: str, reading: list[int], monkeypatch) -> None:
    monkeypatch.setattr(deferred, "MIN_ROOM", 0)
    runs = [make_run(name), make_run(name)]
    for run, n_rows in zip(runs, (1, N_ROWS), strict=True):
        train_step(run, batch(name, 0))
        if n_rows == 1:  # it expects nothing
            run.deferred._last_shares = [0.0] * len(run.deferred._last_shares)
        train_step(run, batch(name, 1))
    assert len(reading) == 5
    for key, value in runs[1].sae.state_dict().items():
        torch.testing.assert_close(runs[0].sae.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_a_million_latents_fit_a_gpu_because_products_are_taken_in_parts(monkeypatch) -> None:
    given = {"type": "topk", "cache": "c", "lr": 1e-3, "d_in": 768, "d_sae": 2**20, "batch_size": 8192}
    monkeypatch.setattr(capacity, "parameter_bytes", lambda config: 4 * 2 * 768 * 2**20)
    needed = [capacity.needed_memory(make_config([{**given, "device": device}])) for device in ("cpu", "cuda")]
    assert needed[1] == needed[0] - 4 * 8192 * 2**20 + 4 * gpu_screen.CHUNK_ENTRIES
    assert needed[1] < 40 * 2**30 < needed[0]


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "vanilla", "gated", "jumprelu"])
def test_a_matrix_that_does_not_fit_is_computed_in_parts_of_rows(name: str, monkeypatch) -> None:
    limit, sizes, product = 7 * D_SAE, [], PreActs._product
    monkeypatch.setattr(PreActs, "_product", staticmethod(lambda *given: sizes.append(product(*given)) or sizes[-1]))
    outcomes = []
    for largest in (limit, 2**40):
        for module in (pre_acts, losses):
            monkeypatch.setattr(module, "MAX_DENSE", largest)
        run = make_run(name)
        for step in range(4):
            if step == 3:
                run.sae.calibrate([batch(name, 9).rows])
            assert train_step(run, batch(name, step)).accepted
        run.sae.eval()
        sizes.clear()
        codes = run.sae.encode(batch(name, 8).rows)
        outcomes.append({**run.sae.state_dict(), "codes": codes.dense()})
        assert (max(part.numel() for part in sizes) <= limit) == (largest == limit)
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("n_slots", [0, 5, 20, 100])
def test_slots_found_in_parts_are_those_of_the_whole(n_slots: int) -> None:
    matrix = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    parts = list(zip(range(0, 7, 2), matrix.split(2), strict=True))
    for found, whole in (
        [padded.largest_slots(given, (7, 12), n_slots) for given in (parts, [(0, matrix)])],
        [padded.true_slots([(n, part > 0) for n, part in given], (7, 12), n_slots) for given in (parts, [(0, matrix)])],
    ):
        assert all(torch.equal(mine, other) for mine, other in zip(found[0], whole[0], strict=True))
        assert torch.equal(found[1], whole[1])


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_a_batch_with_nan_changes_nothing(name: str) -> None:
    run = make_run(name)
    train_step(run, batch(name, 0))
    state = {key: value.clone() for key, value in run.sae.state_dict().items()}
    moments = {key: value.clone() for key, value in run.optimizer.state[run.sae.W_dec].items()}
    bad = batch(name, 1)
    bad.rows["a"][5, 3] = torch.nan
    assert not train_step(run, bad).accepted
    assert all(
        torch.equal(value.nan_to_num(-1), state[key].nan_to_num(-1)) for key, value in run.sae.state_dict().items()
    )
    assert all(torch.equal(run.optimizer.state[run.sae.W_dec][key], value) for key, value in moments.items())
    assert train_step(run, batch(name, 2)).accepted


def test_counters_that_another_rank_sent_are_counted_anew() -> None:
    counters, step = torch.zeros(4, dtype=torch.int64), deferred.Deferred()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        step.remember_count("dead", counters, 3)
        assert step.count("dead", counters) == 3
        Ranks(0, 1).broadcast([counters])
    finally:
        distributed.destroy_process_group()
    assert step.count("dead", counters) is None


@pytest.mark.usefixtures("reading")
def test_numbers_of_every_type_are_read_exactly_and_judged_on_the_host() -> None:
    for value, limit, held in [(-2.0, 2.0, True), (2.5, 2.0, False), (torch.nan, torch.inf, False)]:
        step, count = deferred.Deferred(), torch.tensor(2**24 + 1)
        assert not step.failed([(torch.tensor(value), limit)])
        step.note_share(count, 2**26, room=2**24)
        answers = step.read(torch.tensor(0.1, dtype=torch.float64), count)
        assert answers == (held, False, [0.1, 2**24 + 1])


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_auxk_spreads_no_gradient_over_all_latents(name: str) -> None:
    counted = []
    for dead_after in (10**9, N_ROWS):
        run = make_run(name, dead_after_tokens=dead_after, k_aux=2)
        for step in range(3):
            with Bytes() as found:
                result = train_step(run, batch(name, step), measure=True)
        assert ("auxk" in result.losses) == (dead_after == N_ROWS)
        counted.append(found.n_written)
    # Two are written in place: the rows of dead latents in the gradients of W_enc and W_dec.
    assert counted[1] == counted[0] + 2


@pytest.mark.parametrize("name", ["topk", "jumprelu"])
def test_auxk_has_the_gradients_in_a_step_that_it_has_outside_of_one(name: str) -> None:
    run = make_run(name, dead_after_tokens=N_ROWS, grad_clip=None)
    run.sae.num_tokens_since_fired[::2] = N_ROWS
    alone = copy.deepcopy(run.sae)
    alone.begin_step(Progress(0, run.n_steps))
    terms = batch(name, 1).terms(alone, Progress(0, run.n_steps))
    assert "auxk" in terms.losses
    sum(terms.losses.values()).backward()
    alone.track(terms.out)
    alone.project_gradients()
    assert train_step(run, batch(name, 1)).accepted
    for key, p in alone.named_parameters():
        torch.testing.assert_close(run.sae.get_parameter(key).grad, p.grad, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(("name", "most"), [("topk", 68), ("batchtopk", 78), ("vanilla", 87), ("matryoshka", 125)])
def test_a_step_launches_no_more_than_it_did(name: str, most: int) -> None:
    run = make_run(name, dead_after_tokens=10**9)
    for step in range(3):
        with Launches() as launches:
            assert train_step(run, batch(name, step)).accepted
    assert launches.n <= most
