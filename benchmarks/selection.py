"""Which ranking needs no full labels? `python benchmarks/selection.py --out DIR [--configs 36] [--seeds 0 1 2]`.

Trains networks whose method, learning rate, loss weights and augmentation strengths are drawn at random, on synthetic
radiographs (32 px, profile dense), each with the same budget. Every rule then ranks them by what it may see of the
validation images, one positive an image, and is judged by Kendall's tau-b against the macro AUROC on all labels of test
images. The limit is validation with full labels. Intervals are 95 %, from resampled configurations; a rule sees
`--draws` draws of the observed positive, whose taus are averaged. What is trained is kept in DIR and not trained again.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_expit
from scipy.stats import kendalltau
from sklearn.metrics import average_precision_score
from torch.optim.lr_scheduler import LambdaLR

from mpc.build import build_method, build_model
from mpc.config import PixelSpec
from mpc.device_views import DeviceViews
from mpc.method import Batch, Progress
from mpc.metrics import observed_score, score
from mpc.model import Classifier, Ema
from pipeline.config import RunConfig
from pipeline.setup import make_optimizer, relative_rate
from pipeline.single_positive import draw
from pipeline.sources import phantom

SIZE = 32
PROFILE: Literal["dense"] = "dense"
IMAGES = {"train": 1000, "val": 1000, "test": 1000}

BASE: dict[str, Any] = {
    "model": {"backbone": "test_efficientnet_gn"},
    "pseudo": {"kappa": 2.5},  # mean positives an image of the profile; read by ROLE
    "train": {"epochs": 4, "batch_size": 16},
}
METHODS: tuple[dict[str, Any], ...] = (
    {"train": {"method": "an"}},
    {"train": {"method": "wan"}},
    {"train": {"method": "an_ls"}},
    {"train": {"method": "em"}},
    {"train": {"method": "splc"}},
    {"train": {"method": "role"}},
    {"train": {"method": "mpc"}, "loss": {"sup": "an"}},
    {"train": {"method": "mpc"}, "loss": {"sup": "wan"}},
    {
        "train": {"method": "mpc"},
        "loss": {"sup": "em", "norm": "all"},
        "pseudo": {"source": "ema", "form": "soft", "tau_pos": 0.5, "tau_neg": 0.5},
    },
)


class Drawn(NamedTuple):
    """Synthetic radiographs of one split."""

    ids: list[str]
    images: NDArray[np.uint8]
    """[N, S, S]."""
    labels: NDArray[np.int8]
    """[N, K], all of them known."""

    def observed(self, seed: int) -> NDArray[np.int8]:
        """[N, K]: one positive an image, as training draws it; none where there is none."""
        return draw(self.ids, self.labels, np.ones_like(self.labels, bool), seed)


def images_of(seed: int, split: str) -> Drawn:
    """A split of data set `seed`; splits share no patient, being drawn from seeds of their own."""
    own = 10 * seed + list(IMAGES).index(split)
    every = range(IMAGES[split])
    return Drawn(
        [f"{own}-{index}" for index in every],
        np.stack([phantom.render(own, index, PROFILE, SIZE) for index in every]),
        np.stack([phantom.labels(own, index, PROFILE) for index in every]),
    )


def drawn(index: int) -> RunConfig:
    """Configuration number `index`: methods take turns, everything else is drawn."""
    generator = np.random.default_rng(index)
    tree: dict[str, Any] = {section: dict(values) for section, values in BASE.items()}
    varied: dict[str, Any] = {
        "optim": {"lr": float(10 ** generator.uniform(-3.5, -2))},
        "loss": {f"lambda_{name}": float(generator.uniform(0, 1)) for name in ("ipc", "fpc", "btc")},
        "views": {
            "red": {"rms": float(generator.uniform(0, 0.014))},
            "strong": {"ops": int(generator.integers(1, 4)), "magnitude": float(generator.uniform(0.3, 1.5))},
        },
        "baseline": {"em_alpha": float(10 ** generator.uniform(-1.3, -0.4))},
    }
    for part in (varied, METHODS[index % len(METHODS)]):
        for section, values in part.items():
            tree[section] = {**tree.get(section, {}), **values}
    return RunConfig.model_validate(tree)


def train(run: RunConfig, data: Drawn) -> Classifier:
    """The averaged network after training on the images that have a positive, one of which each shows."""
    observed = data.observed(run.data.draw_seed)
    rows = np.flatnonzero(observed.any(1))
    torch.manual_seed(run.train.seed)
    model = build_model(run, observed.shape[1], PixelSpec()).train()
    ema = Ema(model, run.optim.ema)
    method: Any = build_method(run.train.method, run, model, ema.module)
    method.setup(len(rows), observed.shape[1])
    optimizer = make_optimizer(run, method.param_groups(model, run.optim.lr), torch.device("cpu"))
    a_epoch = len(rows) // run.train.batch_size
    total = a_epoch * run.train.epochs
    rate = LambdaLR(optimizer, partial(relative_rate, warmup=round(run.optim.warmup * total), total=total))
    views = DeviceViews(run.views, SIZE, run.views.strong.count if method.needs_strong else 0)
    generator, order = torch.Generator().manual_seed(run.train.seed), np.random.default_rng(run.train.seed)
    for step in range(total):
        if step % a_epoch == 0:
            shuffled = order.permutation(len(rows))
        place = shuffled[step % a_epoch * run.train.batch_size :][: run.train.batch_size]
        weak, strong = views(torch.from_numpy(data.images[rows[place]])[:, None], generator)
        seen, truth = (torch.from_numpy(table[rows[place]]) for table in (observed, data.labels))
        batch = Batch(weak, strong, seen, truth, torch.ones_like(truth, dtype=torch.bool), torch.from_numpy(place))
        loss = method.step(model, batch, Progress(step, a_epoch, run.train.epochs)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip)
        optimizer.step()
        rate.step()
        ema.update(model, step=step + 1)
    averaged: Classifier = ema.module.eval()
    return averaged


@torch.inference_mode()
def logits_of(model: Classifier, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits [N, K]."""
    parts = [model(part[:, None]).numpy() for part in torch.split(torch.from_numpy(images), 250)]
    return np.concatenate(parts)


