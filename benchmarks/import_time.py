"""`import storyllm` against `import torch`, each in a process of its own, in turn.

python benchmarks/import_time.py
"""

from __future__ import annotations

import subprocess
import sys

from side_by_side import command_line, in_turn, machine, print_table


def main(repeats: int = 7) -> None:
    """Times both."""
    print(f"{machine()}, medians of {repeats}")
    functions = {
        name: lambda module=module: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        for name, module in (("ours", "storyllm"), ("import torch", "torch"))
    }
    print_table("import storyllm", "s", in_turn(functions, repeats))


if __name__ == "__main__":
    command_line(main)
