"""Execute the notebooks

    python notebooks/run.py [NOTEBOOK ...]        # full settings; the outputs are written back
    python notebooks/run.py --short --solutions   # what CI runs: short settings, nothing is written

An exercise is a code cell that begins "# Exercise 3.1" and leaves `...` where the answer belongs.
A cell below it calls check("3.1", answer). With --solutions the cell of the same name in
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

HERE = os.path.dirname(os.path.abspath(__file__))
METADATA = {
    "kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"},
    "language_info": {"name": "python"},
}


def read_solutions():
    """-> {"3.1": the code below "# Exercise 3.1" in solutions.py}"""
    with open(f"{HERE}/solutions.py") as file:
        parts = re.split(r"^# Exercise (\d\.\d)\n", file.read(), flags=re.M)
    numbers = parts[1::2]
    return dict(zip(numbers, parts[2::2]))


def exercises_of(notebook):
    """-> {"3.1": the cell that begins "# Exercise 3.1"}"""
    found = {}
    for cell in notebook.cells:
        title = re.match(r"# Exercise (\d\.\d)", cell.source)
        if cell.cell_type == "code" and title:
            found[title[1]] = cell
    return found


def execute(notebook):
    """Run a notebook from the root of the repository -> [(exercise, what its check printed)]"""
    root = {"metadata": {"path": os.path.dirname(HERE)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=root,
                   record_timing=False, coalesce_streams=True,
                   extra_arguments=["--log-level=ERROR"]).execute()
    verdicts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            verdicts += re.findall(r"^Exercise (\d\.\d): (.*)$", output.get("text", ""), re.M)
    return verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", default=sorted(glob.glob(f"{HERE}/*.ipynb")))
    parser.add_argument("--short", action="store_true", help="short settings, for CI")
    parser.add_argument("--solutions", action="store_true", help="solve the exercises first")
    args = parser.parse_args()
    if args.short:
        os.environ["SHORT"] = "1"
    solutions = read_solutions()

    failed = False
    for path in args.notebooks:
        start = time.time()
        notebook = nbformat.read(path, as_version=4)
        exercises = exercises_of(notebook)
        expected = "not answered yet"
        if args.solutions:
            expected = "right"
            for number, cell in exercises.items():
                cell.source = solutions[number]
        verdicts = execute(notebook)
        print(f"{os.path.basename(path)}: {time.time() - start:.0f} s", flush=True)
        if verdicts != [(number, expected) for number in exercises]:
            print(f"expected each of {list(exercises)} {expected}, found {verdicts}", flush=True)
            failed = True
        if not args.short and not args.solutions:
            notebook.metadata = METADATA
            nbformat.write(notebook, path)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
