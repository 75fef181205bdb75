"""What clusters are made of: valid by Kubernetes' schemas, the operator's rules, Ray's own launcher, linters."""

import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from infra.aws.launcher import as_yaml as launcher_yaml
from infra.aws.launcher import launcher_file
from infra.cluster import ClusterConfig
from infra.kuberay.mlflow import mlflow_objects, namespace
from infra.kuberay.objects import RayCluster, RayJob
from infra.kuberay.render import as_yaml, cluster_objects, job_objects, ray_job
from infra.settings import load
from infra.slurm.script import batch_script
from infra.submit.package import Job, pack
from mpc.errors import UserError

INFRA = Path(__file__).resolve().parents[1] / "infra"
TOOLS = Path(sys.executable).parent
KUBERNETES = ("1.31", "1.35")
IMAGE = "cluster.image=registry.example.com/mpc-cxr:0.1.0-cuda"
KUBERAY = ["cluster.kind=kuberay", IMAGE]
AWS = ["cluster.kind=aws", IMAGE, "cluster.aws.security_group=sg-0123456789abcdef0"]
EVERYTHING = [
    "cluster.kuberay.redis={address: 'redis:6379', password_secret: redis}",
    "cluster.kuberay.service_account=trainer",
    "cluster.kuberay.env_secrets=[bucket]",
    "cluster.kuberay.pull_secrets=[registry]",
    "cluster.kuberay.token_secret=ray-token",
    "cluster.kuberay.max_hours=12",
    "cluster.kuberay.retries=3",
    "cluster.kuberay.train.node_selector={gpu: a100}",
    "cluster.mlflow.storage_class=fast",
    "cluster.mlflow.bucket_secret=null",
]
SETTINGS = {
    "plain": KUBERAY,
    "everything": [*KUBERAY, *EVERYTHING],
    "fixed": [*KUBERAY, "cluster.kuberay.autoscaling=false", "cluster.kuberay.network_policy=false"],
}


def cluster(overrides: list[str]) -> ClusterConfig:
    return load(None, overrides).cluster


def job(name: str = "mpc-train-example", size: int = 0) -> Job:
    package = pack({"job/arguments.json": "[]"}, None) + b"x" * size
    return Job(name, "train", package, 0, "python -m infra.submit.run", {"AWS_REGION": "eu-central-1"})


def everything(overrides: list[str]) -> list[dict[str, Any]]:
    """Every object that the settings can lead to, as the API server would read it."""
    found = cluster(overrides)
    made = [namespace(found), *mlflow_objects(found), *cluster_objects(found, "mpc-cxr"), *job_objects(found, job())]
    return [dict(item) for item in yaml.safe_load_all(as_yaml(made))]


