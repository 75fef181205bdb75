"""The fields of KubeRay 1.7 that we write, with the operator's own rules: what it would refuse is refused here.

Fields: the API reference of ray.io/v1 at v1.7.0. Rules: the operator's validation.go; each check names what it holds.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from packaging.version import Version
from pydantic import ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from mpc.config import Config

DNS_1035 = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
MAX_CLUSTER, MAX_JOB = 53, 47
"""Lengths of names: Kubernetes cuts at 63, and the operator appends to both."""
TOKEN_SINCE = Version("2.52.0")
SIZES = ("num-cpus", "num-gpus", "memory", "resources")
"""Parameters of `ray start` that say the same as a group's `resources`."""
Seconds = Annotated[int, Field(ge=1)]
Tree = dict[str, Any]


class Object(Config):
    """Snake case here, camel case in YAML; unknown fields are refused, as the API server does when it is asked to."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True)

    def tree(self) -> Tree:
        """As the API server reads it."""
        return self.model_dump(by_alias=True, exclude_none=True)


class Metadata(Object):
    """Name and labels."""

    name: Annotated[str, Field(pattern=DNS_1035, max_length=MAX_CLUSTER)]
    namespace: str
    labels: dict[str, str] = Field(default_factory=dict)


class AuthOptions(Object):
    """Ray's token: from a secret, or one that the operator makes."""

    mode: Literal["token", "disabled"]
    secret_name: str | None = None


class AutoscalerOptions(Object):
    """The autoscaler's container beside the head."""

    version: Literal["v1", "v2"]
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    idle_timeout_seconds: Annotated[int, Field(ge=0)] = 60
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    resources: Tree
    security_context: Tree
    env: list[Tree] = Field(default_factory=list)
    volume_mounts: list[Tree] = Field(default_factory=list)


class RedisCredential(Object):
    """A password by reference; the field for its value is left out on purpose."""

    value_from: Tree


class GcsFaultToleranceOptions(Object):
    """The head's state outside the head."""

    backend: Literal["redis"] = "redis"
    redis_address: str
    redis_password: RedisCredential | None = None
    external_storage_namespace: str | None = None


class Group(Object):
    """What head and workers have in common."""

    ray_start_params: dict[str, str]
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    template: Tree

    @model_validator(mode="after")
    def says_it_once(self) -> "Group":
        """validateRayGroupResources, validateRayGroupLabels, and at least one container."""
        if self.resources and any(self.ray_start_params.get(name) for name in SIZES):
            raise ValueError("resources stand in rayStartParams and in resources; keep one of them")
        if "labels" in self.ray_start_params:
            raise ValueError("labels do not belong into rayStartParams; use the group's own field")
        if not self.template.get("spec", {}).get("containers"):
            raise ValueError("a group needs at least one container")
        return self

    def variables(self) -> dict[str, Tree]:
        """Environment of the Ray container by name."""
        return {entry["name"]: entry for entry in self.template["spec"]["containers"][0].get("env", [])}

    @property
    def restarts(self) -> bool:
        """Whether Kubernetes would start a container of the pod again."""
        return bool(self.template["spec"].get("restartPolicy", "Never") != "Never")


class HeadGroup(Group):
    """The head."""

    service_type: Literal["ClusterIP"] = "ClusterIP"
    """Never a port of the node or of a load balancer."""


class WorkerGroup(Group):
    """Workers of one kind."""

    group_name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
    replicas: Annotated[int, Field(ge=0)]
    min_replicas: Annotated[int, Field(ge=0)]
    max_replicas: Annotated[int, Field(ge=0)]
    idle_timeout_seconds: Annotated[int, Field(ge=0)] | None = None
    num_of_hosts: Literal[1] = 1

    @model_validator(mode="after")
    def ordered(self) -> "WorkerGroup":
        """The operator refuses a group whose minimum exceeds its maximum."""
        if not self.min_replicas <= self.replicas <= self.max_replicas:
            raise ValueError(
                f"group {self.group_name}: minReplicas {self.min_replicas} <= replicas {self.replicas} <= "
                f"maxReplicas {self.max_replicas} does not hold; mend the order"
            )
        return self


