"""Verbs about the installation itself: doctor, config show|schema|presets."""

import json
from typing import Annotated

import typer
import yaml

from infra.cli.options import Config, Set, Verbose, settings_of
from infra.console import console, say, table
from infra.settings import Settings, presets
from mpc.errors import UserError

configuration = typer.Typer(help="Shows settings: what is in force, what is possible, which presets exist.")


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command(epilog="Example: mpc-cxr doctor --data s3://bucket/nih-224 --out runs")(doctor)
    configuration.command(epilog="Example: mpc-cxr config show --config mpc --set optim.lr=1e-4")(show)
    configuration.command(epilog="Example: mpc-cxr config schema > schema.json")(schema)
    configuration.command(
        epilog="Example: mpc-cxr config manifests --set cluster.kind=kuberay --set cluster.image=registry/mpc-cxr:0.1.0"
    )(manifests)
    configuration.command("presets", epilog="Example: mpc-cxr config presets")(list_presets)
    app.add_typer(configuration, name="config", no_args_is_help=True, epilog="Example: mpc-cxr config show")


def doctor(
    data: Annotated[
        str | None, typer.Option("--data", metavar="URI", help="Data set whose storage must be readable.")
    ] = None,
    out: Annotated[str, typer.Option("--out", metavar="URI", help="Place whose storage must be writable.")] = ".",
    config: Config = None,
    set_: Set = None,
    verbose: Verbose = False,
) -> None:
    """Checks versions, resources, disk (GiB), storage, clock, tracking and the cluster that `cluster` names.

    Exit code 1 if anything fails, with what to do.
    """
    settings = settings_of(config, set_, verbose)
    from infra.doctor import examine

    findings = examine(settings, data, out)
    table("", ["check", "", "found"], [[item.name, "ok" if item.ok else "FAILS", item.found] for item in findings])
    for item in findings:
        if not item.ok:
            say(f"{item.name}: {item.remedy}")
    if not all(item.ok for item in findings):
        raise typer.Exit(1)


def show(config: Config = None, set_: Set = None, verbose: Verbose = False) -> None:
    """Prints the settings in force as YAML: defaults, then --config, then --set; units are in `config schema`."""
    settings = settings_of(config, set_, verbose)
    print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), end="")


def schema() -> None:
    """Prints the JSON schema of all settings: types, ranges, defaults, units."""
    print(json.dumps(Settings.model_json_schema(), indent=2))


def manifests(config: Config = None, set_: Set = None, verbose: Verbose = False) -> None:
    """Prints what a cluster is made of: Kubernetes objects (kuberay) or the launcher's file (aws), from `cluster`.

    Kubernetes: namespace, MLflow with PostgreSQL, a Ray cluster that stays. Jobs bring a cluster of their own: see
    `submit --dry-run`.
    """
    cluster = settings_of(config, set_, verbose).cluster
    if cluster.kind == "kuberay":
        from infra.kuberay.mlflow import mlflow_objects, namespace
        from infra.kuberay.render import as_yaml, cluster_objects

        print(as_yaml([namespace(cluster), *mlflow_objects(cluster), *cluster_objects(cluster, "mpc-cxr")]), end="")
    elif cluster.kind == "aws":
        from infra.aws.launcher import as_yaml as launcher_yaml

        print(launcher_yaml(cluster), end="")
    else:
        raise UserError(f"cluster.kind = {cluster.kind}: needs no manifests; set it to kuberay or aws")


def list_presets() -> None:
    """Lists the presets that --config takes, and the protocols that --config of benchmark takes."""
    table("", ["preset", "what it is"], presets().items())
    table("", ["protocol of benchmark", "what it is"], presets("protocols").items())
    console().print("See one in full: mpc-cxr config show --config NAME", markup=False)
