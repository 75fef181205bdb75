"""Versions and commit, of this checkout."""

import re

from pipeline.versions import git_commit, versions


def test_versions_name_what_shapes_a_result() -> None:
    found = versions()
    assert {"python", "torch", "ray", "timm"} <= found.keys()
    assert all(found.values())


def test_the_commit_is_a_hash_that_admits_changes() -> None:
    commit = git_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(\+changed)?", commit)
