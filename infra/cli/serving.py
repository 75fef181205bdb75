"""The verb that puts a model behind a page: serve."""

import typer

from infra.cli.options import Checkpoint, Config, Model, Set, Verbose, checkpoint_of, settings_of
from infra.console import say


def add_to(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command(epilog="Example: mpc-cxr serve --model models:/mpc-cxr@champion --set serve.port=8080")(serve)


def serve(
    checkpoint: Checkpoint = None,
    model: Model = None,
    config: Config = None,
    set_: Set = None,
    verbose: Verbose = False,
) -> None:
    """Serves a page on this machine: drop an image or DICOM file, see its findings and where their evidence lies.

    Nobody else is let in and nothing of a file is kept. Limits are settings: serve.max_mib (MiB), serve.timeout_s
    (seconds). Research use only.
    """
    settings = settings_of(config, set_, verbose)
    from infra.serve.app import listen
    from infra.serve.app import serve as answer
    from infra.serve.service import Service

    with listen(settings.serve) as door:
        service = Service(checkpoint_of(checkpoint, model, settings), settings.predict, settings.explain)
        host, port = door.getsockname()[:2]
        say(f"model {service.version} on http://{host}:{port}, until Ctrl-C; research use only")
        answer(service, settings.serve, door, verbose=verbose)
