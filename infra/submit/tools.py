"""Other people's command-line tools: kubectl, sbatch, ray."""

import shutil
import subprocess
from collections.abc import Sequence

from mpc.errors import MissingError, UserError

SECONDS = 120.0


def require(tool: str) -> None:
    """Refuses to go on without `tool`.

    Raises:
        UserError: it is not on the path.
    """
    if shutil.which(tool) is None:
        raise MissingError(f"{tool}: is not installed here, and this kind of cluster needs it; install it or mend PATH")


def call(command: Sequence[str], text: str | None = None, seconds: float | None = SECONDS) -> str:
    """What a tool prints.

    Args:
        command: program and arguments; no shell reads them.
        text: its standard input.
        seconds: how long it may take; None waits.

    Raises:
        UserError: it is not installed, or it failed: its own last line.
    """
    require(command[0])
    name = " ".join(command[:2])
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{name}: has not answered within {seconds:g} s; see whether its server is reachable") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise UserError(f"{name}: {lines[-1][:300]}")
    return done.stdout
