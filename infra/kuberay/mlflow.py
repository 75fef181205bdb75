"""The tracking server in Kubernetes: MLflow, its PostgreSQL, and who may reach them; passwords by reference."""

from typing import Any

from infra.cluster import ClusterConfig
from infra.kuberay import pods
from infra.kuberay.network import DNS, outside, policy
from infra.kuberay.pods import SECURITY

Tree = dict[str, Any]
SERVER, DATABASE = "mlflow", "mlflow-database"
PORT, DATABASE_PORT = 5000, 5432
POSTGRES = 999
"""User and group of the PostgreSQL image."""
DATA = "/var/lib/postgresql/data"


def mlflow_objects(cluster: ClusterConfig) -> list[Tree]:
    """Everything but the namespace and the secrets that it names."""
    return [
        _database(cluster),
        _service(cluster, DATABASE, DATABASE_PORT, headless=True),
        _server(cluster),
        _service(cluster, SERVER, PORT),
        *_policies(cluster),
    ]


def command(cluster: ClusterConfig) -> list[str]:
    """How the server is started; the password is in PGPASSWORD, never in an address."""
    hosts = ",".join([*host_names(cluster.kuberay.namespace), *cluster.mlflow.hosts])
    return [
        "mlflow", "server",
        "--host", "0.0.0.0",
        "--port", str(PORT),
        "--workers", "2",
        "--backend-store-uri", f"postgresql+psycopg2://mlflow@{DATABASE}:{DATABASE_PORT}/mlflow",
        "--serve-artifacts",
        "--artifacts-destination", cluster.mlflow.artifacts,
        "--allowed-hosts", hosts,
    ]  # fmt: skip


def host_names(namespace: str) -> list[str]:
    """What the service is called inside the cluster, and through `kubectl port-forward`."""
    names = [SERVER, f"{SERVER}.{namespace}", f"{SERVER}.{namespace}.svc", f"{SERVER}.{namespace}.svc.cluster.local"]
    return [f"{name}:{PORT}" for name in [*names, "localhost", "127.0.0.1"]]


