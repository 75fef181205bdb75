"""The report: made from files alone, self-contained, the same bytes each time, true to metrics.json, safe to open."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factory import FINDINGS, SIZE, tiny_checkpoint, tiny_data
from pages import Page, pixels_of
from ray.data.extensions import ArrowPythonObjectArray

from mpc import checkpoint as checkpoints
from mpc.errors import MissingError, UserError
from mpc.metrics import score
from pipeline import storage
from pipeline.card import DatasetCard, read_card, write_card
from pipeline.card import digest as digest_of
from pipeline.config import RunConfig
from pipeline.evaluate import evaluate
from pipeline.manifest import list_column, matrix
from tuning.report import search_beside, write_report

BEST, STOPPED, FAILED = "aaaa0001", "bbbb0002", "cccc0003"
ERROR = "RuntimeError: loss is not finite <at step 3>"


class Material(NamedTuple):
    data: str
    card: DatasetCard
    checkpoint: Path
    evaluation: str
    metrics: dict[str, Any]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Material:
    root = tmp_path_factory.mktemp("report")
    card = tiny_data(root / "data")
    tiny_checkpoint(root / "search" / "best", digest=card.digest, thresholds={"Effusion": 0.5, "Mass": 0.5})
    metrics = evaluate(root / "search" / "best", str(root / "data"), "test", root / "test")
    return Material(str(root / "data"), card, root / "search" / "best", str(root / "test"), metrics)


@pytest.fixture(scope="module")
def search(material: Material) -> str:
    """A search around the checkpoint, in the files that tuning.search writes; its trials are invented."""
    folder = material.checkpoint.parent
    config = RunConfig.model_validate(checkpoints.read_info(material.checkpoint).config)
    trials = [
        trial(STOPPED, "stopped", 1, 0.55, 0.3),
        trial(BEST, "finished", 3, 0.75, config.loss.lambda_ipc),
        trial(FAILED, "failed", 0, None, 2.0, ERROR),
    ]
    for entry in trials:
        lines = [epoch(number, 0.55 + 0.1 * (number - 1)) for number in range(1, entry["epochs"] + 1)]
        (folder / "trials" / entry["trial_id"]).mkdir(parents=True)
        if lines:  # a trial that failed in its first epoch leaves no record
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "trials" / entry["trial_id"] / "metrics.jsonl").write_text(text)
    record = {
        "schema_version": 1,
        "data_digest": material.card.digest,
        "synthetic": True,
        "metric": "val_macro_auroc",
        "mode": "max",
        "max_epochs": 3,
        "space": {"loss.lambda_ipc": "uniform 0.1, 2"},
        "config": config.model_dump(mode="json"),
        "search": {"searcher": "tpe", "scheduler": "asha"},
        "best": BEST,
        "trials": trials,
    }
    (folder / "search.json").write_text(json.dumps(record))
    return str(folder)


def trial(
    name: str, status: str, epochs: int, value: float | None, weight: float, error: str | None = None
) -> dict[str, Any]:
    params = {"loss.lambda_ipc": weight}
    return {"trial_id": name, "status": status, "params": params, "epochs": epochs, "value": value, "error": error}


def epoch(number: int, value: float) -> dict[str, Any]:
    watched = {"selected_share": 0.9, "pseudo_positives": 0.2, "mean_sum_p": 1.1, "pseudo_recall": 0.1}
    if number > 1:  # without pseudo-positives there is no precision
        watched["pseudo_precision"] = 0.4
    return {"epoch": number, "loss_sup": 0.3, "val_macro_auroc": value, "val_macro_ap": 0.3, **watched}


def bounds(interval: list[float]) -> str:
    return "–".join(f"{bound:.3f}" for bound in interval)


def report(material: Material, out: Path, search: str | None = None, title: str = "A report", **other: Any) -> str:
    places = {"evaluation": material.evaluation, "data": material.data, "checkpoint": material.checkpoint, **other}
    write_report(str(out), **places, search=search, title=title)
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plain(material: Material, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a checkpoint without a search."""
    return report(material, tmp_path_factory.mktemp("plain") / "report.html")


