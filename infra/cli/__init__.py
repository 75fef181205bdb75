"""The command line `mpc-cxr`; nothing heavy is imported before a verb needs it."""

from infra.cli.app import main

__all__ = ["main"]
