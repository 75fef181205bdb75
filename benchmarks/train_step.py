"""What a training step costs: our loop against one written by hand, MPC against AN: `python benchmarks/train_step.py`.

By hand is the least that trains the same network on the same batch; a second row does what ours does besides: clipping,
schedule, average of the weights. MPC sees twice the images (weak and strong), so 2.0 is the limit of its ratio to AN.
Utilisation is the model's floating-point operations against those of the fastest matrix product or convolution of this
machine in the same number format. Every row has a process of its own, and rows take turns of a few steps, so that a
machine whose pace changes favours none of them; ratios are taken within a round.

Tables: `step`; `parts`, what our loop does besides the least; `settings` of the loop; `workers`, 1 to 4 of them,
against as many processes that know nothing of each other; `stream`, on synthetic images read and augmented meanwhile.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parts import parts_table
from ranks import images_per_second
from steps import BenchLoop, Case, Stopwatch, Stretch, TimedHost, by_hand, card_of, held, ours, run_of
from stream import BATCH, synthetic
from streamed import STREAMED
from torch.utils.flop_counter import FlopCounterMode

from mpc.model import AMP_DTYPES
from mpc.transfer import Transfer

CONTEXT = multiprocessing.get_context("forkserver")  # every process begins with what it needs imported
CONTEXT.set_forkserver_preload(["steps", "streamed"])
HAND, WORK = "AN, by hand", "AN, by hand, the same work"
STEPS: dict[str, partial[None]] = {
    HAND: partial(by_hand, whole=False),
    WORK: partial(by_hand, whole=True),
    "AN": partial(ours, terms="AN"),
    "MPC, IPC alone": partial(ours, terms="IPC"),
    "MPC": partial(ours, terms="MPC"),
    "MPC, averaged teacher": partial(ours, terms="MPC", pseudo={"source": "ema", "form": "soft"}),
}
SETTINGS: dict[str, partial[None]] = {
    "MPC": partial(ours, terms="MPC"),
    "train.channels_last=false": partial(ours, terms="MPC", train={"channels_last": False}),
    "train.compile=true": partial(ours, terms="MPC", train={"compile": True}),
    "train.amp=bf16": partial(ours, terms="MPC", train={"amp": "bf16"}),
    "views.place=device": partial(ours, terms="MPC", views={"place": "device"}),
}
ROWS: dict[str, Callable[[Case, Stopwatch], None]] = {**STEPS, **SETTINGS, **STREAMED}


class Turns:
    """A row in a process of its own, which trains when it is its turn and stands still otherwise."""

    def __init__(self, case: Case) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=train, args=(case, theirs))
        self.process.start()
        theirs.close()  # so that its end is noticed

    def ready(self) -> None:
        """Waits for the first steps, which are not timed."""
        self.pipe.recv()

    def take(self) -> Stretch:
        """Trains one stretch."""
        self.pipe.send(True)
        found: Stretch = self.pipe.recv()
        return found

    def end(self) -> float:
        """Peak memory in MiB: of the GPU, or of the process on a CPU."""
        self.pipe.send(False)
        mib: float = self.pipe.recv()
        self.process.join()
        return mib


def train(case: Case, pipe: Connection) -> None:
    """One row in this process: a stretch for every True that the pipe brings."""
    torch.set_num_threads(1)

    def ask(over: Stretch | None) -> bool:
        pipe.send(over)
        more: bool = pipe.recv()
        return more

    ROWS[case.row](case, Stopwatch(case, ask))
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    pipe.send(torch.cuda.max_memory_allocated() / 2**20 if case.device == "cuda" else mib)


class Found(NamedTuple):
    """What a row reached."""

    stretches: list[Stretch]
    mib: float

    def ms(self) -> float:
        """Median of a step."""
        return statistics.median(stretch.ms for stretch in self.stretches)

    def over(self, other: "Found") -> list[float]:
        """Ratios of time to another row's, one a round, in ascending order."""
        return sorted(own.ms / its.ms for own, its in zip(self.stretches, other.stretches, strict=True))


def in_turns(cases: list[Case], rounds: int) -> list[Found]:
    """Every row in a process of its own; a stretch of each in every round."""
    rows = [Turns(case) for case in cases]
    for row in rows:
        row.ready()
    stretches = list(zip(*[[row.take() for row in rows] for _ in range(rounds)], strict=True))
    return [Found(list(own), row.end()) for own, row in zip(stretches, rows, strict=True)]


def counted(cases: list[Case], rows: list["partial[None]"]) -> list[tuple[float, float]]:
    """Operations of a step of each row, and those a second that the machine reaches in the number format of the row."""
    torch.set_num_threads(1)
    found: list[tuple[float, float]] = []
    peaks: dict[str, float] = {}
    for case, row in zip(cases, rows, strict=True):
        sections = {key: value for key, value in row.keywords.items() if row.func is ours and key != "terms"}
        settings = sections.pop("train", {})
        eager = {**settings, "compile": False}
        done = operations(case, row.keywords.get("terms", "AN"), train=eager, **sections)
        amp = settings.get("amp", case.amp)
        peaks[amp] = peaks.get(amp) or peak(case._replace(amp=amp))
        found.append((done, peaks[amp]))
    return found


def operations(case: Case, terms: str, **sections: Any) -> float:
    """Floating-point operations of the matrix products and convolutions of one step; a multiply-add counts as two."""
    loop = BenchLoop(run_of(case, terms, **sections), "", card_of(case.side), TimedHost(Stopwatch(case, bool)))
    batch = Transfer(loop.host.device)(held(case.batch, case.side, strong=loop.method.needs_strong))
    with FlopCounterMode(display=False) as counter:
        loop.train_step(batch)
    return float(counter.get_total_flops())


