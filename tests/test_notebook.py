"""Notebooks run as notebooks: the one for Colab, with its outputs in the file, and those of the documentation."""

import ast
import base64
import json
import os
import re
import struct
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
COLAB = ROOT / "notebooks" / "fipa_colab.ipynb"
CELLS = json.loads(COLAB.read_text())["cells"]
DOCS = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "index")
CELL = re.compile(r"^```{code-cell} ipython3\n(?:---\n.*?^---\n|:tags:.*?\n\n)?(.*?)^```", re.DOTALL | re.MULTILINE)
PICTURES = 4  # of the Colab notebook at least


def source(cell):
    return "".join(cell["source"])


def code_of(cells):
    return [source(cell) for cell in cells if cell["cell_type"] == "code"]


def pictures(cells):
    """The PNGs, decoded, among the outputs of cells."""
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]


def executed(codes, folder):
    """The cells of a notebook of these codes, after a kernel has run it in a folder."""
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -r docs/requirements.txt")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "MPLBACKEND")}
    environment = inherited | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    # The kernel's own diagnostics say on which transport it listens, which is nobody's warning here.
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return notebook.cells


@pytest.fixture(scope="module")
def install():
    """The functions of the install cell, without what it does."""
    tree = ast.parse(code_of(CELLS)[0])
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.FunctionDef))]
    tree.body += ast.parse("from pathlib import Path").body
    names = {}
    exec(compile(tree, "the install cell", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("https://host/owner/name", "fipa_jax[experiments] @ git+https://host/owner/name"),
        ("git+https://host/owner/name@v1", "fipa_jax[experiments] @ git+https://host/owner/name@v1"),
        ("fipa_jax", "fipa_jax[experiments]"),
        ("fipa-jax==0.2.0", "fipa_jax[experiments]==0.2.0"),
        ("fipa_jax-0.2.0-py3-none-any.whl", "fipa_jax-0.2.0-py3-none-any.whl[experiments]"),
        ("/content/fipa_jax", "/content/fipa_jax[experiments]"),
    ],
)
def test_what_is_installed_is_what_the_source_names(install, given, asked):
    assert install["requirement"](given) == asked
    if ".whl" not in asked and "/content" not in asked:
        assert Requirement(asked).extras == {"experiments"}


def test_without_a_source_a_checkout_or_a_wheel_beside_the_notebook_is_taken(install, tmp_path):
    here = tmp_path / "content"
    here.mkdir()
    assert install["beside"](here) == ""
    with pytest.raises(FileNotFoundError, match="Set SOURCE at the top of this cell to the address of a repository"):
        install["pip_arguments"](" ", here, "0.10.2", "")
    wheel = here / "fipa_jax-0.2.0-py3-none-any.whl"
    wheel.touch()
    assert install["pip_arguments"]("", here, "0.10.2", "")[2] == f"{wheel}[experiments]"
    assert install["beside"](ROOT / "notebooks") == str(ROOT)


@pytest.mark.parametrize(
    ("version", "extra", "asked"),
    [
        ("0.10.0", "cuda12", []),
        ("0.11.3", "tpu", []),
        ("0.9.2", "cuda12", ["jax[cuda12]>=0.10,<0.12"]),
        ("0.12.0", "tpu", ["jax[tpu]>=0.10,<0.12"]),
        (None, "", ["jax>=0.10,<0.12"]),
    ],
)
def test_a_jax_that_is_new_enough_stays_and_another_names_its_accelerator(install, tmp_path, version, extra, asked):
    arguments = install["pip_arguments"]("fipa_jax", tmp_path, version, extra)
    assert [each for each in arguments if each.startswith("jax")] == asked
    assert arguments[0] == "install" and not {"-e", "--editable", "--upgrade", "-U"} & {*arguments}


def test_the_file_holds_its_outputs_and_is_small():
    """Every code cell was run, in order and without an error; pictures are PNGs of a size that can be read."""
    ran = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    kinds = {output["output_type"] for cell in ran for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert len(pictures(ran)) >= PICTURES
    assert all(struct.unpack(">I", png[16:20])[0] > 400 for png in pictures(ran))  # pixels across
    assert COLAB.stat().st_size < 1e6
    assert str(Path.home()) not in COLAB.read_text()


def test_it_explains_itself_and_leaves_something_to_change():
    words = "\n".join(source(cell) for cell in CELLS if cell["cell_type"] == "markdown")
    assert words.count("$$") >= 2 and "## Change this" in words
    codes = code_of(CELLS)
    assert sum("change this" in code for code in codes) >= 2
    assert "config.chunk = -1" in codes[1] and "config.eval.batch_size" in codes[1]
    prepared = [code for code in codes if "prepare_process()" in code]
    assert len(prepared) == 1 and prepared[0].index("prepare_process()") < prepared[0].index("import jax\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_colab_notebook_runs_as_a_notebook(tmp_path):
    cells = executed(code_of(CELLS), tmp_path)
    assert len(pictures(cells)) == len(pictures(CELLS))
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "test_mse" in printed and "test_accuracy" in printed


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_of_the_documentation_is_complete(name):
    """A kernel to run on, the process prepared before jax is imported, formulas or words, something to change."""
    text = (DOCS / f"{name}.md").read_text()
    codes = CELL.findall(text)
    assert text.startswith("---\njupytext:") and "name: python3" in text
    assert len(codes) == text.count("{code-cell}") and "prepare_process()" in codes[0]
    assert "## Change this" in text and "plt.show()" in text
    assert text.count("    alt: ") == sum("plt.show()" in code for code in codes)
    index = (DOCS / "index.md").read_text()
    assert f"({name}.md)" in index and f"\n{name}\n" in index
    for code in codes:
        compile(code, name, "exec")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_of_the_documentation_runs(name, tmp_path):
    codes = CELL.findall((DOCS / f"{name}.md").read_text())
    cells = executed(codes, tmp_path)
    assert len(pictures(cells)) == sum("plt.show()" in code for code in codes)
    assert not list(tmp_path.iterdir()), "a notebook leaves its results in a folder of its own"
