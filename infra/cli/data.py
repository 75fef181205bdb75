"""Verbs that make and verify data sets: prepare, check."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from infra.cli.options import Config, Data, DryRun, Out, Resume, Set, Verbose, claim, settings_of, start_ray
from infra.console import progress, say, table
from mpc.errors import UserError

if TYPE_CHECKING:
    from pipeline.card import DatasetCard, SplitCounts
    from pipeline.prepare_config import PolicyConfig
    from pipeline.shards import Survey

Source = Annotated[
    Literal["phantom", "nih", "chexpert", "mimic_cxr", "vindr", "table", "dicom"] | None,
    typer.Option("--source", help="Where images come from: sets prepare.source. phantom is synthetic."),
]
Root = Annotated[
    list[str] | None,
    typer.Option(
        "--root", metavar="URI", help="Folder or bucket of the collection; may be repeated; phantom has none."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command(
        epilog="Example: mpc-cxr prepare --source nih --root /data/nih --out /data/nih-224 --set prepare.image_size=224"
    )(prepare)
    app.command(epilog="Example: mpc-cxr check --data /data/nih-224")(check)


def prepare(
    out: Out,
    source: Source = None,
    root: Root = None,
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Turns a collection into shards: labels, patient-level split, one decode and resize an image.

    Image sizes are pixels a side, shards MiB before compression; a bad image is quarantined with its reason.
    """
    settings = settings_of(config, set_, verbose)
    if source is not None:
        settings = settings_of(config, [*(set_ or []), f"prepare.source={source}"])
    if settings.prepare.source != "phantom" and not root:
        raise UserError(f"source {settings.prepare.source} needs --root, the folder or bucket of the collection")
    claim(out, resume)
    if dry_run:
        from pipeline.shards import survey

        show_survey(survey(settings.prepare, root), settings.prepare.policy)
        say(f"would prepare {settings.prepare.image_size} pixels a side into {out}")
        return
    from pipeline.shards import prepare as write_shards

    start_ray(verbose)
    with progress("prepare") as report:
        card = write_shards(
            settings.prepare,
            root,
            out,
            resume=resume,
            progress=lambda done, total: report(done, total, "images"),
            announce=lambda found: show_survey(found, settings.prepare.policy),
        )
    show_card(card)
    say(f"data set: {out}")


def check(data: Data, verbose: Verbose = False) -> None:
    """Verifies a data set: schema, patients in two splits, ranges, digests, counts. Exit code 1 on any fault."""
    settings_of(None, None, verbose)
    from pipeline.card import read_card
    from pipeline.check import check as faults_of

    card = read_card(data)
    faults = faults_of(data)
    show_card(card)
    for fault in faults:
        say(f"fault: {fault}")
    say(f"{data}: {len(faults)} faults" if faults else f"{data}: sound")
    if faults:
        raise typer.Exit(1)


def show_survey(found: "Survey", policy: "PolicyConfig") -> None:
    """What is known before any image is read: raw label codes with what they become, counts, what stays outside."""
    name = f"{found.source.name}, before any image is read"
    codes, meanings = found.raw_labels, {finding: policy.of(finding) for finding in found.source.findings}
    table(
        f"{name}: entries of the table, and what the policy makes of them",
        ["", "1", "0", "uncertain", "become", "blank", "become"],
        [
            [finding, *(f"{count:,}" for count in (raw.positive, raw.negative)),
             f"{raw.uncertain:,}", uncertain, f"{raw.blank:,}", blank]
            for finding, raw in codes.items() for uncertain, blank in [meanings[finding]]
        ],
    )  # fmt: skip
    show_counts(f"{name}: images and positives", found.source.findings, found.counts)
    show_quarantine(Counter(found.source.quarantine["reason"].to_pylist()))


def show_card(card: "DatasetCard") -> None:
    """Tables of images, patients and positives per finding and split, and what was quarantined."""
    kind = "synthetic radiographs, " if card.synthetic else ""
    show_counts(f"{card.name}: {kind}{card.image_size} pixels a side", card.findings, card.counts)
    show_quarantine(card.quarantined, "; see quarantine.parquet")
    if card.near_duplicates:
        say(
            f"near-identical: {card.near_duplicates:,} images of val or test resemble one of another split; "
            f"see near_duplicates.parquet"
        )


def show_quarantine(reasons: Mapping[str, int], more: str = "") -> None:
    """What is not among the images: entries that cannot be used, and those left out on purpose."""
    from pipeline.manifest import LEFT_OUT

    unusable = {reason: count for reason, count in sorted(reasons.items()) if reason not in LEFT_OUT}
    unwanted = {reason: count for reason, count in sorted(reasons.items()) if reason in LEFT_OUT}
    for title, chosen in (("quarantined", unusable), ("left out", unwanted)):
        if chosen:
            listed = ", ".join(f"{reason} {count:,}" for reason, count in chosen.items())
            say(f"{title}: {sum(chosen.values()):,} images ({listed}){more}")


def show_counts(title: str, findings: Sequence[str], counts: Mapping[Any, "SplitCounts"]) -> None:
    """One column a split: images, patients, positives of each finding."""
    table(
        title,
        ["", *counts],
        [
            ["images", *(f"{split.images:,}" for split in counts.values())],
            ["patients", *(f"{split.patients:,}" for split in counts.values())],
            *([name, *(f"{split.positives[name]:,}" for split in counts.values())] for name in findings),
        ],
    )