def pods(items: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template, however deep, with where it was found."""

    def inside(tree: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(tree, dict):
            if "containers" in tree.get("spec", {}):
                yield where, tree
            for name, part in tree.items():
                yield from inside(part, f"{where}.{name}")
        elif isinstance(tree, list):
            for number, part in enumerate(tree):
                yield from inside(part, f"{where}[{number}]")

    for item in items:
        yield from inside(item, item["kind"])


@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_core_objects_and_every_pod_are_valid(overrides: list[str], version: str) -> None:
    items = everything(overrides)
    core = [item for item in items if item["apiVersion"] != "ray.io/v1"]
    templates = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **pod["metadata"]}, "spec": pod["spec"]}
        for _, pod in pods(items)
    ]
    assert len(core) >= 9
    assert len(templates) == 2 + 3 + 4, "MLflow's two, a cluster's three, a job's three and its submitter"
    for item in [*core, *templates]:
        kubernetes_validate.validate(item, version, strict=True)


def test_the_schemas_refuse_what_kubernetes_does_not_know() -> None:
    items = everything(KUBERAY)
    items[0]["spec"] = {"finaliser": []}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(items[0], KUBERNETES[0], strict=True)


@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
def test_no_container_has_more_rights_than_it_needs(overrides: list[str]) -> None:
    for where, pod in pods(everything(overrides)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["runAsUser"] > 0, where
        for container in spec["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True, where
            assert rights["allowPrivilegeEscalation"] is False, where
            assert rights["capabilities"] == {"drop": ["ALL"]}, where
            assert container["resources"]["limits"]["memory"], where
            writable = {volume["name"] for volume in spec["volumes"] if "emptyDir" in volume} | {"data"}
            mounts = container["volumeMounts"]
            assert all(mount["name"] in writable or mount.get("readOnly") for mount in mounts), where
            assert "/tmp" in {mount["mountPath"] for mount in mounts}, where
    head = next(pod for where, pod in pods(everything(overrides)) if "headGroupSpec" in where)
    assert {"/tmp", "/tmp/ray", "/dev/shm"} == {m["mountPath"] for m in head["spec"]["containers"][0]["volumeMounts"]}


@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
def test_secrets_are_named_and_never_held(overrides: list[str]) -> None:
    for where, pod in pods(everything(overrides)):
        for container in pod["spec"]["containers"]:
            for entry in container.get("env", []):
                assert ("PASS" in entry["name"]) == ("valueFrom" in entry), f"{where}: {entry['name']}"
    assert "kind: Secret\n" not in as_yaml(everything(overrides))


def test_a_job_has_what_the_operator_wants() -> None:
    made = ray_job(cluster([*KUBERAY, *EVERYTHING]), job()).tree()
    spec, ray = made["spec"], made["spec"]["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (3, 43200, 600)
    assert yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"] == "/job/package.zip"
    assert ray["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert ray["autoscalerOptions"]["version"] == "v2"
    assert ray["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert ray["gcsFaultToleranceOptions"]["redisPassword"] == {
        "valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}
    }
    data, train = ray["workerGroupSpecs"]
    assert (data["groupName"], train["groupName"]) == ("data", "train")
    assert train["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in data["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert {"key": "cloud.google.com/gke-spot", "operator": "Exists"} in train["template"]["spec"]["tolerations"]
    # 0.3 of 32 GiB; /dev/shm is a fifth larger
    assert train["rayStartParams"] == {"object-store-memory": str(int(0.3 * 32 * 2**30))}
    shared = next(v for v in train["template"]["spec"]["volumes"] if v["name"] == "shared-mem")
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "11796Mi"}


FIELDS = {  # docs/reference/api.md of KubeRay v1.7.0
    "RayJob.spec": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector "
    "submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources "
    "entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished preRunningDeadlineSeconds shutdownAfterJobFinishes "
    "suspend",
    "RayJob.spec.rayClusterSpec": "upgradeStrategy authOptions suspend managedBy autoscalerOptions "
    "headServiceAnnotations enableInTreeAutoscaling gcsFaultToleranceOptions historyServerOptions networkPolicy "
    "tlsOptions headGroupSpec rayVersion workerGroupSpecs",
    "RayJob.spec.rayClusterSpec.authOptions": "enableK8sTokenAuth secretName mode",
    "RayJob.spec.rayClusterSpec.autoscalerOptions": "resources image imagePullPolicy securityContext "
    "idleTimeoutSeconds upscalingMode version env envFrom volumeMounts command args",
    "RayJob.spec.rayClusterSpec.gcsFaultToleranceOptions": "backend redisUsername redisPassword "
    "externalStorageNamespace redisAddress storage",
    "RayJob.spec.rayClusterSpec.headGroupSpec": "template headService enableIngress ingressOptions resources labels "
    "rayStartParams serviceType",
    "RayJob.spec.rayClusterSpec.workerGroupSpecs.0": "suspend groupName replicas minReplicas maxReplicas "
    "idleTimeoutSeconds priority resources labels rayStartParams template scaleStrategy numOfHosts",
    "RayJob.spec.submitterConfig": "backoffLimit",
}


@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
def test_every_field_is_in_the_operators_reference(overrides: list[str]) -> None:
    made = {"RayJob": ray_job(cluster(overrides), job()).tree()}
    for path, names in FIELDS.items():
        tree: Any = made
        for part in path.split("."):
            tree = tree[int(part)] if part.isdigit() else tree.get(part, {})
        assert set(tree) <= set(names.split()), path


def changed(path: str, value: Any, overrides: list[str] = KUBERAY) -> dict[str, Any]:
    """A good RayJob with one value replaced, or, for a value of None, taken out."""
    made = deepcopy(ray_job(cluster(overrides), job()).tree())
    *parents, last = path.split(".")
    tree: Any = made
    for part in parents:
        tree = tree[int(part)] if part.isdigit() else tree[part]
    if value is None:
        del tree[last]
    else:
        tree[last] = value
    return made


RAY = "spec.rayClusterSpec"
HEAD = f"{RAY}.headGroupSpec"
WORKERS = f"{RAY}.workerGroupSpecs"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("metadata.name", "a" * 48, "longer than 47 characters"),
        ("metadata.name", "1-job", "pattern"),
        ("spec.entryPoint", "python x.py", "spec.entryPoint\n  Extra inputs are not permitted"),
        (f"{WORKERS}.0.minReplica", 1, "minReplica\n  Extra inputs"),
        (f"{WORKERS}.0.minReplicas", 9, "does not hold"),
        (f"{WORKERS}.0.groupName", "train", "share a name"),
        (f"{WORKERS}.1.template.spec.restartPolicy", "Always", "group train must be Never with autoscaler v2"),
        (f"{HEAD}.template.spec.restartPolicy", "OnFailure", "the head must be Never"),
        (f"{HEAD}.template.spec.containers", [], "at least one container"),
        (f"{HEAD}.resources", {"CPU": "1"}, "in rayStartParams and in resources"),
        (f"{HEAD}.rayStartParams.labels", "a=b", "do not belong into rayStartParams"),
        (f"{HEAD}.rayStartParams.redis-password", "x", "use gcsFaultToleranceOptions"),
        (f"{HEAD}.template.spec.containers.0.env", [{"name": "RAY_REDIS_ADDRESS", "value": "r:1"}], "gcsFaultTol"),
        (
            f"{HEAD}.template.spec.containers.0.env",
            [{"name": "RAY_enable_autoscaler_v2", "value": "1"}],
            "beside autoscalerOptions.version",
        ),
        (f"{HEAD}.serviceType", "LoadBalancer", "ClusterIP"),
        (f"{RAY}.rayVersion", "2.51.0", "knows no token"),
        (f"{RAY}.enableInTreeAutoscaling", False, "has options and is off"),
        (f"{RAY}.autoscalerOptions", None, "on without options"),
        (f"{RAY}.autoscalerOptions.version", "v3", "'v1' or 'v2'"),
        (f"{RAY}.autoscalerOptions.idleTimeoutSeconds", -1, "greater than or equal to 0"),
        (f"{RAY}.autoscalerOptions.env", [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": ""}], "operator's"),
        (f"{RAY}.authOptions.mode", "none", "'token' or 'disabled'"),
        ("spec.shutdownAfterJobFinishes", False, "Input should be True"),
        ("spec.preRunningDeadlineSeconds", 0, "greater than or equal to 1"),
        ("spec.backoffLimit", -1, "greater than or equal to 0"),
    ],
)
def test_what_the_operator_refuses_is_refused_here(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RayJob.model_validate(changed(path, value))


@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
def test_what_is_written_reads_back(overrides: list[str]) -> None:
    for item in everything(overrides):
        if item["kind"] in ("RayJob", "RayCluster"):
            model = RayJob if item["kind"] == "RayJob" else RayCluster
            assert model.model_validate(item).tree() == item


def test_a_package_that_kubernetes_cannot_take_is_refused() -> None:
    with pytest.raises(UserError, match=r"ConfigMap of 1 MiB.*cluster\.code=image"):
        job_objects(cluster(KUBERAY), job(size=1_000_000))


def test_rays_own_launcher_takes_the_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    made = launcher_file(cluster(AWS))
    prepared = prepare_config(deepcopy(made))
    validate_config(prepared)
    assert prepared["max_workers"] == 8
    assert made["available_node_types"]["train"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in made["available_node_types"]["head"]["node_config"]
    with pytest.raises(Exception, match="Additional properties"):
        validate_config(prepare_config(made | {"head_type": "x"}))


SLURM = ["cluster.kind=slurm", "cluster.slurm.nodes=2", "cluster.slurm.gpus_per_node=4", "cluster.slurm.partition=gpu"]


def script(overrides: list[str] = SLURM) -> str:
    found = cluster(overrides)
    return batch_script(found.slurm, job(), "/shared/jobs/mpc-train-example", found.python)


def test_the_batch_script_is_sound(tmp_path: Path) -> None:
    more = ["cluster.slurm.setup=['module load cuda/12']", "cluster.slurm.options=['--constraint=a100']"]
    file = tmp_path / "job.sh"
    file.write_text(script([*SLURM, *more]))
    subprocess.run(["bash", "-n", file], check=True)
    done = subprocess.run([TOOLS / "shellcheck", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    directives = [line for line in file.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --gpus-per-node=4" in directives
    assert "#SBATCH --constraint=a100" in directives
    assert file.read_text().splitlines().index("module load cuda/12") > len(directives)


EXAMPLES = {
    "kuberay/manifests.yaml": lambda: as_yaml(everything(KUBERAY)[: -len(job_objects(cluster(KUBERAY), job()))]),
    "kuberay/rayjob.yaml": lambda: as_yaml([ray_job(cluster(KUBERAY), job()).tree()]),
    "aws/cluster.yaml": lambda: launcher_yaml(cluster(AWS)),
    "slurm/job.sh": script,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_the_settings_give(name: str) -> None:
    text, rendered = (INFRA / name).read_text(), EXAMPLES[name]()
    assert text.endswith(rendered)
    assert all(line.startswith("#") for line in text.removesuffix(rendered).splitlines()), "a command, nothing else"


def test_the_images_recipe_is_sound() -> None:
    recipe = INFRA / "docker" / "Dockerfile"
    done = subprocess.run([TOOLS / "hadolint", recipe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = recipe.read_text().splitlines()
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 1000:1000"]
    assert lines.index(users[0]) > max(n for n, line in enumerate(lines) if line.startswith(("RUN", "COPY")))


def test_secrets_are_drawn_once_and_for_one_reader(tmp_path: Path) -> None:
    recipe = INFRA / "docker" / "make-secrets"
    assert subprocess.run([TOOLS / "shellcheck", recipe], check=False).returncode == 0
    folder = tmp_path / "secrets"
    subprocess.run([recipe, folder], check=True)
    files = {file.name: file.read_text() for file in folder.iterdir()}
    assert set(files) == {"ray.env", "bucket.env", "database.env", "mlflow.env"}
    assert all(file.stat().st_mode & 0o077 == 0 for file in [folder, *folder.iterdir()])
    assert files["database.env"].partition("=")[2] == files["mlflow.env"].partition("=")[2]
    assert len(files["ray.env"].partition("=")[2].strip()) == 64
    again = subprocess.run([recipe, folder], capture_output=True, text=True, check=False)
    assert again.returncode == 2, "secrets in use are never overwritten"
    assert {file.name: file.read_text() for file in folder.iterdir()} == files


def test_one_machines_services_are_open_to_that_machine_alone() -> None:
    compose = yaml.safe_load((INFRA / "docker" / "compose.yaml").read_text())
    assert set(compose["services"]) == {"ray", "mlflow", "database", "s3"}
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert not service["image"].endswith((":latest", "}")) or ":-" in service["image"], name
        assert not [
            key for key in service.get("environment", {}) if "PASS" in key or "SECRET" in key or "TOKEN" in key
        ], name
        assert service["healthcheck"]["test"], name
    assert compose["services"]["ray"]["environment"]["RAY_AUTH_MODE"] == "token"
