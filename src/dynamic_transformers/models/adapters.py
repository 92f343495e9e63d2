"""PEFT: adapters that keep thresholds and β, and one warning for routers that they leave untrained."""

import warnings
from typing import Any

from torch import nn
from transformers.utils.import_utils import is_peft_available

from .heads import ScoreHead

STATE = "routing_state"  # the module of the backbone that adapters save beside their own weights


class WithAdapters(nn.Module):
    """A routed model under PEFT: every adapter keeps its own thresholds and β, else it is another model."""

    def __setattr__(self, name: str, value: Any) -> None:
        """PEFT assigns `peft_config`, by adapter name, once an adapter is in place.

        The routing state then becomes one of the modules that are saved whole (`modules_to_save`).
        """
        super().__setattr__(name, value)
        # Without the second question transformers says that the exported file needs peft.
        if name == "peft_config" and is_peft_available():
            from peft.utils import ModulesToSaveWrapper

            class OwnState(ModulesToSaveWrapper):
                """Thresholds and β of each adapter."""

                def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
                    """The adapter to activate; without a state of its own it would move the model's.

                    Raises:
                        ValueError: it has none.
                    """
                    names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
                    if not set(names) & set(self.modules_to_save):
                        raise ValueError(
                            f"adapter {', '.join(names)} has no thresholds of its own: give it "
                            f"modules_to_save=['{STATE}']"
                        )
                    return super().check_set_adapter(adapter_name)

            backbone: Any = self.base_model
            for adapter, config in value.items():
                saved = list(getattr(config, "modules_to_save", None) or [])
                if STATE in saved or not hasattr(config, "modules_to_save"):
                    continue
                warn_of_untrained_routers(backbone, saved)
                config.modules_to_save = [*saved, STATE]
                state = OwnState(backbone.get_submodule(STATE), adapter)
                state.set_adapter(adapter, inference_mode=config.inference_mode)
                backbone.add_module(STATE, state)


def warn_of_untrained_routers(backbone: nn.Module, saved: list[str]) -> None:
    """One warning where an adapter trains and leaves parts of never trained routers as they are."""
    if not backbone.get_submodule(STATE).fresh:
        return
    parts = [
        part for router in backbone.get_submodule("routers").children() for part in router.named_children()
    ]
    left = {name for name, part in parts if name not in saved and stays_untrained(part)}
    if left:
        warnings.warn(
            "the routers of this model were never trained, and this adapter leaves parts of them as they "
            f"are: give it modules_to_save={sorted(left)}",
            stacklevel=2,
        )


def stays_untrained(part: nn.Module) -> bool:
    """Whether nothing in a router's part learns, or a score head in it does not, which adapters pass by."""
    heads = [module for module in part.modules() if isinstance(module, ScoreHead)]
    return not any(value.requires_grad for value in part.parameters()) or any(
        not head.weight.requires_grad for head in heads
    )
