"""What a search costs beside its trials, what ASHA saves, and what trials that share a GPU gain, on synthetic
radiographs; each part continues where it was stopped.

    python benchmarks/search.py overhead --out runs/overhead     # against the same trials by hand; about 20 minutes
    python benchmarks/search.py curves --out runs/curves         # 81 settings x 27 epochs x 5 seeds: 53 minutes of CPU
    python benchmarks/search.py asha --out runs/curves           # Ray's ASHA over these curves; a minute
    python benchmarks/search.py sharing --out runs/sharing       # needs a GPU and 16 CPUs; minutes

overhead: the same settings, loop, Ray Data stream and checkpoints, once in one process after the other, once as a
search with one trial at a time; both start Ray, which is shown apart. A trial lasts at least a minute.
asha: every setting is trained once to the end and its learning curve kept; then Ray Tune runs the real scheduler over
trials that only report these curves. Compared are the epochs until a trial reports the best value that random search
finds at full length.
sharing: the same trials with a whole GPU, a half and a quarter of it each (train.gpus), so one, two and four at a time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
from processes import alone, cpu_seconds
from ray import tune
from ray.tune.search import BasicVariantGenerator
from scipy.stats import spearmanr

from infra.settings import load, run_config
from mpc.metrics import score
from mpc.transfer import Transfer
from pipeline import runtime
from pipeline.card import CARD_FILE, read_card
from pipeline.config import RunConfig
from pipeline.host import Host, Metrics
from pipeline.loop import Loop
from pipeline.prepare_config import PhantomConfig, PrepareConfig, SplitConfig
from pipeline.record import MetricsLog, read_lines
from pipeline.setup import Timed
from pipeline.shards import prepare
from pipeline.spans import SPAN_ROWS, SpanReader, TrainingData, arrays_of
from tuning.config import SearchConfig
from tuning.domains import Dimension, Space
from tuning.follow import CELL
from tuning.outcome import SearchResult
from tuning.schedulers import make_scheduler
from tuning.search import fresh, search
from tuning.space import apply

METRIC = "val_macro_auroc"
TRIALS, EPOCHS, FACTOR, SEEDS = 81, 27, 3.0, 5
LEAST_S = 62.0
"""Seconds that a trial of the overhead lasts at least, by a first epoch."""
SPACE = Space(
    (
        Dimension("optim.lr", "loguniform", (0.0001, 0.03)),
        Dimension("optim.weight_decay", "loguniform", (0.00001, 0.1)),
        Dimension("loss.lambda_fpc", "uniform", (0.05, 1.0)),
        Dimension("loss.lambda_btc", "uniform", (0.05, 1.0)),
        Dimension("model.perturb.rate", "uniform", (0.0, 0.5)),
        Dimension("pseudo.tau_pos", "uniform", (0.6, 0.95)),
    )
)


class Here(Host):
    """A plain process as host of the loop: what one would write by hand.

    Args:
        out: folder of the run.
    """

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, out: Path) -> None:
        self.out, self.log_ = out, MetricsLog(str(out))
        out.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """Begins anew."""
        yield None

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Keeps record and checkpoint."""
        self.log_.add(metrics)
        tune.Checkpoint.from_directory(checkpoint).to_directory(str(self.out / checkpoint.name))

    def log(self, line: Metrics) -> None:
        """Shows nothing."""

    def leave(self, name: str, content: bytes) -> str:
        """Keeps a file with the run."""
        (self.out / name).write_bytes(content)
        return str(self.out / name)


def synthetic(folder: Path, images: int, side: int, val: float = 0.1) -> str:
    """A prepared data set of phantoms, once."""
    data = str(folder / "data")
    if not (folder / "data" / CARD_FILE).exists():
        config = PrepareConfig(
            image_size=side, row_group=64, phantom=PhantomConfig(images=images), split=SplitConfig(val=val)
        )
        alone(prepare, config, None, data)
    return data


