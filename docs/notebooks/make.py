"""Run first_sae.py as a notebook and write first_sae.ipynb and first_sae.md: `python docs/notebooks/make.py [FOLDER]`.

The source has a cell after each `# %%` or `# %% [markdown]`. It runs in an empty folder, through a Jupyter kernel. The
page (`.md`, with its plots in `first_sae_files/`) is what the documentation site shows.
"""

from __future__ import annotations

import base64
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NAME = "first_sae"
# Runs before the first cell: plots of a moderate size, without the version that wrote them.
SETUP = (
    "%config InlineBackend.print_figure_kwargs = {'bbox_inches': 'tight', 'metadata': {'Software': None}, 'dpi': 80}"
)


def cells_of(source: str) -> list[tuple[str, str]]:
    """(markdown or code, text) of the cells of a percent script."""
    cells = []
    for part in source.split("# %%")[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = (line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines())
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", body.strip()))
    return cells


def executed(source: str, folder: Path) -> Any:
    """The notebook with its outputs, run in a folder."""
    import nbformat
    from nbclient import NotebookClient

    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [make[kind](text) for kind, text in [("code", SETUP), *cells_of(source)]]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    notebook.cells = notebook.cells[1:]
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)  # times
        cell.execution_count = number + 1
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def page(notebook: Any, files: Path) -> str:
    """The notebook as Markdown; its plots become files."""
    parts = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if output.output_type == "stream":
                parts.append(f"```text\n{output.text.rstrip()}\n```")
            elif "image/png" in output.get("data", {}):
                files.mkdir(parents=True, exist_ok=True)
                (files / f"{number}.png").write_bytes(base64.b64decode(output.data["image/png"]))
                parts.append(f"![Output of the cell above]({files.name}/{number}.png)")
    return "\n\n".join(parts) + "\n"


def main(out: Path) -> None:
    """Write the notebook and its page."""
    import nbformat

    source = (HERE / f"{NAME}.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(source, Path(folder))
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out / f"{NAME}.ipynb")
    shutil.rmtree(out / f"{NAME}_files", ignore_errors=True)
    (out / f"{NAME}.md").write_text(page(notebook, out / f"{NAME}_files"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
