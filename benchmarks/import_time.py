"""The time of `import storyllm` against `import torch`, each in a new process.

python benchmarks/import_time.py
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from common import STORYLLM, describe_machine, median_seconds, print_table, run_cli


def main(repeats: int = 7) -> None:
    """Times both imports, including the start of Python."""
    print(f"{describe_machine()}, medians of {repeats}")
    modules = {STORYLLM: "storyllm", "import torch": "torch"}
    functions = {
        name: partial(subprocess.run, [sys.executable, "-c", f"import {module}"], check=True)
        for name, module in modules.items()
    }
    print_table("import storyllm", "s", median_seconds(functions, repeats))


if __name__ == "__main__":
    run_cli(main)