@pytest.fixture(scope="module")
def searched(material: Material, search: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a checkpoint with its search."""
    return report(material, tmp_path_factory.mktemp("searched") / "report.html", search)


def test_scores_are_those_of_metrics_json(material: Material, plain: str) -> None:
    page = Page(plain)
    assert f"{material.metrics['macro']['auroc']:.3f}" in page.words["results"]
    for name in FINDINGS:
        scores = material.metrics["findings"][name]
        shown = [f"{scores[key]:.3f}({bounds(scores[f'{key}_interval'])})" for key in ("auroc", "ap")]
        assert page.row(name)[1:5] == [*shown, str(scores["n_pos"]), str(scores["n_neg"])]


def test_operating_points_are_counted_from_the_predictions(material: Material, plain: str) -> None:
    page = Page(plain)
    table = pq.read_table(Path(material.evaluation) / "predictions.parquet")
    k = FINDINGS.index("Mass")
    called, labels = matrix(table["logits"])[:, k] >= 0, matrix(table["labels"])[:, k] == 1
    row = page.row("Mass")
    assert row[6] == "0.500"
    assert row[7] == f"{100 * called[labels].mean():.0f} %"
    assert row[8] == f"{100 * (~called[~labels]).mean():.0f} %"
    assert page.row("Nodule")[6] == "0.500†"  # no threshold in the checkpoint


def test_the_page_needs_nothing_else(searched: str) -> None:
    page = Page(searched)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in page.tags:
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import", searched)
    assert "default-src 'none'" in searched
    targets = {attributes["id"] for _, attributes in page.tags if attributes.get("id")}
    assert {str(a["href"])[1:] for tag, a in page.tags if tag == "a"} <= targets
    assert len(searched.encode()) < 3_000_000
    assert all(image["alt"] for image in page.images())


def test_the_same_files_give_the_same_bytes(material: Material, search: str, searched: str, tmp_path: Path) -> None:
    assert report(material, tmp_path / "report.html", search) == searched


def test_the_head_says_what_was_trained_on_what(material: Material, plain: str) -> None:
    page = Page(plain)
    head = page.words["head"]
    assert "SYNTHETIC" in head
    assert "not for clinical use" in head
    assert "independent reconstruction of the MPC idea" in head
    about, train = page.words["about"], material.card.counts["train"]
    assert material.card.digest in about
    assert f"{train.images} of {sum(train.positives.values())} positive labels seen" in about
    for name, split in material.card.counts.items():
        assert page.row(name)[1:3] == [str(split.images), str(split.patients)]


def test_real_data_are_not_called_synthetic(material: Material, tmp_path: Path) -> None:
    data = copied(material, tmp_path, synthetic=False)
    page = Page(report(material, tmp_path / "report.html", data=data))
    assert "SYNTHETIC" not in "".join(page.words.values())
    assert "only as you may pass on the data set" in page.words["head"]


def test_trials_are_listed_with_their_end(searched: str) -> None:
    page = Page(searched)
    assert page.row(BEST)[1:5] == ["finished, best", "3 / 3", "0.7500", "1"]
    assert page.row(STOPPED)[1:5] == ["stopped early", "1 / 3", "0.5500", "0.3"]
    assert page.row(FAILED)[1:6] == ["failed", "0 / 3", "–", "2", ERROR]
    assert [row[0] for row in page.rows if row and row[0] in (BEST, STOPPED, FAILED)] == [BEST, STOPPED, FAILED]
    assert "4 of 9 (44 %)" in page.words["search"]
    assert "Not the best trial" not in searched
    for title in ("Share selected", "Pseudo-positives an image", "Sum of probabilities", "against the truth"):
        assert title in page.words["training"]


def test_a_checkpoint_of_another_trial_is_named_so(material: Material, search: str, tmp_path: Path) -> None:
    record = json.loads((Path(search) / "search.json").read_text())
    record["best"] = STOPPED
    changed = tmp_path / "search"
    (changed / "trials").mkdir(parents=True)
    (changed / "search.json").write_text(json.dumps(record))
    assert "Not the best trial" in report(material, tmp_path / "report.html", str(changed))


def test_without_a_search_the_sections_still_stand(plain: str) -> None:
    page = Page(plain)
    assert "search" not in page.words
    assert {"about", "results", "curves", "training", "examples", "errors", "limits", "sources"} <= set(page.words)
    assert "does not lie beside the checkpoint" in page.words["training"]
    assert "mpc-cxr evaluate --checkpoint" in page.words["sources"]


def test_a_run_shows_the_record_beside_its_checkpoint(material: Material, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "best"
    shutil.copytree(material.checkpoint, checkpoint)
    (checkpoint.parent / "metrics.jsonl").write_text(json.dumps(epoch(1, 0.6)) + "\n")
    page = Page(report(material, tmp_path / "report.html", checkpoint=checkpoint))
    assert "Inside the training run" in page.words["training"]
    assert "Share selected" in page.words["training"]


def test_examples_are_images_of_the_split_in_both_views(material: Material, plain: str) -> None:
    page = Page(plain)
    table = pq.read_table(Path(material.data) / "shards" / "test-00000.parquet")
    stored = dict(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
    alts = {str(image["alt"]): str(image["src"]) for image in page.images()}
    as_stored = {alt: uri for alt, uri in alts.items() if alt.endswith(", as stored")}
    assert len(as_stored) == 6
    for alt, uri in as_stored.items():
        pixels = pixels_of(uri)
        image_id = alt.removeprefix("image ").removesuffix(", as stored")
        assert pixels.tobytes() == stored[image_id]
        strong = pixels_of(alts[alt.replace("as stored", "strong view")])
        assert strong.shape == pixels.shape == (SIZE, SIZE)
        assert not np.array_equal(strong, pixels)


def test_worst_errors_lie_farthest_from_their_threshold(material: Material, plain: str) -> None:
    page = Page(plain)
    table = pq.read_table(Path(material.evaluation) / "predictions.parquet")
    logits, labels = matrix(table["logits"]), matrix(table["labels"])
    ids = table["image_id"].to_pylist()
    for word, wrong in (("missed", (labels == 1) & (logits < 0)), ("false alarm", (labels == 0) & (logits >= 0))):
        shown = [str(image["alt"]) for image in page.images() if str(image["alt"]).endswith(f" {word}")]
        if not wrong.any():
            assert not shown
            continue
        row, k = np.unravel_index(np.where(wrong, np.abs(logits), -1).argmax(), logits.shape)
        assert shown[0] == f"image {ids[row]}: {FINDINGS[k]} {word}"
        found = [re.fullmatch(rf"image (.+): (.+) {word}", alt) for alt in shown]
        pairs = [(match[1], match[2]) for match in found if match]
        assert len({image for image, _ in pairs}) == len({finding for _, finding in pairs}) == len(shown)
        assert all(wrong[ids.index(image), FINDINGS.index(finding)] for image, finding in pairs)


def test_findings_with_one_outcome_stand_apart(material: Material, tmp_path: Path) -> None:
    evaluation = rescored(material, tmp_path / "test", lambda labels, known: labels.__setitem__((slice(None), 1), 0))
    page = Page(report(material, tmp_path / "report.html", evaluation=evaluation))
    assert page.row("mean of 2")
    assert len(page.row("Mass")) == 3
    assert page.row("Mass")[1] == "0"
    assert "Not scored" in page.words["results"]


def test_nothing_known_is_a_page_too(material: Material, tmp_path: Path) -> None:
    evaluation = rescored(material, tmp_path / "test", lambda labels, known: known.fill(False))
    page = Page(report(material, tmp_path / "report.html", evaluation=evaluation))
    assert "nothing can be scored" in page.words["results"]
    assert "No finding was missed" in page.words["errors"]


def test_names_cannot_become_markup(material: Material, tmp_path: Path) -> None:
    name = '<img src=x onerror="alert(1)">'
    names = (name, *FINDINGS[1:])
    tiny_checkpoint(tmp_path / "best", findings=names, digest=material.card.digest)
    data = copied(material, tmp_path, name="</style><script>", findings=names)
    evaluate(tmp_path / "best", data, "test", tmp_path / "test")
    text = report(
        material,
        tmp_path / "report.html",
        title="<b>bold</b> & more",
        data=data,
        evaluation=str(tmp_path / "test"),
        checkpoint=tmp_path / "best",
    )
    page = Page(text)
    assert name in page.row(name)[0]
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "<b>bold" not in text
    assert "<script" not in text


def test_large_noise_stays_below_three_megabytes(tmp_path: Path, ray_session: None) -> None:
    """The worst that pixels can do: noise does not compress."""
    card = tiny_data(tmp_path / "data", size=320)
    shard = next(shard for shard in card.shards if shard.split == "test")
    path = tmp_path / "data" / shard.path
    table, generator = pq.read_table(path), np.random.default_rng(0)
    noise = [generator.integers(0, 256, 320 * 320, dtype=np.uint8).tobytes() for _ in range(len(table))]
    index = table.column_names.index("image")
    pq.write_table(table.set_column(index, "image", pa.array(noise, pa.large_binary())), path)
    tiny_checkpoint(tmp_path / "best", size=320, digest=card.digest)
    evaluate(tmp_path / "best", str(tmp_path / "data"), "test", tmp_path / "test")
    write_report(
        str(tmp_path / "report.html"),
        evaluation=str(tmp_path / "test"),
        data=str(tmp_path / "data"),
        checkpoint=tmp_path / "best",
        search=None,
        title="Noise",
    )
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_files_that_do_not_belong_together_are_refused(material: Material, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "other", digest="1" * 64)
    with pytest.raises(UserError, match="with another checkpoint than"):
        report(material, tmp_path / "report.html", checkpoint=tmp_path / "other")
    metrics = dict(material.metrics, n_images=3)
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "predictions.parquet").write_bytes((Path(material.evaluation) / "predictions.parquet").read_bytes())
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match=r"does not give the numbers of metrics\.json"):
        report(material, tmp_path / "report.html", evaluation=str(folder))
    (folder / "metrics.json").write_text(json.dumps(dict(material.metrics, data_digest="0" * 64)))
    with pytest.raises(UserError, match="another data set than"):
        report(material, tmp_path / "report.html", evaluation=str(folder))
    with pytest.raises(MissingError, match=r"search\.json is absent"):
        report(material, tmp_path / "report.html", str(tmp_path))
    assert not (tmp_path / "report.html").exists()


def test_predictions_are_not_unpickled(material: Material, tmp_path: Path) -> None:
    table = pq.read_table(Path(material.evaluation) / "predictions.parquet")
    ids = ArrowPythonObjectArray.from_objects(table["image_id"].to_pylist())
    shutil.copytree(material.evaluation, tmp_path / "test")
    pq.write_table(table.set_column(0, "image_id", ids), tmp_path / "test" / "predictions.parquet")
    with pytest.raises(UserError, match="column image_id has extension type"):
        report(material, tmp_path / "report.html", evaluation=str(tmp_path / "test"))


def test_the_search_beside_a_checkpoint_is_found(material: Material, search: str, tmp_path: Path) -> None:
    assert search_beside(str(material.checkpoint)) == search
    assert search_beside(f"{material.checkpoint}/") == search
    assert search_beside(str(tmp_path / "best")) is None


def test_the_report_goes_to_a_bucket(material: Material, plain: str, bucket: str) -> None:
    write_report(
        f"{bucket}/report.html",
        evaluation=material.evaluation,
        data=material.data,
        checkpoint=material.checkpoint,
        search=None,
        title="A report",
    )
    assert storage.read_bytes(f"{bucket}/report.html").decode() == plain


def copied(material: Material, folder: Path, **changes: Any) -> str:
    """The data set of `material` with another card; its digest stays true."""
    data = folder / "data"
    data.mkdir()
    (data / "shards").symlink_to(Path(material.data) / "shards")
    card = read_card(material.data)
    if "findings" in changes:
        for name, split in card.counts.items():
            old = dict(split)
            renamed = {
                key: dict(zip(changes["findings"], old[key].values(), strict=True)) for key in ("positives", "known")
            }
            changes.setdefault("counts", dict(card.counts))[name] = split.model_copy(update=renamed)
        changes["digest"] = digest_of(changes["findings"], card.shards)
    write_card(str(data), card.model_copy(update=changes))
    return str(data)


def rescored(material: Material, folder: Path, change: Any) -> str:
    """The evaluation of `material` with other labels."""
    table = pq.read_table(Path(material.evaluation) / "predictions.parquet")
    labels, known = matrix(table["labels"]).copy(), matrix(table["known"]).astype(bool).copy()
    change(labels, known)
    for name, values in (("labels", labels), ("known", known)):
        table = table.set_column(table.column_names.index(name), name, list_column(values))
    folder.mkdir()
    pq.write_table(table, folder / "predictions.parquet")
    metrics = {**material.metrics, **score(matrix(table["probabilities"]), labels, known, FINDINGS)}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return str(folder)