def scores_of(out: Path, seed: int, configs: int) -> dict[str, NDArray[np.float32]]:
    """Logits [configurations, N, K] of val and test; what `out` lacks is trained."""
    data = {split: images_of(seed, split) for split in IMAGES}
    found: dict[str, list[NDArray[np.float32]]] = {"val": [], "test": []}
    for index in range(configs):
        place = out / f"scores-{seed}-{index:03d}.npz"
        if not place.exists():
            run = drawn(1000 * seed + index)
            model = train(run, data["train"])
            logits = {split: logits_of(model, data[split].images) for split in found}
            with place.with_suffix(".part").open("wb") as file:
                np.savez(file, config=json.dumps(run.model_dump(mode="json")), val=logits["val"], test=logits["test"])
            place.with_suffix(".part").rename(place)
        with np.load(place) as kept:
            for split, values in found.items():
                values.append(kept[split])
    return {split: np.stack(values) for split, values in found.items()}


def macro_auroc(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """With every label known."""
    names = list(map(str, range(labels.shape[1])))
    return float(score(logits, labels, np.ones_like(labels, bool), names)["macro"]["auroc"])


def observed_auroc(logits: NDArray[Any], shown: NDArray[Any], kappa: float | None = None) -> float:
    """Our estimate."""
    names = list(map(str, range(shown.shape[1])))
    return float(observed_score(logits, shown, names, kappa=kappa)["macro"]["auroc"])


def observed_ap(logits: NDArray[Any], shown: NDArray[Any]) -> float:
    """Mean average precision of the observed positives."""
    return float(average_precision_score(shown, logits))


def an_loss(logits: NDArray[Any], shown: NDArray[Any]) -> float:
    """Minus the binary cross-entropy with every unobserved entry as negative."""
    return float((shown * log_expit(logits) + (1 - shown) * log_expit(-logits)).mean())


def wan_loss(logits: NDArray[Any], shown: NDArray[Any]) -> float:
    """Minus that cross-entropy with negatives weighted by 1 / (K - 1)."""
    return float((shown * log_expit(logits) + (1 - shown) * log_expit(-logits) / (shown.shape[1] - 1)).mean())


def recall(logits: NDArray[Any], shown: NDArray[Any], k: int) -> float:
    """Share of the images whose observed finding is among the k highest."""
    highest = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float(np.take_along_axis(shown, highest, 1).any(1).mean())


Rules = dict[str, Callable[[NDArray[Any], NDArray[Any]], float]]
RULES: Rules = {
    "observed AUROC (ours)": observed_auroc,
    "observed mAP": observed_ap,
    "AN loss": an_loss,
    "WAN loss": wan_loss,
    "recall at 1": partial(recall, k=1),
    "recall at 3": partial(recall, k=3),
}


def tau(ranked: NDArray[Any], truth: NDArray[Any]) -> float:
    """Kendall's tau-b; the mean over the draws, [draws, configurations]."""
    return float(np.mean([kendalltau(one, truth).statistic for one in np.atleast_2d(ranked)]))


def with_interval(ranked: NDArray[Any], truth: NDArray[Any], resamples: int = 500) -> str:
    """Tau and its interval over resampled configurations."""
    ranked, generator = np.atleast_2d(ranked), np.random.default_rng(0)
    picks = generator.integers(0, len(truth), (resamples, len(truth)))
    low, high = np.quantile([tau(ranked[:, pick], truth[pick]) for pick in picks], [0.025, 0.975])
    return f"{tau(ranked, truth):6.3f} [{low:6.3f}, {high:6.3f}]"


def regret(ranked: NDArray[Any], truth: NDArray[Any]) -> float:
    """How much worse than the best configuration the first-ranked one is, as a mean over draws."""
    return float(np.mean([truth.max() - truth[one.argmax()] for one in np.atleast_2d(ranked)]))


def report(seed: int, logits: dict[str, NDArray[np.float32]], draws: int) -> None:
    """One table: how each rule ranks, and how far the estimate is from the true score."""
    val, test = images_of(seed, "val"), images_of(seed, "test")
    shown = [val.observed(100 + number) for number in range(draws)]
    rows = shown[0].any(1)
    truth = np.array([macro_auroc(one, test.labels) for one in logits["test"]])
    kappa = float(val.labels[rows].sum(1).mean())
    rules: Rules = {**RULES, f"ours, kappa {kappa:.2f} told": partial(observed_auroc, kappa=kappa)}
    print(
        f"\ndata set {seed}: {len(truth)} configurations, true macro AUROC {truth.min():.3f} to {truth.max():.3f} "
        f"(median {np.median(truth):.3f}); {rows.sum()} validation images show a finding, {draws} draws"
    )
    print(f"{'ranked by':26}{'tau-b with interval':>23}{'regret':>9}")
    full = np.array([macro_auroc(one, val.labels) for one in logits["val"]])
    print(f"{'all labels (the limit)':26}{with_interval(full, truth)}{regret(full, truth):9.4f}")
    for name, rule in rules.items():
        ranked = np.array([[rule(one[rows], seen[rows]) for one in logits["val"]] for seen in shown])
        print(f"{name:26}{with_interval(ranked, truth)}{regret(ranked, truth):9.4f}")
    show_findings(logits["val"], val, [seen[rows] for seen in shown], kappa)


def show_findings(logits: NDArray[np.float32], val: Drawn, shown: list[NDArray[np.int8]], kappa: float) -> None:
    """Within findings: how rules rank, and by how much the estimate misses the true AUROC of the same images."""
    rows, names = val.labels.any(1), list(phantom.FINDINGS)
    seen_by_all = logits[:, rows]
    known = np.ones_like(val.labels[rows], bool)
    true = np.array([_findings(score(one, val.labels[rows], known, names)) for one in seen_by_all])

    def estimate(seen: NDArray[Any], one: NDArray[Any], kappa: float | None = None) -> list[float]:
        return _findings(observed_score(one, seen, names, kappa=kappa))

    raw, told = (_each(seen_by_all, shown, partial(estimate, kappa=k)) for k in (None, kappa))
    rules = {
        "observed AUROC (ours)": raw,
        "observed AP": _each(seen_by_all, shown, partial(average_precision_score, average=None)),
        "AN loss": _each(seen_by_all, shown, _an_losses),
    }
    print(f"{'within a finding':28}{'images that show it':>20}" + "".join(f"{name:>25}" for name in rules))
    for k, name in enumerate(names):
        intervals = "".join(f"{with_interval(values[:, :, k], true[:, k]):>25}" for values in rules.values())
        print(f"{name:28}{np.mean([seen[:, k].sum() for seen in shown]):20.0f}{intervals}")
    for name, values in rules.items():
        taus = [tau(values[:, :, k], true[:, k]) for k in range(len(names))]
        print(f"{name}: median {np.median(taus):.3f}, {min(taus):.3f} to {max(taus):.3f}")
    print(f"estimate minus truth: {(raw - true).mean():+.3f} as it is, {(told - true).mean():+.3f} with kappa")
    carried = val.labels[rows].sum(1)
    print(
        f"mean findings of the image behind an observed positive {carried.mean():.2f}, "
        f"behind any positive {(carried**2).sum() / carried.sum():.2f}"
    )


def _each(
    logits: NDArray[np.float32], shown: list[NDArray[np.int8]], rule: Callable[[NDArray[Any], NDArray[Any]], Any]
) -> NDArray[Any]:
    """A rule of labels and logits that answers for each finding: [draws, configurations, K]."""
    return np.array([[rule(seen, one) for one in logits] for seen in shown])


def _an_losses(shown: NDArray[Any], logits: NDArray[Any]) -> NDArray[Any]:
    """`an_loss` of each finding alone."""
    losses: NDArray[Any] = (shown * log_expit(logits) + (1 - shown) * log_expit(-logits)).mean(0)
    return losses


def _findings(scored: dict[str, Any]) -> list[float]:
    return [row["auroc"] for row in scored["findings"].values()]


def main() -> None:
    """Trains what is missing, then prints one table a data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--configs", type=int, default=36)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        report(seed, scores_of(options.out, seed, options.configs), options.draws)


if __name__ == "__main__":
    main()
