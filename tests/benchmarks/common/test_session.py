"""Options are resolved for the device, and a limit of time ends a run."""

import pytest
from common import session
from common.budget import Budget
from common.figures import Figure

FIGURE = Figure(("k", "K"), ("n", "N"), ())
BENCHMARK = session.Benchmark("b", "-b", {}, FIGURE, minutes=3)


def resolved(*argv):
    parser = BENCHMARK.parser("")
    parser.add_argument("--size", type=session.at_least(1))
    known = {"dense": 1, "compiled": 4, "betaclip/a": 2, "betaclip/b": 3}
    return BENCHMARK.parse(parser, ["--device", "cpu", *argv], known, {"size": 2}, {"size": {"cpu": 8}})


def test_options(tmp_path):
    args = resolved("--implementations", "betaclip", "--output", str(tmp_path))
    assert list(args.chosen) == ["betaclip/a", "betaclip/b"]
    assert (args.minutes, args.seconds, args.output) == (3, 1.5, tmp_path)
    assert resolved().output == session.RESULTS
    assert (resolved().size, resolved("--size", "3").size, resolved("--smoke").size) == (8, 3, 2)
    assert resolved("--smoke", "--size", "5").size == 5
    assert resolved("--smoke").output != session.RESULTS
    assert list(resolved("--smoke").chosen) == ["dense", "betaclip/a", "betaclip/b"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--implementations", "nobody"], "expected some of dense, compiled, betaclip/a, betaclip/b, got nobody"),
        (["--size", "0"], "--size: expected at least 1, got 0"),
        (["--device", "meta"], "--device: expected cpu or cuda, got meta"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        resolved(*argv)
    assert message in capsys.readouterr().err


def test_nothing_is_begun_after_the_limit(tmp_path, capsys):
    run = session.Session(BENCHMARK, {}, tmp_path / "x.csv", Budget(minutes=1e-9))
    run.path.write_text("benchmark\n")

    def never():
        raise AssertionError

    assert run.run({"n = 1": never, "n = 2": never}) == 0
    assert "left out: n = 1, n = 2" in capsys.readouterr().out
