"""The method's configuration: one frozen model a concern, every field with its range, meaning and source.

Sources: "3.1" is the table of choices in docs/method.md. Fractions of a side refer to the image's height and width.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Probability = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class Config(BaseModel):
    """Frozen, and refuses unknown keys: a mistyped key is an error, never a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class PixelSpec(Config):
    """How pixels are stored and normalised: part of the dataset card and of every checkpoint."""

    encoding: Literal["raw"] = "raw"
    """`raw`: height x width bytes, row by row."""
    channels: Literal[1] = 1
    dtype: Literal["uint8"] = "uint8"
    fit: Literal["crop", "pad"] = "pad"
    """How a rectangle became a square."""
    reduce_to: int | None = None
    """Longest side in pixels to which an image was reduced before it was resized; None: it was resized at once."""
    mean: Share = 0.449
    """Mean of grey ImageNet, in units of the full range: what the network subtracts."""
    std: Positive = 0.226
    """Standard deviation of grey ImageNet, in units of the full range: what the network divides by."""


class CalibrationInfo(Config):
    """How logits of a finding become probabilities that hold; see `mpc.metrics.Calibration`."""

    temperature: Positive
    """Divides the logit."""
    slope: Positive
    """Multiplies it, before ..."""
    shift: float
    """... this is added."""


class CheckpointInfo(Config):
    """`checkpoint.json`: all that the weights of a checkpoint need beside them to be continued, scored and served."""

    schema_version: Literal[1] = 1
    config: dict[str, Any]
    """The resolved configuration of the run."""
    findings: tuple[str, ...]
    """Names of the outputs, in order."""
    image_size: Annotated[int, Field(ge=1)]
    """Side in pixels of the square images that the network was trained on."""
    pixels: PixelSpec
    step: Annotated[int, Field(ge=0)]
    epoch: NonNegative
    """Epochs done, with fractions."""
    metrics: dict[str, int | float]
    thresholds: dict[str, float] = {}
    """Probability from which a finding counts as present, where validation could choose one (Youden)."""
    operating_points: dict[str, dict[str, float]] = {}
    """Finding -> rule of `mpc.metrics.RULES` -> threshold that it chose on validation."""
    calibration: dict[str, CalibrationInfo] = {}
    """Finding -> what validation fitted; empty where validation saw one positive an image alone."""
    data_digest: str
    """Identity of the data set."""
    git_commit: str | None
    versions: dict[str, str]
    sizes: dict[str, int] = {}
    """Bytes of each file beside this one: how a copy that was cut short is told from a whole one."""


