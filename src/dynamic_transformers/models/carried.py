"""Models whose code lies beside their weights, so that they load where this package is not installed."""

import sys
from types import ModuleType

from transformers import PreTrainedConfig, PreTrainedModel

KINDS = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
}


class CarriedCode(PreTrainedModel):
    """Stands first among a model's bases.

    The classes of a model share the prefix of its configuration's: `Qwen2MoDConfig`, `Qwen2MoDForCausalLM`.
    """

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        # What transformers asks before it copies the file of a model's class, and those that it imports.
        cls._auto_class = next((auto for auto, kind in KINDS.items() if cls.__name__.endswith(kind)), None)

    def save_pretrained(self, *arguments, **options) -> None:
        """As every model of transformers; config.json names the class and file of each auto class."""
        name = type(self.config).__name__.removesuffix("Config")
        given = type(self)
        # Not the one that FSDP puts before it: its file is torch's.
        own = next(kind for kind in given.__mro__ if kind.__name__.startswith(name))
        self.config.auto_map = auto_map(type(self.config), sys.modules[own.__module__])
        self.__class__ = own
        try:
            super().save_pretrained(*arguments, **options)
        finally:
            self.__class__ = given


def auto_map(config: type[PreTrainedConfig], code: ModuleType) -> dict[str, str]:
    """Auto class of transformers → file and class beside the weights, of those that `code` has."""
    name = config.__name__.removesuffix("Config")
    classes = {auto: f"{name}{kind}" for auto, kind in KINDS.items()}
    return {"AutoConfig": f"{file_of(config.__module__)}.{config.__name__}"} | {
        auto: f"{file_of(code.__name__)}.{kind}" for auto, kind in classes.items() if hasattr(code, kind)
    }


def file_of(module: str) -> str:
    """The last part of a module's name."""
    return module.rpartition(".")[2]
