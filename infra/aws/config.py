"""The settings of AWS machines."""

from typing import Annotated

from pydantic import Field

from infra.fields import Count, Label, Natural
from mpc.config import Config, Positive

InstanceType = Annotated[str, Field(pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$")]


class InstanceConfig(Config):
    """A kind of AWS machine."""

    type: InstanceType = "m6i.2xlarge"
    disk_gib: Annotated[int, Field(ge=60)] = 150
    min_workers: Natural = 0
    max_workers: Count = 4
    spot: bool = False
    """Whether the machines are bought as spot: cheaper, and taken back at two minutes' notice."""


class DataInstance(InstanceConfig):
    """Machines without GPU, for data."""

    type: InstanceType = "c6i.4xlarge"
    spot: bool = True


class TrainInstance(InstanceConfig):
    """Machines with a GPU, for training."""

    type: InstanceType = "g5.2xlarge"
    spot: bool = True


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
    data: DataInstance = DataInstance()
    train: TrainInstance = TrainInstance()
    idle_minutes: Positive = 5.0
    """Minutes that a worker may be idle before it goes."""
