"""Collections of radiographs, each read into one source table."""

import pyarrow as pa

from mpc.errors import UserError
from pipeline import storage
from pipeline.config import PrepareConfig
from pipeline.manifest import STRATA, SourceTable, check_unique, keep_findings, source_schema


def open_source(config: PrepareConfig, root: str | None) -> SourceTable:
    """Reads the collection that the configuration names, with the findings it asks for.

    Args:
        config: `source` chooses the reader.
        root: folder or s3:// URI of the collection; none for the synthetic source.

    Raises:
        UserError: no root where one is needed, a table without its columns, unknown findings, ids that repeat.
    """
    if config.source == "phantom":
        from pipeline.sources import phantom

        if root is not None:
            raise UserError(f"the phantom source draws its images and reads nothing from {root}; leave --root out")
        source = phantom.source(config.phantom)
    else:
        from pipeline.sources import nih

        if root is None:
            raise UserError(f"source {config.source} needs --root, the folder of the collection")
        source = nih.source(storage.absolute(root))
    if config.findings is None:
        config = config.model_copy(update={"findings": source.default_findings or source.findings})
    return keep_findings(_conform(source), config.findings)


def _conform(source: SourceTable) -> SourceTable:
    """The table in exactly the schema of `source_schema`, ids verified."""
    strata = [name for name in STRATA if name in source.table.column_names]
    wanted: pa.Schema = source_schema(len(source.findings), strata)
    check_unique(source.table["image_id"])
    return source.with_table(source.table.select(wanted.names).cast(wanted))
