"""Which tracking store the settings mean; MLflow is imported only when asked."""

from pathlib import Path

from infra.settings import Settings


def tracking_uri(settings: Settings, near: str | Path = ".") -> str:
    """The tracking store: `tracking.uri`, else MLFLOW_TRACKING_URI, else the nearest mlflow.db at or above `near`.

    Where there is none, it is the one that would be made in `near`.
    """
    from tuning.store import default_uri

    if settings.tracking.uri:
        return settings.tracking.uri
    start = str(near)
    if "://" not in start:
        places = (Path(start).resolve(), *Path(start).resolve().parents)
        start = str(next((place for place in places if (place / "mlflow.db").is_file()), start))
    return default_uri(start)
