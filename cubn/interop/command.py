"""`python -m cubn fold`: batch norms of a safetensors file into the layers before them."""

import argparse
import sys
from pathlib import Path

from cubn.interop.checkpoint import fold_safetensors

SUMMARY = "fold the batch norms of a safetensors file into the layers before them"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    parser.description = (
        "List the batch norms of a safetensors file, which layer each can be folded into, and which are left alone and "
        "why.  With --output, write the folded weights: load them into a network whose folded batch norms are "
        "identities and whose layers before them have biases."
    )
    parser.add_argument("file", type=Path, help="weights, named as PyTorch names them")
    parser.add_argument(
        "--output", type=Path, metavar="F", help="where the folded weights go; nothing is written without"
    )
    parser.add_argument("--eps", type=float, default=1e-5, help="of the batch norms, which no file says (default 1e-5)")


def run(options: argparse.Namespace) -> int:
    """List, fold, and say what went wrong in one sentence."""
    try:
        plan = fold_safetensors(options.file, options.output, eps=options.eps)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(plan)
    if options.output is not None:
        print(f"written to {options.output}, with eps={options.eps:g}")
    elif plan.pairs:
        print(f"nothing written; --output FILE writes the folded weights, with eps={options.eps:g}")
    return 0