# overhead


def long_run(epochs: int) -> RunConfig:
    """A trial of the demo's network: one CPU trains, one reads."""
    tree = run_config(load("demo")).model_dump(mode="json")
    tree["train"] |= {"epochs": epochs, "worker_cpus": 1.0}
    tree["data"] |= {"task_cpus": 0.5, "tasks": 1}
    return RunConfig.model_validate(tree)


def rates(count: int) -> Space:
    """As many settings as trials."""
    return Space((Dimension("optim.lr", "choice", tuple(0.002 + 0.001 * n for n in range(count))),))


def timed_start() -> float:
    """Seconds that Ray takes to start."""
    began = time.perf_counter()
    runtime.start(num_cpus=2)
    return time.perf_counter() - began


class Seconds(NamedTuple):
    """Of one way."""

    start: float
    """Ray's own, which is not counted."""
    all: float
    epochs: float
    """Within the epochs of the trials, where both ways do the same but for what Tune's process takes beside them."""
    cpu: float
    """CPU seconds of all processes, Ray's own among them."""
    beside: float = 0.0
    """CPUs that Tune's own process used while trials trained."""


def within_epochs(out: str) -> float:
    """Seconds, by the records that trials leave."""
    return sum(float(line["seconds"]) for file in Path(out).rglob("metrics.jsonl") for line in read_lines(str(file)))


