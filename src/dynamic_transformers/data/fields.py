"""What a source makes of a record's columns: a text or a conversation, unless its filter drops the record."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynamic_transformers.constraints import template_parts
from dynamic_transformers.data.rows import Row
from dynamic_transformers.settings import CONVERSATIONS, SourceSettings

MISSING = object()
USUAL_COLUMNS = {
    "messages": ("messages", "conversations"),
    "instruction": ("instruction",),
    "input": ("input",),
    "prompt": ("prompt", "question", "query"),
    "response": ("response", "answer", "completion", "output"),
    "output": ("output", "response", "answer", "completion"),
    "system": ("system", "system_prompt"),
}
ROLES = ("system", "user", "assistant", "tool")
# What templates read of a message; anything else, a time or a rating, would tell apart what is the same.
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    **{"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le},
    **{">": operator.gt, ">=": operator.ge},
}
TRUTHS = {"true": True, "false": False}


class NoSuchColumnError(ValueError):
    """A column is not there.

    setting: which names it, and how, of the source's settings.
    """

    def __init__(self, setting: str, reason: str = "no such column") -> None:
        super().__init__(f"{setting}: {reason}")
        self.setting, self.reason = setting, reason


class Fields:
    """Makes the rows of a source of the rows of its files.

    Attributes:
        needed: names of the columns to read, nested ones with dots.

    Args:
        columns: that there are; empty where no record could be read, then none is missed.

    Raises:
        NoSuchColumnError: a column that the settings name is not there, or none is a conversation.
    """

    def __init__(self, source: SourceSettings, columns: Sequence[str]) -> None:
        self._conditions = [(name, symbol, value) for name, symbol, value in source.filter]
        used = {f"filter={condition}": [condition[0]] for condition in source.filter}
        if source.type == "finetune":
            roles = source.columns or _usual(columns)
            self._make = Conversation(roles)
            used |= {f"columns.{role}={column}": [column] for role, column in roles.items()}
        else:
            column = source.text_column
            parts = [(text, name or "") for text, name in template_parts(column)]
            # A column of exactly that name is no template.
            if column in columns or not any(name for _, name in parts):
                self._make = Column(column)
                used[f"text_column={column}"] = [column]
            else:
                self._make = Template(parts)
                used[f"text_column={column}"] = [name for _, name in parts if name]
        for setting, names in used.items():
            for name in names:
                if columns and name not in columns:
                    raise NoSuchColumnError(setting, "no such column" if len(names) == 1 else f"no {name!r}")
        self.needed = list(dict.fromkeys(name for names in used.values() for name in names))

    def __call__(self, row: Row, file: str | None, before: int) -> Row:
        """The row of the source, which shows its file as `file`, and in it the lines in front of its part."""
        number = row.number + before
        if row.fault:
            return row._replace(file=file, number=number)
        record = row.value
        try:
            if not all(_holds(record, condition) for condition in self._conditions):
                return Row(None, file, number, dropped=True)
            return Row(self._make(record), file, number)
        except BrokenError as error:
            return Row(error.value, file, number, str(error))


class BrokenError(ValueError):
    """A record of which nothing can be made; `value` is what was there."""

    def __init__(self, reason: str, value: Any) -> None:
        super().__init__(reason)
        self.value = value


class Column:
    """The text of a column."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, record: Mapping[str, Any]) -> str:
        """The text of a record."""
        value = value_of(record, self._name)
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            raise BrokenError("list instead of str; conversations are read with type: finetune", value)
        return text_of(record, self._name)


