"""Verbs that use a trained model: evaluate, predict, explain, register, promote."""

from typing import Annotated, Any, Literal

import typer

from infra.cli.options import (
    Checkpoint,
    Config,
    Data,
    Model,
    Out,
    Resume,
    Set,
    Verbose,
    checkpoint_of,
    claim,
    settings_of,
    start_ray,
)
from infra.console import fault, progress, say, table
from infra.tracking import tracking_uri
from mpc.errors import UserError

Split = Annotated[Literal["train", "val", "test"], typer.Option("--split", help="Part of the data set to score.")]
Judged = Annotated[
    str | None, typer.Option("--data", metavar="URI", help="Prepared data set, of which --split is scored.")
]
Images = Annotated[str, typer.Option("--images", metavar="URI", help="Folder or bucket of PNG, JPEG or DICOM files.")]


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command(
        epilog="Example: mpc-cxr evaluate --model models:/mpc-cxr@champion --data /data/nih-224 --out runs/test-scores"
    )(evaluate)
    app.command(epilog="Example: mpc-cxr predict --checkpoint runs/mpc-1/best --images /data/new --out runs/new")(
        predict
    )
    app.command(
        epilog="Example: mpc-cxr explain --model models:/mpc-cxr@champion --images /data/new --out runs/new-maps"
    )(explain)
    app.command(epilog="Example: mpc-cxr register --checkpoint runs/mpc-1/best --model mpc-cxr")(register)
    app.command(epilog="Example: mpc-cxr promote --model models:/mpc-cxr/3 --data /data/nih-224")(promote)


def evaluate(
    data: Data,
    out: Out,
    checkpoint: Checkpoint = None,
    model: Model = None,
    split: Split = "test",
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    verbose: Verbose = False,
) -> None:
    """Scores a model on one split, every image exactly once, with intervals by patient; writes metrics and a report.

    Scores lie in 0..1. A finding without positives or without negatives has no score and stays out of the mean. With
    --resume the predictions that --out holds are kept: metrics and report are made anew without weights or GPU.
    """
    settings = settings_of(config, set_, verbose)
    folder = checkpoint_of(checkpoint, model, settings, near=out)
    claim(out, resume)
    from infra.evaluating import REPORT
    from infra.evaluating import evaluate as score
    from pipeline import storage
    from tuning.report import search_beside

    search = search_beside(checkpoint) if checkpoint else None
    title = f"{model or checkpoint} on the {split} split"
    metrics = score(settings, folder, data, split, out, title=title, search=search, resume=resume)
    show_metrics(metrics)
    show_comparison(metrics)
    say(f"predictions and metrics: {out}")
    say(f"report: {storage.join(out, REPORT)}")


def predict(
    images: Images,
    out: Out,
    checkpoint: Checkpoint = None,
    model: Model = None,
    config: Config = None,
    set_: Set = None,
    verbose: Verbose = False,
) -> None:
    """Writes the findings of every image in a folder; probabilities lie in 0..1, an unreadable file is a row too."""
    settings = settings_of(config, set_, verbose)
    folder = checkpoint_of(checkpoint, model, settings, near=out)
    claim(out)
    from pipeline.predict import predict as write_findings

    start_ray(verbose)
    with progress("predict") as report:
        summary = write_findings(folder, images, out, config=settings.predict, progress=report)
    say(f"findings of {summary.images:,} images, {summary.failed:,} of them unreadable: {summary.out}")
    if summary.unlike is None:
        say("not looked at: whether the images are like those of training; this checkpoint holds no reference")
    elif summary.unlike:
        say(f"{summary.unlike:,} images are unlike those of training (flag unlike_training): do not rely on them")


def explain(
    out: Out,
    checkpoint: Checkpoint = None,
    model: Model = None,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="URI", help="Folder or bucket of PNG, JPEG or DICOM files; or --data."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="URI", help="Prepared data set, of which --split is explained.")
    ] = None,
    split: Split = "test",
    config: Config = None,
    set_: Set = None,
    verbose: Verbose = False,
) -> None:
    """Draws where the evidence for each called finding lies, a PNG each; what is explained are settings explain.*.

    A map shows what moved the network, not the outline of a finding. A file that cannot be read is a row of the list.
    """
    settings = settings_of(config, set_, verbose)
    folder = checkpoint_of(checkpoint, model, settings, near=out)
    claim(out)
    from pipeline.explain import explain as draw

    with progress("explain") as report:
        found = draw(folder, out, images=images, data=data, split=split, config=settings.explain, progress=report)
    rest = f"; {found.left_out:,} more images left out by explain.limit" if found.left_out else ""
    say(f"{found.pictures:,} maps ({found.how}) of {found.images:,} images, {found.failed:,} unreadable{rest}")
    say(f"list of all: {found.out}")