class Watch:
    """A listener that notes what the search's own process has used at every epoch."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_trial_start(self, trial_id: str, params: dict[str, Any]) -> None:
        """Nothing to note."""

    def on_trial_epoch(self, trial_id: str, metrics: dict[str, Any]) -> None:
        """CPU seconds and seconds so far."""
        self.marks.append((time.process_time(), time.perf_counter()))

    def on_trial_end(self, trial_id: str, status: str) -> None:
        """Nothing to note."""

    @property
    def share(self) -> float:
        """CPUs that the process used from the first epoch's end to the last one's."""
        (cpu, began), (used, ended) = self.marks[0], self.marks[-1]
        return (used - cpu) / (ended - began)


def by_hand(data: str, out: str, epochs: int, trials: int) -> Seconds:
    """The trials one after the other."""
    started, began, used = timed_start(), time.perf_counter(), cpu_seconds()
    for number, settings in enumerate(rates(trials).grid()):
        run = apply(long_run(epochs), settings, "by hand")
        Loop(run, data, read_card(data), Here(Path(out) / str(number))).fit()
    return Seconds(started, time.perf_counter() - began, within_epochs(out), cpu_seconds() - used)


def lasting(result: SearchResult) -> float:
    """Seconds from the first trial's begin to the last one's end; a trial that failed would make them look few."""
    times = [(t.started, t.ended) for t in result.trials if t.status == "finished" and t.started and t.ended]
    if len(times) < len(result.trials):
        raise SystemExit(f"not all trials have finished: {[(t.trial_id, t.status, t.error) for t in result.trials]}")
    return max(ended for _, ended in times) - min(started for started, _ in times)


def by_search(data: str, out: str, epochs: int, trials: int) -> Seconds:
    """The same as a search."""
    started, began, used = timed_start(), time.perf_counter(), cpu_seconds()
    config = SearchConfig(searcher="grid", scheduler="none", max_trials=trials, max_concurrent=1, cpus_for_data=0.5)
    watch = Watch()
    lasting(search(long_run(epochs), config, rates(trials), data, out, listeners=[watch]))
    whole = time.perf_counter() - began
    return Seconds(started, whole, within_epochs(out), cpu_seconds() - used, watch.share)


def epochs_of_a_minute(folder: Path, data: str) -> int:
    """Epochs that make a trial long enough, by the second of two."""
    alone(by_hand, data, str(folder / "calibration"), 2, 1)
    seconds = MetricsLog(str(folder / "calibration" / "0")).read()[-1]["seconds"]
    return int(LEAST_S / seconds) + 1


def overhead(folder: Path, trials: int, rounds: int) -> None:
    """Both ways, every other round in the other order; every round is kept as soon as it is done."""
    data, kept = synthetic(folder, 3000, 64), folder / "rounds.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"rounds": []}
    if "epochs" not in done:
        done["epochs"] = epochs_of_a_minute(folder, data)
    for number in range(len(done["rounds"]), rounds):
        place = str(folder / f"round-{number}-{time.time():.0f}")
        ways: list[tuple[str, Callable[..., Seconds]]] = [("hand", by_hand), ("search", by_search)]
        found = {
            name: alone(way, data, f"{place}-{name}", done["epochs"], trials) for name, way in ways[:: (-1) ** number]
        }
        done["rounds"].append(found)
        kept.write_text(json.dumps(done))
    print(f"{trials} trials of {done['epochs']} epochs, one at a time, {len(done['rounds'])} rounds")
    pairs = [(Seconds(*found["hand"]), Seconds(*found["search"])) for found in done["rounds"]]
    for pair in pairs:
        for name, way in zip(("hand", "search"), pair, strict=True):
            print(
                f"{name:8}{way.all:8.1f} s, {way.epochs:8.1f} s of it in epochs; {way.cpu:8.1f} CPU seconds; "
                f"ray.init {way.start:.1f} s besides"
            )
    shown("overhead of the search (limit 5 %)", [b.all / a.all - 1 for a, b in pairs])
    shown("before, between and after epochs", [(b.all - b.epochs - a.all + a.epochs) / a.all for a, b in pairs])
    shown("within epochs", [b.epochs / a.epochs - 1 for a, b in pairs])
    shown("in CPU seconds", [b.cpu / a.cpu - 1 for a, b in pairs])
    shown("of a CPU, by Tune's own process while trials train", [b.beside for _, b in pairs])


def shown(what: str, shares: list[float]) -> None:
    """One line over the rounds."""
    print(f"{what}: {statistics.median(shares):+.1%} (median; {min(shares):+.1%} to {max(shares):+.1%})")


# learning curves, and ASHA over them


class Curve(Loop):
    """The loop, its batches made in this process and no checkpoint written: hundreds of small runs."""

    def __init__(self, run: RunConfig, data: str) -> None:
        super().__init__(run, data, read_card(data), Here(Path(data).parent))
        self.values: list[float] = []

    def _until(self, stop: int) -> Iterator[Timed]:
        run = self.now
        data = TrainingData(self.data, self.card, run.views, seed=run.train.seed, draw_seed=run.data.draw_seed)
        reader, transfer = SpanReader(data, self.plan, 0, 1), Transfer(self.host.device)
        for span in self.plan.spans(self.step, stop, SPAN_ROWS // run.train.batch_size):
            for table in reader(span):
                yield Timed(transfer(arrays_of(table, self.card.image_size)), 0.0)

    def end_epoch(self, seconds: float, waited: float, steps: int) -> Metrics:
        """Validation by the averaged weights; thresholds and calibration are not asked for."""
        scored = self._score("val")
        assert scored is not None, "there is one process"
        self.values.append(
            score(scored.probabilities, scored.labels, scored.known, self.card.findings)["macro"]["auroc"]
        )
        return {}


def short_run(seed: int) -> RunConfig:
    """Small enough for hundreds: a few hundred images of 16 pixels, and no second view, which would cost the most."""
    return RunConfig.model_validate(
        {
            "model": {"backbone": "test_efficientnet_gn"},
            "loss": {"sup": "wan", "norm": "all", "lambda_ipc": 0.0, "warmup_epochs": 2, "ramp_epochs": 2},
            "pseudo": {"tau_neg": 0.1},
            "data": {"draw_seed": seed},
            "train": {"epochs": EPOCHS, "batch_size": 32, "seed": seed},
        }
    )


def settings_of(seed: int) -> list[dict[str, Any]]:
    """What random search draws."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    return [SPACE.suggest(study.ask()) for _ in range(TRIALS)]


