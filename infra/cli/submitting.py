"""Verbs that run other verbs elsewhere: submit, jobs status|stop|logs."""

import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.options import Config, DryRun, Set, Verbose, claim, set_logs, settings_of
from infra.console import fault, say
from mpc.errors import UserError

if TYPE_CHECKING:
    from infra.submit.call import Call
    from infra.submit.target import Target

DETACHED = 130
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Follow = Annotated[bool, typer.Option("--follow", help="Show the job's log until it ends; 0 only if it succeeds.")]
Job = Annotated[str, typer.Argument(metavar="JOB", help="Name that submit gave it.")]

jobs = typer.Typer(help="Looks after submitted jobs: how they stand, their logs, their end.")


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command(
        context_settings=PASS_ON,
        epilog="Example: mpc-cxr submit train --data s3://b/nih --out s3://b/run --config mpc --set cluster.kind=ray",
    )(submit)
    jobs.command(epilog="Example: mpc-cxr jobs status mpc-train-1a2b3c4d --set cluster.kind=ray")(status)
    jobs.command(epilog="Example: mpc-cxr jobs logs mpc-train-1a2b3c4d --follow --set cluster.kind=ray")(logs)
    jobs.command(epilog="Example: mpc-cxr jobs stop mpc-train-1a2b3c4d --set cluster.kind=ray")(stop)
    app.add_typer(jobs, name="jobs", no_args_is_help=True, epilog="Example: mpc-cxr jobs status JOB")


def submit(context: typer.Context, follow: Follow = False, dry_run: DryRun = False, verbose: Verbose = False) -> None:
    """Runs any verb on a cluster: submit VERB ARGUMENTS, with the settings `cluster`; without any it runs here.

    The verb is checked here first. Its settings and the project's wheel travel with it. Neither Ctrl-C nor a lost
    connection ends the job.
    """
    set_logs(verbose)
    from infra.submit import call as calls
    from infra.submit.target import kind_of

    call = calls.read(calls.command_line(), context.args)
    if kind_of(call.cluster) == "local":
        _run_here(call, dry_run)
        return
    from infra.submit.package import job_of
    from infra.submit.target import target_of

    target = target_of(call.cluster)
    if not target.on_this_machine():
        calls.require_shared(call, call.cluster.shared_paths)
    job = job_of(call, os.environ, resume=_claimed_for_retries(call))
    if dry_run:
        print(target.plan(job), end="")
        say(f"# would submit {job.verb} as {job.name}: {job.size()}")
        return
    target.submit(job)
    say(f"submitted {job.verb} as {job.name}: {job.size()}")
    say(f"look at it: mpc-cxr jobs logs {job.name} --follow {shlex.join(call.where)}".rstrip())
    if follow:
        raise SystemExit(_follow(target, job.name, call.where))


def status(job: Job, config: Config = None, set_: Set = None, verbose: Verbose = False) -> None:
    """Says how a job stands; exit code 1 if it failed or was stopped."""
    state = _target(config, set_, verbose).state(job)
    say(f"{job}: {state.status}{f', {state.detail}' if state.detail else ''}")
    if state.status.ended:
        raise typer.Exit(state.exit_code)


def logs(job: Job, follow: Follow = False, config: Config = None, set_: Set = None, verbose: Verbose = False) -> None:
    """Prints a job's log from the beginning; with --follow until the job ends, and ends with its exit code."""
    target = _target(config, set_, verbose)
    if follow:
        where = [
            *(["--config", config] if config else []),
            *(part for value in set_ or () for part in ("--set", value)),
        ]
        raise SystemExit(_follow(target, job, where))
    for chunk in target.logs(job, follow=False):
        print(chunk, end="")


def stop(job: Job, config: Config = None, set_: Set = None, verbose: Verbose = False) -> None:
    """Ends a job; what it has written stays, and --resume continues it."""
    _target(config, set_, verbose).stop(job)
    say(f"{job}: asked to stop")


def _target(config: str | None, overrides: list[str] | None, verbose: bool) -> "Target":
    """The cluster of the settings."""
    cluster = settings_of(config, overrides, verbose).cluster
    from infra.submit.target import kind_of, target_of

    if kind_of(cluster) == "local":
        raise UserError("jobs run on a cluster, and the settings name none; set cluster.kind, or RAY_ADDRESS")
    return target_of(cluster)


def _follow(target: "Target", name: str, where: Sequence[str]) -> int:
    """Prints the log until the job ends; its exit code, which is 130 after Ctrl-C and 1 where the cluster is lost."""
    from infra.submit.target import LostError

    command = " ".join(["mpc-cxr jobs logs", name, "--follow", shlex.join(where)]).rstrip()
    again = f"the job goes on; `{command}` picks it up again"
    try:
        for chunk in target.logs(name, follow=True):
            print(chunk, end="", flush=True)
        state = target.state(name)
    except KeyboardInterrupt:
        fault("detached", again)
        return DETACHED
    except LostError as error:
        fault("lost", f"{error}; {again}")
        return 1
    say(f"{name}: {state.status}{f', {state.detail}' if state.detail else ''}")
    return state.exit_code


def _run_here(call: "Call", dry_run: bool) -> None:
    """Runs the verb in this process, as if it had been called."""
    from infra.cli.app import run

    if dry_run:
        say(f"would run here: mpc-cxr {shlex.join(call.arguments)}")
        return
    raise SystemExit(run(list(call.arguments)))


def _claimed_for_retries(call: "Call") -> bool:
    """Whether the job starts with --resume because its cluster may start it again; then --out must be free now."""
    from infra.submit.target import kind_of

    kind, cluster = kind_of(call.cluster), call.cluster
    again = (kind == "kuberay" and cluster.kuberay.retries > 0) or (kind == "slurm" and cluster.slurm.requeue)
    if not again or "resume" not in call.params:
        return False
    claim(call.params["out"], call.params["resume"])
    return True
