"""The bring-up of a GPU: no step stops another, each keeps its limit, and a call begins where the last one ended."""

import re
import sys
import time

import gpu_facts
import gpu_report
import gpu_tests
import pytest
from support.paths import ROOT
from support.programs import load_program

PROGRAM = load_program(ROOT / "tools" / "gpu.py")
FACTS = {
    "device": "nvidia-h200", "name": "NVIDIA H200", "devices": {}, "betaclip": "0.1.0", "commit": "abc", "date": "now",
    "command": "python tools/gpu.py",
    "versions": dict.fromkeys(("torch", "triton", "cuda", "python", "libbetaclip"), "1"),
    "packages": dict.fromkeys((*gpu_facts.PEERS, *gpu_facts.NEEDED), "1"),
    "sanitizer": "/usr/bin/compute-sanitizer", "backends": {"triton": [], "cuda": []},
}  # fmt: skip


class Machine:
    """A stand-in for the processes: what they are asked for, and a clock that they move.

    statuses: what steps whose command has such words end with; others end with 0. seconds: what each takes.
    """

    def __init__(self, monkeypatch, seconds=1.0):
        self.facts, self.statuses, self.seconds, self.now = dict(FACTS), {}, seconds, 0.0
        self.commands, self.limits = [], []
        monkeypatch.setattr(PROGRAM, "machine", lambda log: self.facts)
        monkeypatch.setattr(PROGRAM, "run", self.run)
        monkeypatch.setattr(PROGRAM.time, "monotonic", lambda: self.now)

    def run(self, command, log, limit_s):
        self.commands.append(" ".join(command))
        self.limits.append(limit_s)
        self.now += min(self.seconds, limit_s)
        log.write_text("started\nthe end\n")
        return next((status for words, status in self.statuses.items() if words in self.commands[-1]), 0)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(PROGRAM.signal, "signal", lambda *_: None)
    return Machine(monkeypatch)


@pytest.fixture
def call(machine, tmp_path):
    def main(*argv):
        machine.commands.clear()
        return PROGRAM.main(["--output", str(tmp_path), *argv])

    return main


def page(folder):
    return (folder / "bringup-nvidia-h200.md").read_text(encoding="utf-8")


def test_all_stages_and_nothing_twice(machine, call, tmp_path):
    assert call() == 0
    assert len(machine.commands) == 15 and page(tmp_path).count("| passed |") == 15
    assert call() == 0 and not machine.commands
    assert call("--again", "step") == 0
    assert len(machine.commands) == 1 and "train_step.py" in machine.commands[0]


def test_a_failure_stops_nothing_and_stays(machine, call, tmp_path):
    machine.statuses = {"memcheck --backend cuda": 1, "racecheck": None, "train_step": -9}
    assert call() == 1
    assert len(machine.commands) == 15
    text = page(tmp_path)
    assert text.count("| failed |") == 2 and "stopped after 1.5 minutes" in text and "exit status -9" in text
    assert text.count("started\nthe end\n```") == 3
    assert call() == 1 and not machine.commands
    machine.statuses = {}
    assert call("--again", "tests") == 0 and len(machine.commands) == 5
    assert call() == 1  # the training step has failed still


def test_unfinished_tests_go_on(machine, call, tmp_path, capsys):
    machine.statuses, machine.seconds = {"gpu_tests": gpu_tests.UNFINISHED}, 100.0
    record = tmp_path / "bringup-nvidia-h200" / gpu_report.RECORD
    assert call("tests") == PROGRAM.CONTINUE == gpu_tests.UNFINISHED
    record.touch()
    order = [command.split()[0].removeprefix("tools/") for command in machine.commands]
    assert order == ["gpu_tests.py", *["sanitize.py"] * 4]  # what is left of 10 minutes is too little for a second turn
    assert "left: tests: pytest, up to 4 minutes" in capsys.readouterr().out
    assert "| unfinished | 100 s | the end |" in page(tmp_path)
    machine.statuses = {}
    assert call("tests") == 0 and len(machine.commands) == 1 and record.exists()
    assert call("tests", "--again") == 0 and not record.exists()


def test_unfinished_tests_have_the_time_that_others_leave(machine, call):
    machine.statuses, machine.seconds, machine.facts["sanitizer"] = {"gpu_tests": gpu_tests.UNFINISHED}, 100.0, ""
    assert call("tests") == PROGRAM.CONTINUE
    assert len(machine.commands) == 4 and machine.now == 400  # a fifth would have 200 s of its 240


def test_what_cannot_run_is_not_run_until_it_can(machine, call, tmp_path):
    machine.facts |= {"sanitizer": "", "backends": {"triton": [], "cuda": ["needs Hopper"]}}
    machine.facts["packages"] = FACTS["packages"] | {"open_clip_torch": ""}
    assert call() == 0
    assert not any("sanitize" in command or "train_step" in command for command in machine.commands)
    assert "| not run |  | needs Hopper; compute-sanitizer, part of" in page(tmp_path)
    assert "open_clip_torch is not installed" in page(tmp_path)
    machine.facts |= {"sanitizer": "there", "packages": FACTS["packages"]}
    assert call() == 0
    assert [command.split()[0] for command in machine.commands] == ["tools/sanitize.py", "benchmarks/train_step.py"]


@pytest.mark.parametrize("seconds", [60.0, 200.0])
def test_windows(machine, call, seconds):
    """Each call ends within its window, and the calls together run everything."""
    machine.seconds, commands, calls, status = seconds, [], 0, PROGRAM.CONTINUE
    while status == PROGRAM.CONTINUE:
        begin = machine.now
        status, calls = call("--total-minutes", "10"), calls + 1
        assert machine.now - begin <= 10 * 60 and machine.commands
        commands += machine.commands
    assert status == 0 and len(commands) == len(set(commands)) == 15 and calls > 1


