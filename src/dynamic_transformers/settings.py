"""Typed settings. Everything receives a `Settings` or one of its parts, never a DictConfig.

`configure.py` makes them from Hydra's configuration and checks them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

from dynamic_transformers.constraints import (
    SEED,
    Alias,
    Count,
    FolderName,
    Fraction,
    In,
    KeyOf,
    Multiplier,
    OneOf,
    Place,
    Positive,
    Scale,
    Steps,
    Template,
    Weight,
)
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.architectures.base import Architecture
from dynamic_transformers.models.architectures.looped import LoopedSettings
from dynamic_transformers.models.architectures.mod import MoDSettings
from dynamic_transformers.models.architectures.stt import STTSettings
from dynamic_transformers.models.architectures.surprise import SurpriseSettings

PROJECT_ROOT = Path(__file__).resolve().parents[2]

ATTENTION = ("sdpa", "eager")
PRECISIONS = ("fp32", "bf16")
CONTROLS = ("random", "even")  # selection rules that need no learning, in training and evaluation
SELECTION_RULES = ("threshold", "predictor", "calibrated_predictor", "aux", "topk", *CONTROLS)

SEED_KEY = "run.seed"
EMBEDDED = "embedded"  # the path of a source that Python itself carries

# Of a source's filter, as in pandas' and pyarrow's.
OPERATORS = ("==", "!=", "<", "<=", ">", ">=", "in", "not in")
# What a finetune source can be made of: roles that must be there, and those that may.
CONVERSATIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("messages",): (),
    ("instruction", "output"): ("input", "system"),
    ("prompt", "response"): ("system",),
}


class UserError(ValueError):
    """A user's mistake: reported in one line, exit code 2."""


# Parameters of a URL that let in whoever has it, such as those of signed addresses.
SECRET_PARAMETERS = {
    *("access_key", "access_token", "api-key", "api_key", "apikey", "auth", "auth_token", "client_secret"),
    *("key", "passwd", "password", "private_token", "pwd", "secret", "sig", "signature", "token"),
    *("x-amz-security-token", "x-amz-signature", "x-goog-signature"),
}
# Of their addresses, what stands before the @ is a container, or a user who still has to show a key.
NAMES_BEFORE_AT = {"abfs", "abfss", "sftp", "ssh", "wasb", "wasbs"}


def holds_credentials(address: str) -> bool:
    """Whether a URL, or one of several joined by `::`, holds a user, a password, a token or a signature.

    Raises:
        ValueError: it is no URL.
    """
    for url in map(urlsplit, re.split("::(?=[a-z][a-z0-9+.-]*://)", address)):
        user, at, _ = url.netloc.rpartition("@")
        if at and (":" in user or url.scheme not in NAMES_BEFORE_AT):
            return True
        if any(name.lower() in SECRET_PARAMETERS for name, _ in parse_qsl(url.query)):
            return True
    return False


@dataclass
class RunSettings:
    """Name, place and seed of a run. The run folder is `output_dir/name`."""

    name: Annotated[str, FolderName(taken=("data", "mlartifacts", "mlflow.db"))] = "default"
    output_dir: Annotated[str, Place()] = "outputs"
    seed: Annotated[int, SEED] = 0


