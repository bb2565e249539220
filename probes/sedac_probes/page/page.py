"""The report page of a workshop run: one HTML file that holds everything, for any browser, without network or scripts.

Reads the files of a work directory (streams/, train, validation, calibration, comparison, certificate and check as .json, policy.json)
and the probe set; measures nothing. Called by the command `report`. What `sections` and `blocks` make is escaped by the template.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import safetensors
from markupsafe import Markup
from sedac.errors import ArtifactError, ConfigError
from sedac.probe.manifest import read_manifest

from sedac_probes.page import sections, statement
from sedac_probes.page.blocks import Part, Section, Text, as_dict, as_number, as_percent, as_text, mark_code

NAMES = ("train", "validation", "calibration", "comparison", "certificate", "check")
_KINDS = {"train": "train", "validate": "validation", "calibrate": "calibration", "compare": "comparison", "certify": "certificate", "check": "check"}
_DATA_FIELDS = ("num_documents", "num_tokens", "data_digest", "data_sha256")


def read_parts(work: Path) -> tuple[dict[str, Part], list[str]]:
    """Return the JSON files of a work directory by what they are, and a line for each that can't be read.

    A file is known by its name, else by its field `kind`.

    Raises:
        ConfigError: the directory is missing.
    """
    if not work.is_dir():
        raise ConfigError(f"{work} is no directory; name the work directory of a workshop run")
    paths = [*sorted(work.glob("*.json")), *sorted((work / "streams").glob("collection.json"))]
    parts: dict[str, Part] = {}
    problems = []
    for path in sorted(paths, key=lambda p: p.stem not in NAMES):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data = {"rows": data} if isinstance(data, list) else data
            if not isinstance(data, dict):
                raise ValueError(f"it holds a {type(data).__name__}, not an object")
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path.name} can't be read ({error}); run its command again")
            continue
        name = path.stem if path.stem in (*NAMES, "collection") else _KINDS.get(str(data.get("kind")), "")
        if name:
            parts.setdefault(name, Part(name=path.name, data=data))
    return parts, problems


def read_probe_set(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest as plain JSON, and a line where it can't be read; nothing of either where there is none."""
    path = directory / "manifest.json"
    if not path.is_file():
        return {}, []
    try:
        read_manifest(directory)
    except ArtifactError as error:
        return {}, [str(error)]
    return json.loads(path.read_text()), []


def count_tokens(collection: Path) -> int:
    """Return the number of tokens in a collection's shards, from their headers alone; 0 where they can't be read."""
    total = 0
    for path in collection.glob("shard-*.safetensors"):
        try:
            with safetensors.safe_open(path, framework="numpy") as shard:
                total += shard.get_slice("entropy").get_shape()[0]
        except (OSError, safetensors.SafetensorError):
            return 0
    return total


