"""What uncertain and blank entries mean: from a source's label codes to labels in {0, 1} with a mask."""

from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from mpc.errors import UserError
from pipeline.manifest import (
    BLANK,
    NEGATIVE,
    POSITIVE,
    STRATA,
    UNCERTAIN,
    SourceTable,
    list_column,
    matrix,
    schema,
)
from pipeline.prepare_config import PolicyConfig


@dataclass(frozen=True)
class LabelCodes:
    """How often each raw code occurs for one finding."""

    positive: int
    negative: int
    uncertain: int
    blank: int

    def as_dict(self) -> dict[str, int]:
        """Plain integers by name."""
        return asdict(self)


def apply(source: SourceTable, policy: PolicyConfig) -> tuple[pa.Table, dict[str, LabelCodes]]:
    """Resolves every label code and adds the mask `known`.

    `zeros` and `ones` make an entry known with that value; `ignore` makes it unknown, stored as label 0. A finding
    follows its own meanings where the policy names it.

    Returns:
        The table in the manifest's schema (its `split` may still be null) and the raw codes of each finding.

    Raises:
        UserError: the policy names a finding that is not there.
        ValueError: the source yields a code outside {1, 0, -1, -2} (a defect of the source, not of the user).
    """
    unknown = [name for name in policy.findings if name not in source.findings]
    if unknown:
        raise UserError(
            f"prepare.policy.findings names {unknown[0]!r}, which is not among the findings; "
            f"choose from {', '.join(source.findings)}"
        )
    codes = matrix(source.table["labels"])
    if not np.isin(codes, (POSITIVE, NEGATIVE, UNCERTAIN, BLANK)).all():
        raise ValueError(f"source {source.name} yields label codes {np.unique(codes)}")
    labels = (codes == POSITIVE).astype(np.int8)
    known = np.ones(codes.shape, dtype=np.bool_)
    for code, meanings in zip((UNCERTAIN, BLANK), zip(*map(policy.of, source.findings), strict=True), strict=True):
        ones, ignored = (np.array([meaning == name for meaning in meanings]) for name in ("ones", "ignore"))
        labels[(codes == code) & ones] = 1
        known[(codes == code) & ignored] = False
    strata = [name for name in STRATA if name in source.table.column_names]
    columns = {name: source.table[name] for name in source.table.column_names}
    columns |= {"labels": list_column(labels), "known": list_column(known)}
    target = schema(len(source.findings), strata)
    target = target.set(target.get_field_index("split"), pa.field("split", pa.string()))
    return pa.table([columns[name] for name in target.names], schema=target), _count(source.findings, codes)


def _count(findings: tuple[str, ...], codes: np.ndarray) -> dict[str, LabelCodes]:
    """Raw codes of each finding, before any policy."""
    order = (POSITIVE, NEGATIVE, UNCERTAIN, BLANK)
    counts = np.stack([(codes == code).sum(axis=0) for code in order], axis=1)
    return {finding: LabelCodes(*map(int, row)) for finding, row in zip(findings, counts, strict=True)}
