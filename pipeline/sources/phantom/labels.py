"""Who is imaged and with which findings: pure functions of (seed, index, profile)."""

import csv
import gzip
import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.sources.phantom.parameters import FREQUENCIES, PARAMETERS

Profile = Literal["dense", "nih"]
FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
"""The 14 findings of NIH ChestX-ray14, in that collection's order."""

_RATES = PARAMETERS.labels
_STREAMS = {"patient": 1, "block": 2, "labels": 3, "image": 4, "pose": 5, "vessels": 6, "noise": 7, "sign": 16}


def generator(seed: int, stream: str, *keys: int) -> np.random.Generator:
    """An independent random stream for each (seed, stream, keys): drawing from one never moves another."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, _STREAMS[stream], *keys))))


@dataclass(frozen=True)
class Patient:
    """A synthetic patient; `number` is unique within a seed."""

    number: int
    study: int  # how many images of this patient came before
    sex: str  # M or F
    age: int  # years

    @property
    def age_band(self) -> str:
        """Twenty years, such as `40-59`."""
        return f"{self.age // 20 * 20}-{self.age // 20 * 20 + 19}"


@lru_cache(maxsize=64)
def _block(seed: int, block: int) -> tuple[tuple[int, int], ...]:
    """(patient within the block, image of that patient) for each image of a block: patients have 1 to 6 images."""
    low, high = (int(bound) for bound in _RATES.per_patient)
    uniform = generator(seed, "block", block).random(_RATES.block)
    places: list[tuple[int, int]] = []
    for person, u in enumerate(uniform):
        count = min(low + int(u * (high - low + 1)), _RATES.block - len(places))
        places += [(person, image) for image in range(count)]
    return tuple(places)


def patient(seed: int, index: int) -> Patient:
    """The patient of an image."""
    block, place = divmod(index, _RATES.block)
    person, study = _block(seed, block)[place]
    number = block * _RATES.block + person
    u = generator(seed, "patient", number).random(3)
    age = 18 + int(45 * (u[1] + u[2]) * 0.8)
    return Patient(number, study, "M" if u[0] < _RATES.male else "F", age)


def view(seed: int, index: int) -> str:
    """`AP` or `PA`, independent of the findings: the view alone predicts nothing."""
    return "AP" if generator(seed, "image", index).random() < _RATES.ap else "PA"


@lru_cache(maxsize=1)
def frequencies() -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Label sets of the NIH table as indices into `FINDINGS`, most frequent first, and how many images have each."""
    content = json.loads(FREQUENCIES.read_text("utf-8"))
    sets = [tuple(FINDINGS.index(name) for name in key.split("|") if name) for key in content["counts"]]
    return tuple(sets), tuple(content["counts"].values())


@lru_cache(maxsize=1)
def _cumulative() -> NDArray[np.int64]:
    """Running sum of the counts."""
    return np.cumsum(np.array(frequencies()[1], np.int64))


@lru_cache(maxsize=1)
def _affinity() -> NDArray[np.float64]:
    """How findings attract each other: the NIH table's lift among images with several findings, within [1/4, 4]."""
    sets, counts = frequencies()
    joint = np.zeros((len(FINDINGS), len(FINDINGS)))
    total = 0
    for members, count in zip(sets, counts, strict=True):
        if len(members) > 1:
            total += count
            joint[np.ix_(members, members)] += count
    alone = np.diag(joint)
    affinity: NDArray[np.float64] = np.clip(joint * total / np.outer(alone, alone), 0.25, 4.0)
    return affinity


def _nih(rng: np.random.Generator) -> tuple[int, ...]:
    """A label set with its real frequency."""
    sets, cumulative = frequencies()[0], _cumulative()
    return sets[int(np.searchsorted(cumulative, int(rng.random() * cumulative[-1]), side="right"))]


def _dense(rng: np.random.Generator) -> tuple[int, ...]:
    """None, or one to five findings, each next one drawn by its attraction to those already there."""
    uniform = rng.random(2 + len(_RATES.dense_counts))
    if uniform[0] < _RATES.dense_empty:
        return ()
    number = 1 + int(np.searchsorted(np.cumsum(_RATES.dense_counts)[:-1], uniform[1], side="right"))
    weights = np.array(_RATES.dense_weights)
    chosen: list[int] = []
    for u in uniform[2 : 2 + number]:
        cumulative = np.cumsum(weights)
        chosen.append(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")))
        weights = weights * _affinity()[chosen[-1]]
        weights[chosen] = 0.0
    return tuple(sorted(chosen))


def labels(seed: int, index: int, profile: Profile) -> NDArray[np.int8]:
    """The findings of an image as int8 [14] in {0, 1}, in the order of `FINDINGS`."""
    rng = generator(seed, "labels", index)
    result = np.zeros(len(FINDINGS), np.int8)
    result[list(_dense(rng) if profile == "dense" else _nih(rng))] = 1
    return result


def count_label_sets(table: Path) -> dict[str, Any]:
    """Counts the label sets of `Data_Entry_2017_v2020.csv` (or .csv.gz): the content of `nih_frequencies.json`.

    Returns: `source`, `citation`, `images` and `counts`, whose keys are findings joined by `|` in the order of
        `FINDINGS` ("" = no finding), most frequent first.
    """
    counts: Counter[str] = Counter()
    with gzip.open(table, "rt", newline="") if table.suffix == ".gz" else table.open(newline="") as lines:
        for row in csv.DictReader(lines):
            names = set(row["Finding Labels"].split("|")) - {"No Finding"}
            counts["|".join(sorted(names, key=FINDINGS.index))] += 1
    return {
        "source": "Data_Entry_2017_v2020.csv of ChestX-ray14, NIH Clinical Center; only counts of label sets are kept",
        "citation": "Wang, Peng, Lu, Lu, Bagheri, Summers: ChestX-ray8: Hospital-scale Chest X-ray Database and "
        "Benchmarks on Weakly-Supervised Classification and Localization of Common Thorax Diseases, CVPR 2017",
        "images": sum(counts.values()),
        "counts": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    }
