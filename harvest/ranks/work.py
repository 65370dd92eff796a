"""One process of a harvest in blocks: claim a block, harvest it, until all are complete; then they are joined."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from sae_granary.cache.errors import (
    BadActivationError,
    CacheError,
    CacheLockedError,
    ConcurrentWriteError,
    DiskFullError,
    NotACacheError,
)
from sae_granary.cache.format.affine import Affine
from sae_granary.cache.format.layout import MANIFEST
from sae_granary.cache.format.manifest import Manifest
from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.write.blocks import begin_blocks, remove_blocks
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.files import write_first
from sae_granary.common.signals import StopRequest
from sae_granary.common.signed import DamagedFileError
from sae_granary.harvest.device.host import writing
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.pipeline import Model, Pipeline
from sae_granary.harvest.prepare import Prepared
from sae_granary.harvest.progress import Progress
from sae_granary.harvest.ranks.blocks import BlockSource, Outcome, Records
from sae_granary.harvest.ranks.board import Board, Limits, Task
from sae_granary.harvest.ranks.extension import NEW, Begun
from sae_granary.harvest.ranks.first_rows import shared_affines
from sae_granary.harvest.ranks.joining import join
from sae_granary.harvest.ranks.lease import Lease, Leases
from sae_granary.harvest.ranks.plan import agree
from sae_granary.harvest.ranks.progress import BlockProgress, Heartbeat, RankLog, SummedProgress
from sae_granary.harvest.ranks.world import World, lease_seconds
from sae_granary.harvest.replay.stream import Replay
from sae_granary.harvest.spec import as_begun

Say = Callable[[str], None]
Load = Callable[[Prepared, Say], tuple[Prepared, Model]]
Tell = Callable[[Prepared, CacheWriter], None]

_JOIN = "join"
_TRIES = 5  # where other processes finish, or were taken for dead and still write


class _LostError(Exception):
    """A block is no longer ours, or no longer wanted."""


class Worker:
    """This process; see the module's docstring."""

    def __init__(
        self,
        prepared: Prepared,
        spec: CacheSpec,
        progress: Progress,
        stop: StopRequest,
        world: World,
        begun: Begun = NEW,
    ) -> None:
        self._prepared, self._stop = prepared, stop
        self._path, self._spec = prepared.config.out_path, spec
        self._begun, self._folder = begun, self._path / begun.folder
        self._leases = Leases(self._folder, lease_seconds())
        self._records = Records(prepared.source)
        self._deferred: dict[str, float] = {}  # tasks that cannot be claimed before a time
        self._waited = set[str]()
        self._affines = begun.affines
        config = prepared.config
        assert config.block_docs is not None
        self._block_docs = config.block_docs
        self._board = Board(
            self._folder, self._block_docs, Limits(config.max_tokens, config.max_docs), self._leases, begun
        )
        self._shown = SummedProgress(progress, self._board, prepared.layout.bytes_of, tells=world.tells)
        self._log = RankLog(self._path, world)

    def run(self, load: Load, tell: Tell, model: Model | None) -> bool:
        """Take part until the cache is complete; False if it was already. Raises what a harvest raises."""
        if not self._begin():
            return False
        self._shown.begin()
        try:
            self._take_part(load, tell, model)
            remove_blocks(self._path, len(load_manifest(self._path).shards))
            return True
        except BaseException as error:
            self._log.write(f"stopped: {type(error).__name__}: {error}")
            raise
        finally:
            self._log.close(keep=(self._path / MANIFEST).exists())
            with contextlib.suppress(OSError):
                self._path.rmdir()  # where there were no rows

    def _begin(self, tries: int = _TRIES) -> bool:
        """Begin the cache or join in; False where it is complete."""
        try:
            have = begin_blocks(self._path, self._spec)
            if not self._has_more(have):
                self._folder.mkdir(parents=True, exist_ok=True)
                agree(self._path, self._folder, self._prepared.config, have, self._spec)
                have = load_manifest(self._path)  # again: another process may have finished since
        except (FileNotFoundError, FileExistsError, DamagedFileError):  # it has just finished, or found no rows
            if tries == 1:
                raise
            return self._begin(tries - 1)
        if complete := self._has_more(have):
            remove_blocks(self._path, len(have.shards))  # of one that was killed as it finished, or made just now
        return not complete

    def _has_more(self, have: Manifest) -> bool:
        return have.complete and len(have.shards) > self._begun.n_shards

    def _take_part(self, load: Load, tell: Tell, model: Model | None) -> None:
        while not self._is_complete():
            self._stop.check()
            self._board.look()
            task = None if self._board.ended else next(filter(self._is_free, self._board.tasks()), None)
            if self._board.ended:
                self._join()
            elif task is None:
                self._wait()
            elif model is None:
                located = self._prepared.located
                self._shown.say(f"loading {located.name} ({self._prepared.compute_dtype}, {self._prepared.device})")
                self._prepared, model = load(self._prepared, self._shown.say)
                self._stop.defer()
            elif lease := self._leases.claim(task.name):
                try:
                    self._harvest(task, lease, model, tell)
                finally:
                    lease.release()

    def _is_complete(self) -> bool:
        try:
            have = load_manifest(self._path)
            no_more = self._begun.n_shards > 0 and not self._folder.exists()  # another process found no further rows
            return self._has_more(have) or (have.complete and no_more)
        except NotACacheError:
            raise HarvestError(f"{self._path} was removed: another process found no rows, or somebody did") from None

    def _is_free(self, task: Task) -> bool:
        waits = self._deferred.get(task.name, 0.0) > time.monotonic()
        return not waits and self._leases.is_free(task.name)

    def _wait(self) -> None:
        """All blocks that are left are in work elsewhere: wait for them, or for one whose process has ended."""
        self._shown.show()
        task = None if self._board.ended else next(self._board.tasks(), None)
        if task is not None and task.name not in self._waited:
            self._waited.add(task.name)
            self._log.write(f"waiting for block {task.block} of {self._leases.holder(task.name)}")
        time.sleep(min(1.0, self._leases.seconds / 10))

    def _harvest(self, task: Task, lease: Lease, model: Model, tell: Tell) -> None:
        """Harvest a block, or continue it, and publish its outcome; nothing comes of a block that was lost."""
        progress = BlockProgress(self._shown)

        def check() -> None:
            self._stop.check()
            if lease.lost or self._board.is_past_end(task):
                raise _LostError

        folder = task.name
        with Heartbeat(lease, self._board, progress):
            for left in reversed(range(_TRIES)):
                try:
                    self._publish(task, self._fill(task, folder, model, tell, progress, check))
                    return
                except _LostError:
                    return
                except CacheLockedError as error:  # its process has stopped renewing the lease, but not ended
                    self._deferred[task.name] = time.monotonic() + self._leases.seconds
                    self._shown.say(f"block {task.block} waits for a process that does nothing ({error}): end it")
                    return
                except (CacheError, OSError) as error:
                    lease.renew(progress.n_rows)
                    if lease.lost or self._is_complete():
                        return
                    hopeless = isinstance(error, DiskFullError | BadActivationError)
                    if hopeless or not left or not lease.taken_over:
                        raise
                    if not isinstance(error, ConcurrentWriteError):  # it was cleaned up by the other process
                        # The other process may be about to publish what is there: it stays until all are joined.
                        folder = f"{task.name}.{secrets.token_hex(4)}"

    def _fill(
        self, task: Task, folder: str, model: Model, tell: Tell, progress: BlockProgress, check: Callable[[], None]
    ) -> Outcome:
        start, limits = task.block * self._block_docs, task.limits or Limits(None, None)
        prepared = replace(
            self._prepared,
            source=BlockSource(self._prepared.source, self._records, start + self._block_docs),
            config=replace(self._prepared.config, max_tokens=limits.max_rows, max_docs=limits.max_docs),
        )
        told = {**self._spec.fingerprint, "block": task.block}
        spec = replace(self._spec, fingerprint=told, vocabulary=None, block_docs=None)
        replay = Replay(begin=self._begun.begin_of(task.block, self._block_docs))
        with CacheWriter.open(self._folder / folder, spec, **writing(prepared.device)) as writer:
            if not writer.complete:
                tell(prepared, writer)
                if not writer.layout.is_fitted:
                    writer.fit(self._fitted(model, check))
                prepared = as_begun(prepared, writer.manifest.provenance)
                pipeline = Pipeline(prepared, model, writer, progress, self._log, check, replay)
                pipeline.fill()
                check()
                summary = pipeline.summary() | {"n_records": pipeline.state.next_doc - start}
                if writer.n_rows:
                    writer.finish(summary)
            else:
                summary = dict(writer.manifest.summary or {})
        return Outcome.of_summary(summary, folder, limited=task.limits is not None)

    def _fitted(self, model: Model, check: Callable[[], None]) -> Mapping[str, Affine] | None:
        """The steps and offsets of all blocks."""
        if self._affines is None:
            self._affines = shared_affines(self._folder, self._prepared, model, self._log, self._shown.say, check)
        return self._affines

    def _publish(self, task: Task, outcome: Outcome) -> None:
        # A process that was taken for dead may have published it; the same block gives the same.
        write_first(self._folder / f"{task.name}.json", outcome.to_bytes())
        if outcome.n_records:  # else it was past the end of the text
            self._log.write(f"block {task.block}: {outcome.n_rows:,} rows of {outcome.n_documents:,} documents")

    def _join(self) -> None:
        lease = self._leases.claim(_JOIN)
        if lease is None:
            self._wait()
            return
        try:
            with Heartbeat(lease, self._board, None):
                done = join(self._prepared, self._board, self._begun, self._folder, self._is_complete)
            if done:
                self._log.write(done)
        finally:
            lease.release()
