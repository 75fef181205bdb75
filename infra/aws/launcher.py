"""The file that `ray up` reads: a head, spot workers for data and training, and a token on every node."""

from typing import Any

import yaml

from infra.aws.config import InstanceConfig
from infra.cluster import ClusterConfig

Tree = dict[str, Any]
TOKEN = "~/.ray/auth_token"
"""Where Ray looks for its token, here and on every node; the launcher copies it over SSH."""
START = "ulimit -n 65536; RAY_AUTH_MODE=token ray start"


def launcher_file(cluster: ClusterConfig) -> Tree:
    """The launcher's configuration, whole but for Ray's own defaults."""
    aws = cluster.aws
    nodes = {
        "head": _node(cluster, aws.head, {"resources": {"CPU": 0}}),  # no task runs beside the cluster's state
        "data": _node(cluster, aws.data, _limits(aws.data)),
        "train": _node(cluster, aws.train, _limits(aws.train)),
    }
    return {
        "cluster_name": aws.cluster_name,
        "max_workers": aws.data.max_workers + aws.train.max_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": aws.idle_minutes,
        "docker": {"image": cluster.image, "container_name": "mpc-cxr", "pull_before_run": True},
        "provider": {"type": "aws", "region": aws.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": aws.ssh_user},
        "available_node_types": nodes,
        "head_node_type": "head",
        "file_mounts": {TOKEN: TOKEN},
        "head_start_ray_commands": [
            "ray stop",
            # the dashboard, through which jobs come, answers to the head itself: it is reached through SSH
            f"{START} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{START} --address=$RAY_HEAD_IP:6379"],
    }


def as_yaml(cluster: ClusterConfig) -> str:
    """The file's text."""
    return str(yaml.safe_dump(launcher_file(cluster), sort_keys=False))


def _limits(instance: InstanceConfig) -> Tree:
    # Ray asks AWS what the machine has
    return {"resources": {}, "min_workers": instance.min_workers, "max_workers": instance.max_workers}


def _node(cluster: ClusterConfig, instance: InstanceConfig, more: Tree) -> Tree:
    """One kind of machine."""
    disk = {"VolumeSize": instance.disk_gib, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    config: Tree = {
        "InstanceType": instance.type,
        "SecurityGroupIds": [cluster.aws.security_group],
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if cluster.aws.ami is not None:
        config["ImageId"] = cluster.aws.ami
    if cluster.aws.instance_profile is not None:
        config["IamInstanceProfile"] = {"Arn": cluster.aws.instance_profile}
    if instance.spot:
        config["InstanceMarketOptions"] = {"MarketType": "spot"}
    return more | {"node_config": config}
