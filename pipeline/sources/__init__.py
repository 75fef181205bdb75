"""Collections of radiographs, each read into one source table."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mpc.errors import UserError
from pipeline import storage
from pipeline.manifest import STRATA, SourceTable, check_unique, keep_findings, source_schema
from pipeline.prepare_config import PrepareConfig
from pipeline.sources import chexpert, dicom_folder, mimic_cxr, nih, phantom, table, vindr
from pipeline.sources.tables import quarantine

PRIVATE = frozenset({"table", "dicom"})
"""Sources whose ids are a hospital's own; those of public collections are pseudonyms already."""
Roots = str | Sequence[str] | None
"""Where a collection lies: a folder or s3:// URI, several of them, or None for the synthetic source."""

_READERS: dict[str, Callable[[PrepareConfig, str], SourceTable]] = {
    "phantom": lambda config, _: phantom.source(config.phantom),
    "nih": lambda _, root: nih.source(root),
    "chexpert": lambda config, root: chexpert.source(
        root, views=config.views, official_test=config.official_test, by_hash=config.split.by == "hash"
    ),
    "mimic_cxr": lambda config, root: mimic_cxr.source(root, views=config.views, labeler=config.labeler),
    "vindr": lambda _, root: vindr.source(root),
    "table": lambda config, root: table.source(
        root, columns=config.table, findings=config.findings, views=config.views
    ),
    "dicom": lambda config, root: dicom_folder.source(
        root,
        table=config.table,
        dicom=config.dicom,
        findings=config.findings,
        views=config.views,
        strata=tuple(name for name in config.strata if name in dicom_folder.STRATA),
        task_cpus=config.task_cpus,
    ),
}
"""What lies in one root, by `prepare.source`."""


def open_source(config: PrepareConfig, roots: Roots) -> SourceTable:
    """Reads the collection that the configuration names, with the findings it asks for.

    Several roots are read one by one and put together in their order. An image id that an earlier root already has is
    left out and quarantined as `duplicate`.

    Args:
        config: `source` chooses the reader.
        roots: where the collection lies.

    Raises:
        UserError: no root where one is needed, a table without its columns, unknown findings, ids that repeat in a
            root, a root given twice.
    """
    places = [storage.absolute(root) for root in ([roots] if isinstance(roots, str) else roots or ())]
    if config.source == "phantom":
        if places:
            raise UserError(f"the phantom source draws its images and reads nothing from {places[0]}; leave --root out")
    elif not places:
        raise UserError(f"source {config.source} needs --root, the folder of the collection")
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise UserError(f"--root {twice} is given twice; name each folder once")
    sources = [_read(config, place) for place in places or [""]]
    if "collection" in config.strata and places:
        sources = [_from(source, name) for source, name in zip(sources, _names(places), strict=True)]
    return _together(sources)


def _read(config: PrepareConfig, root: str) -> SourceTable:
    """What lies in one root, with the findings that are asked for."""
    source = _conform(_READERS[config.source](config, root))
    return keep_findings(source, config.findings or source.default_findings or source.findings)


def _names(places: Sequence[str]) -> list[str]:
    """The last part of each root; numbered where two are the same."""
    names = [storage.name(place) for place in places]
    return [f"{number}: {name}" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def _from(source: SourceTable, root: str) -> SourceTable:
    """The source with the stratum `collection`."""
    return source.with_table(source.table.append_column("collection", pa.repeat(root, len(source.table))))


def _conform(source: SourceTable) -> SourceTable:
    """The table in exactly the schema of `source_schema`, ids verified."""
    strata = [name for name in STRATA if name in source.table.column_names]
    wanted: pa.Schema = source_schema(len(source.findings), strata)
    check_unique(source.table["image_id"])
    return source.with_table(source.table.select(wanted.names).cast(wanted))


def _together(sources: Sequence[SourceTable]) -> SourceTable:
    """One source of all roots; digests are numbered by root, strata that one table lacks are unknown there."""
    first = sources[0]
    if len(sources) == 1:
        return first
    if any(source.findings != first.findings for source in sources):
        raise UserError("the tables of the roots name different findings; give the same ones in each")
    table = pa.concat_tables([source.table for source in sources], promote_options="default").combine_chunks()
    ids = table["image_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    _, earliest, which = np.unique(ids, return_index=True, return_inverse=True)
    again = pa.array(earliest[which] < np.arange(len(ids)))
    shadows = table["uri"].combine_chunks().filter(again)
    kept = table["uri"].combine_chunks().take(pa.array(earliest[which])).filter(again)
    detail = pc.binary_join_element_wise("same image id as ", kept, "")
    return replace(
        first,
        table=table.filter(pc.invert(again)),
        digests={
            f"root-{number}/{name}": digest
            for number, source in enumerate(sources, 1)
            for name, digest in source.digests.items()
        },
        quarantine=pa.concat_tables(
            [*(source.quarantine for source in sources), quarantine(shadows, "duplicate", detail)]
        ),
    )
