"""Points the Colab badges and the setup cells at a repository: `make badges REPO=owner/name`.

`tools/setup_cell.py` is the text of every notebook's setup cell and the one place that names the
repository; README.md and the notebooks follow it. A second run changes nothing.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST_LINE = "# @title Setup"
BADGE = re.compile(
    r"(\[!\[[^]]*\]\([^)]*colab-badge\.svg\)\]\(https://colab\.research\.google\.com/github/)[^/)]+/[^/)]+"
)


def setup_cell(root: Path = ROOT) -> str:
    """The text that every notebook's setup cell must have."""
    return (root / "tools" / "setup_cell.py").read_text().strip()


def repository(root: Path = ROOT) -> str:
    """owner/name, as the setup cell has it."""
    return re.search(r'REPOSITORY = "https://github\.com/([^"]+)"', setup_cell(root)).group(1)


def badge(notebook: str, repo: str) -> str:
    """The Markdown of the Colab badge of one notebook, `notebook` being its file name."""
    url = f"https://colab.research.google.com/github/{repo}/blob/main/notebooks/{notebook}"
    return f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"


def retarget(text: str, old: str, new: str) -> str:
    """The text with its badges, and its links to the old repository, pointing at the new one."""
    text = BADGE.sub(rf"\g<1>{new}", text)
    return re.sub(rf"(github(?:\.com)?/){re.escape(old)}(?![\w-])", rf"\g<1>{new}", text)


def retarget_notebook(text: str, old: str, new: str, setup: str) -> str:
    """The same for the JSON of a notebook, whose setup cell becomes `setup`."""
    notebook = json.loads(text)
    changed = False
    for cell in notebook["cells"]:
        before = "".join(cell["source"])
        after = before
        if cell["cell_type"] == "markdown":
            after = retarget(before, old, new)
        elif before.startswith(FIRST_LINE):
            after = setup
        if after != before:
            cell["source"] = after.splitlines(keepends=True)
            changed = True
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n" if changed else text


def rewrite(root: Path, new: str) -> list[Path]:
    """Rewrites the files that need it and returns them."""
    old = repository(root)
    setup = retarget(setup_cell(root), old, new)
    texts = {root / "tools" / "setup_cell.py": setup + "\n"}
    texts[root / "README.md"] = retarget((root / "README.md").read_text(), old, new)
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        texts[path] = retarget_notebook(path.read_text(), old, new, setup)
    changed = [path for path, text in texts.items() if path.read_text() != text]
    for path in changed:
        path.write_text(texts[path])
    return changed


def main(arguments: list[str], root: Path = ROOT) -> int:
    repo = arguments[0] if len(arguments) == 1 else ""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/(?!\.{1,2}$)[A-Za-z0-9._-]+(?<!\.git)", repo):
        print(f"Name the repository as on GitHub: make badges REPO=owner/name (got {repo!r}).", file=sys.stderr)
        return 2
    for path in rewrite(root, repo):
        print(f"rewrote {path.relative_to(root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
