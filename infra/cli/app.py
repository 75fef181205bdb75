"""The entry point: builds the verbs, runs one, and turns every outcome into an exit code and at most one line."""

import re
import sys
import traceback
import warnings
from collections.abc import Iterator

import typer

from infra.cli import admin, comparing, data, models, quickstart, serving, submitting, training
from infra.console import fault
from mpc.errors import StoppedError, UserError

OK, FAULT, USER, INTERRUPTED, STOPPED = 0, 1, 2, 130, 143
RAISED = re.compile(r"^[A-Za-z_][\w.]*: .+$", re.MULTILINE)
"""The line of a traceback that says what was raised."""

app = typer.Typer(
    help="Multi-label chest X-ray classifiers from one positive label per image. Research use only.",
    epilog="Start with: mpc-cxr demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for room in (quickstart, data, training, comparing, models, serving, submitting, admin):
    room.add_to(app)


def main() -> None:
    """Runs the command line of this process and exits with its code."""
    if "-v" not in sys.argv:
        warnings.simplefilter("ignore")  # libraries' hints to their callers; users cannot act on them
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of one call: 0 done; 1 a fault that was found, or an unexpected failure; 2 a user error.

    130 stopped by Ctrl-C; 143 stopped by SIGTERM in good order. A user error is exactly one line on stderr; with -v its
    traceback goes before it.
    """
    try:
        code = app(arguments, prog_name="mpc-cxr", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except StoppedError as error:
        fault("stopped", str(error))
        return STOPPED
    except Exception as error:
        return report(error, verbose="-v" in arguments)
    if code == INTERRUPTED:  # Typer makes it of a KeyboardInterrupt
        fault("interrupted", "stopped by Ctrl-C; --resume continues prepare, train, tune, benchmark and demo")
    return code if isinstance(code, int) else OK


def report(error: Exception, verbose: bool) -> int:
    """Prints `error` as one line on stderr and gives its exit code."""
    if verbose:
        traceback.print_exception(error)
    user = next(user_errors(error), None)
    if user is not None:
        fault("error", str(user))
        return USER
    if isinstance(error, typer.TyperException):  # unknown flags, missing arguments
        fault("error", f"{error.format_message().rstrip('.')}; see `mpc-cxr {_verb(error)}--help`")
        return USER
    if isinstance(error, PermissionError):
        fault("error", f"{error.filename}: no permission; choose another place or change its rights")
        return USER
    fault("failed", f"{origin(error)[:400]}; run it again with -v for the traceback")
    return FAULT


def origin(error: Exception) -> str:
    """`Type: message` of what was raised first: an error from a Ray task holds the whole traceback as its text."""
    raised = RAISED.search(str(error)) if "ray::" in str(error) else None
    return raised.group() if raised else f"{type(error).__name__}: {error}"


def user_errors(error: BaseException, seen: frozenset[int] = frozenset()) -> Iterator[UserError]:
    """User errors in `error` or behind it: Ray wraps what its tasks and workers raise."""
    if id(error) in seen:
        return
    seen |= {id(error)}
    held = [getattr(error, name, None) for name in ("cause", "controller_failure")]
    wrapped = [*held, *getattr(error, "worker_failures", {}).values(), error.__cause__]
    for inner in wrapped:
        if isinstance(inner, BaseException):
            yield from user_errors(inner, seen)
    if isinstance(error, UserError):
        yield error


def _verb(error: typer.TyperException) -> str:
    """`train ` where the error came from that verb."""
    context = getattr(error, "ctx", None)
    path = context.command_path.split(" ")[1:] if context is not None else []
    return "".join(f"{part} " for part in path)
