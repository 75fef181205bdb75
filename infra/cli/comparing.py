"""The verb that compares methods: benchmark."""

from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.data import Root
from infra.cli.options import DryRun, Out, Resume, Set, Verbose, claim, set_logs, start_ray
from infra.console import progress, say, table
from mpc.errors import UserError

if TYPE_CHECKING:
    from tuning.benchmark.protocol import Protocol


def add_to(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command(epilog="Example: mpc-cxr benchmark --config phantom-small --out runs/phantom-small")(benchmark)


def benchmark(
    out: Out,
    config: Annotated[
        str, typer.Option("--config", metavar="PROTOCOL|FILE", help="Shipped protocol (see `config presets`) or YAML.")
    ] = "phantom-small",
    root: Root = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="URI", help="Prepared data set, where the protocol makes none.")
    ] = None,
    set_: Set = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Compares methods on equal terms: same data, network, epochs and number of settings tried, over several draws.

    A protocol says what; its runs are a grid on Ray Tune. Leaves results.json, table.md and benchmark.html. Only resume
    from storage that you trust as you trust code: Ray Tune keeps its own state as a pickle.
    """
    set_logs(verbose)
    claim(out, resume)
    from infra.benchmarking import load, run

    protocol, methods = load(config, set_ or ())
    if dry_run:
        from tuning.benchmark.run import require

        require(protocol, methods, data, root or ())
        show_plan(protocol, out)
        return
    start_ray(verbose)
    with progress("benchmark") as display:
        found, page = run(protocol, methods, out, display, roots=root or (), data=data, resume=resume)
    from tuning.benchmark.report import table_rows

    header, rows = table_rows(found)
    table(protocol.title, header, rows)
    say(f"report: {page}")
    if found["failed"]:
        name, reason = next(iter(found["failed"].items()))
        raise UserError(f"{len(found['failed'])} runs failed, first {name}: {reason}; --resume runs them again")


def show_plan(protocol: "Protocol", out: str) -> None:
    """What the benchmark would run, from its protocol alone."""
    from tuning.benchmark.run import table_cells, tuning_cells

    stages = [("table", table_cells(protocol, None, out, None))]
    if protocol.tuning is not None:
        stages.insert(0, ("tuning", tuning_cells(protocol, out, None)))
    table(
        protocol.title,
        ["stage", "runs", "data sets", "seeds"],
        [
            [name, len(cells), len({cell.data for cell in cells}), ", ".join(map(str, sorted({c.seed for c in cells})))]
            for name, cells in stages
        ],
    )
    say(f"would compare {', '.join(protocol.methods)} into {out}")
