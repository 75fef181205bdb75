"""The report beyond scores: its sections, true to the files they are made from, and rebuilt without weights or GPU."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from factory import FINDINGS, SIZE, tiny_checkpoint
from pages import Page, pixels_of

from infra.cli.app import run
from infra.evaluating import evaluate
from infra.settings import Settings, load
from mpc.checkpoint import read_info
from mpc.config import CalibrationInfo
from mpc.metrics import RULES
from pipeline.calls import Calls, extremes
from pipeline.card import read_card
from pipeline.hidden import hidden, pseudo_positives, recovered, run_of, summarise
from pipeline.illustrate import read_maps
from pipeline.overlay import blend
from pipeline.predictions import Predictions
from pipeline.prepare_config import PhantomConfig, PrepareConfig, SplitConfig
from pipeline.shards import prepare
from pipeline.sources import phantom
from pipeline.stored import read_images
from tuning.report import write_report

FEW = ["evaluate.resamples=100", "evaluate.min_group=5", "evaluate.hidden_images=20"]
POINTS = {rule: 0.48 + 0.01 * n for n, rule in enumerate(RULES)}


class Made(NamedTuple):
    settings: Settings
    data: str
    checkpoint: Path
    out: Path
    metrics: dict[str, Any]
    text: str

    @property
    def page(self) -> Page:
        return Page(self.text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Made:
    """An evaluation with a rival and its report."""
    root = tmp_path_factory.mktemp("report")
    config = PrepareConfig(
        findings=FINDINGS,
        image_size=SIZE,
        row_group=16,
        strata=("sex",),
        split=SplitConfig(val=0.1, test=0.4),
        phantom=PhantomConfig(images=160),
    )
    card = prepare(config, None, str(root / "data"))
    fit = CalibrationInfo(temperature=2.0, slope=0.5, shift=-1.0)
    choices = {"operating_points": dict.fromkeys(FINDINGS, POINTS), "calibration": {"Mass": fit}}
    tiny_checkpoint(
        root / "run" / "best", digest=card.digest, thresholds=dict.fromkeys(FINDINGS, POINTS["youden"]), **choices
    )
    tiny_checkpoint(root / "other", digest=card.digest, seed=4)
    settings = load(None, [*FEW, f"evaluate.compare={root / 'other'}", "pseudo.tau_pos=0.5"])
    out = root / "out"
    metrics = evaluate(settings, root / "run" / "best", str(root / "data"), "test", str(out), title="A report")
    return Made(settings, str(root / "data"), root / "run" / "best", out, metrics, (out / "report.html").read_text())


def test_the_report_is_made_anew_without_weights(made: Made, tmp_path: Path) -> None:
    """Files of the evaluation, the data set and checkpoint.json: the same bytes, and the network is not asked."""
    bare, out = tmp_path / "run" / "best", tmp_path / "out"
    bare.mkdir(parents=True)
    shutil.copy(made.checkpoint / "checkpoint.json", bare)
    shutil.copytree(made.out, out)
    (out / "report.html").unlink()
    (out / "metrics.json").unlink()
    again = evaluate(made.settings, bare, made.data, "test", str(out), title="A report", resume=True)
    assert again == made.metrics == json.loads((out / "metrics.json").read_text())
    text = (out / "report.html").read_text()
    for old, new in ((str(made.checkpoint), str(bare)), (str(made.out), str(out))):
        text = text.replace(new, old)
    assert text == made.text


def test_sections_say_what_metrics_say(made: Made) -> None:
    page, metrics = made.page, made.metrics
    assert {"points", "calibration", "groups", "comparison", "confusion", "hidden"} <= set(page.words)
    youden = metrics["operating_points"]["Mass"]["youden"]
    row = next(row for row in page.rows if row[:2] == ["Mass", f"{POINTS['youden']:.3f}"])
    low, high = youden["sensitivity_interval"]
    assert row[2] == f"{100 * youden['sensitivity']:.0f} %({100 * low:.0f}–{100 * high:.0f})"
    assert len(row) == 1 + 4 * 3
    mass = metrics["calibration"]["findings"]["Mass"]
    row = next(row for row in page.rows if row[0] == "Mass" and "2.00" in row)
    assert row[1:3] == [f"{mass['raw'][key]:.3f}" for key in ("ece", "brier")]
    assert row[-2:] == [f"{mass['platt'][key]:.3f}" for key in ("ece", "brier")]
    assert "Not calibrated, and in no mean: Effusion, Nodule" in page.words["calibration"]
    for sex, group in metrics["groups"]["sex"]["scored"].items():
        row = page.row(f"{sex}{group['n_images']} images, {group['n_patients']} patients")
        assert row[1].startswith(f"{group['macro']['auroc']:.3f}(")
    difference = metrics["comparison"]["macro"]["auroc"]
    assert any(f"{difference:+.3f}".replace("-", "−") in row[1] for row in page.rows if row[0].startswith("mean of"))
    assert "100 resamples of the patients" in page.words["results"]


def test_confusion_by_hand(made: Made) -> None:
    calls = Calls.of(Predictions.read(str(made.out / "predictions.parquet")), read_info(made.checkpoint))
    mass, nodule = FINDINGS.index("Mass"), FINDINGS.index("Nodule")
    labels, called = calls.predictions.labels, calls.called
    rows = (labels[:, mass] == 1) & (labels[:, nodule] == 0)
    table = made.page.rows[next(i for i, row in enumerate(made.page.rows) if row[:1] == ["there"]) :][:5]
    assert table[0] == ["there", *FINDINGS]
    assert table[1 + 1 + mass][1 + nodule] == f"{100 * called[rows, nodule].mean():.0f} %"
    assert table[1 + 1 + mass][1 + mass] == f"{100 * called[labels[:, mass] == 1, mass].mean():.0f} %"
    assert table[1][1 + nodule] == f"{100 * called[labels[:, nodule] == 0, nodule].mean():.0f} %"


def test_hidden_positives_are_those_that_training_did_not_observe(made: Made) -> None:
    found = Predictions.read(str(made.out / "hidden.parquet"))
    info, card = read_info(made.checkpoint), read_card(made.data)
    assert found.observed is not None
    assert found.row is not None
    assert (found.observed.sum(1) == 1).all()
    assert (found.labels[found.observed == 1] == 1).all()
    assert 15 <= len(found.image_id) < len(card.rows("train"))
    assert set(found.row.tolist()) <= set(card.rows("train"))
    there = hidden(found)
    assert there.sum() == found.labels.sum() - len(found.image_id)
    calls, run = Calls.of(found, info), run_of(info)
    pseudo = pseudo_positives(found, run)
    assert pseudo is not None
    unobserved = found.observed == 0
    assert (pseudo == ((found.probabilities >= run.pseudo.tau_pos) & unobserved)).all()
    total = summarise(calls, run)["total"]
    assert (total["hidden"], total["pseudo_found"]) == (there.sum(), (there & pseudo).sum())
    assert total["wrong"] == ((found.labels == 0) & calls.called).sum()
    words = made.page.words["hidden"]
    assert f"{total['hidden']} positives that training was never told" in words
    pairs = extremes(np.where(recovered(calls, run), found.probabilities, -1.0), 6)
    shown = [str(image["alt"]) for image in made.page.images() if str(image["alt"]).endswith(" recovered")]
    assert shown == [f"image {found.image_id[row]}: {FINDINGS[k]} recovered" for row, k in pairs]


def test_evidence_is_drawn_from_the_file_with_the_sign_in_white(made: Made) -> None:
    maps = read_maps(str(made.out), SIZE)
    assert maps is not None
    assert maps.how == "hirescam at blocks.1"
    shown = {str(image["alt"]): str(image["src"]) for image in made.page.images()}
    words = {f"evidence for {finding} in image {image_id}" for _, image_id, finding in maps.by_case}
    assert words == {alt for alt in shown if alt.startswith("evidence for ")}
    split, image_id, finding = next(case for case, found in maps.by_case.items() if found.sign is not None)
    found = maps.by_case[split, image_id, finding]
    assert (found.sign == phantom.signs_of(image_id, SIZE)[finding]).all()
    assert found.randomised is None or -1 <= found.randomised <= 1
    pixels = pixels_of(shown[f"evidence for {finding} in image {image_id}"])
    card = read_card(made.data)
    ids = dict(zip(*positions(made, split), strict=True))
    image = read_images(made.data, card, split, [ids[image_id]])[ids[image_id]].image
    small = blend(image, found.values).astype(int)
    assert pixels.shape == (176, 176, 3)
    corner = pixels[:11, :11].astype(int).mean((0, 1)) - small[:2, :2].mean((0, 1))
    assert np.abs(corner).max() < 25, "the overlay lies on this very image"
    assert "rank correlation is" in made.page.words["examples"]


def positions(made: Made, split: str) -> tuple[list[str], list[int]]:
    found = Predictions.read(str(made.out / ("predictions.parquet" if split == "test" else "hidden.parquet")))
    first = read_card(made.data).rows(split).start
    rows = range(len(found.image_id)) if found.row is None else (found.row - first).tolist()
    return found.image_id, list(rows)


def test_another_collection_is_named_so(made: Made, tmp_path: Path) -> None:
    names = ("Hernia", "Pleural Effusion", "Mass")
    tiny_checkpoint(tmp_path / "best", findings=names, digest="2" * 64)
    settings = load(None, [*FEW, "evaluate.finding_map={Pleural Effusion: Effusion}"])
    evaluate(settings, tmp_path / "best", made.data, "test", str(tmp_path / "out"), title="External")
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "Another data set than that of training" in page.words["head"]
    assert "hidden" not in page.words
    assert "Of the model alone, not scored: Hernia" in page.words["results"]
    assert "Of the data set alone, unknown to the model: Nodule" in page.words["results"]
    assert page.row("Pleural Effusion")
    assert '"Pleural Effusion": "Effusion"' in page.words["sources"]


def test_evaluations_of_the_first_version_still_make_a_page(made: Made, tmp_path: Path) -> None:
    """metrics.json without intervals, predictions without origin, nothing beside them."""
    found = Predictions.read(str(made.out / "predictions.parquet"))
    names = ("findings", "image_id", "patient_id", "logits", "labels", "known")
    Predictions(*(getattr(found, name) for name in names), origin={}).write(str(tmp_path / "predictions.parquet"))
    kept = ("schema_version", "split", "n_images", "data_digest", "synthetic")
    old = {key: made.metrics[key] for key in kept}
    old["macro"] = {key: made.metrics["macro"][key] for key in ("auroc", "ap", "findings_averaged")}
    old["findings"] = {
        name: {key: row[key] for key in ("n_pos", "n_neg", "auroc", "ap")}
        for name, row in made.metrics["findings"].items()
    }
    old["checkpoint"] = {key: made.metrics["checkpoint"][key] for key in ("step", "epoch", "data_digest", "git_commit")}
    (tmp_path / "metrics.json").write_text(json.dumps(old))
    write_report(
        str(tmp_path / "report.html"),
        evaluation=str(tmp_path),
        data=made.data,
        checkpoint=made.checkpoint,
        search=None,
        title="Old",
    )
    page = Page((tmp_path / "report.html").read_text())
    assert not {"points", "calibration", "groups", "comparison", "hidden"} & set(page.words)
    assert "older version, without intervals" in page.words["results"]
    assert page.row("Mass")[1] == f"{old['findings']['Mass']['auroc']:.3f}"


def test_the_verb_shows_intervals_and_the_difference(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.out, tmp_path / "out")
    arguments = ["evaluate", "--checkpoint", str(made.checkpoint), "--data", made.data, "--out", str(tmp_path / "out")]
    overrides = [text for setting in FEW for text in ("--set", setting)]
    assert run([*arguments, "--resume", *overrides, "--set", f"evaluate.compare={made.out}"]) == 0
    shown = capsys.readouterr().out
    low, high = made.metrics["macro"]["auroc_interval"]
    assert f"{low:.3f} to {high:.3f}" in shown
    assert "macro AUROC minus that of" in shown
