"""Batches onto the device: one copy on the host, then a transfer that runs beside the step before."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpc.method import Batch


class Transfer:
    """Moves batches to one device.

    The loop asks for a batch when the step before is queued, not when it is done: on a GPU the batch then travels on a
    stream of its own, from pinned memory, while that step computes. The next step waits for it on the device alone.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self.streams: Any = torch.get_device_module(device)  # torch.cuda, or torch.cpu, whose streams do nothing
        self.beside = self.streams.Stream()

    def __call__(self, arrays: Iterable[NDArray[Any] | None]) -> Batch:
        """The fields of a batch as tensors on the device. Nothing waits; the arrays may be overwritten afterwards."""
        with self.streams.stream(self.beside):
            batch = Batch._make(None if array is None else self._moved(array) for array in arrays)
        step = self.streams.current_stream()
        step.wait_stream(self.beside)
        for tensor in batch if self.gpu else ():
            if tensor is not None:  # its memory belongs to the other stream, which must not take it back too soon
                tensor.record_stream(step)
        return batch

    def _moved(self, array: NDArray[Any]) -> Tensor:
        """One copy, since Ray's arrays are read-only views of shared memory: on a GPU straight into pinned memory."""
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        held = torch.empty(array.shape, dtype=dtype, pin_memory=self.gpu)
        np.copyto(held.numpy(), array)
        return held.to(self.device, non_blocking=True)
