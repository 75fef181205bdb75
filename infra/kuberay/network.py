"""Who may talk to whom: a pod is reached by its own kind alone, and calls out where it must."""

from typing import Any

from infra.cluster import ClusterConfig
from infra.kuberay.pods import DASHBOARD, GCS

Tree = dict[str, Any]
DNS = {
    "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}],
    "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
}
INSTANCE = "app.kubernetes.io/instance"


def policy(name: str, namespace: str, selected: Tree, ingress: list[Tree], egress: list[Tree]) -> Tree:
    """A NetworkPolicy that lets through what it lists and nothing else."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "podSelector": selected,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }


def ray_policy(cluster: ClusterConfig, name: str) -> Tree:
    """Of the pods of one job or cluster: reached by themselves and the operator, calling the namespace and outside."""
    kube = cluster.kuberay
    own = {"matchLabels": {INSTANCE: name}}
    operator = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": kube.operator_namespace}}}
    ingress: list[Tree] = [
        {"from": [{"podSelector": own}]},
        {"from": [operator], "ports": [{"protocol": "TCP", "port": port} for port in (DASHBOARD, GCS)]},
    ]
    return policy(name, kube.namespace, own, ingress, [{"to": [{"podSelector": {}}]}, DNS, outside(cluster)])


def outside(cluster: ClusterConfig) -> Tree:
    """Ports of any address: object storage is known by name, and policies know none."""
    return {"ports": [{"protocol": "TCP", "port": port} for port in cluster.kuberay.egress_ports]}
