"""A benchmark as a person starts it: its protocol, methods resolved from presets, followed on screen and in MLflow."""

from collections.abc import Iterable, Sequence
from typing import Any

from ray.tune import Callback

from infra import settings
from infra.console import Display
from infra.listeners import TrialLines
from infra.tracking import tracking_uri
from pipeline import storage
from pipeline.config import RunConfig
from pipeline.dotted import merge, nested, parsed, validate
from pipeline.setup import located
from tuning.benchmark.protocol import Protocol, combinations
from tuning.benchmark.report import write_page, write_table
from tuning.benchmark.run import Follower, benchmark
from tuning.config import SearchConfig
from tuning.follow import SearchListener
from tuning.listeners import MlflowCallback, close_run, open_run
from tuning.record import Status
from tuning.space import apply
from tuning.tracking import Tracker

FOLDER, EXPERIMENT = "protocols", "benchmark"


def load(config: str, overrides: Iterable[str] = ()) -> tuple[Protocol, dict[str, RunConfig]]:
    """A protocol, shipped or from a file, with `--set` over it, and the configuration of each of its methods.

    Raises:
        UserError: unknown keys, values out of range, settings to try that a method would refuse.
    """
    tree = settings.tree_of(config, FOLDER)
    for text in overrides:
        path, value = settings.parse_override(text)
        tree = merge(tree, nested(path, value))
    protocol = parsed(Protocol, tree, config)
    methods = {name: _method(protocol, name, config) for name in protocol.methods}
    for name, entry in protocol.methods.items():
        space = entry.space or (protocol.tuning.space if protocol.tuning else {})
        for values in combinations(space):
            apply(methods[name], values, f"{config}: methods.{name}.space")
    return protocol, methods


def resolved(config: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The protocol as one tree that names neither preset nor file of this machine, for `load` to read elsewhere.

    Raises:
        UserError: as `load` does.
    """
    protocol, methods = load(config, overrides)
    tree = protocol.model_dump(mode="json")
    for name, entry in tree["methods"].items():
        entry |= {"preset": None, "run": methods[name].model_dump(mode="json")}
    return tree


def _method(protocol: Protocol, name: str, where: str) -> RunConfig:
    """Defaults, then the preset, then the protocol's run, then the method's own."""
    entry = protocol.methods[name]
    tree = settings.read(entry.preset) if entry.preset else {}
    tree = {section: values for section, values in tree.items() if section in RunConfig.model_fields}
    return located(validate(RunConfig, merge(merge(tree, protocol.run), entry.run), f"{where}: methods.{name}"))


def run(
    protocol: Protocol,
    methods: dict[str, RunConfig],
    out: str,
    display: Display,
    *,
    roots: Sequence[str] = (),
    data: str | None = None,
    resume: bool = False,
) -> tuple[dict[str, Any], str]:
    """Runs a benchmark, followed by `display` and MLflow; the content of results.json and the place of its page.

    Args:
        protocol: what is compared.
        methods: resolved configuration of every method.
        out: folder or s3:// prefix; gets results.json, table.md and benchmark.html.
        display: moves with the runs.
        roots: folders of the collection, where the protocol prepares a real one.
        data: prepared data set, where the protocol makes none.
        resume: continue what `out` holds.
    """
    tracker = Tracker(tracking_uri(settings.Settings(), out), EXPERIMENT)
    parent = open_run(tracker, out, storage.name(out), config={"protocol": protocol.title}, tags={"kind": EXPERIMENT})

    def listeners(cells: int, epochs: int) -> list[SearchListener]:
        return [TrialLines(display, SearchConfig(max_trials=cells, metric=protocol.metric), epochs)]

    def callbacks(folder: str) -> list[Callback]:
        return [MlflowCallback(tracker, parent, folder, tags={"kind": EXPERIMENT})]

    status = Status.FAILED
    try:
        follower = Follower(display.line, listeners, callbacks)
        found = benchmark(protocol, methods, out, roots=roots, data=data, resume=resume, follower=follower)
        status = Status.FINISHED
    finally:
        close_run(tracker, out, parent, status)
        tracker.close()
    write_table(found, out)
    return found, write_page(found, out)