def register(
    checkpoint: Annotated[str, typer.Option("--checkpoint", metavar="URI", help="Checkpoint that training wrote.")],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Name of the model in the registry.")],
    data: Judged = None,
    split: Split = "test",
    config: Config = None,
    set_: Set = None,
    verbose: Verbose = False,
) -> None:
    """Makes a checkpoint a new version of a registered model (MLflow), with signature, weights and a model card.

    With --data the card shows scores on --split with intervals by patient; without, those of validation alone.
    """
    settings = settings_of(config, set_, verbose)
    if "/" in model or ":" in model:
        raise UserError(f"--model {model}: register takes a plain name, such as mpc-cxr; MLflow counts versions")
    folder = checkpoint_of(checkpoint, None, settings)
    from infra.registering import register as store

    version, uri = store(settings, checkpoint, folder, model, data, split)
    say(f"registered {version.uri} in {uri}")


def promote(
    model: Annotated[
        str,
        typer.Option("--model", metavar="URI", help="models:/NAME/VERSION, or models:/NAME@previous to roll back."),
    ],
    data: Judged = None,
    split: Split = "val",
    config: Config = None,
    set_: Set = None,
    verbose: Verbose = False,
) -> None:
    """Points the alias `champion` at a version that passes the gate (settings gate.*); else the exit code is 1.

    Version and champion are scored on the same images of --data: the paired interval by patient must lie above
    -gate.margin, and each finding must reach gate.minimum (scores in 0..1). models:/NAME@previous goes back.
    """
    settings = settings_of(config, set_, verbose)
    name, version = _name_and_version(model)
    from infra.registering import promote as judge
    from tuning.gate import Decision
    from tuning.promotion import rollback

    if version is None:
        back, gone, deleted = rollback(name, tracking_uri(settings))
        passed = f"; passed over, because deleted: {', '.join(deleted)}" if deleted else ""
        say(f"models:/{name}@champion is version {back} again, version {gone} no longer{passed}")
        return
    verdict = judge(settings, name, version, data, split)
    if verdict.decision is Decision.REFUSE:
        fault("refused", f"{model}: {verdict.reason}")
        raise typer.Exit(1)
    say(f"models:/{name}@champion is version {version}: {verdict.reason}")


def show_metrics(metrics: dict[str, Any]) -> None:
    """The table of metrics.json: each finding with its counts, the macro means first."""
    macro = metrics["macro"]
    rows: list[list[object]] = [[f"mean of {len(macro['findings_averaged'])}", None, None, *_scores(macro)]]
    for name, row in metrics["findings"].items():
        rows.append([name, row["n_pos"], row["n_neg"], *_scores(row)])
    level = f"{100 * metrics['bootstrap']['level']:g} %"
    table(
        f"{metrics['split']}: {metrics['n_images']:,} images of {metrics['n_patients']:,} patients",
        ["finding", "positive", "negative", "AUROC", level, "average precision", level],
        rows,
    )
    unmatched = metrics["finding_map"]
    for side, names in (("model", unmatched["model_only"]), ("data set", unmatched["data_only"])):
        if names:
            say(f"not scored, of the {side} alone: {', '.join(names)}")


def show_comparison(metrics: dict[str, Any]) -> None:
    """One line a score: ours minus the rival's, paired by patient."""
    found = metrics.get("comparison")
    if found is None:
        return
    for name, title in (("auroc", "macro AUROC"), ("ap", "average precision")):
        difference, bounds = found["macro"][name], found["macro"][f"{name}_interval"]
        if difference is not None:
            say(f"{title} minus that of {found['rival']}: {difference:+.3f} {_interval(bounds, '+')}")


def _scores(row: dict[str, Any]) -> list[object]:
    """AUROC and average precision with their intervals; a dash where a finding has none."""
    found: list[object] = []
    for name in ("auroc", "ap"):
        value = row[name]
        found += ["–" if value is None else f"{value:.3f}", _interval(row[f"{name}_interval"])]
    return found


def _interval(bounds: list[float] | None, sign: str = "") -> str:
    return "–" if bounds is None else f"{bounds[0]:{sign}.3f} to {bounds[1]:{sign}.3f}"


def _name_and_version(uri: str) -> tuple[str, int | None]:
    """`("NAME", 3)` from `models:/NAME/3`, `("NAME", None)` from `models:/NAME@previous`."""
    if uri.startswith("models:/") and uri.endswith("@previous") and "/" not in uri.removeprefix("models:/"):
        return uri.removeprefix("models:/").removesuffix("@previous"), None
    name, slash, version = uri.removeprefix("models:/").rpartition("/")
    if not (uri.startswith("models:/") and slash and name and version.isdigit()):
        raise UserError(
            f"--model {uri}: promote needs a version, such as models:/mpc-cxr/3, or models:/mpc-cxr@previous"
        )
    return name, int(version)
