"""Where a job runs: the section `cluster` of the settings. Secrets are named here, never held."""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from mpc.config import Config, NonNegative, Positive

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
"""A DNS label: what Kubernetes takes as a name."""
SECRETS = re.compile(r"secret|token|passw|credential|private|_key$|key_id|session", re.IGNORECASE)
"""Names of environment variables that hold secrets."""


def no_credentials(address: str) -> str:
    """`address`, if it carries no user and no password."""
    if "@" in urlsplit(address if "://" in address else f"//{address}").netloc:
        raise ValueError("holds credentials, which would end up in files and logs; take them out of the address")
    return address


def pinned(image: str) -> str:
    """`image`, if it names one version: every node must run the same one."""
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        raise ValueError("names no version; end it with a tag other than latest, or with @sha256:DIGEST")
    return image


def public(name: str) -> str:
    """`name`, if an environment variable of that name may be shown to everybody who sees the job."""
    if SECRETS.search(name):
        raise ValueError(f"{name} holds a secret, and what is handed over is shown with the job; give it to the nodes")
    return name


Address = Annotated[str, Field(min_length=1), AfterValidator(no_credentials)]
Image = Annotated[str, Field(pattern=r"^[a-z0-9][\w.:/@-]*$"), AfterValidator(pinned)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(public)]
Line = Annotated[str, Field(pattern=r"^[^\n\r]+$")]


class RayConfig(Config):
    """A Ray cluster that runs already."""

    address: Address | None = None
    """Its dashboard, http(s)://HOST:8265, or HOST:PORT of its head; None takes RAY_ADDRESS."""
    ca_file: str | None = None
    """PEM file of the authority behind an https:// address; None takes the system's."""


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
    head: PodConfig = PodConfig(cpus=2, memory_gib=8.0)
    data: WorkerConfig = WorkerConfig(cpus=8, memory_gib=32.0, spot=True)
    """Workers without GPU: reading, decoding, augmenting."""
    train: WorkerConfig = WorkerConfig(
        cpus=8, memory_gib=32.0, gpus=1, max_workers=4, spot=True, tolerations=(Toleration(key="nvidia.com/gpu"),)
    )
    """Workers with GPUs: training."""
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


class InstanceConfig(Config):
    """A kind of AWS machine."""

    type: Annotated[str, Field(pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$")] = "m6i.2xlarge"
    disk_gib: Annotated[int, Field(ge=60)] = 150
    min_workers: Natural = 0
    max_workers: Count = 4
    spot: bool = False
    """Whether the machines are bought as spot: cheaper, and taken back at two minutes' notice."""


class AwsConfig(Config):
    """A cluster of Ray's own launcher on AWS (`ray up`)."""

    cluster_name: Label = "mpc-cxr"
    region: Annotated[str, Field(pattern=r"^[a-z]{2}(-[a-z]+)+-\d$")] = "eu-central-1"
    security_group: Annotated[str, Field(pattern=r"^sg-[0-9a-f]+$")] | None = None
    """Your own: SSH from your address, everything among its members, nothing else. One that Ray makes lets the whole
    internet try SSH."""
    ssh_user: str = "ubuntu"
    ami: Annotated[str, Field(pattern=r"^ami-[0-9a-f]+$")] | None = None
    """Machine image with Docker and, for GPUs, its driver; None takes the one that Ray knows for the region."""
    instance_profile: Annotated[str, Field(pattern=r"^arn:aws[\w-]*:iam::\d+:instance-profile/.+$")] | None = None
    """Role of the machines (ARN of an instance profile), which grants the bucket without keys."""
    head: InstanceConfig = InstanceConfig()
    data: InstanceConfig = InstanceConfig(type="c6i.4xlarge", spot=True)
    train: InstanceConfig = InstanceConfig(type="g5.2xlarge", spot=True)
    idle_minutes: Positive = 5.0
    """Minutes that a worker may be idle before it goes."""


class SlurmConfig(Config):
    """A batch job of Slurm that starts Ray on its nodes (`ray symmetric-run`)."""

    folder: str = "~/mpc-cxr-jobs"
    """Folder that this machine and all nodes share; every job gets one of its own there, with its log."""
    nodes: Count = 1
    cpus_per_node: Count = 8
    gpus_per_node: Natural = 0
    memory_gib: Positive = 32.0
    hours: Positive = 24.0
    partition: Line | None = None
    account: Line | None = None
    requeue: bool = False
    """Whether Slurm may start the job again after a node failed or was taken: it then goes on with --resume."""
    options: tuple[Line, ...] = ()
    """More options of sbatch, one each, such as --constraint=a100."""
    setup: tuple[Line, ...] = ()
    """Shell lines before the job on every node, such as `module load cuda` or `source /shared/venv/bin/activate`."""


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


class ClusterConfig(Config):
    """Where `submit` runs a verb."""

    kind: Literal["local", "ray", "kuberay", "aws", "slurm"] | None = None
    """`local` runs it here. None takes `ray` where cluster.ray.address or RAY_ADDRESS is set, else `local`."""
    auth: Literal["token", "disabled"] = "token"
    """Ray's own authentication, by the token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. `disabled`
    is for a cluster on this machine alone."""
    code: Literal["wheel", "image"] = "wheel"
    """How this project reaches the nodes, which have what it needs: as a wheel of what runs here, or in the image."""
    image: Image | None = None
    """Container image of the nodes (kuberay, aws); see infra/docker/Dockerfile."""
    python: Line = "python"
    """Interpreter on the nodes."""
    shared_paths: tuple[str, ...] = ()
    """Folders that all nodes see at the same place; other local paths are refused where there are several nodes."""
    pass_env: tuple[Variable, ...] = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
    """Environment variables that are handed over where they are set here; none may hold a secret."""
    ray: RayConfig = RayConfig()
    kuberay: KubeRayConfig = KubeRayConfig()
    aws: AwsConfig = AwsConfig()
    slurm: SlurmConfig = SlurmConfig()
    mlflow: MlflowConfig = MlflowConfig()

    @model_validator(mode="after")
    def is_complete(self) -> "ClusterConfig":
        """What a kind of cluster cannot do without."""
        if self.kind in ("kuberay", "aws") and self.image is None:
            raise ValueError(f"kind {self.kind} needs cluster.image, the container image of the nodes")
        if self.kind == "aws" and self.aws.security_group is None:
            raise ValueError("kind aws needs cluster.aws.security_group, which says who may reach the head by SSH")
        if self.auth == "disabled" and self.kind in ("kuberay", "aws", "slurm"):
            raise ValueError(f"auth disabled would open a {self.kind} cluster to its network; leave it at token")
        return self
