"""``.ci/run`` runs README's commands and existing lanes, and refuses unknown ones."""

import re
import shutil
import subprocess

import pytest
from support.paths import ROOT

SCRIPT = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_commands_are_those_of_the_readme():
    block = re.search(
        r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    install, test = (re.search(f'^{name}="(.+)"$', SCRIPT, re.MULTILINE)[1] for name in ("install", "test"))
    commands = [re.sub(r" +#.*", "", line) for line in block[1].splitlines()]
    assert commands == [f"{install} && python benchmarks/loss_throughput.py", test]


def test_lanes_name_tests_that_exist():
    lanes = dict(re.findall(r"^(\w+)=\((tests/[^)]*)\)", SCRIPT, re.MULTILINE))
    assert lanes.keys() == {"interpreter", "csrc", "packaging", "benchmarks", "faults"}
    paths = [path for paths in lanes.values() for path in paths.split()]
    assert len(paths) == len(set(paths)) and all((ROOT / path).exists() for path in paths)


def test_workflow_runs_every_lane_but_minimum():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    lanes = re.search(r"^#   \.ci/run LANE\.\.\. .*: ([a-z ]+)$", SCRIPT, re.MULTILINE)[1].split()
    assert re.search(r"lane: \[(.*)\]", workflow)[1].split(", ") == [lane for lane in lanes if lane != "minimum"]


def test_minimum_compiles_kernels_with_the_triton_of_each_environment():
    lanes = {name: body for name, body in re.findall(r"^(\w+)\(\) [({](.*?)^[)}]$", SCRIPT, re.MULTILINE | re.DOTALL)}
    environments = lanes["minimum"].split("set_up ")[1:]
    assert len(environments) == 2 and all("run python tools/aot.py --older\n" in part for part in environments)
    assert sum(body.count("aot.py") for body in lanes.values()) == SCRIPT.count("aot.py") == 2  # not in other lanes


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_refuses_a_lane_that_is_none():
    done = subprocess.run(["bash", ROOT / ".ci" / "run", "lint", "gpu"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("gpu is no lane: expected lint, unit, ")
