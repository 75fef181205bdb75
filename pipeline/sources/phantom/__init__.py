"""Synthetic chest radiographs: any number of images, each a pure function of (seed, index, profile, size).

Nothing here shows a person: anatomy and findings are drawn from formulas, so scores on these images say something about
methods and software, nothing about patients. Parameters and their digest are in `parameters`.
"""

from pipeline.sources.phantom.labels import FINDINGS, Profile, labels, patient, view
from pipeline.sources.phantom.parameters import PHANTOM_VERSION, digest
from pipeline.sources.phantom.picture import Case, case_of, draw, render, render_with_signs
from pipeline.sources.phantom.table import image_id, parse_uri, render_uri, signs_of, source, uri

__all__ = [
    "FINDINGS", "PHANTOM_VERSION", "Case", "Profile", "case_of", "digest", "draw", "image_id", "labels", "parse_uri",
    "patient", "render", "render_uri", "render_with_signs", "signs_of", "source", "uri", "view",
]  # fmt: skip
