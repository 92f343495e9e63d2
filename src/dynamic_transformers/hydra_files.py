"""Hydra's composition of configuration files: where they are looked for, and how one is read.

Hydra's own reader makes `False` of `no` and 20261125 of `2026_11_25`, and shows tracebacks. This one keeps
texts as they are written, and names file, line and key of a mistake.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra import compose, initialize
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynamic_transformers.reading import MisfitError, hint_at, read, with_own_names
from dynamic_transformers.settings import Settings, UserError

SCHEMA = "settings_schema"  # default.yaml begins with it, so that files can refer to every key


class TextLoader(yaml.SafeLoader):
    """YAML whose plain scalars stay text, but for null; a key that stands twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping of which each key stands once; what `<<` merges in may be given again."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """What YAML text says, scalars as text, and its nodes.

    Raises:
        UserError: not YAML, or a key twice; begins with `source`, and the line where there are several.
    """
    loader = TextLoader(text)
    try:
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark and "\n" in text.strip() else source
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        if "'\\t'" in reason:
            reason = "a tab; YAML indents by spaces"
        if "\n" not in text.strip():
            reason += "; a text with special characters is written in quotes"
        raise UserError(f"{place}: {reason}") from error
    finally:
        loader.dispose()


def read_file(file: Path, hint: Any, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file as a mapping, whose keys and values fit `hint`; keys are the fields' own names.

    Args:
        ignored: keys at the top that are not looked at.

    Raises:
        UserError: names file, and line or key.
    """
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line}: not UTF-8; save the file in that encoding") from error
    values, node = parse(text, str(file))
    try:
        if not isinstance(values, dict | None):
            raise MisfitError((), "must be a mapping of keys to values")
        values = values or {}
        kept = {name: value for name, value in values.items() if name not in ignored}
        _check(hint, kept, ())
        unread = {name: value for name, value in values.items() if name in ignored}
        return unread | with_own_names(hint, kept)
    except MisfitError as error:
        raise UserError(f"{file}:{_line(node, error.path)}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}: an alias stands within what it names") from error


def _check(hint: Any, values: Any, path: tuple[str | int, ...]) -> None:
    """As `read`, but an interpolation may stand for any value."""
    if isinstance(values, dict | list):
        for part, value in values.items() if isinstance(values, dict) else enumerate(values):
            _check(hint, value, (*path, part))
    elif not (isinstance(values, str) and "${" in values):
        read(hint_at(hint, path), values, path)


def _line(node: yaml.Node | None, path: tuple[str | int, ...]) -> int:
    line = node.start_mark.line if node else 0
    for part in path:
        found: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        if isinstance(node, yaml.MappingNode):
            found = {key.value: (key, value) for key, value in node.value}
        elif isinstance(node, yaml.SequenceNode):
            found = {index: (value, value) for index, value in enumerate(node.value)}
        if part not in found:  # it is merged in from elsewhere
            break
        key, node = found[part]
        line = key.start_mark.line
    return line + 1


class TextSource(ConfigSource):
    """A folder of configuration files, read by `read_file`."""

    @staticmethod
    def scheme() -> str:
        """How Hydra's search path names such a folder."""
        return "settings"

    def _file(self, config_path: str) -> Path:
        return Path(self.path) / self._normalize_file_name(config_path)

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file; one of a group, `data/hub`, holds that part of the settings, or its header's."""
        file = self._file(config_path)
        header = self._get_header_dict(file.read_bytes().decode(errors="replace"))
        package = header["package"] or config_path.rpartition("/")[0].replace("/", ".")
        parts = () if package in ("", "_global_") else tuple(package.split("."))
        try:
            hint = hint_at(Settings, parts)
        except MisfitError as error:
            raise UserError(f"{file}: the folder or @package is no part of the settings: {error}") from error
        values = read_file(file, hint, ignored=("defaults",))
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(values), header)

    def is_group(self, config_path: str) -> bool:
        """Whether it is a folder."""
        return (Path(self.path) / config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        """Whether it is a file."""
        return self._file(config_path).is_file()

    def available(self) -> bool:
        """Whether the folder is there."""
        return Path(self.path).is_dir()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names of the files and folders in a folder."""
        found: list[str] = []
        for entry in (Path(self.path) / config_path).iterdir():
            self._list_add_result(found, f"{config_path}/{entry.name}", entry.name, results_filter)
        return sorted(set(found))


class Folders(SearchPathPlugin):
    """The folders of the composition that is going on, first the one that wins."""

    paths: ClassVar[Sequence[Path]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders to Hydra's search path."""
        for path in self.paths:
            search_path.append("dynamic_transformers", f"{TextSource.scheme()}://{path.resolve()}")


def compose_files(folders: Sequence[Path], config_name: str, choices: Sequence[str]) -> dict[str, Any]:
    """Compose `config_name.yaml` with all that its defaults list names; interpolations stay as they are.

    Args:
        folders: where a file is looked for, in this order.
        choices: `group=option` each, such as `data=hub`.

    Raises:
        UserError: no such file, or a mistake in one.
    """
    Plugins.instance().register(TextSource)
    Plugins.instance().register(Folders)
    ConfigStore.instance().store(SCHEMA, Settings)
    Folders.paths = folders
    GlobalHydra.instance().clear()
    try:
        with warnings.catch_warnings(), initialize(config_path=None, version_base="1.3"):
            # `defaults: [default]` without `_self_` is how the README writes an experiment: the file wins.
            warnings.filterwarnings("ignore", message=".*missing `_self_`")
            composed = compose(config_name, overrides=list(choices))
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{config_name}.yaml: a defaults list leads back to its own file") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(lines[0] if lines else type(error).__name__) from error
    values = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}
