"""Bring up a GPU: tests, benchmarks, a training step and tile variants, in stages of 10 minutes, and a report.

    python tools/gpu.py                              # all stages; begins where the last call ended
    python tools/gpu.py tests tuning                 # these stages
    python tools/gpu.py --total-minutes 10           # what fits into a window; call it again for the rest
    python tools/gpu.py --again benchmarks           # forget what is recorded of a stage, and run it anew
    python tools/gpu.py --wheels FOLDER              # also with the packages in a folder of wheels, without network
    python tools/gpu.py --dry-run                    # all stages on the CPU in tiny sizes, into a temporary folder

It needs a checkout, torch and Triton, and uses what else is there: compute-sanitizer, the CUDA library
(python csrc/build_library.py), the peers of the benchmarks. No step stops those after it. Rows and figures go where the
benchmarks write them; bringup-DEVICE.md says how each step ended and what was measured, beside what was predicted.

The exit status is 0 if no step failed, 1 if one did, 3 if none did but some have not run yet.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gpu_report
from gpu_report import FAILED, NOT_RUN, PASSED, TIMED_OUT, UNFINISHED

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STAGES = ("tests", "benchmarks", "step", "tuning")
STAGE_MINUTES = 10.0
RESERVE = 0.9  # of a step's time, which its own limit leaves it: what is under way then still ends
CONTINUE = 3  # the exit status of a step, and of this program, that is to be called again

Facts = dict[str, Any]
Steps = dict[str, dict[str, Any]]  # what is recorded of each step


@dataclass(frozen=True)
class Step:
    """One command.

    minutes: when it is stopped. unmet: why it cannot run on a machine, empty if it can.
    """

    stage: str
    name: str
    minutes: float
    command: tuple[str, ...]
    unmet: Callable[[Facts], str] = lambda facts: ""


def package(name: str) -> Callable[[Facts], str]:
    return lambda facts: "" if facts["packages"][name] else f"{name} is not installed"


def sanitizer(backend: str) -> Callable[[Facts], str]:
    def unmet(facts: Facts) -> str:
        missing = [] if facts["sanitizer"] else ["compute-sanitizer, part of the CUDA toolkit, is not on PATH"]
        return "; ".join([*facts["backends"][backend], *missing])

    return unmet


def plan(folder: Path, output: Path, scale: float, dry_run: bool) -> list[Step]:
    """All steps. A stage's take 9.5 minutes together, times ``scale``; the rest is for the report."""

    def own_limit(minutes: float) -> str:
        return f"{minutes * scale * RESERVE:.3g}"

    def tests(name: str, minutes: float) -> Step:
        some = ["--marker", "not gpu", "tests/kernels/test_architecture.py"] if dry_run else []
        command = (
            "tools/gpu_tests.py",
            "--record",
            str(folder / gpu_report.RECORD),
            "--minutes",
            own_limit(minutes),
            *some,
        )
        return Step("tests", name, minutes * scale, command, package("pytest"))

    def sanitize(tool: str, backend: str, minutes: float) -> Step:
        command = ("tools/sanitize.py", "--tools", tool, "--backend", backend)
        return Step("tests", f"{tool} {backend}", minutes * scale, command, sanitizer(backend))

    def measure(
        stage: str,
        name: str,
        minutes: float,
        command: str,
        options: str = "",
        sizes: str = "",
        limited: bool = False,
        needs: str = "",
    ) -> Step:
        """sizes: options that a dry run leaves out. limited: it has --minutes. needs: a package."""
        limit = f"--minutes {own_limit(minutes)}" if limited and not dry_run else ""
        given = f"{command} {options} {'--smoke --device cpu' if dry_run else sizes} {limit}"
        unmet = package(needs) if needs else lambda facts: ""
        return Step(stage, name, minutes * scale, (*given.split(), "--output", str(output)), unmet)

    def losses(name: str, minutes: float, options: str, sizes: str = "") -> Step:
        return measure("benchmarks", name, minutes, "benchmarks/loss_throughput.py", options, sizes, limited=True)

    pooling = "benchmarks/pooling_throughput.py"
    linear = "--forms ce bce --implementations linear_cross_entropy liger quack betaclip"
    folds = "--implementations published xformers betaclip"  # without what takes long to compile
    # A figure shows the width that its file ends with: 512.
    return [
        tests("pytest", 4),
        sanitize("memcheck", "triton", 2),
        sanitize("memcheck", "cuda", 1),
        sanitize("racecheck", "cuda", 1.5),
        sanitize("synccheck", "cuda", 1),
        losses("losses, D = 768", 1, linear, "--sizes 65536 --texts 32 --dim 768"),
        losses("losses, large", 2.5, linear, "--sizes 36864 147456 589824"),
        losses("losses, small", 2, "--forms ce bce", "--sizes 108 288 2304 9216"),
        losses("losses, one text per image", 1, "--forms clip siglip"),
        measure(
            "benchmarks", "pooling, all widths", 1.5, pooling, folds, "--dim 768 512 --patches 256 576 --seconds 0.3"
        ),
        measure("benchmarks", "pooling, all peers", 1.5, pooling, "--parts attention", "--dim 512 --patches 196"),
        measure("step", "training step", 9.5, "benchmarks/train_step.py", needs="open_clip_torch"),
        measure("tuning", "fold or project", 2, pooling, "--crossover", "--dim 512 --patches 196 576 --seconds 0.5"),
        measure("tuning", "tiles of the losses", 4.5, "tools/tile_variants.py loss", limited=True),
        measure("tuning", "tiles of pooling", 3, "tools/tile_variants.py pooling", limited=True),
    ]