@pytest.mark.parametrize(("minutes", "stages"), [(10.0, 1.0), (4.0, 0.4)])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_stage_keeps_its_limit(tmp_path, minutes, stages, dry_run):
    steps = PROGRAM.plan(tmp_path, tmp_path, stages, dry_run)
    for stage in PROGRAM.STAGES:
        assert 0 < sum(step.minutes for step in steps if step.stage == stage) <= 0.951 * minutes
    assert {step.stage for step in steps} == set(PROGRAM.STAGES)
    assert len({gpu_report.file_name(step.name) for step in steps}) == len(steps)
    for step in steps:  # whose own limit, where it has one, comes first
        if "--minutes" in step.command:
            assert float(step.command[step.command.index("--minutes") + 1]) < step.minutes


def test_the_limit_of_a_stage_is_that_of_its_processes(machine, call):
    assert call("tests", "--minutes", "5") == 0
    assert machine.limits == pytest.approx([120, 60, 30, 45, 30])


def test_programs_know_their_options(tmp_path, monkeypatch):
    """Each command of a real run, as the program itself reads it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(gpu_tests, "run_all", lambda *given: given)
    monkeypatch.setattr(gpu_tests, "summary", lambda record: [])
    sanitize, tiles = (load_program(ROOT / "tools" / f"{name}.py") for name in ("sanitize", "tile_variants"))
    for step in PROGRAM.plan(tmp_path, tmp_path, 1.0, False):
        file, *options = step.command
        assert (ROOT / file).exists()
        if file == "tools/gpu_tests.py":
            _, selection, minutes, _, processes = gpu_tests.main(options)
            assert minutes == pytest.approx(3.6) and selection[0] == "--on-gpu" and processes >= 1
            assert "tests/kernels/similarity/test_cuda_backend.py" in selection
        elif file == "tools/sanitize.py":
            monkeypatch.setattr(sys, "argv", [file, *options])
            with pytest.raises(SystemExit, match=r"GPU|compute-sanitizer"):
                sanitize.main()
        else:
            program = tiles if "tiles" in step.name else load_program(ROOT / file)
            args = program.arguments([*options, "--device", "cpu"])
            assert args.output == tmp_path and not args.smoke
            assert getattr(args, "minutes", 0) < step.minutes
            if step.name == "losses, large":
                assert max(args.sizes) == 589824
                assert {"linear_cross_entropy", "liger", "quack", "betaclip/triton", "betaclip/cuda"} <= set(
                    args.chosen
                )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["test"], "STAGE: expected some of tests, benchmarks, step, tuning, got test"),
        (["--minutes", "0"], "--minutes: expected more than 0, got 0"),
        (["--total-minutes", "-1"], "--total-minutes: expected more than 0, got -1"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        PROGRAM.arguments(argv)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu(machine, tmp_path):
    machine.facts["device"] = "cpu-2x"
    with pytest.raises(SystemExit, match=r"no GPU.*--dry-run"):
        PROGRAM.main(["--output", str(tmp_path)])


def test_wheels(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"--wheels: expected a folder with \*.whl, got "):
        PROGRAM.install(tmp_path, tmp_path / "packages")
    started = []
    monkeypatch.setattr(PROGRAM.subprocess, "run", lambda command, check: started.append(command))
    monkeypatch.setenv("PYTHONPATH", "before")
    (tmp_path / "x-1-py3-none-any.whl").touch()
    PROGRAM.install(tmp_path, tmp_path / "packages")
    assert started[0][-1].endswith(".whl") and {"--no-index", "--no-deps"} <= set(started[0])
    assert PROGRAM.os.environ["PYTHONPATH"].split(PROGRAM.os.pathsep) == [str(tmp_path / "packages"), "before"]


def test_output_and_status_of_a_process(tmp_path):
    log = tmp_path / "x.log"
    program = "import sys, os; print(os.environ['PYTHONPATH']); sys.stderr.write('said\\n'); sys.exit(3)"
    assert PROGRAM.run(["-c", program], log, 60) == 3
    assert set(log.read_text().split()) >= {"said"} and str(ROOT) in log.read_text()


def test_a_process_is_stopped_with_those_it_started(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time\nwhile True:\n open({str(alive)!r}, 'w').close()\n time.sleep(0.01)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    limit_s = 1.0
    while not alive.exists() and limit_s < 60:  # a busy machine takes longer to start two processes
        assert PROGRAM.run(["-c", program], tmp_path / "x.log", limit_s) is None
        limit_s *= 2
    assert alive.exists() and time.monotonic() - begin < 120
    alive.unlink()
    time.sleep(0.1)
    assert not alive.exists()


@pytest.mark.slow
def test_dry_run(tmp_path, capfd, monkeypatch):
    """A stage as it is: processes for the facts, for the tests, and for pytest."""
    monkeypatch.setattr(PROGRAM.signal, "signal", lambda *_: None)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
    assert PROGRAM.main(["tests", "--dry-run", "--output", str(tmp_path)]) == 0
    assert "tests: pytest ... passed" in capfd.readouterr().out
    (report,) = tmp_path.glob("bringup-cpu-*.md")
    text = report.read_text(encoding="utf-8")
    assert text.count("| not run |") == 4 and re.search(r"Tests: \d+ passed\.", text)
