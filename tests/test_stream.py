"""The training stream against the same work done in one process, and the scan that evaluation reads."""

import copy
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data import DataContext

from mpc.config import StrongConfig, ViewsConfig
from mpc.errors import UserError
from pipeline import stream
from pipeline.card import read_card
from pipeline.manifest import matrix
from pipeline.plan import Plan, make_plan
from pipeline.single_positive import draw
from pipeline.spans import Arrays, SpanReader, TrainingData, images_of
from pipeline.stream import batches, scan


def training_data(uri: str, **changes: object) -> tuple[TrainingData, Plan]:
    card = read_card(uri)
    views = changes.pop("views", ViewsConfig())
    return TrainingData(uri, card, views, **changes), make_plan(card, seed=3, batch_size=32)


def in_one_process(data: TrainingData, plan: Plan, rank: int, world_size: int, start: int, stop: int) -> list[pa.Table]:
    reader = SpanReader(data, plan, rank, world_size)
    return [table for span in plan.spans(start, stop, 4) for table in reader(span)]


def same(batch: Arrays, table: pa.Table) -> bool:
    return (
        np.array_equal(batch.row, table["row"].to_numpy())
        and np.array_equal(batch.weak.reshape(len(batch.row), -1), matrix(table["weak"]))
        and np.array_equal(batch.observed, matrix(table["observed"]))
        and (batch.strong is None or np.array_equal(batch.strong.reshape(len(batch.row), -1), matrix(table["strong"])))
    )


def test_ray_data_streams_what_one_process_reads(phantom_data: str) -> None:
    data, plan = training_data(phantom_data)
    stop = 2 * plan.steps_per_epoch  # across the end of an epoch
    streamed = list(batches(data, plan, 0, 1, 0, stop))
    assert len(streamed) == stop
    assert all(map(same, streamed, in_one_process(data, plan, 0, 1, 0, stop)))
    first = {row: image for b in streamed[: plan.steps_per_epoch] for row, image in zip(b.row, b.weak, strict=True)}
    again = {row: image for b in streamed[plan.steps_per_epoch :] for row, image in zip(b.row, b.weak, strict=True)}
    assert any(not np.array_equal(first[row], again[row]) for row in first.keys() & again.keys())  # drawn anew


def test_a_batch_holds_its_strong_views_one_view_after_the_other(phantom_data: str) -> None:
    data, plan = training_data(phantom_data, views=ViewsConfig(strong=StrongConfig(count=2)))
    single, _ = training_data(phantom_data)
    batch, reference = (next(iter(batches(d, plan, 0, 1, 0, 1))) for d in (data, single))
    assert batch.strong.shape == (2 * len(batch.weak), 1, data.card.image_size, data.card.image_size)
    assert np.array_equal(batch.weak, reference.weak)
    assert np.array_equal(batch.strong[: len(batch.weak)], reference.strong)
    assert not np.array_equal(batch.strong[len(batch.weak) :], reference.strong)


def test_the_stream_is_the_same_for_any_tasks_ranks_and_start(phantom_data: str) -> None:
    data, plan = training_data(phantom_data)
    reference = in_one_process(data, plan, 0, 1, 0, 6)
    one_task, _ = training_data(phantom_data, tasks=1, task_cpus=1.0)
    assert all(map(same, batches(one_task, plan, 0, 1, 0, 6), reference))
    assert all(map(same, batches(data, plan, 0, 1, 4, 6), reference[4:]))
    halves = [list(batches(data, plan, rank, 2, 0, 6)) for rank in range(2)]
    for left, right, whole in zip(*halves, reference, strict=True):
        together = Arrays._make(None if a is None else np.concatenate([a, b]) for a, b in zip(left, right, strict=True))
        assert same(together, whole)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")  # on two cores
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_data_loader_yields_the_same_batches(phantom_data: str, workers: int) -> None:
    data, plan = training_data(phantom_data, backend="torch", tasks=workers)
    stop = plan.steps_per_epoch + 5
    loaded = list(batches(data, plan, 0, 1, 2, stop))
    reference = in_one_process(data, plan, 0, 1, 2, stop)
    assert len(loaded) == len(reference) == stop - 2
    assert all(map(same, loaded, reference))


