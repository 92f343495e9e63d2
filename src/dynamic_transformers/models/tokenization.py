"""The tokenizer of an exported standard model, for programs that load it with `trust_remote_code=True`."""

from transformers import PreTrainedTokenizerFast


class ExactTokenizer(PreTrainedTokenizerFast):
    """Reads tokenizer.json as it is; transformers' class for Qwen2 would normalize texts (NFC)."""