def curves(folder: Path, images: int) -> None:
    """Trains every setting of every seed to its end; a line each, those that are there are left alone."""
    data, kept = synthetic(folder, images, 16, val=0.5), folder / "curves.jsonl"
    known = {(line["seed"], line["trial"]) for line in read_curves(kept)}
    for seed in range(SEEDS):
        for trial, settings in enumerate(settings_of(seed)):
            if (seed, trial) in known:
                continue
            began = time.process_time()
            loop = Curve(apply(short_run(seed), settings, f"trial {trial}"), data)
            loop.fit()
            spent = time.process_time() - began
            line = {"seed": seed, "trial": trial, "settings": settings, "values": loop.values, "cpu_s": spent}
            with kept.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_curves(kept: Path) -> list[dict[str, Any]]:
    """All lines so far."""
    return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


def replay(params: dict[str, Any], *, values: list[list[float]]) -> None:
    """A trial that reports a learning curve."""
    for epoch, value in enumerate(values[params[CELL]["trial"]], 1):
        tune.report({"epoch": epoch, METRIC: value})


class Count(tune.Callback):  # type: ignore[misc]
    """Every epoch that is reported, in order."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """One more."""
        self.values.append(result[METRIC])


def epochs_to(values: list[float], target: float) -> int | None:
    """Epochs until a value is reached; None if it never is."""
    return next((number for number, value in enumerate(values, 1) if value >= target), None)


def by_asha(values: list[list[float]], folder: str, grace: int) -> list[float]:
    """All values that trials report under ASHA, in order: one trial at a time, in the order of random search."""
    config = SearchConfig(
        searcher="random", scheduler="asha", reduction_factor=FACTOR, grace_epochs=grace, metric=METRIC
    )
    count = Count()
    fresh(
        tune.with_resources(tune.with_parameters(replay, values=values), {"CPU": 1}),
        {CELL: tune.grid_search([{"trial": trial} for trial in range(TRIALS)])},
        folder,
        tune.TuneConfig(
            search_alg=BasicVariantGenerator(max_concurrent=1),
            scheduler=make_scheduler(config, short_run(0), SPACE, folder),
            reuse_actors=True,
        ),
        tune.CheckpointConfig(),
        [count],
    ).fit()
    return count.values


def asha(folder: Path) -> None:
    """A table for each first rung."""
    lines = read_curves(folder / "curves.jsonl")
    runtime.start(num_cpus=2)
    print(f"{TRIALS} trials, at most {EPOCHS} epochs, factor {FACTOR:g}: {TRIALS * EPOCHS:,} epochs for random search")
    for grace in (1, 3, 9):
        print(f"\nfirst comparison after {grace} epochs (search.grace_epochs)")
        compare(folder, lines, grace)


def compare(folder: Path, lines: list[dict[str, Any]], grace: int) -> None:
    """One line a seed, then the medians; `order`: how trials rank at the first comparison, against their best."""
    full, rows = TRIALS * EPOCHS, []
    print(f"{'seed':>4}{'best':>8}{'random':>8}{'ASHA in all':>13}{'until best':>12}{'ASHA best':>11}{'order':>7}")
    for seed in sorted({line["seed"] for line in lines}):
        values = [line["values"] for line in sorted(lines, key=lambda line: line["trial"]) if line["seed"] == seed]
        if len(values) < TRIALS:
            continue
        everything = [value for curve in values for value in curve]
        best = max(everything)
        found = by_asha(values, str(folder / f"asha-{seed}-{time.time():.0f}"), grace)
        reached, at_random = epochs_to(found, best), epochs_to(everything, best)
        rows.append((len(found) / full, (reached or full) / full, reached is not None, max(found) - best))
        order = spearmanr([max(curve[:grace]) for curve in values], [max(curve) for curve in values]).statistic
        print(f"{seed:4}{best:8.4f}{at_random:8}{len(found):13}{reached or 'never':>12}{max(found):11.4f}{order:7.2f}")
    for name, at in (("epochs of the whole search", 0), ("epochs until the best of random search", 1)):
        shares = [row[at] for row in rows]
        print(f"{name}: {statistics.median(shares):.2f} of random search, {min(shares):.2f} to {max(shares):.2f}")
    missed = [row[3] for row in rows if not row[2]]
    print(
        f"reached in {len(rows) - len(missed)} of {len(rows)} seeds; else short by {[f'{-gap:.4f}' for gap in missed]}"
    )


# trials that share a GPU


class Shared(NamedTuple):
    """Of all trials with one share."""

    seconds: float
    """From the first trial's begin to the last one's end."""
    epoch: float
    """Seconds of a trial's later epochs, in the median; its first one warms up."""
    memory: float
    """Most of the GPU's memory that was in use when an epoch ended, in MB."""


