"""The verb that shows everything: demo."""

from pathlib import Path
from typing import Annotated

import typer

from infra.cli.options import Config, Resume, Set, Verbose, claim, settings_of
from mpc.errors import UserError

DEMO_OUT = "runs/demo"


def add_to(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command(epilog="Example: mpc-cxr demo --out runs/demo")(demo)


def demo(
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help=f"Folder for everything; default {DEMO_OUT}[-2, -3].")
    ] = None,
    config: Config = "demo",
    set_: Set = None,
    resume: Resume = False,
    verbose: Verbose = False,
) -> None:
    """Does all of it on synthetic radiographs, without network, GPU or account: at most 8 minutes on 2 cores.

    prepare, a search of several trials, register and promote the best, evaluate on the test split, predict, report.
    """
    settings = settings_of(config, set_, verbose)
    if resume and out is None:
        raise UserError("demo --resume needs --out, the folder of the demo to continue")
    from infra.demo import Demo

    Demo(settings, Path(claim(out or free_folder(DEMO_OUT), resume)), resume=resume, verbose=verbose).run()


def free_folder(first: str) -> str:
    """`first`, or the first of `first-2`, `first-3`, ... that does not exist."""
    place, number = Path(first), 1
    while place.exists():
        number += 1
        place = Path(f"{first}-{number}")
    return str(place)
