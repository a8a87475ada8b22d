"""The recipe's schema: the only home of defaults. Units are in the names: _px pixels, _p probability, _pct percent."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
MAX_VIEW_PX = 1024
MAX_VIEWS = 32


def expanded(value: Any) -> Any:
    """A path with ~ and $VAR replaced, so that a run records where its files were."""
    if not isinstance(value, str | Path):
        return value
    for match in re.finditer(r"\$(?:(\w+)|\{(\w+)\})", str(value)):
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"{value} names the environment variable {name}, which is not set")
    return os.path.expanduser(os.path.expandvars(str(value)))


def named(value: Any) -> Any:
    """A path whose last part is a name, next to which a manifest can lie; `.` is the folder it stands for."""
    value = expanded(value)
    if not isinstance(value, str | Path):
        return value
    path = Path(value) if Path(value).name not in ("", "..") else Path(value).resolve()
    if not str(value).strip() or not path.name:
        raise ValueError(f"{str(value)!r} names no file or folder")
    return path


def named_run(name: str) -> str:
    if not name.strip() or not Path(name).name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} names no folder below runs")
    return name


NamedPath = Annotated[Path, BeforeValidator(named)]
ExpandedPath = Annotated[Path, BeforeValidator(expanded)]
ExpandedText = Annotated[str, BeforeValidator(expanded)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Data(Section):
    """Where images come from. Three files: pretraining, labeled images for the probes, and the test set."""

    source: ExpandedText | None = Field(
        None,
        description="What to convert when `path` is absent: shapes, cifar10, ... or a folder or archive.",
    )
    path: NamedPath = Field(description="The .beton file to pretrain on, or a folder of WebDataset shards to stream.")
    split: Literal["train", "test", "val", "unlabeled"] = "train"
    test_path: NamedPath | None = Field(None, description="The .beton file that the final evaluation uses, once.")
    test_split: Literal["train", "test", "val"] = "test"
    probe_path: NamedPath | None = Field(None, description="Labeled images for the probes; `path` itself when absent.")
    probe_split: Literal["train", "test", "val"] = "train"
    side_px: Annotated[int, Field(ge=4, le=MAX_VIEW_PX)] | None = Field(
        None, description="Side to convert to; None keeps sizes."
    )
    count: Count | None = Field(None, description="How many images to generate (shapes only).")
    test_count: Count | None = Field(None, description="How many test images to generate (shapes only).")
    root: ExpandedPath | None = Field(None, description="Folder with torchvision's files; its own cache when absent.")
    download: bool = Field(True, description="May the data set be downloaded when it is absent?")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="List images that cannot be read and fail, or leave them out, when converting."
    )
    val_count: Annotated[int, Field(ge=0)] = Field(0, description="Labeled images held out of training for evaluation.")
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Share of the pretraining images to use.")
    batch_size: Annotated[int, Field(ge=2)] = Field(256, description="Images (not views) of one step over all ranks.")
    drop_last: bool = Field(True, description="Leave out an epoch's last batch where it is not full.")
    loader: Literal["auto", "resident", "ffcv", "dali"] = "auto"
    memory: Literal["device", "host", "mmap"] = Field("device", description="Where the resident loader keeps pixels.")
    layout: Literal["flat", "padded"] = Field(
        "flat",
        description="How images of different sizes arrive: in one buffer with offsets, or padded to the largest.",
    )
    workers: Annotated[int, Field(ge=0)] = Field(0, description="Threads that convert and decode; 0 is one per core.")


class ViewSpec(Section):
    """One row of the view table. The defaults change nothing but the side length: presets say what to add."""

    side_px: Annotated[int, Field(ge=1, le=MAX_VIEW_PX)] = 32
    crop: Literal["random_resized", "resize", "center", "pad", "none"] = "resize"
    area_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    area_max: Annotated[float, Field(gt=0, le=1)] = 1.0
    aspect_min: Positive = 3 / 4
    aspect_max: Positive = 4 / 3
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    pad_px: Annotated[int, Field(ge=0, le=MAX_VIEW_PX)] = 0
    hflip_p: Probability = 0.0
    vflip_p: Probability = 0.0
    quarter_turn_p: Probability = 0.0
    rotate_p: Probability = 0.0
    rotate_max_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    jitter_p: Probability = 0.0
    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    hue_mode: Literal["hsv", "linear"] = "hsv"
    jitter_order: Literal["fixed", "random"] = "random"
    gray_p: Probability = 0.0
    blur_p: Probability = 0.0
    blur_sigma_min_px: Positive = 0.1
    blur_sigma_max_px: Annotated[float, Field(gt=0, le=16)] = 2.0
    solarize_p: Probability = 0.0
    solarize_threshold: Probability = 0.5
    posterize_p: Probability = 0.0
    posterize_bits: Annotated[int, Field(ge=1, le=8)] = 4
    cutout_p: Probability = 0.0
    cutout_fraction: Probability = 0.25

    @model_validator(mode="after")
    def ranges(self) -> Self:
        for low, high in (
            ("area_min", "area_max"),
            ("aspect_min", "aspect_max"),
            ("blur_sigma_min_px", "blur_sigma_max_px"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low} {getattr(self, low)} is above {high} {getattr(self, high)}, so the range is empty"
                )
        return self


class Progressive(Section):
    """Smaller views at first: their largest side grows in steps over the epochs to that of the view table."""

    from_px: Annotated[int, Field(ge=4, le=MAX_VIEW_PX)] = Field(description="Largest side of the first epoch's views.")
    until: Annotated[float, Field(gt=0, le=1)] = Field(
        0.75, description="Share of the epochs after which views have their full side."
    )
    step_px: Annotated[int, Field(ge=1, le=MAX_VIEW_PX)] = Field(8, description="What the side grows by at a time.")


class Augment(Section):
    """The view table: `views` rows of a preset, `all` changed in every row, or `rows` written out."""

    preset: Literal["cifar", "stl", "imagenet", "imagenet_asymmetric", "multicrop", "none"] = "cifar"
    views: Annotated[int, Field(ge=2, le=MAX_VIEWS)] = Field(
        2, description="V, views cut from each image in each step."
    )
    side_px: Annotated[int, Field(ge=4, le=MAX_VIEW_PX)] = 32
    small_side_px: Annotated[int, Field(ge=4, le=MAX_VIEW_PX)] | None = Field(
        None, description="Side of multicrop's small views."
    )
    all: dict[str, Any] = Field(default_factory=dict, description="Fields of a row to change in every view.")
    rows: tuple[dict[str, Any], ...] | None = Field(
        None, description="One entry a view, each changing fields of the preset's row."
    )
    mean: tuple[Probability, ...] | None = Field(
        None, description="What normalization subtracts from each channel, 0 to 1; the data's own mean when absent."
    )
    std: tuple[Positive, ...] | None = Field(
        None, description="What normalization divides each channel by; the data's own standard deviation when absent."
    )
    progressive: Progressive | None = Field(None, description="Start with smaller views, which cost less.")
    backend: Literal["auto", "torch", "cpu", "cuda"] = "auto"


class Model(Section):
    backbone: str = Field(
        "resnet18",
        description="resnet_tiny, resnet_slim, resnet_small, resnet_pool, resnet_compact, resnet18, resnet34, "
        "resnet50, torchvision/NAME or timm/NAME.",
    )
    stem: Literal["auto", "cifar", "imagenet", "patch2", "patch4", "patch8"] = Field(
        "auto", description="First convolution; auto is cifar for the package's ResNets, else imagenet (as published)."
    )
    width: Annotated[float, Field(gt=0, le=8)] = Field(1.0, description="Factor on the channels of those ResNets.")
    weights: ExpandedText | None = Field(
        None,
        description="Start from a run folder, a .safetensors or .pth file, or torchvision's or timm's own weights.",
    )
    freeze: Annotated[int, Field(ge=0)] | tuple[str, ...] = Field(
        0, description="Stages that stay as they are, counted from the input, or beginnings of parameter names."
    )
    batch_norm: Literal["joint", "per_view"] = Field(
        "joint", description="Batch statistics over all views together, or of each view by itself."
    )
    batch_norm_groups: Count = Field(
        1,
        description="Parts of each view's images with batch statistics of their own, where batch_norm is per_view: "
        "more pieces for a CPU with more cores than views.",
    )
    projector: tuple[Count, ...] = Field(
        (256, 256), description="Widths of the projector's linear layers; the last is D. Empty is the identity."
    )
    projector_norm: Literal["batch", "layer", "none"] = Field("batch", description="After each hidden linear layer.")
    projector_bias: Literal["auto", "all", "none"] = Field(
        "auto", description="Which linear layers carry a bias; auto is all but those whose batch norm would remove it."
    )


Weight = Literal["auto"] | NonNegative
Form = Literal["leave_one_out", "authors"]


class BarlowTwins(Section):
    """Barlow Twins over any number of views (Zbontar et al. 2021; arXiv 2312.10725)."""

    name: Literal["barlow_twins"] = "barlow_twins"
    redundancy_weight: Weight = Field("auto", description="Weight of the off-diagonal terms; auto scales it as c / D.")
    form: Form = Field(
        "leave_one_out", description="What each view is compared with: the mean of the others, or of all."
    )
    standardize: Literal["per_view", "joint"] = Field(
        "per_view", description="Mean and variance of each view by itself, or of all views together."
    )
    l2_normalize: bool = Field(False, description="Scale each embedding to length sqrt(D) first.")


class VicReg(Section):
    """VICReg over any number of views (Bardes et al. 2022; arXiv 2312.10725)."""

    name: Literal["vicreg"] = "vicreg"
    invariance_weight: Weight = Field("auto", description="Of the distance between views; auto grows with D.")
    variance_weight: Weight = Field("auto", description="Of the hinge on each dimension's spread; auto grows with D.")
    covariance_weight: Weight = Field("auto", description="Of the squared covariances; auto is 1.")
    form: Form = Field(
        "leave_one_out", description="Variance and covariance of the views, or also of each view's mean of the others."
    )


class SigReg(Section):
    """LeJEPA's sketched isotropic Gaussian regularization over any number of views (Balestriero and LeCun 2025)."""

    name: Literal["sigreg"] = "sigreg"
    sigreg_weight: Literal["auto"] | Probability = Field(
        "auto", description="Of the distance to a Gaussian, and 1 less it of the distance between views; auto is 0.02."
    )
    slices: Annotated[int, Field(ge=1, le=1 << 16)] = Field(
        256, description="Random directions in which embeddings are compared with a Gaussian; others at every step."
    )