class PerturbConfig(Config):
    """Feature perturbation of FPC: channel dropout (UniMatch)."""

    rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Probability that a channel of the weak features is zeroed."""
    place: Literal["last", "before_last_stage"] = "last"
    """`last`: the pooled features, the same as the last map. `before_last_stage`: the map that enters the last stage,
    which then runs once more on the weak view."""


NO_FILE = ("none", "imagenet")
"""Values of `model.weights` that name no file."""


class ModelConfig(Config):
    """The shared network: a timm backbone and one linear head."""

    backbone: str = "densenet121"
    """Any timm model name that yields pooled features."""
    weights: str = "none"
    """`none`, `imagenet` (timm's own, needs a network), or the URI of a .safetensors or .pth file of tensors."""
    drop: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout rate inside the backbone, where the timm model offers it."""
    perturb: PerturbConfig = PerturbConfig()


class WeakConfig(Config):
    """The weak view: a random crop, resized back to the image size."""

    crop: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Smallest share of the area that a crop keeps; 1 switches cropping off."""


class RedConfig(Config):
    """Random elastic deformation (RED; Simard et al. 2003), by physical size instead of library parameters."""

    rms: Annotated[float, Field(ge=0.0, le=0.1)] = 0.013
    """Root mean square displacement per axis, as a fraction of the side; 0 switches RED off."""
    sigma: Annotated[float, Field(gt=0.0, le=0.5)] = 0.045
    """Correlation length (standard deviation of the Gaussian), as a fraction of the side."""
    p: Share = 0.5
    """Probability that RED is applied to a strong view."""

    @model_validator(mode="after")
    def fold_free(self) -> "RedConfig":
        """Refuses fields that would fold the image over itself."""
        if self.rms > 0.33 * self.sigma:
            raise ValueError(
                f"rms {self.rms} with sigma {self.sigma} folds the image over itself; keep rms <= 0.33 * sigma"
            )
        return self


class StrongConfig(Config):
    """The strong view on top of a weak draw: random operations that leave a radiograph a radiograph."""

    count: Annotated[int, Field(ge=1, le=2)] = 1
    """Strong views on each weak draw (UniMatch has two); their losses are averaged."""
    ops: Annotated[int, Field(ge=0, le=4)] = 2
    """Operations drawn from autocontrast, brightness, contrast, sharpness, rotate, shear, translate, equalize."""
    magnitude: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    """Scales the largest strength of every operation (1 = rotate 15 degrees, shear 0.1, translate 0.1, brightness and
    contrast 0.7-1.3); autocontrast and equalize have none."""
    blur: Share = 0.5
    """Probability of a Gaussian blur with sigma 0.1-2 px at a side of 224 px, scaled with the side."""
    cutout: Annotated[float, Field(ge=0.0, le=0.5)] = 0.2
    """Largest side of the erased rectangle, as a fraction of the image side; 0 switches it off."""


class ViewsConfig(Config):
    """The augmented views of an image."""

    place: Literal["auto", "stream", "device"] = "auto"
    """Where views are made: in the reading tasks on CPUs, on the network's device, a batch at a time, or, `auto`, on
    the device where that is a GPU. Both draw from the same laws, not the same numbers."""

    hflip: Share = 0.0
    """Probability of a horizontal flip. A flip mirrors the heart, hence 0; 0.5 is an ablation."""
    weak: WeakConfig = WeakConfig()
    strong: StrongConfig = StrongConfig()
    red: RedConfig = RedConfig()


class LossConfig(Config):
    """The supervised loss and the weights of the three consistency terms (docs/method.md, section 4.2)."""

    sup: Literal["an", "wan", "an_ls", "em"] = "an"
    """Loss on the weak view: assume negative, weak assume negative, assume negative with label smoothing, or, ours,
    entropy maximisation with `baseline.em_alpha`."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1
    """Smoothing c of `an_ls`: targets c and 1 - c."""
    lambda_ipc: NonNegative = 1.0
    """Weight of instance-level consistency (strong view); 0 skips its branch."""
    lambda_fpc: NonNegative = 0.5
    """Weight of feature-level consistency (channel dropout); 0 skips its branch."""
    lambda_btc: NonNegative = 0.5
    """Weight of batch-level consistency (transformer across the batch); 0 skips its branch."""
    norm: Literal["selected", "all"] = "selected"
    """Denominator of the consistency terms: selected entries (LAC) or all entries (FixMatch)."""
    warmup_epochs: NonNegative = 0.4
    """Epochs, fractions allowed, with L_sup alone; 0.4 is 5 % of the default 8 epochs."""
    ramp_epochs: NonNegative = 0.4
    """Epochs over which the consistency terms rise linearly to their weight."""

    @property
    def needs_strong(self) -> bool:
        """Whether any active term reads the strong view."""
        return self.lambda_ipc > 0


class PseudoConfig(Config):
    """Pseudo-labels: which predictions on the weak view become targets (docs/method.md, section 3.2)."""

    tau_pos: Probability = 0.6
    """Positive where the probability is at least this."""
    tau_neg: Probability = 0.4
    """Negative where the probability is below this."""
    align: Literal["none", "distribution"] = "none"
    """Distribution alignment: shift logits by logit(prior) - logit(running mean)."""
    kappa: Annotated[float, Field(ge=1.0)] | None = None
    """Mean number of positives an image: extra information, declared. Needed by distribution alignment."""
    source: Literal["online", "ema"] = "online"
    """Whose prediction is the target: the network of the same step, or its exponential moving average."""
    form: Literal["hard", "soft"] = "hard"
    """Targets 0 and 1, or the probabilities themselves, on the selected entries."""

    @model_validator(mode="after")
    def consistent(self) -> "PseudoConfig":
        """Thresholds may not overlap; alignment needs its prior."""
        if self.tau_neg > self.tau_pos:
            raise ValueError(f"tau_neg {self.tau_neg} lies above tau_pos {self.tau_pos}; keep tau_neg <= tau_pos")
        if self.align == "distribution" and self.kappa is None:
            raise ValueError("align=distribution needs kappa, the mean number of positives an image; set pseudo.kappa")
        return self


class BtcConfig(Config):
    """Batch-level consistency: one transformer encoder layer across the mini-batch (BatchFormer)."""

    input: Literal["weak", "strong", "both"] = "weak"
    """Whose pooled features enter the encoder; `both` stacks all views into one sequence, so that a strong row may read
    its own weak copy."""
    target: Literal["pseudo", "observed", "both"] = "pseudo"
    """Pseudo-labels with their mask, the observed labels with L_sup, as in BatchFormer, or half of each."""
    scope: Literal["rank", "global"] = "rank"
    """Attention over the batch of one rank, or over the gathered global batch."""
    heads: Annotated[int, Field(ge=1)] = 4
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    lr_scale: Positive = 0.1
    """Learning rate of the encoder relative to the network's."""


class BaselineConfig(Config):
    """Settings of the rival methods (docs/method.md, section 5); each method reads its own alone.

    EPR and ROLE read `pseudo.kappa`, AN-LS reads `loss.label_smoothing`.
    """

    em_alpha: Positive = 0.2
    """EM and APL: weight of the entropy of unobserved entries."""
    apl_beta: NonNegative = 0.02
    """APL: weight of entries that got a soft negative label."""
    apl_theta: Share = 0.9
    """APL: share of the unobserved entries of a finding that get one by the end."""
    apl_warmup: Share = 0.5
    """APL: share of the epochs before the first labels are given."""
    ll_delta: Share = 0.002
    """LL-R, LL-Ct, LL-Cp: share of a batch's entries taken for hidden positives, more by this each epoch (LL-Cp: no
    more)."""
    splc_tau: Probability = 0.6
    """SPLC: an unobserved entry above this probability counts as positive after the first epoch."""
    gr_q2: Positive = 0.01
    gr_q3: Positive = 1.0
    """GR: exponents of the robust loss; towards 0 it is the logarithm, at 1 the absolute error."""


class OptimConfig(Config):
    """Optimiser and schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-4
    """Peak learning rate at the configured global batch; never rescaled silently."""
    weight_decay: NonNegative = 1e-4
    warmup: Share = 0.05
    """Share of all steps over which the rate rises linearly; a cosine to zero follows."""
    clip: Positive = 5.0
    """Largest norm of the gradient."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the evaluation weights, as min(ema, (1 + t) / (10 + t)); 0 evaluates the raw weights."""


class MethodConfig(Config):
    """All that a method's builder reads: `pipeline.config.RunConfig` extends it with data and training."""

    model: ModelConfig = ModelConfig()
    views: ViewsConfig = ViewsConfig()
    loss: LossConfig = LossConfig()
    pseudo: PseudoConfig = PseudoConfig()
    btc: BtcConfig = BtcConfig()
    baseline: BaselineConfig = BaselineConfig()
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def strong_features(self) -> "MethodConfig":
        """BTC on strong features needs the strong forward pass that IPC makes."""
        if self.loss.lambda_btc > 0 and self.btc.input != "weak" and not self.loss.needs_strong:
            raise ValueError(
                f"btc.input={self.btc.input} needs the strong view; set loss.lambda_ipc above 0 or btc.input=weak"
            )
        return self
