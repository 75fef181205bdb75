"""Reads HTML pages as tests need them: elements, words by section, cells of tables, pixels of images."""

import base64
import io
from collections.abc import Iterator
from html.parser import HTMLParser

import numpy as np
from PIL import Image


class Page(HTMLParser):
    """Elements, visible text by section, and cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: dict[str, str] = {}
        self._section, self._cell, self._silent = "head", False, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._section = dict(attrs).get("id") or self._section if tag == "section" else self._section
        self._silent = tag in ("style", "title") or (self._silent and tag not in ("body", "meta"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._silent = self._silent and tag not in ("style", "title")
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        self.words[self._section] = self.words.get(self._section, "") + data
        if self._cell:
            self.rows[-1][-1] += data.replace("\u200b", "").strip()

    def row(self, first: str) -> list[str]:
        """The first row that begins with `first`, but for the mark of few images."""
        return next(row for row in self.rows if row and row[0].removesuffix("*").strip() == first)

    def images(self) -> Iterator[dict[str, str | None]]:
        return (attributes for tag, attributes in self.tags if tag == "img")


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
