"""Time and peak memory of an MPC step against an AN step of the same batch: `python benchmarks/train_step.py`.

MPC sees twice the images (weak and strong), so 2.0 is the least that its ratio can be. Every row runs in a process of
its own; rows take turns, so that a machine whose pace changes does not favour one of them.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from typing import Any, NamedTuple

import torch

from mpc.build import build_method, build_model
from mpc.config import LossConfig, MethodConfig, ModelConfig, PixelSpec
from mpc.method import Batch, Progress

FINDINGS = 14
PARTS = {  # name: method, weights of the three terms
    "AN": ("an", (0.0, 0.0, 0.0)),
    "MPC, IPC alone": ("mpc", (1.0, 0.0, 0.0)),
    "MPC, all terms": ("mpc", (1.0, 0.5, 0.5)),
}


class Case(NamedTuple):
    """One row of the table."""

    part: str
    backbone: str
    side: int
    batch: int
    device: str
    amp: str
    steps: int


class Measured(NamedTuple):
    """What a row took."""

    ms: float
    """Median of a step."""
    mib: float
    """Peak memory: of the GPU, or of the process on a CPU."""


def measure(case: Case) -> Measured:
    """Forward, backward and optimiser step on one batch that already lies on the device."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method_name, (ipc, fpc, btc) = PARTS[case.part]
    loss = LossConfig(lambda_ipc=ipc, lambda_fpc=fpc, lambda_btc=btc, warmup_epochs=0, ramp_epochs=0)
    config = MethodConfig(model=ModelConfig(backbone=case.backbone), loss=loss)
    device = torch.device(case.device)
    model = build_model(config, FINDINGS, PixelSpec(), amp=case.amp).to(device).train()
    method: Any = build_method(method_name, config, model)
    method.to(device)
    optimizer = torch.optim.AdamW(method.param_groups(model, 1e-4))
    images = torch.randint(0, 256, (2, case.batch, 1, case.side, case.side), dtype=torch.uint8, device=device)
    observed = torch.nn.functional.one_hot(torch.arange(case.batch, device=device) % FINDINGS, FINDINGS).float()
    batch = Batch(images[0], images[1], observed, observed, observed >= 0, torch.arange(case.batch, device=device))
    times = []
    for _ in range(case.steps + 2):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        method.step(model, batch, Progress(0, 1, 1)).loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return Measured(statistics.median(times[2:]), _peak(device))


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def alone(case: Case) -> Measured:
    """`measure` in a process of its own: its peak memory is that of this case."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (case,))


def main() -> None:
    """Prints one line a row: ms, ratio to AN, peak memory, images a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="densenet121")
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images, before the second view")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    cases = [Case(part, a.backbone, a.side, a.batch, a.device, a.amp, a.steps) for part in PARTS]
    rounds = [[alone(case) for case in cases] for _ in range(a.rounds)]
    print(f"{a.backbone}, {a.side} px, batch {a.batch}, {a.device}, amp {a.amp}, median of {a.rounds} rounds")
    print(f"{'':18}{'ms/step':>10}{'x AN':>8}{'peak MiB':>10}{'x AN':>8}{'images/s':>10}")
    for row, part in enumerate(PARTS):
        ms = statistics.median(r[row].ms for r in rounds)
        ratio = statistics.median(r[row].ms / r[0].ms for r in rounds)
        mib = max(r[row].mib for r in rounds)
        memory = mib / max(r[0].mib for r in rounds)
        print(f"{part:18}{ms:10.1f}{ratio:8.2f}{mib:10.0f}{memory:8.2f}{1e3 * a.batch / ms:10.1f}")


if __name__ == "__main__":
    main()