def peak(case: Case) -> float:
    """Floating-point operations a second of this machine: the best of a large matrix product and a convolution."""
    device, dtype = torch.device(case.device), AMP_DTYPES.get(case.amp, torch.float32)
    size = 8192 if case.device == "cuda" else 1024
    square = torch.rand(size, size, device=device, dtype=dtype)
    images = torch.rand(size // 128, 256, 28, 28, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    filters = torch.rand(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    convolve = partial(torch.nn.functional.conv2d, images, filters, padding=1)
    with torch.no_grad():
        return max(
            2 * size**3 / _fastest(partial(torch.mm, square, square), device),
            2 * 9 * 256 * images.numel() / _fastest(convolve, device),
        )


def _fastest(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of twenty calls, after two that allocate; CPU seconds on a CPU, as those of steps are."""
    clock, found = time.process_time if device.type == "cpu" else time.perf_counter, []
    for _ in range(22):
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(clock() - start)
    return min(found[2:])


def by_step(case: Case, rows: dict[str, "partial[None]"], base: str, rounds: int) -> dict[str, Found]:
    """Prints one line a row: ms, images a second, time relative to the row `base`, utilisation, memory."""
    cases = [case._replace(row=row) for row in rows]
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        counts = pool.submit(counted, cases, list(rows.values())).result()
    found = dict(zip(rows, in_turns(cases, rounds), strict=True))
    print(f"{'':28}{'ms/step':>10}{'images/s':>10}{'x ' + base:>8}{'GFLOP':>9}{'of peak':>9}{'peak MiB':>10}")
    for (name, row), (done, fastest) in zip(found.items(), counts, strict=True):
        ms, ratio = row.ms(), statistics.median(row.over(found[base]))
        use = 1e3 * done / ms / fastest
        print(f"{name:28}{ms:10.1f}{1e3 * case.batch / ms:10.1f}{ratio:8.3f}{done / 1e9:9.1f}{use:9.1%}{row.mib:10.0f}")
    print(f"peak: {counts[0][1] / 1e9:,.0f} GFLOP/s in the number format of the first row")
    return found


def step_table(case: Case, rounds: int) -> None:
    """Our loop and the hand-written one."""
    found = by_step(case, STEPS, "AN", rounds)
    for what, above, below in (
        ("throughput of our loop relative to the one by hand (aim 0.97)", HAND, "AN"),
        ("relative to the one by hand that does the same work", WORK, "AN"),
        ("MPC step relative to AN step (limit 2.0, aim 2.1)", "MPC", "AN"),
    ):
        low, middle, high = statistics.quantiles(found[above].over(found[below]), n=4)
        print(f"{what}: {middle:.3f}, half of the rounds from {low:.3f} to {high:.3f}")


def settings_table(case: Case, rounds: int) -> None:
    """Settings of the loop, one changed at a time."""
    by_step(case, SETTINGS, "MPC", rounds)


def workers_table(case: Case, rounds: int) -> None:
    """Images a second of 1, 2 and 4 workers with a batch of their own each, and of processes without communication."""
    counts = [n for n in (1, 2, 4) if case.device == "cpu" or n <= torch.cuda.device_count()]
    found = [
        {(n, way): images_per_second(case, n, way) for n in counts for way in (True, False)} for _ in range(rounds)
    ]
    print(f"{'':4}{'images/s':>10}{'x one':>8}{'without communication':>24}{'x one':>8}{'share of it':>13}")
    for n in counts:
        own, limit = (statistics.median(r[n, way] for r in found) for way in (True, False))
        gain, most = (statistics.median(r[n, way] / r[1, way] for r in found) for way in (True, False))
        share = statistics.median(r[n, True] / r[n, False] for r in found)
        print(f"{n:4}{own:10.1f}{gain:8.2f}{limit:24.1f}{most:8.2f}{share:13.1%}")


def stream_table(case: Case, rounds: int) -> None:
    """Training on a data set, one row after the other: images a second, and the share of time that waits for data."""
    print(f"batches of {BATCH}\n{'':34}{'images/s':>10}{'waiting':>9}")
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic(Path(folder), 4000, case.side)
        for row in STREAMED:
            [found] = in_turns([case._replace(row=row, batch=BATCH, data=data)], rounds)
            waited = statistics.mean(stretch.waited for stretch in found.stretches)
            print(f"{row:34}{1e3 * BATCH / found.ms():10.1f}{waited:9.1%}", flush=True)


TABLES = {
    "step": step_table,
    "parts": parts_table,
    "settings": settings_table,
    "workers": workers_table,
    "stream": stream_table,
}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="step", choices=TABLES)
    parser.add_argument("--backbone", default="resnet10t", help="any timm model; densenet121 and resnet50 on a GPU")
    parser.add_argument("--side", type=int, default=112, help="pixels; 224 on a GPU")
    parser.add_argument("--batch", type=int, default=16, help="images of a rank, before the second view")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"])
    parser.add_argument("--stretch", type=int, default=3, help="steps of a turn; 20 on a GPU")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each row")
    a = parser.parse_args()
    case = Case("", a.backbone, a.side, a.batch, a.device, a.amp, a.stretch)
    print(f"{a.backbone}, {a.side} px, batch {a.batch}, {a.device}, amp {a.amp}, median of {a.rounds} rounds")
    TABLES[a.table](case, a.rounds)


if __name__ == "__main__":
    main()
