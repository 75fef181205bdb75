"""Our loop in several processes at once: as workers of one run, or each for itself on the same cores."""

import json
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from steps import BenchLoop, Case, Stopwatch, Stretch, TimedHost, card_of, run_of

STRETCHES = 5


def images_per_second(case: Case, count: int, together: bool) -> float:
    """Of all processes, each with a held batch of `case.batch` images.

    Args:
        case: what each of them trains, on one thread or one GPU.
        count: of processes.
        together: as workers that add up their gradients.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (case, count, together, folder), nprocs=count)  # type: ignore[attr-defined, no-untyped-call]
        return sum(1e3 * case.batch / float(json.loads(file.read_text())) for file in Path(folder).glob("*.json"))


def train(rank: int, case: Case, count: int, together: bool, folder: str) -> None:
    """One process; leaves the milliseconds of its step."""
    torch.set_num_threads(1)
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if case.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    if not together:  # they have met, and so begin at the same time
        dist.barrier()
        dist.destroy_process_group()
    found: list[Stretch] = []

    def ask(over: Stretch | None) -> bool:
        found.extend([over] if over else [])
        return len(found) < STRETCHES

    watch = Stopwatch(case, ask, together=True)
    host = TimedHost(watch, rank, count) if together else TimedHost(watch)
    BenchLoop(run_of(case, "MPC", host.world_size), "", card_of(case.side), host).fit()
    Path(folder, f"{rank}.json").write_text(json.dumps(statistics.median(stretch.ms for stretch in found)))
    if together:
        dist.destroy_process_group()
