"""Run the CUDA kernels over small shapes under compute-sanitizer; needs a Hopper GPU and the CUDA toolkit.

    python tests/sanitize.py            # memcheck, racecheck and synccheck, one after the other

A kernel that waits for ever is the likeliest fault of a pipeline, so each tool has a limit of time.
"""

import argparse
import itertools
import shutil
import subprocess
import sys

import torch

from betaclip.kernels.similarity.operators import (
    BACKENDS,
    logsumexp,
    logsumexp_backward,
    similarity_softplus,
    softplus_with_gradients,
)

TOOLS = ("memcheck", "racecheck", "synccheck")
# n, m, d: less than a tile, one more than a tile, several with ragged ends, and the deepest.
SHAPES = [(1, 1, 8), (129, 257, 72), (300, 700, 512), (513, 200, 1024)]
LIMIT_S = 900


def run_kernels() -> None:
    """Every function of the library, with and without groups and bias, in both dtypes; scale 100 takes the fallback."""
    for (n, m, d), dtype, grouped in itertools.product(SHAPES, (torch.bfloat16, torch.float16), (False, True)):
        x, y = (torch.nn.functional.normalize(torch.randn(rows, d), dim=1).to("cuda", dtype) for rows in (n, m))
        x_group, y_group = (
            torch.randint(-1, 9, (rows,), dtype=torch.int32, device="cuda") if grouped else None for rows in (n, m)
        )
        bias = torch.tensor(-3.0, device="cuda") if grouped else None
        for scale in (torch.tensor(value, device="cuda") for value in (10.0, 100.0)):
            lse = logsumexp(x, y, scale, x_group, y_group, "cuda")
            incoming = [torch.ones_like(statistic) for statistic in lse]
            logsumexp_backward(x, y, scale, x_group, y_group, *lse, *incoming, True, True, "cuda")
            similarity_softplus(x, y, scale, bias, x_group, y_group, backend="cuda")
            softplus_with_gradients(x, y, scale, bias, x_group, y_group, incoming[0], True, True, "cuda")
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", action="store_true", help="run the kernels in this process, without a tool")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    arguments = parser.parse_args()
    probe = torch.zeros(1, 8, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    if reasons := BACKENDS["cuda"](probe, probe):
        sys.exit(f"cuda: {'; '.join(reasons)}")
    if arguments.inside:
        return run_kernels()
    if not (sanitizer := shutil.which("compute-sanitizer")):
        sys.exit("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    for tool in arguments.tools:
        print(f"+ {tool}", flush=True)
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, __file__, "--inside"]
        subprocess.run(command, check=True, timeout=LIMIT_S)


if __name__ == "__main__":
    main()
