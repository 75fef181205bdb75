"""An evaluation as a person starts it: scores, what the report shows besides, and the report."""

from pathlib import Path
from typing import Any

from infra.settings import Settings
from infra.tracking import tracking_uri
from pipeline import storage
from pipeline.evaluate import evaluate as score
from pipeline.illustrate import illustrate
from tuning.report import write_report

REPORT = "report.html"


def evaluate(
    settings: Settings,
    checkpoint: Path,
    data: str,
    split: str,
    out: str,
    *,
    title: str,
    search: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Scores a checkpoint, explains the report's cases, writes the report; the content of metrics.json.

    Args:
        settings: sections evaluate, explain and train.
        checkpoint: local folder.
        data: URI of a prepared data set.
        split: of it.
        out: folder or s3:// prefix of the evaluation.
        title: heading of the report.
        search: the search that made the checkpoint, if any.
        resume: keep predictions and saliency that `out` holds.
    """
    batch_size = settings.train.eval_batch_size
    rival = rival_of(settings, near=out)
    metrics = score(checkpoint, data, split, out, batch_size, config=settings.evaluate, rival=rival, resume=resume)
    illustrate(
        checkpoint,
        data,
        out,
        config=settings.evaluate,
        explain=settings.explain,
        batch_size=batch_size,
        resume=resume,
    )
    page = storage.join(out, REPORT)
    write_report(page, evaluation=out, data=data, checkpoint=checkpoint, search=search, title=title)
    return metrics


def rival_of(settings: Settings, near: str) -> str | None:
    """The folder of the model that `evaluate.compare` names; a registered one is fetched."""
    rival = settings.evaluate.compare
    if rival is None or not rival.startswith("models:/"):
        return rival
    from tuning import registry

    return str(registry.download(rival, tracking_uri(settings, near)))
