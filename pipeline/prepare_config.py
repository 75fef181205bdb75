"""The configuration of data preparation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpc.config import Config, Count, Name, Positive, Share


class SplitConfig(Config):
    """The patient-level split: by salted hash, or the collection's own lists where it has them."""

    by: Literal["official", "hash", "file"] = "official"
    """`official` honours the source's own lists and carves `val` from its training patients; without lists, `hash`.
    `file` takes every image's split from a table of the user's."""
    file: str | None = None
    """With by=file, a CSV (or .csv.gz) with the columns `split` (train, val, test) and `patient_id` or `image_id`."""
    salt: str = "mpc-cxr"
    val: Share = 0.1
    """Share of the patients that validate; of those that are not tested where `folds` or official lists choose them."""
    test: Share = 0.1
    """Share of the patients that test; not used with official lists, nor with `folds` above 1."""
    folds: Count = 1
    """Folds of a cross-validation by patient hash, 1 or more; above 1 the test split is the fold `fold`."""
    fold: Annotated[int, Field(ge=0)] = 0
    """Which fold is tested, 0 to folds - 1; over all of them every patient is tested exactly once."""

    @model_validator(mode="after")
    def leaves_training(self) -> "SplitConfig":
        """Something must remain to train on."""
        if self.folds == 1 and self.val + self.test >= 1:
            raise ValueError(f"val {self.val} + test {self.test} leave nothing to train on; keep their sum below 1")
        if self.val >= 1:
            raise ValueError(f"val {self.val} leaves nothing to train on; keep it below 1")
        return self

    @model_validator(mode="after")
    def names_a_file(self) -> "SplitConfig":
        """A file is given where it is read, and nowhere else."""
        if (self.by == "file") != (self.file is not None):
            raise ValueError(f"by {self.by} with file {self.file}; set both by=file and file=TABLE.csv, or neither")
        return self

    @model_validator(mode="after")
    def names_a_fold(self) -> "SplitConfig":
        """Folds exist by hash alone: official lists have one test split."""
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} is not one of folds {self.folds}; choose 0 to {self.folds - 1}")
        if self.folds > 1 and self.by != "hash":
            raise ValueError(f"folds {self.folds} cannot follow by={self.by}; set prepare.split.by=hash")
        return self


Meaning = Literal["zeros", "ones", "ignore"]
"""What an entry that is neither 1 nor 0 becomes: a known 0, a known 1, or unknown."""


class FindingPolicy(Config):
    """Where one finding departs from the policy; None follows it."""

    uncertain: Meaning | None = None
    blank: Meaning | None = None


class PolicyConfig(Config):
    """What uncertain and blank entries of a table mean: 0, 1, or unknown."""

    uncertain: Meaning = "zeros"
    blank: Meaning = "zeros"
    findings: dict[str, FindingPolicy] = Field(default_factory=dict)
    """Exceptions by the name of the finding."""

    def of(self, finding: str) -> tuple[Meaning, Meaning]:
        """What uncertain and what blank entries of one finding mean."""
        own = self.findings.get(finding, FindingPolicy())
        return own.uncertain or self.uncertain, own.blank or self.blank


class PhantomConfig(Config):
    """The embedded synthetic source."""

    images: Count = 3000
    seed: Annotated[int, Field(ge=0)] = 0
    profile: Literal["dense", "nih"] = "dense"


