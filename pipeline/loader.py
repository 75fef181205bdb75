"""The training stream without Ray Data: the same spans, read by the worker processes of a torch DataLoader.

Worker w of n takes the batches w, w + n, w + 2n ... of every span, and the DataLoader asks its workers in turn, so
that batches come in the plan's order for any n. A span is n times as long as a task of Ray Data: reading costs the
same.
"""

import gc
import multiprocessing
from collections.abc import Iterator

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mpc.errors import UserError
from pipeline.plan import Plan
from pipeline.spans import SPAN_ROWS, Arrays, SpanReader, TrainingData, arrays_of

AHEAD = 2  # batches that each worker holds ready
Item = tuple[Tensor | None, ...] | str


def loaded(
    data: TrainingData, plan: Plan, rank: int, world_size: int, start_step: int, stop_step: int
) -> Iterator[Arrays]:
    """The rank's batches for the global steps [start_step, stop_step), in order, by `data.tasks` processes.

    Raises:
        UserError: a worker met one.
    """
    # a fork of a process with threads may hang; the server has imported everything before the first worker is asked for
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    share = _Share(SpanReader(data, plan, rank, world_size), start_step, stop_step)
    items = DataLoader(
        share, batch_size=None, num_workers=data.tasks, prefetch_factor=AHEAD, multiprocessing_context=context
    )
    for item in items:
        if isinstance(item, str):
            raise UserError(item)
        yield Arrays._make(None if tensor is None else tensor.numpy() for tensor in item)


class _Share(IterableDataset[Item]):
    """What one worker process reads."""

    def __init__(self, reader: SpanReader, start_step: int, stop_step: int) -> None:
        self.reader, self.start_step, self.stop_step = reader, start_step, stop_step

    def __iter__(self) -> Iterator[Item]:
        """The batches of this worker as tensors in shared memory; a user's error as its text, which stays one line."""
        info = get_worker_info()
        assert info is not None, "the DataLoader has worker processes"
        plan, size = self.reader.plan, self.reader.data.card.image_size
        most = info.num_workers * max(1, SPAN_ROWS * self.reader.world_size // plan.batch_size)
        gc.freeze()  # what a process has imported need not be searched for garbage: 5 % of augmenting
        threadpool_limits(1)  # NumPy's BLAS would spin on every core in each of the processes: 2.5 x the CPU time
        try:
            for span in plan.spans(self.start_step, self.stop_step, most):
                first = (info.id - (span.step - self.start_step)) % info.num_workers
                for table in self.reader(span, slice(first, None, info.num_workers)):
                    arrays = arrays_of(table, size)
                    yield tuple(None if a is None else torch.from_numpy(np.array(a)) for a in arrays)
        except UserError as error:
            yield str(error)
