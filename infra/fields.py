"""Kinds of values that the sections about clusters share; none of them can hold a secret."""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
"""A DNS label: what Kubernetes takes as a name."""
SECRETS = re.compile(r"secret|token|passw|credential|private|_key$|key_id|session", re.IGNORECASE)
"""Names of environment variables that hold secrets."""


def no_credentials(address: str) -> str:
    """`address`, if it carries no user and no password."""
    if "@" in urlsplit(address if "://" in address else f"//{address}").netloc:
        raise ValueError("holds credentials, which would end up in files and logs; take them out of the address")
    return address


def pinned(image: str) -> str:
    """`image`, if it names one version: every node must run the same one."""
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        raise ValueError("names no version; end it with a tag other than latest, or with @sha256:DIGEST")
    return image


def public(name: str) -> str:
    """`name`, if an environment variable of that name may be shown to everybody who sees the job."""
    if SECRETS.search(name):
        raise ValueError(f"{name} holds a secret, and what is handed over is shown with the job; give it to the nodes")
    return name


Address = Annotated[str, Field(min_length=1), AfterValidator(no_credentials)]
Image = Annotated[str, Field(pattern=r"^[a-z0-9][\w.:/@-]*$"), AfterValidator(pinned)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(public)]
Line = Annotated[str, Field(pattern=r"^[^\n\r]+$")]