class TableConfig(Config):
    """Your own table of images (source `table`) or of labels (source `dicom`): its columns by the names they have."""

    file: str | None = None
    """CSV (.csv, .csv.gz) or Parquet: a path below --root, or an absolute path or URI."""
    image: str = "image"
    """Column of the images, paths below --root or URIs; for source `dicom` the values that prepare.dicom.key names."""
    image_id: str | None = None
    """Column of the images' ids; None takes the paths."""
    patient: str = "patient_id"
    """Column of the patients' ids; source `dicom` takes them from the headers instead."""
    study: str | None = None
    """Column of the studies' ids."""
    view: str | None = None
    """Column of the views; where it is named, prepare.views=frontal leaves lateral and other views out."""
    split: str | None = None
    """Column of an official split: train, val (or valid, validate) and test."""
    sex: str | None = None
    """Column of the patient's sex, for prepare.strata: M, F or O, or the words."""
    age: str | None = None
    """Column of the patient's age in years, for prepare.strata: stored in bands of twenty years."""
    label_columns: dict[Name, Name] | None = None
    """Finding -> the column with its entries: 1, 0, -1 (uncertain), true, false or empty. None, without `labels`, takes
    the columns that prepare.findings names."""
    labels: Name | None = None
    """One column that lists the findings of an image; findings that it does not list are blank."""
    delimiter: Name = "|"
    """What stands between two findings of `labels`."""

    @model_validator(mode="after")
    def one_form(self) -> "TableConfig":
        """Labels are columns or a list, never both."""
        if self.labels is not None and self.label_columns is not None:
            raise ValueError("labels and label_columns are two forms of the same labels; give one of them")
        if self.label_columns is not None and not self.label_columns:
            raise ValueError("label_columns names no finding; write FINDING: COLUMN for each")
        return self


class DicomConfig(Config):
    """A folder of DICOM files, with labels in the table that `prepare.table` describes."""

    key: Literal["sop_instance_uid", "study_instance_uid", "patient_id", "accession_number", "file"] = (
        "sop_instance_uid"
    )
    """What the table's column prepare.table.image holds: a value of the header, or the file's path below --root."""
    modalities: tuple[str, ...] = ("CR", "DX", "RG")
    """Modalities that are radiographs; files of others are left out."""


class PrepareConfig(Config):
    """Source to shards."""

    source: Literal["phantom", "nih", "chexpert", "mimic_cxr", "vindr", "table", "dicom"] = "phantom"
    findings: tuple[str, ...] | None = None
    """Findings to keep, in this order; None takes the source's own list."""
    views: Literal["frontal", "all"] = "frontal"
    """Where views are told: frontal radiographs alone, or lateral and other views as well."""
    official_test: Literal["valid", "test"] | None = None
    """CheXpert: the official list that becomes the test split; the other one is left out. None takes `test` where there
    is a test.csv, else `valid`. With split.by=hash both are left out."""
    labeler: Literal["chexpert", "negbio"] = "chexpert"
    """MIMIC-CXR: the program whose labels of the reports are read."""
    image_size: Annotated[int, Field(ge=16, le=2048)] = 224
    """Side in pixels of the stored square image."""
    reduce_to: Annotated[int, Field(ge=16, le=2048)] | None = None
    """Longest side in pixels to which every larger image is reduced before it is resized to `image_size`, so that
    images of unequal sharpness carry the same detail: where collections are put together, sharpness can predict the
    label. None resizes at once."""
    fit: Literal["crop", "pad"] = "pad"
    """How a rectangle becomes a square: cut the longer side centrally, or pad the shorter one with black."""
    policy: PolicyConfig = PolicyConfig()
    split: SplitConfig = SplitConfig()
    phantom: PhantomConfig = PhantomConfig()
    table: TableConfig = TableConfig()
    dicom: DicomConfig = DicomConfig()
    key_file: str | None = None
    """Sources `table` and `dicom`: file, local or s3://, with the secret key of the hashes that stand for ids; None
    takes the environment variable MPC_CXR_ID_KEY. The key itself is never a setting."""
    shard_mib: Annotated[float, Field(gt=0, le=1024)] = 128.0
    """Size of a shard in MiB before compression."""
    row_group: Annotated[int, Field(ge=1, le=256)] = 256
    """Rows of a Parquet row group: the unit of reading and of the shuffle."""
    max_bad: Share = 0.01
    """Largest share of images that may be unusable before prepare stops; what is left out on purpose (lateral views,
    duplicates) does not count."""
    strata: tuple[Literal["sex", "age_band", "collection"], ...] = ()
    """Fields that the shards shall carry for metrics by group: of the patient, or which --root an image came from, by
    the name of that folder. None unless asked for."""
    task_cpus: Positive = 1.0
    """CPUs that one task, which decodes and writes one shard, asks of Ray."""
