"""docs/extending.md: its files are written, its commands run, and what they print is what the page shows."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dynamic_transformers.settings import PROJECT_ROOT
from tests.pages import BLOCK, run_commands, write_files

PAGE = (PROJECT_ROOT / "docs" / "extending.md").read_text()


def test_the_page_does_what_it_says(tmp_path):
    assert len(BLOCK.findall(PAGE)) * 2 == PAGE.count("```")
    write_files(PAGE, tmp_path)
    _, data, *independent, comparison, _ = PAGE.split("\n## ")
    run_commands(data, tmp_path)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_commands, independent, [tmp_path] * len(independent)))
    run_commands(comparison, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```bash\nfalse\ntrue\n```", "false"),
        ("```bash\necho 12 of 3.5\n```\n```text\n13 of 3.5\n```", "not printed: 13 of 3.5"),
        ("```bash\necho 12 of 3.5\n```\n```text\n12 of 4.5\n```", "not printed: 12 of 4.5"),
        ("```python\nprint(1)\n```", "neither a named file nor a command"),
    ],
)
def test_a_page_that_does_something_else_fails(text, told, tmp_path):
    with pytest.raises(AssertionError, match=told):
        run_commands(text, tmp_path)


def test_times_rounding_and_places_may_differ(tmp_path):
    run_commands(
        "```bash\necho 10:00:00 12   of 3.5 '│' to: /a/b/c.txt\n```\n"
        "```text\n15:33:01 12 of 3.6 │ to: b/c.txt\n```",
        tmp_path,
    )
