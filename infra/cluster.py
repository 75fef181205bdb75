"""Where a job runs: the section `cluster` of the settings. Secrets are named here, never held."""

from typing import Literal

from pydantic import model_validator

from infra.aws.config import AwsConfig
from infra.fields import Address, Image, Line, Variable
from infra.kuberay.config import KubeRayConfig, MlflowConfig
from infra.slurm.config import SlurmConfig
from mpc.config import Config


class RayConfig(Config):
    """A Ray cluster that runs already."""

    address: Address | None = None
    """Its dashboard, http(s)://HOST:8265, or HOST:PORT of its head; None takes RAY_ADDRESS."""
    ca_file: str | None = None
    """PEM file of the authority behind an https:// address; None takes the system's."""


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
