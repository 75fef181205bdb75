"""The settings of Kubernetes: pods, groups of workers, the operator, the tracking server."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.fields import Count, Image, Label, Line, Natural
from mpc.config import Config, NonNegative, Positive


class Toleration(Config):
    """A taint of nodes that pods may run on in spite of it (Kubernetes)."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def has_its_value(self) -> "Toleration":
        """Kubernetes compares a value with `Equal` alone."""
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError(
                f"operator {self.operator} with value {self.value}; Equal needs a value, Exists takes none"
            )
        return self


SPOT = (
    Toleration(key="cloud.google.com/gke-spot"),
    Toleration(key="kubernetes.azure.com/scalesetpriority"),
    Toleration(key="spot"),
)
"""Taints of spot nodes: those of two providers, and a plain one for the others."""


class PodConfig(Config):
    """What one pod of a group asks for; its limits are the same, so that nothing is shared by chance."""

    cpus: Count = 4
    memory_gib: Positive = 16.0
    gpus: Natural = 0
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the GPUs in Kubernetes."""
    scratch_gib: Positive = 20.0
    """Node disk in GiB for what Ray spills and logs."""
    object_store: Annotated[float, Field(gt=0.0, le=0.6)] = 0.3
    """Share of the memory for Ray's object store, which lies in /dev/shm."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    spot: bool = False
    """Whether spot nodes will do: their usual taints are tolerated, beside `tolerations`."""


class WorkerConfig(PodConfig):
    """A group of workers that grows and shrinks with its work."""

    min_workers: Natural = 0
    max_workers: Count = 8
    idle_seconds: Natural = 120
    """How long a worker may be idle before it goes."""

    @model_validator(mode="after")
    def ordered(self) -> "WorkerConfig":
        """The operator refuses a group that starts above its own limit."""
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} lies above max_workers {self.max_workers}; lower it")
        return self


class HeadConfig(PodConfig):
    """The head: it keeps the cluster's state and runs the verb itself, and stays off spot nodes."""

    cpus: Count = 2
    memory_gib: Positive = 8.0


class DataConfig(WorkerConfig):
    """Workers without GPU: reading, decoding, augmenting."""

    cpus: Count = 8
    memory_gib: Positive = 32.0
    spot: bool = True


class TrainConfig(WorkerConfig):
    """Workers with GPUs: training."""

    cpus: Count = 8
    memory_gib: Positive = 32.0
    gpus: Natural = 1
    max_workers: Count = 4
    tolerations: tuple[Toleration, ...] = (Toleration(key="nvidia.com/gpu"),)
    spot: bool = True


class RedisConfig(Config):
    """Where the head keeps its state, so that a head that restarts knows its cluster again."""

    address: Annotated[str, Field(pattern=r"^(rediss?://)?[\w.-]+:\d+$")]
    """HOST:PORT, or rediss://HOST:PORT for TLS."""
    password_secret: Label | None = None
    """Secret of the namespace that holds the password under the key `password`."""


class KubeRayConfig(Config):
    """Kubernetes through a KubeRay RayJob; the operator must be there (1.7 or later)."""

    context: str | None = None
    """Context of kubectl; None takes the current one."""
    namespace: Label = "mpc-cxr"
    operator_namespace: Label = "kuberay-system"
    """Where the operator runs: the network policy lets it reach the head."""
    service_account: Label | None = None
    """Account of the pods, through which clouds grant a bucket without keys; None takes the namespace's default."""
    env_secrets: tuple[Label, ...] = ()
    """Secrets whose keys become environment variables of every Ray pod, such as AWS_ACCESS_KEY_ID."""
    pull_secrets: tuple[Label, ...] = ()
    """Secrets that open the image's registry."""
    token_secret: Label | None = None
    """Secret with Ray's token under the key `auth_token`; None lets the operator make one for each cluster."""
    head: HeadConfig = HeadConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    autoscaling: bool = True
    redis: RedisConfig | None = None
    """Fault tolerance of the head; None does without. A job then starts again with --resume, see `retries`."""
    network_policy: bool = True
    """Whether pods are reachable by each other and the operator alone, and may call out to `egress_ports` alone."""
    egress_ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = (443, 6443)
    """TCP ports outside the namespace that pods may call: object storage, and Kubernetes itself for the autoscaler."""
    retries: Annotated[int, Field(ge=0, le=20)] = 0
    """How often a failed job starts again, each time on a new cluster and with --resume; this machine must then reach
    --out when it submits, to see that nothing lies there yet."""
    max_hours: Positive | None = None
    """Hours after which the job is ended."""
    start_minutes: Positive = 60.0
    """Minutes within which the cluster must be there: images are pulled, nodes may have to be bought."""
    keep_minutes: NonNegative = 10.0
    """Minutes that the cluster stays after the job, for its logs."""


class MlflowConfig(Config):
    """The tracking server that `config manifests` writes: MLflow with PostgreSQL and a bucket."""

    artifacts: Annotated[str, Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]+(/\S*)?$")] = "s3://mpc-cxr/mlflow"
    """Where models and files go; clients need no key, the server hands them on."""
    hosts: tuple[Line, ...] = ()
    """More host names (with port) that clients call it by, such as an ingress; MLflow refuses unknown ones."""
    postgres: Image = "postgres:17.6-bookworm"
    storage_gib: Count = 20
    storage_class: str | None = None
    """Class of the database's volume; None takes the cluster's default."""
    database_secret: Label = "mlflow-database"
    """Secret with the database's password under the key `password`."""
    bucket_secret: Label | None = "mlflow-bucket"
    """Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, outside AWS, AWS_ENDPOINT_URL; None where a service
    account grants the bucket."""
