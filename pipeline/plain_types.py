"""Arrow schemas of files from outside: types that are values and nothing else."""

import pyarrow as pa

from mpc.errors import UserError

EXTENSION = b"ARROW:extension:name"


def refuse_extension_types(schema: pa.Schema, where: str) -> None:
    """Raises UserError on any type that is not plain Arrow, however deep it lies, before a value of it is read.

    Ray Data registers a type whose values are pickles: to read one as a Python object is to run it.
    """
    for field in schema:
        if not _is_plain(field):
            raise UserError(
                f"{where}: column {field.name} has extension type {field.type}; only plain types are read: text, "
                f"numbers, booleans and lists of them"
            )


def _is_plain(field: pa.Field) -> bool:
    """Whether neither a column nor what is nested in it has an extension type."""
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType) or EXTENSION in (field.metadata or {}):
        return False
    inner = [kind.field(index) for index in range(kind.num_fields)]
    if pa.types.is_dictionary(kind):
        inner.append(pa.field("", kind.value_type))
    return all(map(_is_plain, inner))
