"""The order of training: a permutation, the same for every number of ranks and from every start."""

import numpy as np
import pytest

from pipeline.plan import Plan, RowGroup, Span


def make(rows: int = 10_000, *, seed: int = 0, digest: str = "d", batch_size: int = 96) -> Plan:
    starts = range(0, rows, 256)
    groups = tuple(RowGroup(f"shards/{s // 2048}", (s // 256) % 8, s, min(256, rows - s)) for s in starts)
    return Plan(groups, digest, seed, batch_size)


def test_an_epoch_visits_every_row_once_and_drops_less_than_a_batch() -> None:
    plan = make()
    whole = plan.order(0, 0, plan.num_rows)
    assert np.array_equal(np.sort(whole), np.arange(10_000))
    trained = np.concatenate([plan.batch(step) for step in range(plan.steps_per_epoch)])
    assert len(np.unique(trained)) == len(trained) == 10_000 - 10_000 % 96
    assert np.array_equal(trained, whole[: len(trained)])


def test_epochs_seeds_and_data_sets_differ() -> None:
    first = make().batch(0)
    assert not np.array_equal(first, make().batch(make().steps_per_epoch))
    assert not np.array_equal(first, make(seed=1).batch(0))
    assert not np.array_equal(first, make(digest="other").batch(0))
    assert np.array_equal(first, make().batch(0))


def test_rows_mix_across_shards_within_a_window() -> None:
    plan = make()
    first_window = plan.order(0, 0, 4096)
    assert len({plan.holding(np.array([row]))[0].path for row in first_window}) == 5  # of 5 shards
    assert len(plan.holding(plan.batch(0))) > 10  # a batch draws on many row groups
    assert len(plan.holding(first_window)) <= 17  # and a window on few: reading stays sequential


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_every_global_batch(world_size: int) -> None:
    plan = make()
    for span in plan.spans(plan.steps_per_epoch - 3, plan.steps_per_epoch + 4, most=4):
        shares = [plan.share(span, rank, world_size) for rank in range(world_size)]
        for i in range(span.steps):
            together = np.concatenate([share[i] for share in shares])
            assert np.array_equal(together, plan.batch(span.step + i))


def test_spans_cover_the_steps_from_any_start_and_never_cross_an_epoch() -> None:
    plan = make()
    end = 2 * plan.steps_per_epoch
    for start in (0, 1, 57, plan.steps_per_epoch, end - 1, end):
        spans = plan.spans(start, end, most=10)
        steps = [step for span in spans for step in range(span.step, span.step + span.steps)]
        assert steps == list(range(start, end))
        assert all(s.step // plan.steps_per_epoch == (s.step + s.steps - 1) // plan.steps_per_epoch for s in spans)
    assert plan.spans(0, end, most=10)[0] == Span(0, 1)  # the first batch does not wait for a long task
