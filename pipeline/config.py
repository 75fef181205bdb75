"""The configuration of a training run and of what follows it, composed of the method's own models."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpc.config import Config, Count, MethodConfig, Name, Positive, Probability
from pipeline.schedule import Change, check_schedule, settings_at


class DataConfig(Config):
    """How a run sees a prepared data set."""

    draw_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawn positive; another seed rewrites nothing."""
    val_labels: Literal["full", "observed"] = "full"
    """Whether validation may use all known labels or, like training, one positive an image (docs/selection.md)."""
    val_kappa: Annotated[float, Field(ge=1.0)] | None = None
    """With val_labels=observed: mean number of findings of the images that show one, where that is known. It puts the
    estimated AUROC on the scale of the true one; None needs nothing, and the order within a finding is the same."""
    window: Annotated[int, Field(ge=4096)] = 4096
    """Rows among which the stream shuffles after it has permuted row groups."""
    backend: Literal["ray", "torch"] = "ray"
    """Who reads and augments: Ray Data, anywhere in the cluster, or processes of a torch DataLoader beside each
    training worker, which is cheaper where one machine is all there is. The batches are the same."""
    task_cpus: Positive = 0.5
    """CPUs that one reading and augmenting task (or DataLoader process) asks of Ray."""
    tasks: Count = 2
    """Reading and augmenting tasks (or DataLoader processes) at work at a time, for each rank."""


class TrainConfig(Config):
    """The loop around the method."""

    method: str = "mpc"
    """`mpc` or the name of a baseline."""
    epochs: Count = 8
    batch_size: Count = 32
    """Images of a global batch, over all workers."""
    seed: Annotated[int, Field(ge=0)] = 0
    num_workers: Count = 1
    """Workers, each with an equal slice of the global batch; with `min_workers` the most that there may be."""
    min_workers: Count | None = None
    """The fewest workers that the run goes on with when nodes leave; it grows again up to `num_workers`, and batch and
    learning rate stay as they are. None keeps the number fixed: the run then waits for a lost node's replacement."""
    resize_s: Positive = 60.0
    """Seconds between two looks for room for more workers; growing repeats the steps since the last checkpoint."""
    use_gpu: bool = False
    gpus: Positive = 1.0
    """GPUs that each worker asks of Ray where use_gpu is on: 1, 2, ... or, with one worker, a share such as 0.25, so
    that trials of a search divide a GPU."""
    threads: Count = 1
    """CPU threads of each worker; results are bit-equal only at the same number."""
    worker_cpus: Positive = 1.0
    """CPUs that each worker asks of Ray."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast of the backbone; head and losses stay in float32. With `fp16` the loss is scaled, so that small
    gradients stay above zero."""
    channels_last: bool = True
    """Maps lie in memory with their channels innermost, as convolutions read them faster; results differ in rounding
    alone."""
    compile: bool = False
    """Compile the backbone (torch.compile) in the first steps, which takes minutes and a C++ compiler; results differ
    in rounding alone."""
    eval_batch_size: Count = 128
    log_every: Count = 50
    """Steps between two lines of the log."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two checkpoints inside an epoch; 0 writes them at the ends of epochs only."""
    keep: Count = 1
    """Latest checkpoints that stay in storage; the best one stays beside them."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often a run that lost a worker continues from its last checkpoint; announced departures do not count."""
    metric: Literal["macro_auroc", "macro_ap"] = "macro_auroc"
    """Validation metric by which the best checkpoint is chosen."""
    schedule: tuple[Change, ...] = ()
    """Settings that change at the ends of epochs, each as `{epoch: 3, settings: {optim.lr: 0.001}}`; what population
    based training found, in OUT/best.yaml, can be given to `train` as it is."""

    @model_validator(mode="after")
    def shares_a_gpu(self) -> "TrainConfig":
        """Ray knows whole GPUs and shares of one; NCCL knows no two ranks on the same GPU."""
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus {self.gpus} is neither a whole number nor a share of one GPU; use 1, 2 or 0.5")
        if self.gpus < 1 and self.num_workers > 1:
            raise ValueError(
                f"gpus {self.gpus} would put several of the {self.num_workers} workers on one GPU, which NCCL refuses; "
                f"set gpus=1, or num_workers=1"
            )
        return self

    @property
    def least_workers(self) -> int:
        """The fewest workers that train."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def divides(self) -> "TrainConfig":
        """Every rank takes an equal slice of the global batch, whatever their number."""
        if self.least_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is above num_workers {self.num_workers}; lower it")
        sizes = range(self.least_workers, self.num_workers + 1)
        uneven = [size for size in sizes if self.batch_size % size]
        if uneven:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide over {uneven[0]} workers; use a multiple of "
                f"{math.lcm(*sizes)}" + (", or raise min_workers" if self.min_workers else "")
            )
        return self


class RunConfig(MethodConfig):
    """One training run, fully resolved: what checkpoints and MLflow hold."""

    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def follows_its_schedule(self) -> "RunConfig":
        """Whatever changes while it trains, the run stays one that can be trained."""
        check_schedule(self, self.train.schedule, self.train.method, self.train.epochs)
        return self

    @model_validator(mode="after")
    def compilable(self) -> "RunConfig":
        """A compiled backbone is one piece: nothing can be put in before its last stage."""
        if self.train.compile and self.model.perturb.place == "before_last_stage" and self.loss.lambda_fpc > 0:
            raise ValueError(
                "train.compile and model.perturb.place=before_last_stage exclude each other; "
                "set train.compile=false or model.perturb.place=last"
            )
        return self

    def at(self, epoch: float) -> Self:
        """The settings in force once so many epochs are done."""
        return settings_at(self, self.train.schedule, epoch)

    @property
    def worker_gpus(self) -> float:
        """GPUs that a training worker asks of Ray."""
        return self.train.gpus if self.train.use_gpu else 0.0

    @property
    def worker_cpus(self) -> float:
        """CPUs that a training worker asks of Ray, with those of its own reading processes."""
        own = self.data.tasks * self.data.task_cpus if self.data.backend == "torch" else 0.0
        return self.train.worker_cpus + own

    @property
    def cpus_beside(self) -> float:
        """CPUs that must stay free beside the training workers, for Ray Data to read at all."""
        return self.data.task_cpus if self.data.backend == "ray" else 0.0


class EvaluateConfig(Config):
    """How predictions are judged."""

    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1000
    """Resamples of the patients behind every interval."""
    level: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.95
    """Confidence of the intervals."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the resamples: the same one gives the same intervals."""
    bins: Annotated[int, Field(ge=2, le=100)] = 10
    """Bins of equal numbers of images, for calibration error and reliability."""
    min_group: Count = 20
    """Patients that a group (of a view, sex, age band or collection) needs to be scored; smaller ones are listed."""
    finding_map: dict[Name, Name] | None = None
    """For a data set with other findings than the model: the model's name -> the data set's. Names that are equal need
    no entry; None refuses findings that differ."""
    compare: str | None = None
    """Another model, compared on the same images: its checkpoint, models:/NAME@ALIAS, or --out of its evaluation."""
    hidden_images: Annotated[int, Field(ge=0)] = 2000
    """About how many training images the report looks at for positives that training did not observe; 0 for none."""


