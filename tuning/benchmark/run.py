"""A benchmark from its protocol to its files: data, tuning, the table's cells, results."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ray.tune import Callback

from mpc.config import NO_FILE
from mpc.errors import MissingError, UserError
from pipeline import runtime, storage
from pipeline.card import DatasetCard, read_card
from pipeline.config import RunConfig
from pipeline.prepare_config import PrepareConfig
from pipeline.record import claim
from pipeline.scoring import require_validation
from pipeline.shards import prepare
from pipeline.versions import git_commit, versions
from tuning.benchmark import results
from tuning.benchmark.cells import CELLS, Cell
from tuning.benchmark.grid import require_one_worker, run_cells
from tuning.benchmark.protocol import Protocol, combinations
from tuning.follow import SearchListener
from tuning.search import begun

RESULTS_FILE, TUNED_FILE = "results.json", "tuned.json"
TUNING, TABLE, DATA = "tuning", "table", "data"

Announce = Callable[[str], None]
"""Told what begins, in words."""


class Follower(NamedTuple):
    """Who follows a benchmark; none of it changes the result."""

    announce: Announce = lambda text: None
    listeners: Callable[[int, int], Sequence[SearchListener]] = lambda cells, epochs: ()
    """Makes the listeners of a stage from its number of cells and of epochs."""
    callbacks: Callable[[str], Sequence[Callback]] = lambda folder: ()
    """Makes the Tune callbacks of a stage from the folder of its cells."""


class Tuned(NamedTuple):
    """What tuning left to the table."""

    choices: dict[str, Any] | None = None
    """By method, as `results.chosen` has them; None without tuning."""
    failed: dict[str, str] = {}  # noqa: RUF012, never changed
    """Name and reason of every cell that failed."""


def benchmark(
    protocol: Protocol,
    methods: Mapping[str, RunConfig],
    out: str,
    *,
    roots: Sequence[str] = (),
    data: str | None = None,
    resume: bool = False,
    follower: Follower = Follower(),  # noqa: B008, immutable
) -> dict[str, Any]:
    """Runs what is not done yet and leaves `results.json`; its content.

    Args:
        protocol: what is compared.
        methods: resolved configuration of every method of the protocol.
        out: folder or s3:// prefix.
        roots: folders of the collection, where the protocol prepares a real one.
        data: prepared data set, where the protocol does not prepare any.
        resume: continue what `out` holds; finished cells are not run again.
        follower: who follows.

    Raises:
        UserError: settings that do not fit, or a stage of which no run ended well.
    """
    out = storage.absolute(out)
    require(protocol, methods, data, roots)
    digest = read_card(data).digest if data else None
    claim(out, identity(protocol, methods) | {"data_digest": digest}, resume=resume)
    runtime.start()
    tuning, table = storage.join(out, TUNING), storage.join(out, TABLE)
    tuned = Tuned()
    if protocol.tuning is not None and begun(table):  # its cells train with what was chosen, whatever is mended later
        tuned = Tuned(**json.loads(storage.read_bytes(storage.join(out, TUNED_FILE))))
    elif protocol.tuning is not None:
        cells = tuning_cells(protocol, out, data)
        _prepare(protocol, cells, out, roots, data, follower.announce)
        follower.announce(f"tuning: {len(cells)} runs")
        failed = _run(protocol, methods, cells, tuning, follower, test=False)
        tuned = Tuned(results.chosen(cells, storage.join(tuning, CELLS), protocol.metric, failed), failed)
        if not tuned.choices:
            raise _none_ended_well(cells, failed)
        storage.write_bytes(storage.join(out, TUNED_FILE), json.dumps(tuned._asdict(), indent=1).encode())
    cells = table_cells(protocol, tuned.choices, out, data)
    cards = _prepare(protocol, cells, out, roots, data, follower.announce)
    follower.announce(f"table: {len(cells)} runs")
    failed = _run(protocol, methods, cells, table, follower, test=True)
    found = summary(protocol, methods, cells, table, cards, tuned.choices or {})
    found |= {"failed": failed, "failed_while_tuning": tuned.failed}
    storage.write_bytes(storage.join(out, RESULTS_FILE), (json.dumps(found, indent=1) + "\n").encode())
    if len(failed) == len(cells):
        raise _none_ended_well(cells, failed)
    return found


def _none_ended_well(cells: Sequence[Cell], failed: Mapping[str, str]) -> UserError:
    """Of a stage without a result."""
    name, reason = next(iter(failed.items()), ("of all", "no epoch has the metric"))
    return UserError(f"none of {len(cells)} runs ended well, first {name}: {reason}; --resume runs them again")


def identity(protocol: Protocol, methods: Mapping[str, RunConfig]) -> dict[str, Any]:
    """What must be the same for a benchmark to be continued."""
    return {
        "protocol": protocol.model_dump(mode="json"),
        "config": {name: run.model_dump(mode="json") for name, run in methods.items()},
    }


def require(protocol: Protocol, methods: Mapping[str, RunConfig], data: str | None, roots: Sequence[str]) -> None:
    """Refuses what could not run to its end, before anything is written.

    Raises:
        UserError: cells of several workers, weights that are not there, data that are missing or too much.
    """
    require_one_worker(methods)
    for weights in sorted({run.model.weights for run in methods.values()} - {*NO_FILE}):
        if not storage.exists(weights):
            raise MissingError(f"model.weights {weights}: no such file; set run.model.weights to its place")
    require_data(protocol, data, roots)


def require_data(protocol: Protocol, data: str | None, roots: Sequence[str]) -> None:
    """Refuses a call that lacks the protocol's data, or brings what it would not read.

    Raises:
        UserError: what is missing or too much; a given data set without the protocol's findings.
    """
    if protocol.prepare is None:
        if data is None:
            raise UserError(f"{protocol.title}: needs --data, a data set made by `mpc-cxr prepare`")
        card = read_card(data)
        require_validation(card)
        if protocol.findings is not None and card.findings != protocol.findings:
            wanted = ", ".join(protocol.findings)
            raise UserError(
                f"--data {data} has the findings {', '.join(card.findings)}; "
                f"prepare it with those of the protocol: {wanted}"
            )
    elif data is not None:
        raise UserError(f"{protocol.title}: prepares its own data; leave --data out")
    elif not protocol.generated and not roots:
        raise UserError(f"{protocol.title}: needs --root, the folder of the {protocol.prepare.source} collection")


def tuning_cells(protocol: Protocol, out: str, data: str | None) -> list[Cell]:
    """Every setting of every method on every tuning seed; of a cross-validation, the first fold."""
    assert protocol.tuning is not None
    tuning = protocol.tuning
    return [
        Cell(name, seed, 0, number, settings, data or _place(protocol, out, seed, 0))
        for seed in tuning.seeds
        for name, method in protocol.methods.items()
        for number, settings in enumerate(combinations(method.space or tuning.space))
    ]


def table_cells(protocol: Protocol, choices: Mapping[str, Any] | None, out: str, data: str | None) -> list[Cell]:
    """Every method with its chosen settings on every seed and fold, seed by seed.

    Args:
        protocol: what is compared.
        choices: what tuning chose; a method that is not among them is left out. None keeps all as they are.
        out: folder of the benchmark.
        data: prepared data set, where one was given.
    """
    held = {name: {} for name in protocol.methods} if choices is None else choices
    return [
        Cell(name, seed, fold, None, choice.get("settings", {}), data or _place(protocol, out, seed, fold))
        for seed in protocol.seeds
        for fold in range(protocol.folds)
        for name, choice in held.items()
    ]


def _place(protocol: Protocol, out: str, seed: int, fold: int) -> str:
    """Where the data of a seed and fold lie."""
    parts = [f"seed{seed}" if protocol.generated else "all", *([f"fold{fold}"] if protocol.folds > 1 else [])]
    return storage.join(out, DATA, "-".join(parts))


def prepare_config(protocol: Protocol, seed: int, fold: int) -> PrepareConfig:
    """How the data of a seed and fold are made."""
    assert protocol.prepare is not None
    config = protocol.prepare
    phantom = config.phantom.model_copy(update={"seed": seed}) if protocol.generated else config.phantom
    split = config.split.model_copy(update={"folds": protocol.folds, "fold": fold})
    return config.model_copy(update={"phantom": phantom, "split": split})


def _prepare(
    protocol: Protocol, cells: Sequence[Cell], out: str, roots: Sequence[str], data: str | None, announce: Announce
) -> list[DatasetCard]:
    """Every data set of the cells, made where it is not there yet."""
    if data:
        return [read_card(data)]
    places = {cell.data: cell for cell in cells}
    announce(f"data: {len(places)} data sets")
    return [
        prepare(prepare_config(protocol, cell.seed, cell.fold), roots, place, resume=True)
        for place, cell in places.items()
    ]


def _run(
    protocol: Protocol,
    methods: Mapping[str, RunConfig],
    cells: Sequence[Cell],
    stage: str,
    follower: Follower,
    *,
    test: bool,
) -> dict[str, str]:
    epochs = next(iter(methods.values())).train.epochs
    return run_cells(
        cells,
        methods,
        stage,
        metric=protocol.metric,
        test=test,
        listeners=follower.listeners(len(cells), epochs),
        callbacks=follower.callbacks(storage.join(stage, CELLS)),
    )


def summary(
    protocol: Protocol,
    methods: Mapping[str, RunConfig],
    cells: Sequence[Cell],
    stage: str,
    cards: Sequence[DatasetCard],
    choices: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of results.json but for what failed."""
    folder = storage.join(stage, CELLS)
    scores, counts = results.replicates(cells, folder, cards[0].findings)
    return {
        "schema_version": 1,
        "synthetic": cards[0].synthetic,
        "data_digests": sorted({card.digest for card in cards}),
        "findings": cards[0].findings,
        "images_trained": [len(card.rows("train")) for card in cards],
        **counts,
        **identity(protocol, methods),
        "choices": dict(choices),
        "methods": results.summarise(protocol, scores),
        "tests": results.tested(protocol, scores),
        "curves": results.curves(cells, folder, protocol.metric),
        "seconds": results.seconds(cells, folder),
        "git_commit": git_commit(),
        "versions": versions(),
    }
