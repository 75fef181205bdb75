"""RayCluster and RayJob from the settings."""

import base64
from importlib import metadata
from typing import Any

import yaml

from infra.cluster import ClusterConfig
from infra.kuberay import objects, pods
from infra.kuberay.config import WorkerConfig
from infra.kuberay.network import ray_policy
from infra.kuberay.objects import Metadata, RayCluster, RayClusterSpec, RayJob, RayJobSpec, WorkerGroup
from infra.kuberay.pods import SECURITY
from infra.submit.package import Job
from mpc.errors import UserError

Tree = dict[str, Any]
PACKAGE, MOUNT = "package.zip", "/job"
MAX_PACKAGE = 1_000_000
"""Bytes: Kubernetes keeps at most 1 MiB in a ConfigMap."""


def cluster_objects(cluster: ClusterConfig, name: str) -> list[Tree]:
    """A cluster that stays, with its network policy and its head's protection against evictions."""
    kube = cluster.kuberay
    made = RayCluster(metadata=_metadata(cluster, name), spec=cluster_spec(cluster, name))
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"{name}-head", "namespace": kube.namespace},
        "spec": {"maxUnavailable": 0, "selector": {"matchLabels": pods.labels(name, "head")}},
    }
    return [*([ray_policy(cluster, name)] if kube.network_policy else []), budget, made.tree()]


def job_objects(cluster: ClusterConfig, job: Job) -> list[Tree]:
    """A job with a cluster of its own, its package and its network policy.

    Raises:
        UserError: the package is larger than Kubernetes takes.
    """
    kube = cluster.kuberay
    if len(job.package) > MAX_PACKAGE:
        raise UserError(
            f"the package of {job.size()} does not fit into a ConfigMap of 1 MiB; build the code into the image and "
            f"set cluster.code=image"
        )
    package = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name, "namespace": kube.namespace, "labels": pods.labels(job.name, "package")},
        "immutable": True,
        "binaryData": {PACKAGE: base64.b64encode(job.package).decode()},
    }
    return [package, *([ray_policy(cluster, job.name)] if kube.network_policy else []), ray_job(cluster, job).tree()]


def ray_job(cluster: ClusterConfig, job: Job) -> RayJob:
    """The job alone."""
    kube = cluster.kuberay
    environment = {"working_dir": f"{MOUNT}/{PACKAGE}", "env_vars": dict(job.environment)}
    spec = RayJobSpec(
        entrypoint=job.entrypoint,
        runtime_env_yaml=yaml.safe_dump(environment, sort_keys=False),
        job_id=job.name,
        metadata=job.metadata,
        submitter_config=objects.SubmitterConfig(backoff_limit=2),
        submitter_pod_template=_submitter(cluster, job.name),
        ttl_seconds_after_finished=round(kube.keep_minutes * 60),
        backoff_limit=kube.retries,
        active_deadline_seconds=round(kube.max_hours * 3600) if kube.max_hours else None,
        pre_running_deadline_seconds=round(kube.start_minutes * 60),
        ray_cluster_spec=cluster_spec(cluster, job.name),
    )
    return RayJob(metadata=_metadata(cluster, job.name), spec=spec)


def cluster_spec(cluster: ClusterConfig, name: str) -> RayClusterSpec:
    """Head, CPU workers for data, GPU workers for training."""
    kube = cluster.kuberay
    head = pods.ray_pod(cluster, name, "head", kube.head)
    return RayClusterSpec(
        ray_version=metadata.version("ray"),  # both sides of a job must run the same
        auth_options=objects.AuthOptions(mode="token", secret_name=kube.token_secret),
        enable_in_tree_autoscaling=kube.autoscaling,
        autoscaler_options=_autoscaler() if kube.autoscaling else None,
        gcs_fault_tolerance_options=_redis(cluster, name),
        head_group_spec=objects.HeadGroup(ray_start_params=pods.ray_start(kube.head, head=True), template=head),
        worker_group_specs=[
            _workers(cluster, name, "data", kube.data),
            _workers(cluster, name, "train", kube.train),
        ],
    )


def as_yaml(found: list[Tree]) -> str:
    """Objects as one file of YAML documents."""
    return str(yaml.safe_dump_all(found, sort_keys=False, explicit_start=True))


def _metadata(cluster: ClusterConfig, name: str) -> Metadata:
    labels = pods.labels(name, "cluster")
    return Metadata(name=name, namespace=cluster.kuberay.namespace, labels=labels)


def _workers(cluster: ClusterConfig, name: str, group: str, config: WorkerConfig) -> WorkerGroup:
    """A group; without the autoscaler all of its workers are there at once."""
    autoscaling = cluster.kuberay.autoscaling
    replicas = config.min_workers if autoscaling else config.max_workers
    return WorkerGroup(
        group_name=group,
        replicas=replicas,
        min_replicas=config.min_workers if autoscaling else replicas,
        max_replicas=config.max_workers,
        idle_timeout_seconds=config.idle_seconds if autoscaling else None,
        ray_start_params=pods.ray_start(config, head=False),
        template=pods.ray_pod(cluster, name, "worker", config),
    )


def _autoscaler() -> objects.AutoscalerOptions:
    size = {"cpu": "500m", "memory": "1Gi"}
    return objects.AutoscalerOptions(
        version="v2",
        resources={"requests": dict(size), "limits": dict(size)},
        security_context=SECURITY,
        env=[{"name": "HOME", "value": "/tmp"}],
        volume_mounts=[{"name": pods.SCRATCH, "mountPath": "/tmp"}],
    )


def _redis(cluster: ClusterConfig, name: str) -> objects.GcsFaultToleranceOptions | None:
    redis = cluster.kuberay.redis
    if redis is None:
        return None
    password = None
    if redis.password_secret is not None:
        reference = {"secretKeyRef": {"name": redis.password_secret, "key": "password"}}
        password = objects.RedisCredential(value_from=reference)
    return objects.GcsFaultToleranceOptions(
        redis_address=redis.address, redis_password=password, external_storage_namespace=name
    )


def _submitter(cluster: ClusterConfig, name: str) -> Tree:
    """The pod that hands the package and the entry point to the cluster, and whose log is the job's."""
    size = {"cpu": "500m", "memory": "1Gi"}
    container = {
        "name": "ray-job-submitter",
        "image": cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": dict(size), "limits": dict(size)},
        "securityContext": SECURITY,
        "volumeMounts": [
            {"name": "package", "mountPath": MOUNT, "readOnly": True},
            {"name": pods.SCRATCH, "mountPath": "/tmp"},
        ],
    }
    volumes = [
        {"name": "package", "configMap": {"name": name}},
        {"name": pods.SCRATCH, "emptyDir": {"sizeLimit": "1Gi"}},
    ]
    spec: Tree = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": pods.pod_security(),
        "containers": [container],
        "volumes": volumes,
    }
    return {"metadata": {"labels": pods.labels(name, "submitter")}, "spec": spec | pods.account(cluster)}
