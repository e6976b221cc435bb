"""Commands are recorded as typed, figures are redrawn on demand, and a limit of time ends a run."""

import argparse

import pytest
from common import session
from common.figures import Figure

FIGURE = Figure(lambda row: "", "n", "N", (("time_ms_p50", "ms", 1.0),), (), lambda row: "title")
BENCHMARK = session.Benchmark("b", "-b", "size", {}, FIGURE, minutes=3)


def test_command_holds_no_folder_of_this_machine():
    command = session.command("loss_throughput", ["--output", "/srv/me/x", "--sizes", "72"])
    assert command == "python benchmarks/loss_throughput.py --output x --sizes 72"


def resolved(*argv):
    parser = BENCHMARK.parser("")
    args = parser.parse_args(["--device", "cpu", *argv])
    BENCHMARK.resolve(parser, args, {"dense": 1, "betaclip/a": 2, "betaclip/b": 3})
    return args


def test_options(tmp_path):
    args = resolved("--implementations", "betaclip", "--output", str(tmp_path))
    assert list(args.chosen) == ["betaclip/a", "betaclip/b"]
    assert (args.minutes, args.seconds, args.output) == (3, 1.5, tmp_path)
    assert resolved().output == session.RESULTS
    assert resolved("--smoke").output != session.RESULTS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--implementations", "nobody"], "expected some of dense, betaclip/a, betaclip/b, got nobody"),
        (["--device", "meta"], "--device: expected cpu or cuda, got meta"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        resolved(*argv)
    assert message in capsys.readouterr().err


def test_at_least(capsys):
    with pytest.raises(SystemExit):
        args = argparse.Namespace(sizes=[3, 0])
        session.expect_at_least(1, argparse.ArgumentParser(), args, "--sizes")
    assert "--sizes: expected at least 1, got 0" in capsys.readouterr().err


def test_nothing_is_begun_after_the_limit(tmp_path, capsys):
    args = resolved("--output", str(tmp_path), "--minutes", "1e-9")
    run = session.Session(BENCHMARK, args, [])
    run.path.parent.mkdir(exist_ok=True)
    run.path.write_text("benchmark\n")

    def never():
        raise AssertionError

    assert run.run({"n = 1": never, "n = 2": never}) == 0
    assert "left out: n = 1, n = 2" in capsys.readouterr().out
