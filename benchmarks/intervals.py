"""Intervals by patient: how fast against a loop over scikit-learn, and how often they hold the truth.

`python benchmarks/intervals.py [--resamples 1000] [--naive 100] [--coverage 400]`

Speed: 10,000 images of 3,300 patients, 14 findings, AUROC and AP of every resample, by CPU time on one core. The loop
draws the same patients and asks scikit-learn for each finding; both must agree to 1e-12. Coverage: splits are drawn
from a population whose scores are known; images of a patient share a part of their score. An interval of 95 % should
hold the population's value 95 times in 100. Resampling images instead of patients is shown beside it.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from mpc.metrics import Resamples
from mpc.metrics.intervals import interval

IMAGES, PATIENTS, FINDINGS = 10_000, 3_300, 14
NAMES = [f"finding {k}" for k in range(FINDINGS)]
POPULATION = 60_000
Arrays = tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.int64]]


def split(rng: np.random.Generator, patients: int, prevalence: float, effect: float) -> Arrays:
    """Patient, score and label of each image of as many patients with 1 to 6 images."""
    patient = np.repeat(np.arange(patients), rng.integers(1, 7, patients))
    severity = rng.normal(size=patients)[patient] * 0.8 + rng.normal(size=len(patient)) * 0.6
    label = (severity > norm.ppf(1 - prevalence)).astype(int)
    habit = rng.normal(size=patients)[patient] * 0.7
    return patient, effect * label + habit + rng.normal(size=len(patient)), label


def speed(resamples: int, naive: int) -> None:
    """Prints seconds of both, and how far they are apart."""
    rng = np.random.default_rng(0)
    patients = rng.integers(0, PATIENTS, IMAGES)
    labels = (rng.random((IMAGES, FINDINGS)) < np.linspace(0.01, 0.3, FINDINGS)).astype(int)
    scores, known = rng.random((IMAGES, FINDINGS)) + 0.3 * labels, np.ones((IMAGES, FINDINGS), bool)
    start = time.process_time()
    drawn = Resamples.draw(patients, resamples)
    auroc, ap = drawn.scores(scores, labels, known, NAMES)
    ours = (time.process_time() - start) / resamples
    start, apart = time.process_time(), 0.0
    for number in range(naive):
        rows = np.repeat(np.arange(IMAGES), drawn.weights[number][drawn.patient])
        for k in range(FINDINGS):
            one, other = (
                metric(labels[rows, k], scores[rows, k]) for metric in (roc_auc_score, average_precision_score)
            )
            apart = max(apart, abs(one - auroc[number, k]), abs(other - ap[number, k]))
    loop = (time.process_time() - start) / naive
    print(f"{IMAGES:,} images, {drawn.patients:,} patients, {FINDINGS} findings; CPU seconds")
    print(f"{'':28}{'a resample':>12}{f'{resamples:,}':>10}")
    for name, seconds in (("scikit-learn, in a loop", loop), ("mpc.metrics.Resamples", ours)):
        print(f"{name:28}{seconds:12.5f}{seconds * resamples:10.1f}")
    print(f"{loop / ours:.0f} times as fast; largest difference {apart:.1e} over {naive} resamples")


def coverage(trials: int) -> None:
    """Prints how often intervals of 95 % hold the population's AUROC and AP."""
    print(f"\nheld of {trials} splits{'AUROC':>23}{'AP':>9}{'AUROC, by image':>19}{'AP, by image':>15}")
    for patients, prevalence, effect in ((250, 0.15, 1.2), (250, 0.03, 1.5), (80, 0.15, 1.0), (250, 0.15, 2.8)):
        rng = np.random.default_rng(0)
        _, scores, labels = split(rng, POPULATION, prevalence, effect)
        truth = (roc_auc_score(labels, scores), average_precision_score(labels, scores))
        held = np.zeros((trials, 4))
        for trial in range(trials):
            patient, scores, labels = split(rng, patients, prevalence, effect)
            for by, unit in enumerate((patient, np.arange(len(patient)))):
                drawn = Resamples.draw(unit, 400, trial)
                values = drawn.scores(scores[:, None], labels[:, None], labels[:, None] >= 0, ["a"])
                for metric, (true, found) in enumerate(zip(truth, values, strict=True)):
                    bounds = interval(found[:, 0])
                    held[trial, 2 * by + metric] = bounds is not None and bounds[0] <= true <= bounds[1]
        row = "".join(f"{share:{width}.3f}" for share, width in zip(held.mean(0), (9, 9, 19, 15), strict=True))
        print(f"{patients} patients, {prevalence:.0%} positive, AUROC {truth[0]:.2f}{row}")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--naive", type=int, default=100, help="resamples of the loop")
    parser.add_argument("--coverage", type=int, default=400, help="splits drawn for each setting; 0 for none")
    arguments = parser.parse_args()
    speed(arguments.resamples, arguments.naive)
    if arguments.coverage:
        coverage(arguments.coverage)


if __name__ == "__main__":
    main()
