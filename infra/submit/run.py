"""What runs on the cluster: `python -m infra.submit.run` reads the verb from the package and is that verb."""

import json
import sys
from pathlib import Path

from infra.cli.app import run
from infra.submit.package import ARGUMENTS


def main(note: str | None = None) -> int:
    """Runs the verb of the package in the working directory.

    Args:
        note: file for the exit code, where nobody else would keep it.

    Returns:
        Its exit code.
    """
    code = run(json.loads(Path(ARGUMENTS).read_text(encoding="utf-8")))
    if note is not None:
        Path(note).write_text(f"{code}\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