def test_a_data_loader_of_one_rank_of_two_without_views(phantom_data: str) -> None:
    data, plan = training_data(phantom_data, backend="torch", augment=False)
    by_ray, _ = training_data(phantom_data, augment=False)
    pairs = zip(batches(data, plan, 1, 2, 1, 6), batches(by_ray, plan, 1, 2, 1, 6), strict=True)
    for left, right in pairs:
        assert left.strong is None
        assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_data_loader_passes_a_users_error_on_as_one_line(phantom_data: str, tmp_path) -> None:
    copy = shutil.copytree(phantom_data, tmp_path / "data")
    data, plan = training_data(str(copy), backend="torch")
    for shard in data.card.shards_of("train"):
        table = pq.read_table(copy / shard.path)
        short = pa.array([image[1:] for image in table["image"].to_pylist()], pa.large_binary())
        table = table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), short)
        pq.write_table(table, copy / shard.path, row_group_size=max(shard.row_groups))
    with pytest.raises(UserError, match=r"^an image of the shards is not \d+ x \d+ bytes; prepare .*again$"):
        list(batches(data, plan, 0, 1, 0, 2))


def test_the_observed_label_is_the_draw_over_the_known_positives(phantom_data: str) -> None:
    data, plan = training_data(phantom_data, draw_seed=5, strong=False)
    batch = next(iter(batches(data, plan, 0, 1, 0, 1)))
    assert batch.strong is None
    assert (batch.observed.sum(1) == 1).all()
    assert (batch.labels[batch.observed == 1] == 1).all()
    rows = pa.concat_tables(pq.read_table(f"{phantom_data}/{s.path}") for s in data.card.shards_of("train"))
    rows = rows.take(pa.array(batch.row))  # training rows come first: row number = position
    expected = draw(rows["image_id"].to_pylist(), matrix(rows["labels"]), matrix(rows["known"]), 5)
    assert np.array_equal(batch.observed, expected)


@pytest.mark.parametrize("world_size", [1, 3])
def test_scan_reads_every_row_once_over_all_ranks(phantom_data: str, world_size: int) -> None:
    card = read_card(phantom_data)
    for split in ("train", "val", "test"):
        counted = Counter(
            row
            for rank in range(world_size)
            for part in scan(phantom_data, card, split, 50, rank, world_size)
            for row in part["row"].to_pylist()
        )
        assert counted == Counter(card.rows(split))


def test_scanned_pixels_are_the_stored_ones(phantom_data: str) -> None:
    card = read_card(phantom_data)
    part = next(iter(scan(phantom_data, card, "val", 10)))
    stored = part["image"].to_pylist()
    assert [image.tobytes() for image in images_of(part["image"], card.image_size)] == stored
    with pytest.raises(UserError, match="not 31 x 31"):
        images_of(part["image"], 31)


@pytest.mark.parametrize("module", ["stream", "controller"])
def test_what_a_reading_task_and_the_controller_import_needs_no_torch(module: str) -> None:
    code = f"import sys, pipeline.{module}; print('torch' in sys.modules); import albumentations.pytorch"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"


def test_a_stream_leaves_the_settings_of_the_process_alone(phantom_data: str) -> None:
    before = copy.deepcopy(DataContext.get_current())
    data, plan = training_data(phantom_data)
    assert len(list(batches(data, plan, 0, 1, 0, 2))) == 2
    assert DataContext.get_current() == before


def test_a_stream_without_cpus_says_so_and_goes_on_when_they_are_free(
    phantom_data: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, "STARVED_SECONDS", 0.5)
    data, plan = training_data(phantom_data)

    @ray.remote(num_cpus=2)
    class Holder:
        def ready(self) -> None:
            """Answers as soon as it holds its CPUs."""

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    with ThreadPoolExecutor(1) as pool:
        count = pool.submit(lambda: len(list(batches(data, plan, 0, 1, 0, 2))))
        while not caplog.messages and not count.done():
            time.sleep(0.05)
        assert not count.done()
        ray.kill(holder)
        assert count.result() == 2
    assert "no batch for 0.5 s: 2 reading tasks wait for data or for 0.5 CPU each" in caplog.text
