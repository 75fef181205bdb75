"""The whole chain on synthetic radiographs: prepare, search, register, promote, evaluate, predict, report."""

import time
from collections.abc import Callable
from pathlib import Path

import cv2

from infra.console import progress, say, table
from infra.registering import promote, register
from infra.searching import search
from infra.settings import Settings, run_config
from infra.tracking import tracking_uri
from mpc.errors import UserError
from pipeline import runtime, storage
from pipeline.evaluate import evaluate
from pipeline.illustrate import illustrate
from pipeline.predict import predict
from pipeline.shards import prepare
from pipeline.sources import phantom
from tuning import registry
from tuning.report import write_report
from tuning.space import load as load_space

SPACE = "demo"
NEW_IMAGES, NEW_SIDE = 12, 512
"""Pictures for `predict`: how many, and their side in pixels before the model's own resizing."""


class Demo:
    """The steps in order; each says in one line what it did.

    Args:
        settings: of the preset `demo`, perhaps changed.
        out: folder for everything.
        resume: keep what earlier steps have finished there.
        verbose: show Ray's logs.

    Raises:
        UserError: settings of another source than the phantom.
    """

    def __init__(self, settings: Settings, out: Path, *, resume: bool = False, verbose: bool = False) -> None:
        if settings.prepare.source != "phantom":
            raise UserError("demo draws its own images; set prepare.source=phantom, or use the verbs one by one")
        self.settings, self.out, self.resume, self.verbose = settings, out, resume, verbose
        self.tracking = tracking_uri(settings, out)
        self.champion = f"models:/{settings.tracking.model_name}@{registry.CHAMPION}"

    def run(self) -> None:
        """Every step, then what they did and where things are."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.verbose:
            runtime.start(verbose=True)
        steps: list[tuple[str, Callable[[], str]]] = [
            ("prepare", self.prepare),
            ("search", self.search),
            ("register", self.register),
            ("promote", self.promote),
            ("evaluate", self.evaluate),
            ("predict", self.predict),
            ("report", self.report),
        ]
        rows, began = [], time.monotonic()
        for number, (name, step) in enumerate(steps, 1):
            say(f"[{number}/{len(steps)}] {name}")
            started = time.monotonic()
            result = step()
            rows.append([name, f"{time.monotonic() - started:.0f} s", result])
        table(f"Demo on synthetic radiographs, {time.monotonic() - began:.0f} s", ["step", "took", "result"], rows)
        self.show_places()

    def place(self, name: str) -> str:
        """A path below the demo's folder."""
        return str(self.out / name)

    def prepare(self) -> str:
        """Draws radiographs into shards."""
        with progress("images") as display:
            card = prepare(
                self.settings.prepare,
                None,
                self.place("data"),
                resume=self.resume,
                progress=lambda done, total: display(done, total, ""),
            )
        images = sum(split.images for split in card.counts.values())
        return f"{images:,} synthetic images of {card.image_size} pixels, {len(card.findings)} findings"

    def search(self) -> str:
        """Searches loss weights and strengths of augmentation."""
        space = load_space(SPACE, run_config(self.settings))
        with progress("trials") as display:
            found = search(
                self.settings,
                space,
                self.place("data"),
                self.place("search"),
                self.tracking,
                display,
                resume=self.resume,
                verbose=self.verbose,
            )
        self.checkpoint = Path(found.best_checkpoint)
        stopped = sum(trial.status == "stopped" for trial in found.trials)
        return (
            f"{len(found.trials)} trials, {stopped} stopped early; best {found.best.trial_id}: "
            f"{self.settings.search.metric} {found.best.value or 0:.3f}"
        )

    def register(self) -> str:
        """Makes the best trial a model version."""
        source, model = str(self.checkpoint), self.settings.tracking.model_name
        self.version, _ = register(
            self.settings, source, self.checkpoint, model, self.place("data"), "val", tracking=self.tracking
        )
        return f"{self.version.uri} in {self.tracking}"

    def promote(self) -> str:
        """Makes that version champion if the gate lets it."""
        name, version, _ = self.version
        verdict = promote(self.settings, name, version, self.place("data"), "val", tracking=self.tracking)
        return f"{verdict.decision.value}: {verdict.reason}"

    def evaluate(self) -> str:
        """Scores the champion on patients that no step has seen."""
        self.model = registry.download(self.champion, self.tracking)
        metrics = evaluate(
            self.model,
            self.place("data"),
            "test",
            self.place("test"),
            self.settings.train.eval_batch_size,
            config=self.settings.evaluate,
        )
        macro, bounds = metrics["macro"], metrics["macro"]["auroc_interval"]
        interval = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
        return (
            f"{metrics['n_images']:,} test images: macro AUROC {macro['auroc']:.3f}{interval}, "
            f"average precision {macro['ap']:.3f} over {len(macro['findings_averaged'])} findings"
        )

    def predict(self) -> str:
        """Draws new pictures as PNG files and writes their findings."""
        source, folder = self.settings.prepare.phantom, self.out / "images"
        folder.mkdir(exist_ok=True)
        for index in range(NEW_IMAGES):  # another seed: patients that the data set does not hold
            picture = phantom.render(source.seed + 1, index, source.profile, NEW_SIDE)
            cv2.imwrite(str(folder / f"new-{index:02d}.png"), picture)
        target = self.place("predictions/findings.csv")
        storage.delete(target)
        with progress("new images") as display:
            summary = predict(self.model, str(folder), target, progress=display)
        return f"{summary.images} new images, {summary.failed} unreadable"

    def report(self) -> str:
        """Writes one page about all of it, with maps of where the evidence lies."""
        illustrate(
            self.model,
            self.place("data"),
            self.place("test"),
            config=self.settings.evaluate,
            explain=self.settings.explain,
        )
        write_report(
            self.place("report.html"),
            evaluation=self.place("test"),
            data=self.place("data"),
            checkpoint=self.model,
            search=self.place("search"),
            title="Demo on synthetic radiographs",
        )
        return "trials, curves, scores, example images with predictions and saliency"

    def show_places(self) -> None:
        """Where to look, and the commands that go on from here."""
        places = {
            "report": "report.html",
            "trials": "search/search.json",
            "best checkpoint": "search/best",
            "test metrics": "test/metrics.json",
            "predictions": "predictions/findings.csv",
        }
        for name, place in places.items():
            say(f"{name + ':':<18}{self.place(place)}")
        say(f"{'MLflow:':<18}mlflow ui --backend-store-uri {self.tracking}")
        say(
            f"{'go on:':<18}mpc-cxr predict --model {self.champion} --set tracking.uri={self.tracking} "
            f"--images FOLDER --out runs/new"
        )