def loss_name(value: Any) -> Any:
    """Which loss a mapping or section describes; Barlow Twins when it does not say."""
    return value.get("name", "barlow_twins") if isinstance(value, dict) else getattr(value, "name", "barlow_twins")


Optimizer = Literal["adam", "adamw", "sgd", "lars", "muon"]
Schedule = Literal["cosine", "constant"]


class Optim(Section):
    name: Optimizer = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 1e-6
    decay_vectors: bool = Field(False, description="Weight decay on norms and biases too, not on matrices alone.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    trust: Positive = 1e-3
    rate_in_momentum: bool = Field(
        True, description="LARS: the rate scales what enters the momentum (You et al. 2017), or what leaves it (false)."
    )
    schedule: Schedule = "cosine"
    warmup_epochs: NonNegative = 0.0
    final_fraction: Probability = 0.0
    clip_norm: Positive | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Decay of averaged weights, such as 0.999; probes, evaluation and exports then take the average.",
    )
    accumulate_steps: Count = Field(
        1,
        description="Parts that a batch is run in, their gradients averaged: less memory, but the loss and every batch "
        "norm see one part at a time, so it is not the same as the whole batch at once.",
    )


class Train(Section):
    epochs: Count
    threads: Count | Literal["auto"] = Field(
        "auto",
        description="Threads of a process on the CPU; auto is the cores it may use by affinity and by a container's "
        "quota, shared among the ranks of a machine.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Of matrix products; auto is bf16 where the device has instructions for it, else fp16 on CUDA and "
        "fp32 elsewhere. A CPU without them emulates bf16, many times slower than fp32.",
    )
    channels_last: bool = True
    parallel: Literal["auto", "views", "operators"] = Field(
        "auto",
        description="What the threads of a CPU share: whole views, where model.batch_norm is per_view, or operators; "
        "auto tries both.",
    )
    compile: bool | Literal["reduce-overhead", "max-autotune"] = Field(
        False,
        description="torch.compile for network and loss; modes reduce-overhead and max-autotune replay CUDA graphs.",
    )
    cuda_graph: bool = Field(
        False,
        description="CUDA: replay the whole step, optimizer included, as one graph; for steps whose operators take as "
        "long to launch as to run.",
    )
    gradient_compression: Literal["none", "bf16"] = Field(
        "none", description="What ranks send of their gradients: all bits, or bfloat16, half the bytes of float32."
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep only each block's input and run it again in the backward pass: less memory, more work."
    )
    tf32: bool = Field(True, description="CUDA: products that stay float32 may use TF32.")
    deterministic: bool = Field(False, description="Only kernels that repeat their bits; slower on CUDA.")
    log_every_steps: Count = 10
    checkpoint_every_epochs: Count = 1
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = Field(0, description="Also every N steps; 0 is never.")
    checkpoint_every_minutes: NonNegative = Field(0.0, description="Also every N minutes; 0 is never.")
    keep_checkpoints: Count = Field(2, description="The newest so many stay, and the best one.")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite ends the run, or the step is left out."
    )
    step_timeout_s: Positive = Field(1800.0, description="A step that takes longer ends the process with all stacks.")