def namespace(cluster: ClusterConfig) -> Tree:
    """The namespace, which refuses pods with more rights than ours ask for."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": cluster.kuberay.namespace, "labels": labels}}


def _server(cluster: ClusterConfig) -> Tree:
    """Stateless: everything lies in the database and the bucket."""
    asked = {"httpGet": {"path": "/health", "port": PORT}, "timeoutSeconds": 5, "periodSeconds": 10}
    size = {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "5Gi"}
    bucket = cluster.mlflow.bucket_secret
    container = {
        "name": SERVER,
        "image": cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "command": command(cluster),
        "ports": [{"name": "http", "containerPort": PORT}],
        "env": [
            {"name": "HOME", "value": "/tmp"},
            {"name": "MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "value": "false"},
            {"name": "PGPASSWORD", "valueFrom": {"secretKeyRef": _password(cluster)}},
        ],
        "envFrom": [{"secretRef": {"name": bucket}}] if bucket else [],
        "resources": {"requests": dict(size), "limits": dict(size)},
        "securityContext": SECURITY,
        "startupProbe": asked | {"failureThreshold": 30},
        "readinessProbe": asked | {"failureThreshold": 3},
        "livenessProbe": asked | {"failureThreshold": 6},
        "volumeMounts": [{"name": pods.SCRATCH, "mountPath": "/tmp"}],
    }
    spec: Tree = {
        "automountServiceAccountToken": cluster.kuberay.service_account is not None,
        "securityContext": pods.pod_security(),
        "containers": [container],
        "volumes": [{"name": pods.SCRATCH, "emptyDir": {"sizeLimit": "4Gi"}}],
    }
    body = {"replicas": 1, "strategy": {"type": "RollingUpdate"}}
    return _workload(cluster, "Deployment", SERVER, body, spec | pods.account(cluster))


def _database(cluster: ClusterConfig) -> Tree:
    """One PostgreSQL on a volume of its own."""
    ready = {"exec": {"command": ["pg_isready", "-U", "mlflow", "-d", "mlflow"]}, "timeoutSeconds": 5}
    size = {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "1Gi"}
    container = {
        "name": "postgres",
        "image": cluster.mlflow.postgres,
        "ports": [{"name": "postgres", "containerPort": DATABASE_PORT}],
        "env": [
            {"name": "POSTGRES_USER", "value": "mlflow"},
            {"name": "POSTGRES_DB", "value": "mlflow"},
            {"name": "POSTGRES_INITDB_ARGS", "value": "--auth-host=scram-sha-256"},
            {"name": "POSTGRES_PASSWORD", "valueFrom": {"secretKeyRef": _password(cluster)}},
            {"name": "PGDATA", "value": f"{DATA}/pgdata"},
        ],
        "resources": {"requests": dict(size), "limits": dict(size)},
        "securityContext": SECURITY,
        "startupProbe": ready | {"periodSeconds": 5, "failureThreshold": 60},
        "readinessProbe": ready | {"periodSeconds": 10},
        "livenessProbe": ready | {"periodSeconds": 20, "failureThreshold": 6},
        "volumeMounts": [
            {"name": "data", "mountPath": DATA},
            {"name": "run", "mountPath": "/var/run/postgresql"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    spec: Tree = {
        "automountServiceAccountToken": False,
        "securityContext": pods.pod_security() | {"runAsUser": POSTGRES, "runAsGroup": POSTGRES, "fsGroup": POSTGRES},
        "containers": [container],
        "volumes": [{"name": name, "emptyDir": {"sizeLimit": "256Mi"}} for name in ("run", "tmp")],
    }
    body = {"replicas": 1, "serviceName": DATABASE, "volumeClaimTemplates": [_claim(cluster)]}
    return _workload(cluster, "StatefulSet", DATABASE, body, spec)


def _claim(cluster: ClusterConfig) -> Tree:
    storage: Tree = {"accessModes": ["ReadWriteOnce"]}
    storage["resources"] = {"requests": {"storage": f"{cluster.mlflow.storage_gib}Gi"}}
    if cluster.mlflow.storage_class is not None:
        storage["storageClassName"] = cluster.mlflow.storage_class
    return {"metadata": {"name": "data"}, "spec": storage}


def _password(cluster: ClusterConfig) -> Tree:
    return {"name": cluster.mlflow.database_secret, "key": "password"}


def _workload(cluster: ClusterConfig, kind: str, name: str, body: Tree, spec: Tree) -> Tree:
    """A Deployment or StatefulSet of one kind of pod."""
    labels = pods.labels(name, name)
    template = {"metadata": {"labels": labels}, "spec": spec}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": cluster.kuberay.namespace, "labels": labels},
        "spec": body | {"selector": {"matchLabels": labels}, "template": template},
    }


def _service(cluster: ClusterConfig, name: str, port: int, *, headless: bool = False) -> Tree:
    spec: Tree = {"selector": pods.labels(name, name), "ports": [{"port": port, "targetPort": port}]}
    spec |= {"clusterIP": "None"} if headless else {"type": "ClusterIP"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": cluster.kuberay.namespace},
        "spec": spec,
    }


def _policies(cluster: ClusterConfig) -> list[Tree]:
    """The namespace may reach the server, the server its database; the database calls nobody."""
    space = cluster.kuberay.namespace
    server, database = ({"matchLabels": pods.labels(name, name)} for name in (SERVER, DATABASE))
    ports = [{"protocol": "TCP", "port": PORT}]
    database_ports = [{"protocol": "TCP", "port": DATABASE_PORT}]
    calls = [{"to": [{"podSelector": database}], "ports": database_ports}, DNS, outside(cluster)]
    return [
        policy(SERVER, space, server, [{"from": [{"podSelector": {}}], "ports": ports}], calls),
        policy(DATABASE, space, database, [{"from": [{"podSelector": server}], "ports": database_ports}], []),
    ]
