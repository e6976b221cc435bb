"""What is printed says what the rows say."""

from common import report


def row(name="dense", phase="forward+backward", **fields):
    return {
        "implementation": name,
        "phase": phase,
        "status": "ok",
        "note": "",
        "n": "96",
        "rounds": "3",
        "foreign_cores": "",
        **{f"time_ms_{p}": "10" for p in ("p20", "p50", "p80")},
        **fields,
    }


def test_table():
    rows = [
        row(phase="forward", time_ms_p20="1", time_ms_p50="2", time_ms_p80="3.5"),
        row(rounds="1", time_ms_p50="1234.5", peak_bytes=str(3 * 2**20), error="0.002"),
        row("gone", status="out of memory", note="not tried"),
    ]
    columns = {"saved": report.memory("saved_bytes"), "error": report.number("error", ".1e")}
    shown = report.table(rows, columns)
    heading, _, timed, reason = (line.split("  ") for line in shown.splitlines())
    assert [cell.strip() for cell in heading if cell][-2:] == ["extra memory", "error"]  # no others have entries
    assert [cell.strip() for cell in timed if cell.strip()] == ["dense", "2 (1-3.5)", "1,234", "3 MiB", "2.0e-03"]
    assert [cell.strip() for cell in reason if cell.strip()] == ["gone: out of memory (not tried)"]


def test_a_table_of_failures_has_its_heading():
    shown = report.table([row("gone", status="out of memory")], {}).splitlines()
    assert shown[0].split()[:2] == ["implementation", "forward"] and len(shown) == 3


def test_what_a_limit_of_time_cost_is_said():
    rows = [row(rounds="1"), row("slow", status="skipped", rounds="0"), row("slow", "forward", status="skipped")]
    (said,) = report.kept_within(rows, 3, "n", ["bce, N = 9216"])
    assert said == (
        "To stay within --minutes 3: 1 rows of one round; left out: slow at 96, bce, N = 9216. 0 sets no limit."
    )
    assert report.kept_within([row()], 3, "n", []) == report.kept_within(rows, 0, "n", []) == []


def test_disturbance_is_said():
    assert report.untrustworthy([row(foreign_cores="0.02")]) == []
    assert "1.5 cores" in report.untrustworthy([row(foreign_cores="1.5")])[0]


def test_units():
    assert [report.in_bytes(x) for x in ("", "12", str(330 * 2**20), str(4 * 2**30))] == [
        "",
        "12 B",
        "330 MiB",
        "4 GiB",
    ]
    assert [report.in_ms(x) for x in ("", "0.1234", "99.5", "1234")] == ["", "0.123", "99.5", "1,234"]
