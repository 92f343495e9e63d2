"""Models whose code lies beside their weights, so that they load where this package is not installed."""

import sys

from transformers import PreTrainedModel

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
        self.config.auto_map = self.auto_map()
        super().save_pretrained(*arguments, **options)

    def auto_map(self) -> dict[str, str]:
        """Auto class of transformers → file and class beside the weights."""
        config = type(self.config)
        name = config.__name__.removesuffix("Config")
        # By name, since FSDP puts a class of its own before the model's.
        module = next(kind.__module__ for kind in type(self).__mro__ if kind.__name__.startswith(name))
        classes = {auto: f"{name}{kind}" for auto, kind in KINDS.items()}
        return {"AutoConfig": f"{file_of(config.__module__)}.{config.__name__}"} | {
            auto: f"{file_of(module)}.{kind}"
            for auto, kind in classes.items()
            if hasattr(sys.modules[module], kind)
        }


def file_of(module: str) -> str:
    """The last part of a module's name."""
    return module.rpartition(".")[2]
