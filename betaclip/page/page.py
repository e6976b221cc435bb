"""Writes the page about a run: one HTML file that needs no server, no network and no other file."""

import base64
import hashlib
import json
import logging
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import betaclip
from betaclip.evaluation.report import Results, tables
from betaclip.evaluation.run import Evaluator
from betaclip.files import write_atomically
from betaclip.model.beta_clip import BetaCLIP
from betaclip.page import curves
from betaclip.page.images import RAMP
from betaclip.page.mistakes import mistakes
from betaclip.page.pictures import shown_pictures
from betaclip.page.results import by_set, measures
from betaclip.settings import flat, to_dict, to_toml
from betaclip.training.config import TrainingConfig
from betaclip.training.log import read_metrics

FILE = "report.html"

_log = logging.getLogger(__name__)


def write_page(
    file: Path,
    config: TrainingConfig,
    runs: Mapping[str, Path],
    results: Results,
    model: BetaCLIP | None,
    evaluator: Evaluator | None,
) -> None:
    """Write what there is to show of a run; parts without content are left out.

    Args:
        config: the run's settings.
        runs: the folders of the run and of those that it is compared with, by name, itself first.
        results: the final ones, as results.json holds them; empty if the run has not come to its end.
        model: the trained model, for pictures and choices; None if there is none yet.
        evaluator: has the sets of the run's evaluation; None if they cannot be read.

    Raises:
        OutputError: the file cannot be written.
    """
    metrics = {name: read_metrics(folder / "metrics.jsonl") for name, folder in runs.items()}
    content = {
        "name": config.run.name,
        "folder": shlex.quote(str(next(iter(runs.values())))),
        "version": betaclip.__version__,
        "facts": _facts(config, next(iter(metrics.values())), model),
        "sets": [(name, list(values), measures(values)) for name, values in by_set(results).items()],
        "tables": tables(results),
        "panels": curves.panels({name: rows for name, rows in metrics.items() if rows}),
        "curves": curves,
        "runs": [name for name, rows in metrics.items() if rows],
        "ramp": RAMP,
        "changed": _changed(config),
        "settings": to_toml(config),
        **_of_model(config, model, evaluator),
    }
    with write_atomically(file) as stream:
        stream.write(render(content).encode())


def render(content: Mapping[str, Any]) -> str:
    """The page of the template. Every string in the content is escaped."""
    source = {name: resources.files(__package__).joinpath(name).read_text("utf-8") for name in
              ("template.html", "style.css", "script.js")}  # fmt: skip
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = source["script.js"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(source["template.html"]).render(
        content, style=Markup(source["style.css"]), script=Markup(script), script_digest=digest
    )


def _facts(config: TrainingConfig, rows: list[dict[str, float]], model: BetaCLIP | None) -> list[tuple[str, str]]:
    """The name and value of each thing that the head of the page says."""
    facts = []
    if model is not None:
        name = "from JSON" if config.model.name.startswith("{") else config.model.name
        count = sum(parameter.numel() for parameter in model.parameters())
        side = model.image_size
        facts.append(("model", f"{name}, {count / 1e6:.1f} M parameters, pictures of {side} × {side} pixels"))
    facts.append(("data", config.data.kind))
    if logged := [row for row in rows if row.get("epoch")]:
        step = int(logged[-1]["step"])
        steps = config.run.steps or round(step * config.run.epochs / logged[-1]["epoch"])
        done = f"{step:,} of {steps:,}" + ("" if step >= steps else ", not finished")
        facts.append(("updates", f"{done}; {config.run.batch_size:,} pictures each"))
    weights = {name: weight for name, weight in config.loss.term_weights().items() if weight}
    facts.append(
        ("losses", ", ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items()))
    )
    if weights.get("beta_cal"):
        facts.append(("β-CAL", f"{config.loss.form} form, β = {config.loss.beta:g}"))
    return facts


def _changed(config: TrainingConfig) -> list[tuple[str, str, str]]:
    """The settings that are not the default ones: name, value and default."""
    values, defaults = (dict(flat(to_dict(one))) for one in (config, type(config)()))
    names = [name for name in values if values[name] != defaults.get(name) and name not in ("run.name", "run.folder")]
    return [(name, _plain(values[name]), _plain(defaults.get(name))) for name in names]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value, ensure_ascii=False)


def _of_model(config: TrainingConfig, model: BetaCLIP | None, evaluator: Evaluator | None) -> dict[str, Any]:
    """Pictures, where they are from, and mistakes. Data that can no longer be read are left out, and logged."""
    content: dict[str, Any] = {"origin": "", "pictures": [], "mistakes": []}
    if model is None:
        return content
    try:
        sets = [] if evaluator is None else evaluator.sets.retrieval
        content["origin"], content["pictures"] = shown_pictures(model, config.data, sets)
    except (OSError, ValueError) as error:
        _log.warning("left out the pictures: data: %s", error)
    if evaluator is not None:
        try:
            content["mistakes"] = mistakes(model, evaluator)
        except (OSError, ValueError) as error:
            _log.warning("left out the choices: %s", error)
    return content
