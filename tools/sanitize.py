"""Run the kernels of the losses over small shapes under compute-sanitizer; needs a GPU and the CUDA toolkit.

    python tools/sanitize.py                      # memcheck, racecheck and synccheck, one after the other
    python tools/sanitize.py --tools racecheck    # one of them
    python tools/sanitize.py --backend triton     # Triton's kernels in place of those of csrc, which need Hopper
    python tools/sanitize.py --inside             # the kernels alone, in this process

Each tool is stopped after 15 minutes, because the likeliest fault of a pipelined kernel is a deadlock.
"""

import argparse
import itertools
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from betaclip.kernels.similarity import similarity_logsumexp, similarity_softplus

TOOLS = ("memcheck", "racecheck", "synccheck")
# n, m, d: less than a tile, one more than a tile, several with ragged ends, and the greatest depth.
SHAPES = {
    "cuda": [(1, 1, 8), (129, 257, 72), (300, 700, 512), (513, 200, 1024)],
    "triton": [(129, 257, 72), (300, 700, 512)],  # it compiles each depth anew, slowly under a tool
}
LIMIT_S = 900


def run_kernels(device: str, shapes: Sequence[tuple[int, int, int]] = (), backend: str = "cuda") -> int:
    """Run each kernel in both dtypes, with and without image ids and bias, and return the number of cases. By default
    the shapes are those of the backend in ``SHAPES``.

    At scale 10 rows and columns share one exponential per pair; at 1000 the kernels take their other path, and the
    log-sum-exp a second pass.
    """
    cases = list(
        itertools.product(shapes or SHAPES[backend], (torch.bfloat16, torch.float16), (False, True), (10.0, 1000.0))
    )
    for (n, m, d), dtype, with_ids, scale_value in cases:
        x, y = (F.normalize(torch.randn(rows, d, device=device), dim=1).to(dtype).requires_grad_() for rows in (n, m))
        ids = [torch.randint(-1, 9, (rows,), device=device) if with_ids else None for rows in (n, m)]
        scale = torch.tensor(scale_value, device=device, requires_grad=True)
        bias = torch.tensor(-3.0, device=device, requires_grad=True) if with_ids else None
        lse_x, lse_y = similarity_logsumexp(x, y, scale, *ids, backend=backend)
        softplus = similarity_softplus(x, y, scale, bias, *ids, backend=backend)
        (lse_x.sum() + lse_y.sum() + softplus.sum()).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return len(cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", action="store_true", help="run the kernels in this process, without a tool")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda", help="whose kernels (default cuda)")
    arguments = parser.parse_args()
    if arguments.inside:
        print(f"{run_kernels('cuda', backend=arguments.backend)} cases ran")
        return
    if not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is False")
    if not (sanitizer := shutil.which("compute-sanitizer")):
        sys.exit("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    for tool in arguments.tools:
        print(f"+ {tool}", flush=True)
        program = [sys.executable, __file__, "--inside", "--backend", arguments.backend]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *program]
        subprocess.run(command, check=True, timeout=LIMIT_S)


if __name__ == "__main__":
    main()