def run(command: Sequence[str], log: Path, limit_s: float) -> int | None:
    """Run a Python program and keep its output. The exit status; None: it was stopped, and all that it had started."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def machine(log: Path) -> Facts:
    """Run ``gpu_facts`` in a process of its own, because this one must not occupy the GPU; return its facts."""
    status = run(["tools/gpu_facts.py"], log, 300)
    lines = log.read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line.startswith("{")]
    if status != 0 or not found:
        sys.exit(f"betaclip does not work here, exit status {status}:\n" + "\n".join(lines[-12:]))
    return json.loads(found[-1])


class BringUp:
    """One device's steps, and what is recorded of them.

    output: where rows, figures and the report go. end: when to stop, by time.monotonic.
    """

    def __init__(self, facts: Facts, output: Path, end: float) -> None:
        self.facts, self.output, self.end = facts, output, end
        self.folder = output / f"bringup-{facts['device']}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "steps.json"
        self.recorded: Steps = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def forget(self, stages: Sequence[str]) -> None:
        self.recorded = {name: x for name, x in self.recorded.items() if x["stage"] not in stages}
        if "tests" in stages:
            for record in self.folder.glob(f"{Path(gpu_report.RECORD).stem}*"):
                record.unlink()

    def stage(self, steps: Sequence[Step], minutes: float) -> None:
        """Run those of one stage's steps that have not ended yet, as long as one has the time that it may take."""
        end = min(self.end, time.monotonic() + 60 * minutes)
        begun = True
        while begun:  # unfinished steps have another turn after the others
            begun = False
            for step in steps:
                ended = self.recorded.get(step.name, {}).get("outcome") in (PASSED, FAILED, TIMED_OUT)
                if not ended and (unmet := step.unmet(self.facts)):
                    self._record(step, NOT_RUN, 0.0, unmet)
                elif not ended and time.monotonic() + 60 * step.minutes <= end:
                    self._run(step)
                    begun = True

    def left(self, steps: Sequence[Step]) -> list[Step]:
        """The steps that another call would run."""
        return [x for x in steps if self.recorded.get(x.name, {}).get("outcome") in (None, UNFINISHED)]

    def failed(self, steps: Sequence[Step]) -> bool:
        return any(self.recorded.get(x.name, {}).get("outcome") in (FAILED, TIMED_OUT) for x in steps)

    def _run(self, step: Step) -> None:
        print(f"{step.stage}: {step.name} ... ", end="", flush=True)
        begin, log = time.monotonic(), gpu_report.log_of(self.folder, step.name)
        status = run(step.command, log, 60 * step.minutes)
        outcome = {0: PASSED, None: TIMED_OUT, CONTINUE: UNFINISHED}.get(status, FAILED)
        reasons = {
            PASSED: gpu_report.left_out(log),
            TIMED_OUT: f"stopped after {step.minutes:g} minutes",
            FAILED: f"exit status {status}",
            UNFINISHED: gpu_report.tail(log, 1),
        }
        self._record(step, outcome, time.monotonic() - begin, reasons.get(outcome, ""))
        print(f"{outcome}, {time.monotonic() - begin:.0f} s", flush=True)

    def _record(self, step: Step, outcome: str, seconds: float, reason: str) -> None:
        self.recorded[step.name] = {
            "stage": step.stage,
            "outcome": outcome,
            "seconds": round(seconds, 1),
            "reason": reason,
            "command": gpu_report.as_typed(step.command),
            "commit": self.facts["commit"],
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self.path.write_text(json.dumps(self.recorded, indent=1, ensure_ascii=False), encoding="utf-8")


def install(wheels: Path, target: Path) -> None:
    """Unpack the wheels, for the processes that follow, without asking for what they depend on."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        sys.exit(f"--wheels: expected a folder with *.whl, got {wheels}")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH", "")]))


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    add("--minutes", type=float, default=STAGE_MINUTES, help=f"limit of a stage (default {STAGE_MINUTES:g})")
    add(
        "--total-minutes", type=float, default=float("inf"), help="begin no step that may take longer than what is left"
    )
    add("--again", action="store_true", help="forget what is recorded of these stages")
    add("--wheels", type=Path, help="folder of wheels to use beside what is installed")
    add("--output", type=Path, help=f"folder of the results (default {RESULTS.relative_to(ROOT)})")
    add("--dry-run", action="store_true", help="on the CPU in tiny sizes: the same steps, their figures mean nothing")
    args = parser.parse_args(argv)
    for stage in args.stages:
        if stage not in STAGES:
            parser.error(f"STAGE: expected some of {', '.join(STAGES)}, got {stage}")
    for name in ("minutes", "total_minutes"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: expected more than 0, got {getattr(args, name):g}")
    args.stages = args.stages or STAGES
    args.output = (args.output or (Path(tempfile.mkdtemp(prefix="gpu_")) if args.dry_run else RESULTS)).resolve()
    return args


def main(argv: list[str]) -> int:
    begin, args = time.monotonic(), arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that run() stops what it has started
    if args.dry_run:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if args.wheels:
            install(args.wheels, Path(scratch) / "packages")
        facts = machine(Path(scratch) / "facts.log")
        if not args.dry_run and facts["device"].startswith("cpu"):
            sys.exit("no GPU: torch.cuda.is_available() is False (--dry-run runs every stage on the CPU)")
        bring_up = BringUp(facts, args.output, begin + 60 * args.total_minutes)
        steps = plan(bring_up.folder, args.output, args.minutes / STAGE_MINUTES, args.dry_run)
        if args.again:
            bring_up.forget(args.stages)
        report = args.output / f"bringup-{facts['device']}.md"
        for stage in STAGES:
            if stage in args.stages:
                bring_up.stage([step for step in steps if step.stage == stage], args.minutes)
                names = {step.name: step.stage for step in steps}
                report.write_text(gpu_report.report(facts, names, bring_up.recorded, args.output), encoding="utf-8")
    chosen = [step for step in steps if step.stage in args.stages]
    for step in bring_up.left(chosen):
        print(f"left: {step.stage}: {step.name}, up to {step.minutes:.2g} minutes")
    print(f"report: {report}")
    return 1 if bring_up.failed(chosen) else CONTINUE if bring_up.left(chosen) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