def by_share(data: str, out: str, trials: int, share: float) -> Shared:
    """MPC as it is recommended, from random weights, as a search on this machine's GPU."""
    tree = run_config(load("mpc")).model_dump(mode="json")
    tree["model"]["weights"] = "none"
    tree["train"] |= {"epochs": 4, "use_gpu": True, "gpus": share, "amp": "bf16"}
    config = SearchConfig(searcher="grid", scheduler="none", max_trials=trials)
    runtime.start()
    seconds = lasting(search(RunConfig.model_validate(tree), config, rates(trials), data, out))
    lines = [line for file in Path(out).rglob("metrics.jsonl") for line in read_lines(str(file))]
    later = [line["seconds"] for line in lines if line["epoch"] > 1]
    memory = [line["system/gpu_0_memory_usage_megabytes"] for line in lines]
    return Shared(seconds, statistics.median(later), max(memory))


def sharing(folder: Path, trials: int) -> None:
    """A table; a share is kept as soon as it is done."""
    data, kept = synthetic(folder, 2000, 224), folder / "shares.json"
    done: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    for share in (1.0, 0.5, 0.25):
        if str(share) not in done:
            done[str(share)] = alone(by_share, data, str(folder / f"share-{share}-{time.time():.0f}"), trials, share)
            kept.write_text(json.dumps(done))
    whole = Shared(*done["1.0"])
    print(f"{trials} trials, 4 epochs of MPC, DenseNet-121, 224 px, batch 32, bfloat16, {torch.cuda.get_device_name()}")
    print(f"{'train.gpus':>10}{'seconds':>9}{'x a whole GPU':>15}{'an epoch, s':>13}{'memory, MB':>12}")
    for name, found in ((name, Shared(*values)) for name, values in done.items()):
        gain = whole.seconds / found.seconds
        print(f"{name:>10}{found.seconds:9.1f}{gain:15.2f}{found.epoch:13.1f}{found.memory:12,.0f}")


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("overhead", "curves", "asha", "sharing"))
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps what is done")
    parser.add_argument("--trials", type=int, default=4, help="of the overhead, or that share a GPU")
    parser.add_argument("--rounds", type=int, default=1, help="of the overhead")
    parser.add_argument("--images", type=int, default=600, help="synthetic images of the learning curves")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    if a.part == "overhead":
        overhead(a.out.absolute(), a.trials, a.rounds)
    elif a.part == "curves":
        torch.set_num_threads(1)
        curves(a.out.absolute(), a.images)
    elif a.part == "sharing":
        if not torch.cuda.is_available():
            parser.error("sharing needs a GPU, and torch finds none here")
        sharing(a.out.absolute(), a.trials)
    else:
        asha(a.out.absolute())


if __name__ == "__main__":
    main()
