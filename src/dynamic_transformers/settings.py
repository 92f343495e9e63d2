"""Typed settings. Everything receives a `Settings` or one of its parts, never a DictConfig.

`configure.py` makes them from Hydra's configuration and checks them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROJECT_ROOT = Path(__file__).resolve().parents[2]

ARCHITECTURES = ("standard", "mod", "sdt", "stt")
ATTENTION = ("sdpa", "eager")
SELECTION_RULES = ("threshold", "predictor", "calibrated_predictor", "aux", "topk")


class UserError(ValueError):
    """A user's mistake: reported in one line, exit code 2."""


def holds_credentials(address: str) -> bool:
    """Whether a URL holds a user, a password or a token.

    Raises:
        ValueError: it is no URL.
    """
    return "@" in urlsplit(address).netloc


@dataclass
class RunSettings:
    """Name, place and seed of a run. The run folder is `output_dir/name`."""

    name: str = "default"
    output_dir: str = "outputs"
    seed: int = 0


@dataclass
class Dimensions:
    """Dimensions of the Qwen2 backbone."""

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


@dataclass
class MoDSettings:
    """Mixture-of-Depths options (architectures.md, section 3)."""

    gate: str = "sigmoid"  # sigmoid | raw (the paper's formula)
    routing: str = "learned"  # learned | random (a control)
    aux_weight: float = 0.01  # of the router's own membership loss; docs/selection_rules.md
    z_loss_weight: float = 0.0


@dataclass
class SurpriseSettings:
    """Surprise gate of SDT and STT (architectures.md, section 4)."""

    offset_ce_init: float = 1.025
    multiplier_cu_init: float = 1.1
    window: int = 100
    beta_start: float = 0.1
    beta_end: float = 100.0
    beta_warmup_steps: int = 100
    beta_schedule: str = "linear"  # linear | cosine
    normalize: str = "none"  # none | moving_average | state
    prior_factor: float = 0.0625
    prior_loss_weight: float = 0.05


@dataclass
class STTSettings:
    """Options of STT alone (architectures.md, section 6)."""

    targets: str = "topk"  # topk | threshold
    target_threshold: float = 0.75
    train_output: str = "sparse"  # sparse | dense
    teacher_detach: bool = False
    student_weight: float = 0.01
    gate_mean_weight: float = 0.001  # only in threshold mode


@dataclass
class ModelSettings:
    """Which architecture, how large, and how it routes."""

    type: str = "standard"
    size: str = "tiny"  # one of SIZES
    dimensions: Dimensions | None = None  # None: those of `size`
    capacity: float | None = None  # None: 0.125 for MoD, 0.5 for SDT and STT
    capacity_warmup_steps: int = 0  # over which training's capacity falls from 1 to γ
    selection_rule: str | None = None  # None: the architecture's measured default
    predictor_weight: float = 0.0
    attention: str = "sdpa"  # sdpa | eager (for reference)
    mod: MoDSettings = field(default_factory=MoDSettings)
    surprise: SurpriseSettings = field(default_factory=SurpriseSettings)
    stt: STTSettings = field(default_factory=STTSettings)
    pretrained: str | None = None  # folder or hub name of a Qwen2 checkpoint (training.mode=pretrained)

    @property
    def backbone(self) -> Dimensions:
        """The dimensions in force."""
        return self.dimensions or SIZES[self.size]


@dataclass
class SourceSettings:
    """One source of documents: `embedded` (prose, code, math), or anything `datasets.load_dataset` reads."""

    name: str = "???"
    type: str = "hub"  # embedded | hub
    path: str | None = None  # hub id, or a builder ("json", "text", "parquet") together with data_files
    config: str | None = None
    data_files: Any = None
    split: str = "train"
    text_column: str = "text"
    weight: float = 1.0
    max_documents: int | None = None


@dataclass
class DataSettings:
    """Mixing, tokenization and packing."""

    dataset_configs: list[SourceSettings] = field(default_factory=list)
    tokenizer_name: str | None = None  # None: a byte-level BPE is trained on the training split
    vocab_size: int = 2048
    block_size: int = 256  # tokens of one packed block
    batch_size: int = 8  # blocks per device and forward pass
    max_tokens: int | None = None  # of the training split; None: as many as the weights allow
    validation_split_percentage: float = 5.0
    test_split_percentage: float = 5.0
    max_eval_tokens: int = 65536  # of the validation and of the test split, each
    min_characters: int = 32
    max_broken_fraction: float = 0.01
    cloze_examples: int = 64
    arithmetic_examples: int = 64
    output_dir: str | None = None  # None: run.output_dir/data/<digest of these settings>


@dataclass
class OptimizerSettings:
    """AdamW. Learning rates of the groups are multiples of `lr` (architectures.md, section 7)."""

    lr: float = 3e-3
    router_lr_multiplier: float = 1.0
    prior_lr_multiplier: float = 1.0
    surprise_lr_multiplier: float = 3.0
    predictor_lr_multiplier: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_fraction: float = 0.01
    min_lr_fraction: float = 0.0
    max_grad_norm: float = 1.0


@dataclass
class TrainingSettings:
    """The loop and when it ends. Exactly one of the three budgets is set."""

    mode: str = "scratch"  # scratch | pretrained
    max_steps: int | None = None
    max_tokens: float | None = None
    max_flops: float | None = None
    gradient_accumulation_steps: int = 1
    log_every: int = 10
    eval_every: int = 0  # steps; 0: only at the end
    checkpoint_every: int = 0  # steps; 0: by time, and at the end
    checkpoint_minutes: float = (
        10.0  # a checkpoint after so much time without one; 0: by steps, and at the end
    )
    keep_checkpoints: int | None = 3  # the last ones, and the one of the best evaluation; None: all
    max_skipped_steps: int = 10  # in a row, whose loss or gradient is not finite, before the run ends
    resume: str = "auto"  # auto | none (begin anew; the old run is renamed) | a checkpoint folder
    reschedule: bool = False  # a run that goes on to another budget stretches its schedules over that one
    gradient_checkpointing: bool = False
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)


@dataclass
class EvaluationSettings:
    """Held-out loss, lm-eval suites and efficiency of an exported model."""

    tasks: list[str] = field(default_factory=lambda: ["quick_test"])
    batch_size: int = 16
    limit: int | None = None
    num_fewshot: int | None = None
    confirm_run_unsafe_code: bool = False


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

    precision: str = "fp32"  # fp32 | bf16
    device: str = "auto"  # auto | cpu | cuda
    num_workers: int = 0


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

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.run.output_dir) / self.run.name

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, as written into manifests."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """One JSON string: how settings travel through pipeline parameters."""
        return json.dumps(self.to_dict())
