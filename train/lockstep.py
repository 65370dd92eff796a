"""Members of one stream from where they stand to their results: train, calibrate, evaluate, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sae_granary.common.signals import StopRequest
from sae_granary.train import loop
from sae_granary.train.data.streams import RunStream
from sae_granary.train.errors import InterruptedRunError
from sae_granary.train.trainer import Result, Trainer

OnFailure = Callable[[Trainer, Exception], None]


def train_together(
    members: Sequence[Trainer], stop: StopRequest, on_failure: OnFailure | None = None
) -> dict[Trainer, Result]:
    """Train all members on one stream of batches (equal `RunData.stream_key`), then finish each.

    A member that raises is reported to `on_failure` and left out; without it the exception is raised.
    Raises InterruptedRunError when asked to stop, after a checkpoint of every member.
    """
    failed: list[Trainer] = []

    def fail(member: Trainer, error: Exception) -> None:
        if on_failure is None:
            raise error
        failed.append(member)
        on_failure(member, error)

    def stream_from(member: Trainer) -> RunStream:
        return RunStream([m.data for m in members], member.state, member.step)

    def stop_if_asked(active: Sequence[Trainer]) -> None:
        unfinished = [m for m in active if not m.done]
        if not stop or not unfinished:
            return
        for member in unfinished:
            try:
                member.save()
            except Exception as error:
                fail(member, error)
        InterruptedRunError.raise_if(stop, unfinished[0].step, unfinished[0].folder)

    for member in members:
        try:
            member.begin()
        except Exception as error:
            fail(member, error)
    members = [m for m in members if m not in failed]
    if unfinished := [m for m in members if not m.done]:
        InterruptedRunError.raise_if(stop, unfinished[0].step, unfinished[0].folder)
    loop.train(members, stream_from, after_batch=stop_if_asked, on_failure=fail if on_failure else None)
    return _finish([m for m in members if m not in failed], stop, fail)


def _finish(members: Sequence[Trainer], stop: StopRequest, fail: OnFailure) -> dict[Trainer, Result]:
    results = {}
    for member in members:
        InterruptedRunError.raise_if(stop, member.step, member.folder)
        try:
            results[member] = member.finish(stop)
        except InterruptedRunError:
            raise
        except Exception as error:
            fail(member, error)
    return results