class RayClusterSpec(Object):
    """A cluster."""

    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool
    autoscaler_options: AutoscalerOptions | None = None
    gcs_fault_tolerance_options: GcsFaultToleranceOptions | None = None
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]

    @model_validator(mode="after")
    def has_a_version_with_tokens(self) -> "RayClusterSpec":
        """Token mode exists since Ray 2.52."""
        if self.auth_options.mode == "token" and Version(self.ray_version) < TOKEN_SINCE:
            raise ValueError(f"rayVersion {self.ray_version} knows no token; use {TOKEN_SINCE} or later")
        return self

    @model_validator(mode="after")
    def scales_in_one_way(self) -> "RayClusterSpec":
        """The second autoscaler never meets a pod twice, is chosen in one place, and is on with its switch."""
        variable = self.head_group_spec.variables().get("RAY_enable_autoscaler_v2")
        if not self.enable_in_tree_autoscaling:
            if self.autoscaler_options is not None or variable is not None:
                raise ValueError("the autoscaler has options and is off; set enableInTreeAutoscaling")
            return self
        if self.autoscaler_options is None:
            raise ValueError("the autoscaler is on without options; name its version")
        if variable is not None:
            raise ValueError("RAY_enable_autoscaler_v2 is set beside autoscalerOptions.version; keep the latter")
        if self.autoscaler_options.version == "v2":
            _forbid_restarts([("the head", self.head_group_spec)])
            _forbid_restarts((f"group {group.group_name}", group) for group in self.worker_group_specs)
        if any(entry["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for entry in self.autoscaler_options.env):
            raise ValueError("autoscalerOptions.env sets KUBERAY_GEN_AUTOSCALER_START_CMD, which is the operator's")
        return self

    @model_validator(mode="after")
    def names_redis_in_one_place(self) -> "RayClusterSpec":
        """Redis is told to the operator, not to Ray behind its back."""
        for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"):
            if name in self.head_group_spec.variables():
                raise ValueError(f"{name} is set in the head; use gcsFaultToleranceOptions")
        for name in ("redis-password", "redis-username"):
            if name in self.head_group_spec.ray_start_params:
                raise ValueError(f"{name} is among rayStartParams; use gcsFaultToleranceOptions")
        return self

    @model_validator(mode="after")
    def tells_groups_apart(self) -> "RayClusterSpec":
        """Two groups of one name would be one."""
        names = [group.group_name for group in self.worker_group_specs]
        if len(set(names)) != len(names):
            raise ValueError(f"groups {', '.join(names)} share a name; rename one")
        return self


class RayCluster(Object):
    """A cluster that stays."""

    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayCluster"] = "RayCluster"
    metadata: Metadata
    spec: RayClusterSpec


class SubmitterConfig(Object):
    """How often the pod that submits is tried."""

    backoff_limit: Annotated[int, Field(ge=0)]


class RayJobSpec(Object):
    """A job with a cluster of its own, which goes with it."""

    entrypoint: Annotated[str, Field(min_length=1)]
    # in YAML the operator's capitals differ from the rule
    runtime_env_yaml: Annotated[str, Field(alias="runtimeEnvYAML")]
    job_id: str
    metadata: dict[str, str] = Field(default_factory=dict)
    submission_mode: Literal["K8sJobMode"] = "K8sJobMode"
    submitter_config: SubmitterConfig
    submitter_pod_template: Tree
    shutdown_after_job_finishes: Literal[True] = True
    """Without it neither `suspend` nor a time to live would be allowed."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)]
    backoff_limit: Annotated[int, Field(ge=0)] = 0
    active_deadline_seconds: Seconds | None = None
    pre_running_deadline_seconds: Seconds | None = None
    suspend: bool = False
    ray_cluster_spec: RayClusterSpec


class RayJob(Object):
    """A job."""

    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayJob"] = "RayJob"
    metadata: Metadata
    spec: RayJobSpec

    @model_validator(mode="after")
    def leaves_room_for_its_cluster(self) -> "RayJob":
        """The cluster's name is the job's and six characters."""
        if len(self.metadata.name) > MAX_JOB:
            raise ValueError(f"name {self.metadata.name} is longer than {MAX_JOB} characters; shorten it")
        return self


def _forbid_restarts(groups: Iterable[tuple[str, Group]]) -> None:
    """Refuses pods that restart: autoscaler v2 takes a restarted pod for another node."""
    for name, group in groups:
        if group.restarts:
            raise ValueError(f"restartPolicy of {name} must be Never with autoscaler v2")
