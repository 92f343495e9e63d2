"""Jinja templates of pages and cards, which lie beside the code that fills them."""

from __future__ import annotations

from pathlib import Path

import jinja2


def template(name: str, *folders: Path) -> jinja2.Template:
    """The template `name` of the first of these folders that has it; it may include others of them.

    A name that it is not given is an error; in HTML what it is given is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