class Evaluate(Section):
    """Probes on frozen features: figures without labels, kNN and ridge while training, a linear probe at the end."""

    every_epochs: Annotated[int, Field(ge=0)] = Field(1, description="0 evaluates at the end only.")
    every_steps: Annotated[int, Field(ge=0)] = Field(0, description="Also every N steps; 0 is never.")
    knn_k: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        (20, 200), description="Neighbors that vote; at most the images of a class are used. Runs compare by the first."
    )
    whitened_knn: bool = Field(False, description="Also kNN of features whitened on those that vote.")
    max_train: Count | None = Field(
        None, description="Labeled images the probes learn from while training; None is all."
    )
    side_px: Annotated[int, Field(ge=4, le=MAX_VIEW_PX)] | None = Field(
        None, description="Side of the clean image; None is its own side."
    )
    batch_size: Count = 512
    linear_epochs: Annotated[int, Field(ge=0)] = Field(200, description="0 skips the linear probe.")
    linear_epochs_while_training: Annotated[int, Field(ge=0)] = Field(
        0, description="Of a linear probe at every evaluation while training too; 0 skips it."
    )
    baselines: bool = Field(False, description="Also kNN of raw pixels and of the untrained network, at the end.")

    @property
    def metric(self) -> str:
        """The accuracy that decides which checkpoint is best and by which runs are compared."""
        return f"knn{self.knn_k[0]}_pct"


