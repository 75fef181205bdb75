"""The order of training: a pure function of (seed, epoch, data set, global batch).

It is the same for every number of workers. An epoch permutes all row groups of the training split, cuts them into
windows of at least `window` rows, and permutes the rows of each window. Global batches are consecutive runs of that
order; the last partial one is dropped, and what it drops differs from epoch to epoch. Each rank takes its slice of
every batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpc.errors import UserError
from pipeline.card import DatasetCard

Rows = NDArray[np.int64]


class RowGroup(NamedTuple):
    """Where a run of rows lies."""

    path: str
    """Shard, relative to the data set."""
    number: int
    """Row group inside the shard."""
    start: int
    """First row number over the data set."""
    rows: int


class Span(NamedTuple):
    """Consecutive global batches of one epoch: the work of one task."""

    step: int
    """First global batch, counted over all epochs."""
    steps: int


@dataclass(frozen=True)
class Plan:
    """Which rows train when.

    Args:
        groups: row groups of the training split, in row order.
        digest: of the data set, so that another data set is another order.
        seed: of the run.
        batch_size: images of a global batch.
        window: rows among which rows are permuted, at least.
    """

    groups: tuple[RowGroup, ...]
    digest: str
    seed: int
    batch_size: int
    window: int = 4096

    @cached_property
    def num_rows(self) -> int:
        """Rows of the training split."""
        return sum(group.rows for group in self.groups)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_rows // self.batch_size

    @cached_property
    def _starts(self) -> Rows:
        return np.array([group.start for group in self.groups], dtype=np.int64)

    def _generator(self, epoch: int, what: str) -> np.random.Generator:
        key = blake2b(f"{self.seed}:{self.digest}:{epoch}:{what}".encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(int.from_bytes(key, "big")))

    def _windows(self, epoch: int) -> Iterator[list[RowGroup]]:
        held: list[RowGroup] = []
        for index in self._generator(epoch, "groups").permutation(len(self.groups)):
            held.append(self.groups[index])
            if sum(group.rows for group in held) >= self.window:
                yield held
                held = []
        if held:
            yield held

    def order(self, epoch: int, start: int, stop: int) -> Rows:
        """Row numbers at positions [start, stop) of an epoch; only the windows that they lie in are permuted."""
        parts, position = [], 0
        for number, window in enumerate(self._windows(epoch)):
            size = sum(group.rows for group in window)
            if position + size > start and position < stop:
                rows = np.concatenate([np.arange(group.start, group.start + group.rows) for group in window])
                rows = self._generator(epoch, f"window {number}").permutation(rows)
                parts.append(rows[max(0, start - position) : stop - position])
            position += size
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> Rows:
        """Row numbers of a global batch, counted over all epochs."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        return self.order(epoch, inside * self.batch_size, (inside + 1) * self.batch_size)

    def spans(self, start_step: int, stop_step: int, most: int) -> list[Span]:
        """The global batches [start_step, stop_step) in spans of at most `most`, none of which crosses an epoch.

        The first ones are shorter, so that the first batch comes early.
        """
        spans, step, planned = [], start_step, 1
        while step < stop_step:
            left = self.steps_per_epoch - step % self.steps_per_epoch
            count = min(planned, left, stop_step - step)
            spans.append(Span(step, count))
            step, planned = step + count, min(2 * planned, max(1, most))
        return spans

    def share(self, span: Span, rank: int, world_size: int) -> Rows:
        """Row numbers [count, batch_size / world_size] that `rank` trains on in a span."""
        assert self.batch_size % world_size == 0, "the configuration refuses unequal slices"
        epoch, inside = divmod(span.step, self.steps_per_epoch)
        rows = self.order(epoch, inside * self.batch_size, (inside + span.steps) * self.batch_size)
        return rows.reshape(span.steps, world_size, -1)[:, rank]

    def holding(self, rows: Rows) -> tuple[RowGroup, ...]:
        """The row groups that hold `rows`."""
        return tuple(self.groups[i] for i in np.unique(np.searchsorted(self._starts, rows, side="right") - 1))


def make_plan(card: DatasetCard, *, seed: int, batch_size: int, window: int = 4096) -> Plan:
    """The plan of a prepared data set's training split.

    Raises:
        UserError: fewer training rows than one global batch.
    """
    groups = []
    for shard in card.shards_of("train"):
        starts = shard.row_start + np.cumsum([0, *shard.row_groups])
        groups += [RowGroup(shard.path, i, int(starts[i]), rows) for i, rows in enumerate(shard.row_groups)]
    plan = Plan(tuple(groups), card.digest, seed, batch_size, window)
    if plan.steps_per_epoch == 0:
        raise UserError(
            f"train.batch_size {batch_size} exceeds the {plan.num_rows} training images of the data set; lower it"
        )
    return plan
