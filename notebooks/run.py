"""Execute the notebooks: every cell must run, and with --solutions every exercise must be solved

    python notebooks/run.py [NOTEBOOK ...]        # full settings; the outputs are written back
    python notebooks/run.py --short --solutions   # what CI runs: short settings, nothing is written

An exercise is a code cell that begins "# Exercise 3.1" and leaves `...` where the answer belongs; a
later cell asserts the answer, or that it is still `...`. solutions.py has the cell that solves it,
under the same first line.
"""

import argparse
import ast
import glob
import os
import re
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = os.path.dirname(os.path.abspath(__file__))
METADATA = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"},
            "language_info": {"name": "python"}}

def read_solutions(path):
    """-> {"3.1": the code under "# Exercise 3.1"}"""
    with open(path) as f:
        parts = re.split(r"^# Exercise (\d\.\d+).*\n", f.read(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))

def names(code, unanswered=False):
    """What a cell binds: all of its names, or those that are `...` or functions that return it"""
    found = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign):
            name, values = ast.unparse(node.targets[0]), [node.value]
        elif isinstance(node, ast.FunctionDef):
            name, values = node.name, [n.value for n in ast.walk(node) if isinstance(n, ast.Return)]
        else:
            continue
        if not unanswered or any(v and ast.unparse(v) == "..." for v in values):
            found.add(name)
    return found

def solve(notebook, number, solutions):
    """Put the solutions in place of the exercises of notebook `number`; ValueError if one lacks"""
    left = {key for key in solutions if key.startswith(number)}
    for cell in notebook.cells:
        exercise = re.match(r"# Exercise (\d\.\d+)", cell.source)
        if cell.cell_type == "code" and exercise:
            code, wanted = solutions.get(exercise[1], ""), names(cell.source, unanswered=True)
            if not wanted or wanted - names(code) or names(code, unanswered=True):
                raise ValueError(f"exercise {exercise[1]}: solutions.py must set {sorted(wanted)}")
            cell.source, left = code, left - {exercise[1]}
    if left:
        raise ValueError(f"solutions.py answers {sorted(left)}, which are no exercises here")

def execute(path, solutions, write):
    """Run one notebook from the repository's root; raises at the first cell that fails"""
    notebook = nbformat.read(path, as_version=4)
    if solutions:
        solve(notebook, os.path.basename(path)[0], solutions)
    where = {"metadata": {"path": os.path.dirname(HERE)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where,
                   record_timing=False, coalesce_streams=True,
                   extra_arguments=["--log-level=ERROR"]).execute()
    if write:
        notebook.metadata = METADATA
        nbformat.write(notebook, path)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", default=sorted(glob.glob(f"{HERE}/*.ipynb")))
    parser.add_argument("--short", action="store_true", help="short settings, for CI")
    parser.add_argument("--solutions", action="store_true", help="solve the exercises first")
    args = parser.parse_args()
    os.environ.update({"SHORT": "1"} if args.short else {})
    solutions, failed = args.solutions and read_solutions(f"{HERE}/solutions.py"), False
    for path in map(os.path.relpath, args.notebooks):
        start = time.time()
        try:
            execute(path, solutions, not (args.short or args.solutions))
            print(f"{path}: {time.time() - start:.0f} s", flush=True)
        except (CellExecutionError, ValueError) as error:  # the former holds the cell and its trace
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
    return int(failed)

if __name__ == "__main__":
    sys.exit(main())