class ExplainConfig(Config):
    """Which maps are drawn, and from where in the network."""

    method: Literal["hirescam", "gradcam"] = "hirescam"
    """`hirescam`: gradient x activation, place by place (Draelos & Carin 2020). `gradcam`: gradients averaged over
    places first (Selvaraju et al., ICCV 2017). Before pooling and a linear head both are the same."""
    layer: str | None = None
    """Module of the backbone whose maps are read, such as blocks.4; None takes the deepest one with enough places."""
    cells: Annotated[int, Field(ge=2, le=64)] = 7
    """Places a side that a layer needs to be taken where `layer` is None."""
    findings: tuple[Name, ...] | None = None
    """Findings to explain in every image; None takes those at or above their threshold, or the nearest one below."""
    per_image: Count = 3
    """Findings an image at most, highest above their threshold first; not used with `findings`."""
    limit: Count = 100
    """Images at most, evenly spread over all."""


class ReferenceConfig(Config):
    """What a checkpoint remembers of its training images, so that prediction can tell images unlike them."""

    images: Annotated[int, Field(ge=0)] = 2000
    """Training images that are described, and validation images that set the limit, at most; 0 for none at all."""
    false_alarms: Probability = 0.02
    """Share of images like those of validation that are flagged all the same."""


class PredictConfig(Config):
    """How findings of new images are written."""

    calibration: Literal["platt", "temperature", "none"] = "platt"
    """What makes probabilities of logits, as validation fitted it: slope and shift, a temperature alone, or neither.
    Thresholds move along, so that what is called stays the same."""
    batch_size: Count = 64
    """Images of one task."""
