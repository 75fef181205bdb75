"""What our loop does in a step besides forward, backward and the optimiser's step, part by part in CPU time."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from steps import BenchLoop, Case, Stopwatch, TimedHost, card_of, held, run_of
from timm.utils import ModelEmaV3
from torch import nn

from mpc.method import Progress
from mpc.transfer import Transfer


def parts_of(case: Case, repeats: int) -> dict[str, float]:
    """Median milliseconds of each part of an AN step; `step` is the whole of it, timm's average is for comparison.

    Args:
        case: the network and the batch, on a CPU.
        repeats: of each part.
    """
    torch.set_num_threads(1)
    loop = BenchLoop(run_of(case, "AN"), "", card_of(case.side), TimedHost(Stopwatch(case, bool)))
    arrays, transfer = held(case.batch, case.side, strong=False), Transfer(loop.host.device)
    batch = transfer(arrays)
    loop.train_step(batch)
    loss, output = loop.step_module(batch, Progress(0, 1, 1))
    torch.autograd.backward(loss)
    parameters = [p for group in loop.optimizer.param_groups for p in group["params"]]
    theirs = ModelEmaV3(loop.model, decay=0.999)

    def watched() -> None:
        loop.watch.add(loss, 0)
        loop.watch.look()

    parts: dict[str, Callable[[], Any]] = {
        "one copy of the batch": lambda: transfer(arrays),
        "seed": lambda: torch.manual_seed(loop._seed()),
        "watch for NaN": watched,
        "clipping": lambda: nn.utils.clip_grad_norm_(parameters, 5.0),
        "average": lambda: loop.ema.update(loop.model, step=1),
        "schedule": loop.schedule.step,
        "sums for the log": lambda: loop.meter.add(output),
        "the average of timm": lambda: theirs.update(loop.model, step=1),
        "step": lambda: loop.train_step(batch),
    }
    return {name: _median(part, repeats) for name, part in parts.items()}


def _median(part: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        part()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times[1:])


def parts_table(case: Case, rounds: int) -> None:
    """Prints each part and its share of an AN step, and what throughput they leave."""
    found = parts_of(case, rounds)
    whole = found.pop("step")
    others = found.pop("the average of timm")
    print(f"{'AN step':28}{whole:10.2f} ms")
    for name, ms in found.items():
        print(f"{name:28}{ms:10.2f} ms{ms / whole:8.2%}")
    spent = sum(found.values())
    print(
        f"{'together':28}{spent:10.2f} ms{spent / whole:8.2%}: {1 - spent / whole:.3f} of the throughput without them"
    )
    print(f"(the average of timm would take {others:.2f} ms)")
