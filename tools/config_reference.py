"""Write docs/config.md and workflow/schemas/config.schema.json: `python tools/config_reference.py`.

Keys, values, defaults and descriptions are those of `gmp_atl.config.Config`, a column is that of config.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from gmp_atl.config import Config, Section

ROOT = Path(__file__).parent.parent
ABSENT = object()
"""Stands for a value that is not there; null is one that is."""

HEAD = """\
# Every key of the config

<!-- Made by `python tools/config_reference.py` from src/gmp_atl/config.py and config.yaml; do not edit. -->

`config.yaml` is the paper's experiment on IEMOCAP; a preset, or `--config` on the command line, changes single keys
of it. Unknown keys are refused. *Default* is what the code takes where a key is not given, with a dash where it must
be; the column beside it is what `config.yaml` has. Numbers such as `[9]` in `config.yaml` are those of [the open
readings](readings.md). What an edit reruns is told in [workflow.md](workflow.md#what-an-edit-reruns). Layers are
counted from the end: -1 is the last.

In YAML, quote ids such as `"03"`; on the command line, put a space behind each colon. Of several files after one
`--configfile`, the later change the earlier, `name` included.
"""
WORDS = {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path", NoneType: "null"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def main() -> None:
    """Write both files."""
    for path, text in outputs().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def outputs() -> dict[Path, str]:
    """What each generated file should hold."""
    return {ROOT / "docs/config.md": reference(), ROOT / "workflow/schemas/config.schema.json": schema()}


def schema() -> str:
    """JSON Schema of the whole config."""
    return json.dumps(Config.model_json_schema(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def reference() -> str:
    """The page: a table of the keys outside any section, then one for each section."""
    paper = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    parts = [HEAD, "## At the top", *_table(Config, "", paper, nested=False)]
    for name, section in _sections(Config):
        parts += [f"## {name}", _prose(section.__doc__)]
        parts += [f"`{name}.{part}`: {_prose(inner.__doc__)}" for part, inner in _sections(section)]
        parts += _table(section, f"{name}.", paper)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def keys(section: type[Section], prefix: str = "", *, nested: bool = True) -> Iterator[tuple[str, FieldInfo]]:
    """Dotted path and field of every key that is not itself a section, in the order of the code."""
    for name, field in section.model_fields.items():
        if (inner := _section(field)) is None:
            yield prefix + name, field
        elif nested:
            yield from keys(inner, f"{prefix}{name}.")


def defaults(section: type[Section]) -> dict[str, Any]:
    """What the code takes where nothing is given; keys that must be given are left out."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if not field.is_required():
            value = field.default
            found[name] = value.model_dump(mode="json") if isinstance(value, Section) else value
        elif inner := _section(field):
            found[name] = defaults(inner)
    return found


def look_up(settings: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or ABSENT."""
    value: Any = settings
    for name in path.split("."):
        value = value.get(name, ABSENT) if isinstance(value, Mapping) else ABSENT
    return value


def _section(field: FieldInfo) -> type[Section] | None:
    """What a key holds, if that is a section, one that may be left out, or a list of them."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _sections(section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    for name, field in section.model_fields.items():
        if inner := _section(field):
            yield name, inner


def _table(section: type[Section], prefix: str, paper: Mapping[str, Any], *, nested: bool = True) -> list[str]:
    rows = [["Key", "Values", "Default", "`config.yaml`", "Meaning"], ["---"] * 5]
    for path, field in keys(section, prefix, nested=nested):
        values = _values(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
        shown = [_yaml(look_up(settings, path)) for settings in (defaults(Config), paper)]
        rows.append([f"`{path}`", values, *shown, _prose(field.description)])
    return ["\n".join("| " + " | ".join(row) + " |" for row in rows)]


def _values(annotation: Any) -> str:
    """What a key may hold, in words."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        # A Field inside Annotated keeps its constraints in a list of its own.
        constraints = [c for each in arguments[1:] for c in (each.metadata if isinstance(each, FieldInfo) else [each])]
        bounds = [f"{sign} {getattr(c, key)}" for c in constraints for key, sign in BOUNDS.items() if hasattr(c, key)]
        return f"{_values(arguments[0])} {', '.join(bounds)}".strip()
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin is list:
        return f"list of {_values(arguments[0])}"
    if origin is dict:
        return "mapping from name to settings"
    return " or ".join(map(_values, arguments))  # a union


def _yaml(value: Any) -> str:
    return "-" if value is ABSENT else f"`{json.dumps(value, ensure_ascii=False)}`".replace('"', "")


def _prose(text: str | None) -> str:
    """A docstring on one line, safe in a table."""
    return " ".join((text or "").split()).replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    main()
