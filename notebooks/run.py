"""Execute the notebooks

    python notebooks/run.py [NOTEBOOK ...]        # full settings; the outputs are written back
    python notebooks/run.py --short --solutions   # what CI runs: short settings, nothing is written

An exercise is a code cell that begins "# Exercise 3.1" and leaves `...` where the answer belongs.
The cell below it calls check("3.1", answer). With --solutions the cell of the same name in
solutions.py takes the place of the exercise, and every check must then print "right". Without,
every check must print "not answered yet". Anything else is a failure, with exit code 1.
"""

import argparse
import glob
import os
import re
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = os.path.dirname(os.path.abspath(__file__))
METADATA = {
    "kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"},
    "language_info": {"name": "python"},
}


def read_solutions(path):
    """-> {"3.1": the code below "# Exercise 3.1"}"""
    with open(path) as file:
        parts = re.split(r"^# Exercise (\d\.\d+)\n", file.read(), flags=re.M)
    numbers = parts[1::2]
    return dict(zip(numbers, parts[2::2]))


def exercise_of(cell):
    """The number of the exercise in a cell, such as "3.1", or None"""
    found = re.match(r"# Exercise (\d\.\d+)", cell.source)
    if cell.cell_type == "code" and found:
        return found[1]
    return None


def solve(notebook, solutions):
    """Put the solutions in place of the exercises"""
    for cell in notebook.cells:
        number = exercise_of(cell)
        if number is not None:
            cell.source = solutions.pop(number)


def printed(notebook):
    """All that the cells of a notebook wrote to stdout"""
    text = ""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stdout":
                text += output.text
    return text


def complaints(notebook, expected):
    """The exercises whose check did not print what was expected -> [one line each]"""
    text = printed(notebook)
    lines = []
    for cell in notebook.cells:
        found = re.match(r"check\(\"(\d\.\d+)\"", cell.source)
        if found and f"Exercise {found[1]}: {expected}" not in text:
            lines.append(f"check {found[1]} did not print {expected!r}")
    return lines


def execute(path, solutions, write):
    """Run one notebook from the root of the repository -> complaints, or the cell that failed"""
    notebook = nbformat.read(path, as_version=4)
    exercises = [exercise_of(cell) for cell in notebook.cells if exercise_of(cell)]
    checks = re.findall(r"^check\(\"(\d\.\d+)\"", "\n".join(c.source for c in notebook.cells), re.M)
    if exercises != checks:
        return [f"exercises {exercises}, but checks {checks}"]
    expected = "not answered yet"
    if solutions is not None:
        expected = "right"
        missing = [number for number in exercises if number not in solutions]
        if missing:
            return [f"solutions.py does not answer {missing}"]
        solve(notebook, solutions)
    root = {"metadata": {"path": os.path.dirname(HERE)}}
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=root,
                            record_timing=False, coalesce_streams=True,
                            extra_arguments=["--log-level=ERROR"])
    try:
        client.execute()
    except CellExecutionError as error:
        return [str(error)]
    if write:
        notebook.metadata = METADATA
        nbformat.write(notebook, path)
    return complaints(notebook, expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", default=sorted(glob.glob(f"{HERE}/*.ipynb")))
    parser.add_argument("--short", action="store_true", help="short settings, for CI")
    parser.add_argument("--solutions", action="store_true", help="solve the exercises first")
    args = parser.parse_args()
    if args.short:
        os.environ["SHORT"] = "1"
    solutions = None
    if args.solutions:
        solutions = read_solutions(f"{HERE}/solutions.py")
    write = not args.short and not args.solutions

    failed = False
    for path in args.notebooks:
        path = os.path.relpath(path)
        start = time.time()
        errors = execute(path, solutions, write)
        print(f"{path}: {time.time() - start:.0f} s", flush=True)
        for error in errors:
            print(f"{path}: {error}", file=sys.stderr, flush=True)
            failed = True
    if solutions and args.notebooks == parser.get_default("notebooks"):
        print(f"solutions.py answers {sorted(solutions)}, which no notebook asks", file=sys.stderr)
        failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
