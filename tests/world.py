"""Small files in the places that the docs name: collections in their own layouts, keys, new images."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import test_chexpert
import test_dicom_source
import test_mimic_cxr
import test_nih
import test_table_source
import test_vindr
from test_chexpert import jpeg

from pipeline import storage
from pipeline.sources.chexpert import FINDINGS as CHEXPERT
from pipeline.sources.phantom.labels import FINDINGS as NIH


def build(folder: Path, bucket: str) -> None:
    """Everything that the documented commands read and no documented command writes.

    Args:
        folder: stands for the root of the file system.
        bucket: stands for s3://bucket.
    """
    data = folder / "data"
    nih(data / "nih", 0, 160)
    nih(data / "nih-256", 500, 60)
    nih(data / "nih-64", 600, 60)
    test_chexpert.collection(data / "CheXpert-v1.0-small", chexpert(160))
    mimic(folder / "upload" / "mimic-cxr-jpg")
    test_vindr.collection(data / "vindr-cxr", *test_vindr.many(90))
    site(data / "site")
    pacs(folder / "upload" / "pacs")
    for place in ("mimic-cxr-jpg", "pacs"):
        for file in (folder / "upload" / place).rglob("*.*"):
            name = str(file.relative_to(folder / "upload"))
            storage.write_bytes(storage.join(bucket, name), file.read_bytes())
    (folder / "secrets").mkdir()
    (folder / "secrets" / "site.key").write_bytes(test_table_source.KEY)
    (data / "efficientnet-lite0.pth").touch()  # a dry run looks only whether it is there
    for seed in range(4):
        jpeg(data / "new" / f"{seed}.png", 900 + seed, (40, 40))


def nih(root: Path, first: int, patients: int) -> None:
    """One image a patient, with two findings."""
    rows = [
        (f"{n:08d}_000.png", f"{NIH[n % 14]}|{NIH[(n + 1 + n // 14) % 14]}", str(n), "50", "F", "PA")
        for n in range(first, first + patients)
    ]
    test_nih.collection(root, rows)


def chexpert(patients: int) -> dict[str, dict[str, str]]:
    """One frontal image a patient; every label is stated."""
    found = {}
    for patient in range(patients):
        split = "valid" if patient < 28 else "train"
        labels = {name: str(float(place in (patient % 14, patient % 13))) for place, name in enumerate(CHEXPERT)}
        found[f"{split}/patient{patient:05d}/study1/view1_frontal"] = labels
    return found


def mimic(root: Path) -> None:
    """Sixty studies of one image."""
    images, studies = [], {}
    for n in range(60):
        subject, study = str(10_000_000 + n), str(50_000_000 + n)
        split = "test" if n % 5 == 0 else "validate" if n % 5 == 1 else "train"
        images.append((f"image-{n}", subject, study, "PA", split))
        studies[subject, study] = {CHEXPERT[n % 14]: "1.0", CHEXPERT[(n + 1) % 14]: "0.0"}
    test_mimic_cxr.collection(root, images, studies)


def site(root: Path) -> None:
    """A table as the page on data shows it."""
    root.mkdir(parents=True)
    lines = ["path,mrn,accession,group,edema_gt,mass_gt"]
    for n in range(60):
        group = "test" if n % 5 == 0 else "valid" if n % 5 == 1 else "train"
        lines.append(f"{n}.png,MRN-{n},ACC-{n},{group},{n % 2},{(n + 1) % 2}")
        jpeg(root / f"{n}.png", n)
    (root / "labels.csv").write_text("\n".join(lines) + "\n")


def pacs(root: Path) -> None:
    """DICOM files and the table that the page on data shows."""
    files = [(f"s{n}/{n}.dcm", f"1.2.3.{n}", f"1.2.{n}", f"MRN-{n}", f"ACC-{n}", "DX", "PA") for n in range(60)]
    test_dicom_source.collection(root, files, [(path, "1", "0") for path, *_ in files])
    (root / "labels.csv").unlink()
    columns = {
        "accession": [f"ACC-{n}" for n in range(60)],
        "edema_gt": [n % 2 for n in range(60)],
        "mass_gt": [(n + 1) % 2 for n in range(60)],
    }
    pq.write_table(pa.table(columns), root / "labels.parquet")