class Log(Section):
    """Where a run's numbers go in addition to metrics.jsonl; none of it changes the run."""

    tensorboard: bool = Field(False, description="Event files in the run's folder; needs the extra tensorboard.")
    wandb: bool = Field(False, description="A Weights & Biases run; needs the extra wandb.")
    wandb_project: str = "fastssl"
    mlflow: bool = Field(False, description="An MLflow run; needs the extra mlflow.")
    mlflow_experiment: str = "fastssl"


class Recipe(Section):
    """Everything that decides a run. Equal recipes, data and machine give equal losses."""

    name: Annotated[str, AfterValidator(named_run)] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    data: Data
    augment: Augment = Augment()
    model: Model = Model()
    loss: Annotated[
        Annotated[BarlowTwins, Tag("barlow_twins")]
        | Annotated[VicReg, Tag("vicreg")]
        | Annotated[SigReg, Tag("sigreg")],  # one section per loss
        Discriminator(loss_name),
    ] = BarlowTwins()
    optim: Optim = Optim()
    train: Train
    evaluate: Evaluate = Evaluate()
    log: Log = Log()


def loss_sections() -> dict[str, type[Section]]:
    """Every loss's name and its section, read off the recipe's own field."""
    sections = [get_args(section)[0] for section in get_args(Recipe.model_fields["loss"].annotation)]
    return {section.model_fields["name"].default: section for section in sections}
