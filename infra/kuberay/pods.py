"""Pods of a Ray cluster: sizes, probes, and no more rights than a training run needs."""

from typing import Any

from infra.cluster import ClusterConfig
from infra.kuberay.config import SPOT, PodConfig

Tree = dict[str, Any]
USER = 1000
"""User and group of the image; see infra/docker/Dockerfile."""
GIB = 2**30
RAY, SHARED_MEMORY, SCRATCH = "ray-logs", "shared-mem", "scratch"
"""Volumes; the first two under the names that the operator gives its own, which it then leaves out."""
SHARED_MEMORY_SHARE = 1.2
"""/dev/shm in sizes of the object store: torch's own processes exchange batches there too."""
DASHBOARD, AGENT, GCS = 8265, 52365, 6379
HEALTH = {"head": ("/api/gcs_healthz", DASHBOARD), "worker": ("/api/local_raylet_healthz", AGENT)}
"""Ray answers these without a token."""
SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""Of every container: the restricted standard of pod security, and a file system that nobody writes."""


def ray_pod(cluster: ClusterConfig, name: str, role: str, pod: PodConfig) -> Tree:
    """The pod template of a head or a worker.

    Args:
        cluster: image, secrets, accounts.
        name: of the job or cluster, by which network policies find the pod.
        role: `head` or `worker`.
        pod: its size and where it may run.
    """
    kube = cluster.kuberay
    spec: Tree = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,  # spot nodes leave two minutes at best
        "securityContext": pod_security(),
        "containers": [_container(cluster, role, pod)],
        "volumes": _volumes(pod),
        "nodeSelector": dict(pod.node_selector),
        "tolerations": tolerations(pod),
    }
    spec |= account(cluster)
    if role == "worker":
        spec["automountServiceAccountToken"] = kube.service_account is not None
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"} if role == "head" else {}
    return {"metadata": {"labels": labels(name, role), "annotations": annotations}, "spec": spec}


def labels(name: str, role: str) -> dict[str, str]:
    """Labels of a pod that belongs to the job or cluster `name`."""
    return {
        "app.kubernetes.io/name": "mpc-cxr",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": role,
    }


def account(cluster: ClusterConfig) -> Tree:
    """Whom a pod runs as towards Kubernetes and the image's registry."""
    kube = cluster.kuberay
    found: Tree = {"imagePullSecrets": [{"name": name} for name in kube.pull_secrets]}
    return found | ({"serviceAccountName": kube.service_account} if kube.service_account else {})


def pod_security() -> Tree:
    """The user of all containers, who also owns the volumes."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def tolerations(pod: PodConfig) -> list[Tree]:
    """Taints in spite of which the pod may run."""
    wanted = [*pod.tolerations, *(SPOT if pod.spot else ())]
    return [toleration.model_dump(exclude_none=True) for toleration in wanted]


def ray_start(pod: PodConfig, head: bool) -> dict[str, str]:
    """Parameters of `ray start`; CPUs, memory and GPUs follow from the container's limits."""
    parameters = {"object-store-memory": str(int(pod.object_store * pod.memory_gib * GIB))}
    if not head:
        return parameters
    # no task runs beside the state of the cluster; the network policy, not the address, guards the dashboard
    return parameters | {"num-cpus": "0", "dashboard-host": "0.0.0.0"}


def scratch_mounts() -> list[Tree]:
    """What stays writable."""
    return [
        {"name": SCRATCH, "mountPath": "/tmp"},
        {"name": RAY, "mountPath": "/tmp/ray"},
        {"name": SHARED_MEMORY, "mountPath": "/dev/shm"},
    ]


def _container(cluster: ClusterConfig, role: str, pod: PodConfig) -> Tree:
    kube = cluster.kuberay
    found: Tree = {
        "name": f"ray-{role}",
        "image": cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "HOME", "value": "/tmp"}],
        "envFrom": [{"secretRef": {"name": name}} for name in kube.env_secrets],
        "resources": _resources(pod),
        "securityContext": SECURITY,
        "volumeMounts": scratch_mounts(),
        **_probes(*HEALTH[role]),
    }
    if role == "head":
        ports = {"gcs-server": GCS, "dashboard": DASHBOARD, "client": 10001, "metrics": 8080}
        found["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    return found


def _resources(pod: PodConfig) -> Tree:
    """Requests that equal the limits: the kind of pod that Kubernetes evicts last."""
    sizes = {
        "cpu": str(pod.cpus),
        "memory": f"{pod.memory_gib:g}Gi",
        "ephemeral-storage": f"{pod.scratch_gib:g}Gi",
    }
    sizes |= {pod.gpu_resource: str(pod.gpus)} if pod.gpus else {}
    return {"requests": dict(sizes), "limits": dict(sizes)}


def _probes(path: str, port: int) -> Tree:
    """Five minutes to start, then half a minute without an answer before the pod is replaced."""
    asked = {"httpGet": {"path": path, "port": port}, "timeoutSeconds": 5}
    return {
        "startupProbe": asked | {"periodSeconds": 5, "failureThreshold": 60},
        "readinessProbe": asked | {"periodSeconds": 10, "failureThreshold": 3},
        "livenessProbe": asked | {"periodSeconds": 10, "failureThreshold": 12},
    }


def _volumes(pod: PodConfig) -> list[Tree]:
    """Scratch space on the node, and /dev/shm, which counts as the container's memory."""
    shared = pod.object_store * SHARED_MEMORY_SHARE * pod.memory_gib
    half = f"{pod.scratch_gib / 2:g}Gi"
    return [
        {"name": SCRATCH, "emptyDir": {"sizeLimit": half}},
        {"name": RAY, "emptyDir": {"sizeLimit": half}},
        {"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared * 1024:.0f}Mi"}},
    ]