@dataclass(frozen=True)
class Dimensions:
    """Dimensions of a Qwen2 backbone."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    initializer_range: float = 0.02
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True


# 0.5b and 1.5b are Qwen2's own. The small ones are ours: head size 64, ff ≈ 8/3·d, and initial weights of
# √(2/5d), which is about Qwen2's 0.02 at d = 896: with 0.02 at d = 128 the blocks hardly act at first.
SIZES = {
    "micro": Dimensions(64, 176, 4, 1, 1, initializer_range=0.079),
    "tiny": Dimensions(128, 344, 6, 2, 1, initializer_range=0.056),
    "small": Dimensions(256, 688, 8, 4, 2, initializer_range=0.040),
    "base": Dimensions(512, 1376, 8, 8, 2, initializer_range=0.028),
    "0.5b": Dimensions(896, 4864, 24, 14, 2),
    "1.5b": Dimensions(1536, 8960, 28, 12, 2),
}
DEFAULT_SIZE = "tiny"


@dataclass
class DimensionSettings:
    """Dimensions that replace those of `model.size`, one by one; None: that of the size."""

    hidden_size: Annotated[int | None, In("[2, 65536]")] = None
    intermediate_size: Annotated[int | None, In("[1, 1048576]")] = None
    num_hidden_layers: Annotated[int | None, In("[1, 1024]")] = None
    num_attention_heads: Annotated[int | None, In("[1, 1024]")] = None
    num_key_value_heads: Annotated[int | None, In("[1, 1024]")] = None
    initializer_range: Annotated[float | None, In("(0, 1]")] = None
    max_position_embeddings: Annotated[int | None, In("[2, 16777216]")] = None
    rope_theta: Annotated[float | None, In("[1, 1e12]")] = None
    tie_word_embeddings: bool | None = None


@dataclass
class ModelSettings:
    """Which architecture, how large, and how it routes."""

    type: Annotated[str, KeyOf(ARCHITECTURES)] = "standard"
    plugin: Annotated[Any, Place()] = None  # file of an own architecture; then name → text of its files
    options: dict[str, Any] = field(default_factory=dict)  # of a plugin: what its configuration has
    size: Annotated[str | None, OneOf(*SIZES)] = None  # None: DEFAULT_SIZE, or that of `pretrained`
    dimensions: DimensionSettings = field(default_factory=DimensionSettings)
    depth_factor: Scale = 1.0  # times the layers of the size: a dense model of another cost
    width_factor: Scale = 1.0  # times its heads, and so its width; the size of a head stays
    capacity: Annotated[float | None, In("(0, 1]")] = None  # None: 0.125 for MoD, 0.5 for SDT and STT
    capacity_warmup_steps: Steps = 0  # over which training's capacity falls from 1 to γ
    selection_rule: Annotated[str | None, OneOf(*SELECTION_RULES)] = None  # None: the measured default
    training_rule: Annotated[str, OneOf("topk", "threshold")] = "topk"  # threshold: as evaluation selects
    training_rule_warmup: Fraction = 0.1  # of the schedule, in which topk selects before threshold does
    training_rule_bound: Annotated[float, In("[1, 1e6]")] = 1.5  # most tokens of a training row ÷ its k
    predictor_weight: Weight = 0.0
    attention: Annotated[str, OneOf(*ATTENTION)] = "sdpa"  # eager: for reference
    mod: MoDSettings = field(default_factory=MoDSettings)
    surprise: SurpriseSettings = field(default_factory=SurpriseSettings)
    stt: STTSettings = field(default_factory=STTSettings)
    looped: LoopedSettings = field(default_factory=LoopedSettings)
    pretrained: Annotated[str | None, Place()] = (
        None  # folder or hub name of a Qwen2 checkpoint (training.mode=pretrained)
    )

    @property
    def architecture(self) -> Architecture:
        """The record of `type`."""
        return ARCHITECTURES[self.type]

    @property
    def uses_plugin(self) -> bool:
        """Whether its architecture is the one of `plugin`."""
        return f"{self.architecture.module}.py" in (self.plugin or {})

    @property
    def is_control(self) -> bool:
        """Whether tokens are selected without learning."""
        return self.selection_rule in CONTROLS

    @property
    def backbone(self) -> Dimensions:
        """Dimensions of a model that is trained from scratch: the size, its factors, then `dimensions`."""
        size = SIZES[self.size or DEFAULT_SIZE]
        heads = max(1, round(size.num_attention_heads * self.width_factor))
        scaled = {
            "num_hidden_layers": max(1, round(size.num_hidden_layers * self.depth_factor)),
            "num_attention_heads": heads,
            "num_key_value_heads": max(
                divisor for divisor in range(1, size.num_key_value_heads + 1) if heads % divisor == 0
            ),
            "hidden_size": size.hidden_size // size.num_attention_heads * heads,
            "intermediate_size": max(1, round(size.intermediate_size * self.width_factor)),
        }
        given = {name: value for name, value in vars(self.dimensions).items() if value is not None}
        return dataclasses.replace(size, **scaled | given)


@dataclass
class SourceSettings:
    """One source of documents or conversations: embedded, local or remote files, or a hub data set."""

    name: str = ""  # part of file names; where it is missing it is made of the path
    type: Annotated[str, OneOf("pretrain", "finetune")] = "pretrain"  # texts, or conversations
    path: Annotated[str | None, Place(), Alias("dataset_name")] = (
        None  # "embedded" (name: prose, code, math), hub id, folder, or a builder ("json") with data_files
    )
    config: Annotated[str | None, Alias("dataset_config")] = None
    revision: str | None = None  # branch, tag or commit of a hub data set; None: the newest commit
    data_files: Annotated[Any, Place()] = None  # a path, URL or pattern, a list of them, or {split: paths}
    split: str = "train"
    validation_split: str | None = None  # the source's own split, whose documents are held out as validation
    text_column: Annotated[str, Template()] = "text"  # also nested, "meta.text", or "{title}\n\n{body}"
    columns: dict[str, str] = field(default_factory=dict)  # finetune: role → column; empty: by usual names
    sample_by: Annotated[str, OneOf("line", "paragraph", "document")] = "line"  # of text files
    filter: list[list[Any]] = field(default_factory=list)  # [column, operator, value] each, all must hold
    streaming: bool = False  # read a hub set's or remote file without keeping it
    weight: Annotated[float, In("(0, 1e9]")] = 1.0
    max_documents: Count | None = None  # the first records of `split`
    max_tokens: Count | None = None
    train_subset_ratio: Annotated[float | None, In("(0, 1]")] = None


@dataclass
class DataSettings:
    """Mixing, tokenization and packing."""

    dataset_configs: list[SourceSettings] = field(default_factory=list)
    tokenizer_name: Annotated[str | None, Place()] = (
        None  # None: a byte-level BPE is trained on the training split
    )
    vocab_size: Annotated[int, In("[257, 4194304]")] = 2048  # at least every byte, and the end of text
    block_size: Annotated[int, In("[2, 16777216]")] = 256  # tokens of one packed block
    processes: Count | None = None  # that tokenize; None: one for each core, where there is enough to do
    batch_size: Annotated[int, In("[1, 1048576]")] = 8  # blocks per device and forward pass
    max_tokens: Count | None = None  # of the training split; None: as many as the weights allow
    exhausted: Annotated[str, OneOf("stop", "repeat", "redistribute")] = "stop"  # where a source runs dry
    max_epochs: Annotated[float, In("[1, inf)")] = 4.0  # of a source in the mixture; more gives a warning
    packing: Annotated[str | None, OneOf("concatenate", "best_fit")] = (
        None  # of documents into blocks; None: best_fit where a source has conversations, else concatenate
    )
    validation_split_percentage: Annotated[float, In("[0, 100)")] = 5.0
    test_split_percentage: Annotated[float, In("(0, 100)")] = 5.0
    max_eval_tokens: Count = 65536  # of the validation and of the test split, each
    min_characters: Annotated[int, In("[0, inf)")] = 32
    max_document_characters: Count | None = None  # None: documents of any length
    long_documents: Annotated[str, OneOf("cut", "filter")] = "cut"  # what becomes of longer ones
    max_broken_fraction: Fraction = 0.01
    decontaminate: Annotated[str | None, Place()] = (
        None  # file of benchmark texts (`dynamic-transformers task-texts`): what quotes them is left out
    )
    cloze_examples: Annotated[int, In("[0, inf)")] = 64
    arithmetic_examples: Annotated[int, In("[0, inf)")] = 64
    output_dir: Annotated[str | None, Place()] = None  # None: run.output_dir/data/<digest of these settings>

    @property
    def has_conversations(self) -> bool:
        """Whether a source has conversations."""
        return any(source.type == "finetune" for source in self.dataset_configs)

    @property
    def packs_by_best_fit(self) -> bool:
        """What `packing` comes to."""
        return self.packing == "best_fit" or (self.packing is None and self.has_conversations)


@dataclass
class OptimizerSettings:
    """AdamW. Learning rates of the groups are multiples of `lr` (docs/architectures.md)."""

    lr: Annotated[float, In("(0, 10]")] = 3e-3
    router_lr_multiplier: Multiplier = 1.0
    prior_lr_multiplier: Multiplier = 1.0
    surprise_lr_multiplier: Multiplier = 3.0
    predictor_lr_multiplier: Multiplier = 1.0
    betas: Annotated[tuple[float, float], In("[0, 1)")] = (0.9, 0.95)
    eps: Annotated[float, In("(0, 1]")] = 1e-8
    weight_decay: Annotated[float, In("[0, 10]")] = 0.01
    warmup_fraction: Fraction = 0.01
    min_lr_fraction: Fraction = 0.0
    max_grad_norm: Positive = 1.0


@dataclass
class TrainingSettings:
    """The loop and when it ends. Exactly one of the three budgets is set."""

    mode: Annotated[str, OneOf("scratch", "pretrained")] = "scratch"
    max_steps: Count | None = None
    max_tokens: Positive | None = None
    max_flops: Positive | None = None
    gradient_accumulation_steps: Count = 1
    log_every: Count = 10
    eval_every: Steps = 0  # 0: only at the end
    checkpoint_every: Steps = 0  # 0: by time, and at the end
    checkpoint_minutes: Annotated[float, In("[0, inf)")] = 10.0  # that may pass without one; 0: no limit
    keep_checkpoints: Count | None = 3  # the last ones, and the one of the best evaluation; None: all
    max_skipped_steps: Steps = 10  # in a row, whose loss or gradient is not finite, before the run ends
    resume: Annotated[str, Place()] = "auto"  # auto, none (the old run is renamed), or a checkpoint folder
    reschedule: bool = False  # a run that goes on to another budget stretches its schedules over that one
    gradient_checkpointing: bool = False
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)


@dataclass
class EvaluationSettings:
    """Held-out loss, lm-eval suites and efficiency of an exported model."""

    tasks: list[str] = field(default_factory=lambda: ["quick_test"])
    task_dir: Annotated[str | None, Place()] = None  # folder of task files of one's own (docs/extending.md)
    batch_size: Annotated[int, In("[1, 1048576]")] = 16
    dtype: Annotated[str | None, OneOf(*PRECISIONS)] = None  # of the model's weights; None: system.precision
    limit: Count | None = None
    num_fewshot: Annotated[int | None, In("[0, 1000]")] = None
    confirm_run_unsafe_code: bool = False

    @property
    def own_tasks(self) -> Path | None:
        """`task_dir` as a path."""
        return Path(self.task_dir) if self.task_dir else None


@dataclass
class TrackingSettings:
    """MLflow (on) and Weights & Biases (off)."""

    mlflow: bool = True
    mlflow_uri: str | None = None  # None: MLFLOW_TRACKING_URI, else sqlite in run.output_dir
    experiment: str = "dynamic-transformers"
    wandb: bool = False
    wandb_project: str = "dynamic-transformers"
    wandb_checkpoints: bool = False  # checkpoints as artifacts of W&B


@dataclass
class SystemSettings:
    """Hardware."""

    precision: Annotated[str, OneOf(*PRECISIONS)] = "fp32"
    device: Annotated[str, OneOf("auto", "cpu", "cuda")] = "auto"
    compile: bool = False  # training forwards by torch.compile, as one graph; needs a C++ compiler


@dataclass
class StudySettings:
    """What is compared: labelled variants of one configuration, at each point of a grid (study.py)."""

    baseline: str | None = "standard"  # what ratios and differences refer to; null: there are none
    variants: dict[str, list[str] | None] = field(default_factory=dict)  # label → overrides; null: left out
    grid: dict[str, Any] = field(default_factory=dict)  # setting → list of values
    variant: str | None = None  # the one that this run is; null: none of them
    overrides: list[str] = field(default_factory=list)  # of that variant
    point: dict[str, Any] = field(default_factory=dict)  # where in the grid this run is


@dataclass
class Settings:
    """All settings of one run."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    system: SystemSettings = field(default_factory=SystemSettings)
    study: StudySettings = field(default_factory=StudySettings)

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.run.output_dir) / self.run.name

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, as written into manifests."""
        return dataclasses.asdict(self)

    def to_record(self) -> dict[str, Any]:
        """The same for records and pages: of a plugin's files their SHA-256."""
        values = self.to_dict()
        if plugin := self.model.plugin:
            values["model"]["plugin"] = {
                name: hashlib.sha256(text.encode()).hexdigest() for name, text in plugin.items()
            }
        return values

    def to_json(self) -> str:
        """One JSON string: how settings travel through pipeline parameters."""
        return json.dumps(self.to_dict())
