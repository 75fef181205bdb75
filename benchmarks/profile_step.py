"""Where the time of one training step goes, by torch.profiler: `python benchmarks/profile_step.py`.

Our whole loop on one held batch; the entries with the largest time of their own, which is the GPU's where there is one.
Besides, the parts of a step by time: what backward spends is told apart from forward, optimiser, average and the rest.
"""

import argparse
from collections import Counter
from typing import Any

import torch
from steps import TERMS, WARM_STEPS, BenchLoop, Case, Stopwatch, Stretch, TimedHost, card_of, run_of
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline import loop as loops
from pipeline.config import RunConfig

PARTS = ("forward", "update", "average", "sums")


class PartsLoop(BenchLoop):
    """Our loop with its parts named for the profiler."""

    def __init__(self, run: RunConfig, *arguments: Any) -> None:
        super().__init__(run, *arguments)
        _name(self.step_module, "forward", "forward")
        _name(self.ema, "update", "average")
        _name(self.meter, "add", "sums")


def _name(owner: object, function: str, name: str) -> None:
    """Puts a function that the profiler knows by `name` in place of the owner's."""
    original = getattr(owner, function)

    def named(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return original(*arguments, **options)

    setattr(owner, function, named)


def profiled(case: Case, terms: str, steps: int) -> profile:
    """The steps that follow the first ones, which allocate."""
    torch.set_num_threads(1)
    _name(loops, "update", "update")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if case.device == "cuda" else [])]
    profiler = profile(activities=activities)

    def ask(over: Stretch | None) -> bool:
        if over is None:
            profiler.start()
        else:
            profiler.stop()
        return over is None

    watch = Stopwatch(case._replace(stretch=steps), ask)
    PartsLoop(run_of(case, terms), "", card_of(case.side), TimedHost(watch)).fit()
    return profiler


def main() -> None:
    """Prints the parts of a step, then its largest entries."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--terms", default="MPC", choices=TERMS)
    parser.add_argument("--backbone", default="resnet10t", help="any timm model")
    parser.add_argument("--side", type=int, default=112, help="pixels")
    parser.add_argument("--batch", type=int, default=16, help="images, before the second view")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--entries", type=int, default=12)
    a = parser.parse_args()
    case = Case("", a.backbone, a.side, a.batch, a.device, a.amp, a.steps)
    averages = profiled(case, a.terms, a.steps).key_averages()
    field = "self_device_time_total" if a.device == "cuda" else "self_cpu_time_total"
    entries = Counter({entry.key: getattr(entry, field) for entry in averages if entry.key not in PARTS})
    calls = {entry.key: entry.count for entry in averages}
    parts = {entry.key: entry.cpu_time_total for entry in averages if entry.key in PARTS}
    whole = sum(entries.values()) + sum(getattr(entry, field) for entry in averages if entry.key in PARTS)
    print(
        f"{a.terms}, {a.backbone}, {a.side} px, batch {a.batch}, {a.device}, amp {a.amp}: {a.steps} steps after "
        f"{WARM_STEPS}, {whole / a.steps / 1e3:.1f} ms each"
    )
    for name in PARTS:
        print(f"  {name:10}{parts[name] / a.steps / 1e3:9.1f} ms of the host")
    print(f"{'time of its own':52}{'ms/step':>9}{'share':>8}{'calls/step':>12}")
    for name, spent in entries.most_common(a.entries):
        print(f"{name[:50]:52}{spent / a.steps / 1e3:9.2f}{spent / whole:8.1%}{calls[name] / a.steps:12.0f}")


if __name__ == "__main__":
    main()
