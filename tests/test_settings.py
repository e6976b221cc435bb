from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from betaclip.errors import ConfigError
from betaclip.settings import bounded, check_numbers, differences, filled, from_dict, keys, read, to_dict, to_toml


@dataclass(frozen=True)
class Part:
    rate: float = 0.1
    steps: int = 3
    limit: float | None = field(default=None, metadata={"was": "bound"})

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")


@dataclass(frozen=True)
class Whole:
    name: str = 'quo"te\\\n\x7f β'
    root: Path | None = None
    kind: Literal["a", "b"] = "a"
    betas: tuple[float, float] = (0.9, 1e-08)
    words: tuple[str, ...] = ()
    on: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    first: Part = field(default_factory=Part)
    second: Part = field(default_factory=lambda: Part(rate=1e-9))
    parts: Mapping[str, Part] = field(default_factory=dict)


def of_text(tmp_path, text: str) -> Whole:
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    return read(Whole(), tmp_path / "x.toml")


def test_toml_returns(tmp_path):
    for config in (
        Whole(),
        Whole(
            "x",
            Path("a/b"),
            "b",
            (1e300, 5e-324),
            ("u", 'v"'),
            True,
            {"a": 0.5, "b_c": 2.0},
            Part(1 / 3, 7, 1e22),
            Part(2),
            {"a": Part(3), "b-2_c": Part(limit=4)},
        ),
    ):
        assert of_text(tmp_path, to_toml(config)) == config
        assert from_dict(Whole(), to_dict(config)) == config


def test_tables_of_a_mapping(tmp_path):
    """Each has the defaults of its class; wrong keys, values and names are named in full."""
    config = of_text(tmp_path, "[parts.a]\nsteps = 5\n[parts.b]\n")
    assert config.parts == {"a": Part(steps=5), "b": Part()}
    changed = of_text(tmp_path, "[parts.a]\nsteps = 5\nlimit = 2.0\n[parts.c]\n")
    assert list(differences(to_dict(config), to_dict(changed))) == [
        "parts.a.limit: None -> 2.0", "parts.b: {'rate': 0.1, 'steps': 3} -> None",
        "parts.c: None -> {'rate': 0.1, 'steps': 3}",
    ]  # fmt: skip
    for text, message in (
        ("[parts.a]\nstep = 5", "unknown key 'parts.a.step'; the nearest is 'parts.a.steps'"),
        ("[parts.a]\nsteps = 0", "parts.a: steps: expected at least 1, got 0"),
        ("[parts.a]\nsteps = true", "parts.a.steps: expected int, got True"),
        ("[parts.a]\nbound = 1.0", "'parts.a.bound' has been renamed to 'parts.a.limit'"),
        ("[parts]\na = 5", "parts.a: expected a table, got 5"),
        ("parts = 5", "parts: expected a table, got 5"),
        ('[parts."my set"]', "parts.my set: expected a name of letters, digits, - and _"),
        ('[parts."a.b"]', "parts.a.b: expected a name of letters, digits, - and _"),
    ):
        with pytest.raises(ConfigError, match=message):
            of_text(tmp_path, text)


def test_file_overrides_default_field_by_field(tmp_path):
    config = of_text(tmp_path, "root = 'data'\n[second]\nsteps = 9\n")
    assert config == Whole(root=Path("data"), second=Part(rate=1e-9, steps=9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[second]\nstep = 1", r"x.toml: unknown key 'second.step'; the nearest is 'second.steps'"),
        ("rooot = 'a'", r"unknown key 'rooot'; the nearest is 'root'"),
        ("[first]\nbound = 1", r"x.toml: 'first.bound' has been renamed to 'first.limit'"),
        ("on = 1", "on: expected bool, got 1"),
        ("[first]\nsteps = true", "first.steps: expected int, got True"),
        ("[first]\nsteps = 2.0", "first.steps: expected int, got 2.0"),
        ("[first]\nlimit = 'x'", "first.limit: expected float, got 'x'"),
        ("kind = 'c'", "kind: expected one of a, b, got 'c'; the nearest is '[ab]'$"),
        ("kind = 3", "kind: expected one of a, b, got 3$"),
        ("betas = [1.0]", "betas: expected a list of 2, got"),
        ("weights = 3", "weights: expected a table, got 3"),
        ("[weights]\na = 'x'", "weights.a: expected float, got 'x'"),
        ("first = 3", "first: expected a table, got 3"),
        ("[first]\nsteps = 0", "x.toml: first: steps: expected at least 1, got 0"),
        ("first", "x.toml: not TOML"),
    ],
)
def test_rejects(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        of_text(tmp_path, text)


def test_rejects_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml: No such file"):
        read(Whole(), tmp_path / "nowhere.toml")


def test_keys_and_differences():
    assert list(keys(Part)) == ["rate", "steps", "limit"]
    assert "second.limit" in list(keys(Whole))
    old, new = Whole(), Whole(root=Path("r"), first=Part(steps=4))
    assert list(differences(to_dict(old), to_dict(new))) == ["first.steps: 3 -> 4", "root: None -> 'r'"]


def test_filled():
    defaults = {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}}
    assert filled({"a": 5, "b": {"d": 6}, "x": 7}, defaults) == {"a": 5, "b": {"c": 2, "d": 6}, "e": {"f": 4}, "x": 7}
    assert filled({"b": 5}, defaults)["b"] == 5


@dataclass(frozen=True)
class Numbers:
    share: float = bounded(0.5, at_least=0, below=1)
    rates: tuple[float, ...] = bounded((1.0,), above=0)
    count: int | None = bounded(None, at_least=1)
    free: float = -1e9
    on: bool = True
    weights: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    part: Part = field(default_factory=Part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1.0}, "share: expected at least 0 and less than 1, got 1.0"),
        ({"share": -0.1}, "share: expected at least 0 and less than 1, got -0.1"),
        ({"rates": (1.0, 0.0)}, "rates: expected more than 0, got 0.0"),
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"free": float("nan")}, "free: expected a finite number, got nan"),
        ({"weights": {"a": float("inf")}}, "weights.a: expected a finite number, got inf"),
        ({"part": Part(rate=float("nan"))}, "part.rate: expected a finite number, got nan"),
        ({"parts": {"a": Part(limit=float("-inf"))}}, "parts.a.limit: expected a finite number, got -inf"),
    ],
)
def test_numbers(change, message):
    """Each is finite and in its field's range, at any depth."""
    check_numbers(Numbers(share=0.0, count=1, parts={"a": Part()}))
    with pytest.raises(ConfigError) as raised:
        check_numbers(Numbers(**change))
    assert str(raised.value) == message
