"""What every notebook must keep to. Each check returns its problems, each with what to do about it.

Checks take a notebook as `nbformat` reads it; tests/test_hygiene.py runs them over the collection,
tests/test_checks.py over small notebooks that break each rule.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

import nbformat

from tools.badges import FIRST_LINE, badge

MAX_BYTES = 1_500_000
MAX_LINES = 12
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
WIDGET = "application/vnd.jupyter.widget-view+json"
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
ABSOLUTE = re.compile(r"(?<![\w.~/-])/(?:work|home|Users|tmp|root)\b|\bC:\\")
BUDGET_WORDS = ("Download", "RAM", "VRAM", "T4", "CPU")


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that the code of an executed notebook printed, without what it wrote to stderr."""
    outputs = (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    return "\n".join(one.text for one in outputs if one.output_type == "stream" and one.name == "stdout")


def numbers(text: str, pattern: str) -> list[float]:
    """The numbers that the groups of the pattern find in `text`, first match; a comma between thousands is dropped."""
    found = re.search(pattern, text)
    assert found, f"the page no longer prints {pattern!r}"
    return [float(number.replace(",", "")) for number in found.groups()]


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def name_of(notebook, cell) -> str:
    """How a message names a cell: its place, counted from 0 as nbval does, and its first line."""
    start = cell.source.strip().splitlines()[0][:50] if cell.source.strip() else "empty"
    return f"cell {notebook.cells.index(cell)} ({start})"


def has_picture(output) -> bool:
    return any(kind in output.get("data", {}) for kind in PICTURES)


def texts(cell) -> list[str]:
    """Everything in a cell that reads as text: its source and its text outputs."""
    found = [cell.source]
    for output in cell.get("outputs", []):
        found.append(output.get("text", ""))
        found += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return found


def opening(notebook) -> str:
    """The Markdown above the first code cell."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            break
        cells.append(cell.source)
    return "\n\n".join(cells)


def prose(markdown: str) -> str:
    """Markdown with code and formulas taken out, where brackets are no links."""
    for pattern in (r"(?ms)^\s*```.*?^\s*```", r"`[^`\n]*`", r"(?s)\$\$.*?\$\$", r"(?<!\\)\$[^$\n]+\$"):
        markdown = re.sub(pattern, "", markdown)
    return markdown


# What was run


def check_format(notebook) -> list[str]:
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        return [f"is no valid notebook ({str(error).splitlines()[0]}): open it in JupyterLab and save it again"]
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        return ["names a kernel other than python3, which others lack: choose Python 3 and save"]
    return []


def check_executed(notebook) -> list[str]:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        return [f"was not run once from top to bottom (execution counts {counts}): Restart and run all, save"]
    if not any(has_picture(output) for cell in code_cells(notebook) for output in cell.outputs):
        return ["stores no picture: Restart and run all, save with outputs"]
    return []


def check_errors(notebook) -> list[str]:
    return [
        f"{name_of(notebook, cell)} stores the error {output.ename}: mend the cell, Restart and run all, save"
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "error"
    ]


def check_widgets(notebook) -> list[str]:
    """GitHub shows no widgets and calls a notebook with stored widget state invalid."""
    problems = []
    if "widgets" in notebook.metadata:
        problems.append('stores widget state: delete "widgets" from the metadata')
    cells = code_cells(notebook)
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        seen = [index for index, output in enumerate(cell.outputs) if WIDGET in output.get("data", {})]
        after = cell.outputs[seen[-1] :] + (following.outputs if following else []) if seen else []
        if seen and not any(has_picture(output) for output in after):
            problems.append(
                f"{name_of(notebook, cell)} shows a widget, which stays blank on GitHub: show a picture of its "
                "default run after it (for a progress bar: use tqdm, not tqdm.auto)"
            )
    return problems


def check_secrets(notebook) -> list[str]:
    problems = []
    for cell in notebook.cells:
        for text in texts(cell):
            if TOKEN.search(text):
                problems.append(f"{name_of(notebook, cell)} holds a Hugging Face token: revoke it, then take it out")
            if found := ABSOLUTE.search(text):
                line = text[text.rfind("\n", 0, found.start()) + 1 :].splitlines()[0][:80]
                problems.append(f"{name_of(notebook, cell)} holds the path of one machine: make it relative ({line})")
    return problems


def check_size(notebook) -> list[str]:
    size = len(nbformat.writes(notebook).encode())
    if size > MAX_BYTES:
        return [f"has {size:,} bytes, {MAX_BYTES:,} are allowed: show fewer or smaller pictures"]
    return []


# How it opens


def check_badge(notebook, file_name: str, repo: str) -> list[str]:
    expected = badge(file_name, repo)
    if not notebook.cells or notebook.cells[0].cell_type != "markdown" or expected not in notebook.cells[0].source:
        return [f"lacks its Colab badge in the first cell: run `make badges REPO={repo}`, or put there {expected}"]
    return []


def check_promise(notebook) -> list[str]:
    """A title, and at least one plain sentence that says what you will have done at the end."""
    lines = [line.strip() for line in prose(opening(notebook)).splitlines()]
    if not any(line.startswith("# ") for line in lines):
        return ["has no title above its first code cell: begin with a line `# Title`"]
    if not any(re.match(r"[\w*]", line) and len(line) > 30 and re.search(r"[.!?]\**$", line) for line in lines):
        return ["makes no promise above its first code cell: say in one sentence what the reader will see happen"]
    return []


def check_budget(notebook) -> list[str]:
    table = "\n".join(line for line in opening(notebook).splitlines() if line.strip().startswith("|"))
    missing = [word for word in BUDGET_WORDS if not re.search(rf"\b{word}\b", table, re.IGNORECASE)]
    if missing:
        return [f"has no budget table above its first code cell that names {', '.join(missing)}: add it"]
    return []


def check_setup(notebook, setup: str) -> list[str]:
    cells = code_cells(notebook)
    found = [cell for cell in cells if cell.source.startswith(FIRST_LINE)]
    if len(found) != 1 or found[0] is not cells[0]:
        return [f"must have one setup cell ({FIRST_LINE}), and as its first code cell: copy tools/setup_cell.py there"]
    if found[0].source.strip() != setup:
        return ["has a setup cell of its own: run `make badges` with the repository that tools/setup_cell.py names"]
    return []


def check_config(notebook) -> list[str]:
    found = [cell for cell in code_cells(notebook) if "# @param" in cell.source]
    if len(found) > 1:
        return [f"has {len(found)} cells with # @param: keep one configuration cell, and set the rest in plain code"]
    return []


# How it reads


def check_code(notebook) -> list[str]:
    problems = []
    for cell in code_cells(notebook):
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]
        if not lines:
            problems.append(f"{name_of(notebook, cell)} has no code: delete it, or make it text")
        if len(lines) > MAX_LINES and not cell.source.startswith("# @title"):
            problems.append(
                f"{name_of(notebook, cell)} has {len(lines)} lines of code, {MAX_LINES} are allowed: split it, "
                "or move what distracts into helpers"
            )
        if any(line.rstrip().endswith(";") for line in lines):
            problems.append(f"{name_of(notebook, cell)} ends a line with a semicolon: assign the value to _ instead")
    return problems


def alt_problems(markdown: str) -> list[str]:
    """Pictures in a text that say nothing to those who cannot see them."""
    markdown = prose(markdown)
    found = [target for alt, target in re.findall(r"!\[([^]]*)\]\(([^)]*)\)", markdown) if not alt.strip()]
    found += [tag for tag in re.findall(r"<img\b[^>]*>", markdown) if not re.search(r'\balt="[^"]+"', tag)]
    return [f"shows {picture[:60]} without alt text: say in a few words what it shows" for picture in found]


def link_problems(markdown: str, folder: Path) -> list[str]:
    """Links that cannot work: with spaces, of an unknown kind, or to a file that is not there."""
    markdown = prose(markdown)
    targets = re.findall(r"\]\(([^)]*)\)", markdown) + re.findall(r'(?:src|href)="([^"]*)"', markdown)
    problems = []
    for target in targets:
        link = re.sub(r'\s+"[^"]*"$', "", target.strip())
        scheme, host, path, *_ = urlsplit(link)
        if not link or " " in link or scheme not in ("", "http", "https") or (scheme and "." not in host):
            problems.append(f"has the malformed link ({target}): write https://... or a relative path, with no spaces")
        elif not scheme and not link.startswith("#") and not (folder / path).exists():
            problems.append(f"links to {link}, which does not exist: mend the path")
    return problems


def check_text(notebook, folder: Path) -> list[str]:
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    return [
        f"{name_of(notebook, cell)} {problem}"
        for cell in cells
        for problem in alt_problems(cell.source) + link_problems(cell.source, folder)
    ]


def check_captions(notebook) -> list[str]:
    """A picture that code draws is described in one of three ways: by a comment of four words or
    more at the top of its cell, by a cell of prose right below it, or by alt text in the metadata
    of the output, `display(picture, metadata={"image/png": {"alt": "..."}})`."""
    problems = []
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type != "code":
            continue
        pictures = [output for output in cell.outputs if has_picture(output)]
        undescribed = [o for o in pictures if not any(o.get("metadata", {}).get(k, {}).get("alt") for k in PICTURES)]
        lines = [line for line in cell.source.splitlines() if line.strip() and "NBVAL_" not in line]
        comment = bool(lines) and lines[0].startswith("#") and len(lines[0].replace("@title", "").split()) > 4
        caption = below is not None and below.cell_type == "markdown" and re.match(r"[^#\s<|]", below.source)
        if undescribed and not comment and not caption:
            problems.append(
                f"{name_of(notebook, cell)} shows a picture that nothing describes: begin the cell with a comment "
                "that says what to see, or put a cell of prose below it"
            )
    return problems


def all_problems(notebook, path: Path, repo: str, setup: str) -> list[str]:
    """Every problem of one notebook, a line each."""
    if problems := check_format(notebook):
        return problems
    for check in (check_executed, check_errors, check_widgets, check_secrets, check_size):
        problems += check(notebook)
    problems += check_badge(notebook, path.name, repo) + check_setup(notebook, setup)
    for check in (check_promise, check_budget, check_config, check_code, check_captions):
        problems += check(notebook)
    return problems + check_text(notebook, path.parent)
