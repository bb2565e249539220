"""Write docs/reference: `python docs/generate [OUT]` (`make docs` runs it first).

Every other module of this folder has `render() -> dict[str, str]`: the texts of its pages by file name. The pages are committed; a test
renders them again and compares, so that the reference can't say what the code no longer does. index.md, which lists them, is made here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REFERENCE = HERE.parent / "reference"
_INDEX = """# Reference

These pages are generated from the code by `make docs`, and a test compares them with it.

"""


def render_all() -> dict[str, str]:
    """Return the texts of all pages by file name.

    Raises:
        ValueError: two modules make a page of the same name.
    """
    pages: dict[str, str] = {}
    for path in sorted(HERE.glob("*.py")):
        if path.name == Path(__file__).name:
            continue
        spec = importlib.util.spec_from_file_location(f"docs_generate_{path.stem}", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, text in module.render().items():
            if name in pages:
                raise ValueError(f"{path.name} makes {name}, which another module makes too; rename one of the pages")
            pages[name] = text
    links = [f"- [{text.splitlines()[0].removeprefix('# ')}]({name})" for name, text in sorted(pages.items())]
    return {**pages, "index.md": _INDEX + "\n".join(links) + "\n"}


def write(out: Path) -> None:
    """Write the pages into a folder, and remove pages there that nothing makes any more."""
    pages = render_all()
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else REFERENCE)
