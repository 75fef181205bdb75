"""Everything that an MLflow server was given, artifacts included, as bytes to search for what must not be there."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient


def column(data: Path | str, name: str) -> list[str]:
    """The values of a column of a prepared data set."""
    return sorted(
        {value for path in Path(data, "shards").rglob("*.parquet") for value in pq.read_table(path)[name].to_pylist()}
    )


def everything(uri: str) -> Iterator[tuple[str, bytes]]:
    """(what it is, its content): runs with their artifacts, models with their files, versions; archives are opened.

    Where a store keeps its own artifacts is not part of it.
    """
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments):
        inputs = [item.to_dictionary() for item in run.inputs.dataset_inputs]
        data = [run.info.run_name, run.info.user_id, run.data.params, run.data.tags, run.data.metrics, inputs]
        yield f"run {run.info.run_name}", json.dumps(data).encode()
        for item in client.list_artifacts(run.info.run_id):
            yield from files_below(f"runs:/{run.info.run_id}/{item.path}", uri)
    for model in client.search_logged_models(experiments):
        yield f"model {model.name}", json.dumps([model.tags, model.params]).encode()
        yield from files_below(str(model.artifact_location), uri)
    for version in client.search_model_versions():
        yield f"version {version.version}", json.dumps([version.tags, version.description, version.run_link]).encode()


def files_below(place: str, uri: str) -> Iterator[tuple[str, bytes]]:
    """Every file below an artifact's place."""
    with TemporaryDirectory() as folder:
        download_artifacts(artifact_uri=place, dst_path=folder, tracking_uri=uri)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                yield path.name, path.read_bytes()
                if path.suffix == ".whl":
                    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
                        for name in archive.namelist():
                            yield f"{path.name}/{name}", archive.read(name)


def leaks(uri: str, forbidden: list[str]) -> list[tuple[str, str]]:
    """(where, what) for each of `forbidden` that the server was given."""
    return [(where, text) for where, content in everything(uri) for text in forbidden if text.encode() in content]