def make_page(work: Path, probe_set: Path, *, model: str = "") -> str:
    """Return the page as HTML.

    Raises:
        ConfigError: `work` is missing, or has nothing to report.
    """
    parts, problems = read_parts(work)
    manifest, more = read_probe_set(probe_set)
    problems += more
    if not parts and not manifest:
        names = ", ".join(f"{name}.json" for name in NAMES)
        raise ConfigError(f"{work} has none of {names}, and {probe_set} is no probe set; run `sedac-probes demo` first")
    collection, certification = parts.get("collection"), parts.get("certificate")
    model = model or str(collection.data.get("model", "") if collection else "") or str(manifest.get("model", "")) or "MODEL_DIR"
    missing = _find_missing(work, probe_set, parts, manifest, model)
    certificate = as_dict(certification.data.get("certificate") if certification else None)
    problems += _find_mixture(manifest, parts, certificate)
    made = (
        statement.make_certificate(certification, parts.get("check")),
        sections.make_data(collection, count_tokens(work / "streams"), _get_uses(manifest, parts)),
        sections.make_model(manifest, collection, certificate),
        sections.make_probes(manifest, parts.get("train"), work / "train.png"),
        sections.make_validation(parts.get("validation"), work / "validation.png"),
        sections.make_levels(manifest, parts.get("calibration")),
        sections.make_comparison(parts.get("comparison")),
        statement.make_next(work, model, probe_set, missing, certification),
    )
    shown = [_mention_missing(section, missing) for section in made if section]
    if problems:
        shown.insert(0, Section(name="problems", title="Look at this first", blocks=tuple(Text(text=p, kind="warning") for p in problems)))
    return _get_template().render(
        title=f"Probe set {manifest['name']} for {Path(model).name}" if manifest else f"Probes for {Path(model).name}",
        style=Markup(resources.files("sedac_probes.page").joinpath("report.css").read_text(encoding="utf-8")),
        verdict=_judge(certification),
        cards=_make_cards(manifest, parts),
        sections=shown,
        work=str(work),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


@functools.cache
def _get_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sedac_probes.page", "."), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = mark_code
    return environment.get_template("report.html.j2")


def write_page(out: Path, page: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        ConfigError: it can't be written.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} can't be written ({error}); name another file with --out") from error
    finally:
        with contextlib.suppress(OSError):  # the directory itself may be missing
            temporary.unlink()


def _judge(certification: Part | None) -> dict[str, str]:
    if certification is None:
        return {"kind": "none", "word": "UNCERTIFIED", "text": "No certification was run: what is below is measured, and nothing of it is promised."}
    good = bool(certification.data.get("certificate"))
    return {"kind": "good" if good else "bad", "word": "CERTIFIED" if good else "NONE CERTIFIED", "text": statement.state(certification)}


def _make_cards(manifest: Mapping[str, Any], parts: Mapping[str, Part]) -> list[tuple[str, str]]:
    certification = parts.get("certificate")
    settings = as_dict(certification.data.get("settings") if certification else None)
    certificate = as_dict(certification.data.get("certificate") if certification else None)
    saving = statement.get_best_saving(certification)
    cards = []
    if saving is not None:
        cards.append((as_percent(saving), "of MLP FLOPs saved, certified"))
    if (limit := as_number(certificate.get("upper_limit"))) is not None:
        cards.append((f"{limit:.4f}", f"upper limit of the mean {settings.get('loss', 'loss')}"))
    if settings.get("num_requests"):
        cards.append((str(as_text(settings["num_requests"])), "requests tested"))
    if not cards and (levels := manifest.get("levels")):
        cards.append((str(len(levels)), "levels, measured"))
    if probes := manifest.get("probes"):
        cards.append((str(len(probes)), "checkpoints"))
    return cards


def _get_uses(manifest: Mapping[str, Any], parts: Mapping[str, Part]) -> dict[str, Mapping[str, Any]]:
    """What each step was made from, where its file says."""
    training = as_dict(manifest.get("training"))
    uses: dict[str, Mapping[str, Any]] = {}
    if "collection" not in parts and "data_digest" in training:
        uses["train"] = training
    calibration = parts.get("calibration")
    found = {"calibrate": as_dict(calibration.data.get("training") if calibration else None) or as_dict(training.get("calibration"))}
    for step, name in (("validate", "validation"), ("compare", "comparison"), ("certify", "certificate"), ("check", "check")):
        if name in parts:
            data = parts[name].data
            found[step] = as_dict(data.get("data")) or {k: data[k] for k in _DATA_FIELDS if k in data}
    return uses | {step: data for step, data in found.items() if data}


def _find_missing(work: Path, probe_set: Path, parts: Mapping[str, Part], manifest: Mapping[str, Any], model: str) -> list[tuple[str, str]]:
    """What the directory lacks, in the order of the workshop, with the command that makes it."""
    m, p, w = shlex.quote(model), shlex.quote(str(probe_set)), shlex.quote(str(work))
    steps = {
        "collection": ("recorded streams", f"sedac-probes collect --model {m} --texts TRAFFIC.txt --out {w}/streams"),
        "train": ("training" if manifest else "probe set", f"sedac-probes train --collection {w}/streams --out {p} --name NAME"),
        "validation": ("validation", f"sedac-probes validate --model {m} --probe-set {p} --texts HELD_OUT.txt --out {w}/validation"),
        "calibration": ("calibration", f"sedac-probes calibrate --model {m} --probe-set {p} --texts TRAFFIC.txt --report {w}/calibration"),
        "comparison": ("comparison of mechanisms", f"sedac-probes compare --model {m} --probe-set {p} --texts HELD_OUT.txt --out {w}/comparison"),
        "certificate": ("certificate", f"sedac-probes certify --model {m} --probe-set {p} --texts FRESH_TRAFFIC.txt --out {w}"),
    }
    return [step for name, step in steps.items() if name not in parts]


def _mention_missing(section: Section, missing: list[tuple[str, str]]) -> Section:
    """Name in a section the parts of it that are left out."""
    homes = {"data": ("recorded streams",), "probes": ("probe set", "training"), "levels": ("calibration",)}
    lines = [Text(text=f"No {what} here; made by: {command}", kind="missing") for what, command in missing if what in homes.get(section.name, ())]
    return Section(name=section.name, title=section.title, blocks=(*section.blocks, *lines)) if lines else section


def _find_mixture(manifest: Mapping[str, Any], parts: Mapping[str, Part], certificate: Mapping[str, Any]) -> list[str]:
    """Say where a file was made with another probe set than the one shown."""
    given = {parts[n].name: parts[n].data.get("probe_set") for n in ("validation", "calibration", "comparison") if n in parts}
    if certificate:
        given[parts["certificate"].name] = certificate.get("probe_set_sha256")
    mine = manifest.get("sha256")
    others = {name: str(digest) for name, digest in given.items() if mine and isinstance(digest, str) and len(digest) == 64 and digest != mine}
    return [f"{name} was made with probe set {digest[:12]}…, this is {str(mine)[:12]}…: run its command again" for name, digest in others.items()]
