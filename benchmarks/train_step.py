"""What a training step costs: our loop against one written by hand, MPC against AN: `python benchmarks/train_step.py`.

By hand is the least that trains the same network on the same batch; a second row does what ours does besides: clipping,
schedule, average of the weights. MPC sees twice the images (weak and strong), so 2.0 is the limit of its ratio to AN.
Utilisation is the model's floating-point operations against those of the fastest matrix product or convolution of this
machine in the same number format. Every row runs in a process of its own; rows take turns, so that a machine whose pace
changes does not favour one of them, and ratios are taken within a round.

Tables: `step`; `settings` of the loop; `workers`, 1 to 4 of them, against as many processes that know nothing of each
other; `stream`, on synthetic images that are read and augmented meanwhile.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from processes import alone
from ranks import images_per_second
from steps import BenchLoop, Case, Stopwatch, TimedHost, by_hand, card_of, held, ours, run_of
from stream import BATCH, synthetic
from streamed import STREAMED
from torch.utils.flop_counter import FlopCounterMode

from mpc.model import AMP_DTYPES
from mpc.transfer import Transfer

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


class Measured(NamedTuple):
    """What a row took."""

    ms: float
    """Median of a step."""
    mib: float
    """Peak memory: of the GPU, or of the process on a CPU."""
    waited: float
    """Share of the time that went by waiting for batches."""


def measure(case: Case) -> Measured:
    """One row in this process."""
    torch.set_num_threads(1)
    watch = Stopwatch(case)
    {**STEPS, **SETTINGS, **STREAMED}[case.row](case, watch)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    if case.device == "cuda":
        mib = torch.cuda.max_memory_allocated() / 2**20
    return Measured(watch.ms(), mib, watch.wait_share())


def operations(case: Case, terms: str, **sections: Any) -> float:
    """Floating-point operations of the matrix products and convolutions of one step; a multiply-add counts as two."""
    torch.set_num_threads(1)
    loop = BenchLoop(run_of(case, terms, **sections), "", card_of(case.side), TimedHost(Stopwatch(case)))
    batch = Transfer(loop.host.device)(held(case.batch, case.side, strong=loop.method.needs_strong))
    with FlopCounterMode(display=False) as counter:
        loop.train_step(batch)
    return float(counter.get_total_flops())


def peak(case: Case) -> float:
    """Floating-point operations a second of this machine: the best of a large matrix product and a convolution."""
    torch.set_num_threads(1)
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
    """Seconds of the fastest of ten calls, after two that allocate."""
    found = []
    for _ in range(12):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[2:])


def measured(case: Case, rows: dict[str, partial[None]], rounds: int) -> list[dict[str, Measured]]:
    """Every row once a round, each in a process of its own."""
    return [{row: alone(measure, case._replace(row=row)) for row in rows} for _ in range(rounds)]


def by_step(case: Case, rows: dict[str, partial[None]], base: str, rounds: int) -> list[dict[str, Measured]]:
    """Prints one line a row: ms, images a second, time relative to the row `base`, utilisation, memory."""
    found = measured(case, rows, rounds)
    print(f"{'':28}{'ms/step':>10}{'images/s':>10}{'x ' + base:>8}{'GFLOP':>9}{'of peak':>9}{'peak MiB':>10}")
    for name, row in rows.items():
        ms = statistics.median(r[name].ms for r in found)
        ratio = statistics.median(r[name].ms / r[base].ms for r in found)
        sections = {key: value for key, value in row.keywords.items() if row.func is ours and key != "terms"}
        format_of = case._replace(amp=sections.get("train", {}).get("amp", case.amp))
        eager = {**sections, "train": {**sections.get("train", {}), "compile": False}}
        done = alone(partial(operations, case, row.keywords.get("terms", "AN"), **eager))
        use = 1e3 * done / ms / alone(peak, format_of)
        mib = max(r[name].mib for r in found)
        line = f"{name:28}{ms:10.1f}{1e3 * case.batch / ms:10.1f}{ratio:8.3f}{done / 1e9:9.1f}{use:9.1%}{mib:10.0f}"
        print(line, flush=True)
    return found


def judge(found: list[dict[str, Measured]], what: str, above: str, below: str) -> None:
    """Prints the ratio of two rows' times: its median and range over rounds."""
    ratios = sorted(r[above].ms / r[below].ms for r in found)
    print(f"{what}: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def step_table(case: Case, rounds: int) -> None:
    """Our loop and the hand-written one."""
    found = by_step(case, STEPS, "AN", rounds)
    judge(found, "throughput of our loop relative to the one by hand (aim 0.97)", HAND, "AN")
    judge(found, "relative to the one by hand that does the same work", WORK, "AN")
    judge(found, "MPC step relative to AN step (limit 2.0, aim 2.1)", "MPC", "AN")


def settings_table(case: Case, rounds: int) -> None:
    """Settings of the loop, one changed at a time."""
    by_step(case, SETTINGS, "MPC", rounds)


def workers_table(case: Case, rounds: int) -> None:
    """Images a second of 1, 2 and 4 workers with a batch of their own each, and of processes without communication."""
    counts = [1, 2, 4] if case.device == "cpu" else [n for n in (1, 2, 4) if n <= torch.cuda.device_count()]
    ways = {"workers": True, "processes": False}
    found = [{(n, way): images_per_second(case, n, ways[way]) for n in counts for way in ways} for _ in range(rounds)]
    print(f"{'':4}{'images/s':>10}{'x one':>8}{'without communication':>24}{'x one':>8}{'share of it':>13}")
    for n in counts:
        ours_, limit = (statistics.median(r[n, way] for r in found) for way in ways)
        one, one_limit = (statistics.median(r[n, way] / r[1, way] for r in found) for way in ways)
        share = statistics.median(r[n, "workers"] / r[n, "processes"] for r in found)
        print(f"{n:4}{ours_:10.1f}{one:8.2f}{limit:24.1f}{one_limit:8.2f}{share:13.1%}")


def stream_table(case: Case, rounds: int) -> None:
    """Training on a data set: images a second, and the share of time that waits for batches."""
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic(Path(folder), 4000, case.side)
        found = measured(case._replace(batch=BATCH, data=data), STREAMED, rounds)
    print(f"batches of {BATCH}\n{'':34}{'images/s':>10}{'waiting':>9}")
    for name in STREAMED:
        ms, waited = (statistics.median(r[name][at] for r in found) for at in (0, 2))
        print(f"{name:34}{1e3 * BATCH / ms:10.1f}{waited:9.1%}")


TABLES = {"step": step_table, "settings": settings_table, "workers": workers_table, "stream": stream_table}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="step", choices=TABLES)
    parser.add_argument("--backbone", default="resnet10t", help="any timm model; densenet121 and resnet50 on a GPU")
    parser.add_argument("--side", type=int, default=112, help="pixels; 224 on a GPU")
    parser.add_argument("--batch", type=int, default=16, help="images of a rank, before the second view")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"])
    parser.add_argument("--stretch", type=int, default=1, help="steps between two looks at the clock; 20 on a GPU")
    parser.add_argument("--stretches", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    case = Case("", a.backbone, a.side, a.batch, a.device, a.amp, a.stretch, a.stretches)
    print(f"{a.backbone}, {a.side} px, batch {a.batch}, {a.device}, amp {a.amp}, median of {a.rounds} rounds")
    TABLES[a.table](case, a.rounds)


if __name__ == "__main__":
    main()