class Template:
    """A text of columns, numbers too: pairs of fixed text and the column behind it, '' for none."""

    def __init__(self, parts: Sequence[tuple[str, str]]) -> None:
        self._parts = parts

    def __call__(self, record: Mapping[str, Any]) -> str:
        """The text of a record."""
        return "".join(fixed + (self._filled(record, name) if name else "") for fixed, name in self._parts)

    def _filled(self, record: Mapping[str, Any], name: str) -> str:
        value = value_of(record, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if number else text_of(record, name, f"{name}: ")


class Conversation:
    """Messages of the columns that hold the roles of a conversation.

    Each is {"role": "system" | "user" | "assistant" | "tool", "content": text}, with what else it holds of
    MESSAGE_KEYS.
    """

    def __init__(self, roles: Mapping[str, str]) -> None:
        self._roles = roles

    def __call__(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The conversation of a record."""
        roles = self._roles
        if "messages" in roles:
            messages = _messages(value_of(record, roles["messages"]))
        else:
            asked = self._text(record, roles.get("prompt") or roles["instruction"])
            if more := self._optional(record, "input"):
                asked = f"{asked}\n\n{more}"
            answer = self._text(record, roles.get("response") or roles["output"])
            system = self._optional(record, "system")
            messages = [{"role": "system", "content": system}] if system else []
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        if not any(message["role"] == "assistant" for message in messages):
            raise BrokenError("no turn of the assistant", messages)
        return messages

    def _optional(self, record: Mapping[str, Any], role: str) -> str | None:
        """Text of a column that may be empty or null."""
        name = self._roles.get(role)
        value = value_of(record, name) if name else MISSING
        return None if name is None or value is None or value is MISSING else self._text(record, name)

    def _text(self, record: Mapping[str, Any], name: str) -> str:
        return text_of(record, name, f"{name}: ")


def value_of(record: Mapping[str, Any], name: str) -> Any:
    """Value of a column, of that name or nested by its dots; MISSING where there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def text_of(record: Mapping[str, Any], name: str, place: str = "") -> str:
    """The text of a column; what is wrong with it begins with `place`.

    Raises:
        BrokenError: there is none, or it is no text.
    """
    value = value_of(record, name)
    if value is MISSING:
        raise BrokenError(f"no {name!r}", record)
    return checked(value, place)


def checked(value: Any, place: str) -> str:
    """A value that is a text, all of UTF-8.

    Raises:
        BrokenError: it is not.
    """
    if not isinstance(value, str):
        raise BrokenError(f"{place}{type(value).__name__} instead of str", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BrokenError(f"{place}no valid UTF-8", value) from error
    return value


def _messages(values: Any) -> list[dict[str, Any]]:
    """Messages as OpenAI's interface has them, of those or of ShareGPT's."""
    if values is MISSING or not isinstance(values, list | tuple):
        kind = "no" if values is MISSING else f"{type(values).__name__} instead of"
        raise BrokenError(f"{kind} list of messages", None if values is MISSING else values)
    messages = []
    for number, value in enumerate(values, 1):
        place = f"message {number}: "
        if not isinstance(value, Mapping):
            raise BrokenError(f"{place}{type(value).__name__} instead of an object", values)
        # Tables have every key in every message, null where it has none.
        message = {key: value[key] for key in MESSAGE_KEYS if value.get(key) is not None}
        if "role" not in message and "from" in value:
            message["role"] = SHAREGPT_ROLES.get(value["from"], value["from"])
            message["content"] = value.get("value")
        if message.get("role") not in ROLES:
            raise BrokenError(f"{place}role {message.get('role')!r}; known are {', '.join(ROLES)}", values)
        if message.get("content") is None and message.get("tool_calls"):
            message["content"] = None
        else:
            checked(message.get("content"), f"{place}content: ")
        messages.append(message)
    return messages


def _usual(columns: Sequence[str]) -> dict[str, str]:
    """Role → column, by the names that columns of conversations usually have."""
    found = {
        role: name
        for role, names in USUAL_COLUMNS.items()
        for name in [next((name for name in names if name in columns), None)]
        if name
    }
    for needed, optional in CONVERSATIONS.items():
        if set(needed) <= set(found):
            return {role: found[role] for role in (*needed, *optional) if role in found}
    if not columns:
        return {"messages": "messages"}
    raise NoSuchColumnError(
        "columns",
        "no conversation by the usual names (messages, prompt and response, or instruction and output)",
    )


def _holds(record: Mapping[str, Any], condition: tuple[str, str, Any]) -> bool:
    """Whether a condition holds; nothing does for null or what is not there."""
    name, symbol, wanted = condition
    value = value_of(record, name)
    if value is None or value is MISSING:
        return False
    try:
        if isinstance(wanted, list):
            return any(operator.eq(*_alike(value, entry)) for entry in wanted) == (symbol == "in")
        return bool(COMPARISONS[symbol](*_alike(value, wanted)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        kind = type(value).__name__
        raise BrokenError(f"filter: cannot tell whether {name} ({kind}) {symbol} {wanted}", record) from error


def _alike(value: Any, wanted: Any) -> tuple[Any, Any]:
    """A value and what a filter compares it with, of one kind where one of them is written as text."""
    if isinstance(value, str) and not isinstance(wanted, str):
        return TRUTHS[value.lower()] if isinstance(wanted, bool) else float(value), wanted
    if not isinstance(wanted, str) or isinstance(value, str):
        return value, wanted
    if isinstance(value, bool):
        return value, TRUTHS[wanted.lower()]
    if isinstance(value, int | float):
        return value, float(wanted)
    return value, type(value).fromisoformat(wanted)  # dates and times
