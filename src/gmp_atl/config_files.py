"""Config files as text: what Snakemake, which reads them first, would take without a word.

Snakemake merges the files into one mapping, which `config.parse` validates. By then a key that was given twice has
lost its first value. The workflow therefore has each file checked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from gmp_atl.corpora.base import read_text
from gmp_atl.errors import UserError

_LARGEST = 10_000
"""Values of a file, those behind aliases counted each time: config.yaml has some hundred."""
_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")
}


def check(path: Path) -> None:
    """Refuse a config file that is not plain YAML.

    Raises:
        UserError: not UTF-8 or YAML, no mapping, a key twice in one, a tag, an expression (`__use_yte__`), or aliases
            that multiply; names file and line.
    """
    text = read_text(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            if not isinstance(node, yaml.MappingNode):
                raise UserError(f"{path}: a list, or a single value; expected keys and values, as in config.yaml.")
            _count(node, path, {})
    except yaml.MarkedYAMLError as error:
        place = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place}: not YAML ({error.problem}). Mend the line.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({error}).") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a config.") from None


def _count(node: yaml.Node, path: Path, known: dict[int, int]) -> int:
    """Values in a node once aliases are written out; checks each node once."""
    if id(node) in known:
        return known[id(node)]
    place = f"{path}:{node.start_mark.line + 1}"
    if node.tag not in _TAGS:
        # A date, which no key takes, is told by its tag too.
        raise UserError(f"{place}: {node.tag.removeprefix('tag:yaml.org,2002:')} is no type of a config; quote text.")
    known[id(node)] = _LARGEST  # an alias to what it is part of never ends
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, path)
    total = 1 + sum(_count(child, path, known) for child in _children(node))
    if total > _LARGEST:
        raise UserError(f"{place}: stands for over {_LARGEST} values, aliases written out; write the config plainly.")
    known[id(node)] = total
    return total


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_keys(node: yaml.MappingNode, path: Path) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path}:{line}: a list or mapping as a key; expected a name.")
        if key.value == "__use_yte__":
            raise UserError(f"{path}:{line}: __use_yte__ would run the file's expressions as code; remove it.")
        if key.value in first:
            raise UserError(f"{path}:{line}: {key.value} was given in line {first[key.value]} already; remove one.")
        first[key.value] = line
