"""YAML and JSON in which nothing that is written is dropped: a key written twice is an error, with both places."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from data import DataError


class _Strict(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise DataError(f"line {line}: {key!r} cannot be a key.")
            if key in lines:
                raise DataError(
                    f"'{key}' is written twice, in lines {lines[key]} and {line}: only one of them could act. "
                    "Make one of the two."
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> Any:
    """Safe YAML, every key once.

    Raises:
        DataError: it is not YAML, or a key is written twice.
    """
    try:
        return yaml.load(text, Loader=_Strict)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2015-02-31 is a ValueError
        raise DataError(f"{source} is not valid YAML: {error}") from error


def read_yaml(path: Path, kind: Any, example: str) -> Any:
    """A YAML file whose content is of a kind that pydantic knows.

    Args:
        example: how it is meant, for messages.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text ({error}).") from error
    return checked(kind, tree, str(path), example)


def checked(kind: Any, tree: Any, where: str, example: str) -> Any:
    """A tree as a kind that pydantic knows.

    Raises:
        DataError: it is something else; says where and what.
    """
    from pydantic import TypeAdapter, ValidationError  # not for those who read no such file

    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
    places = [_place(tree, about["loc"], about["type"] == "missing") for about in wrong]
    place = max(places, key=len)  # of a union the kind that fits best
    told = " or ".join(dict.fromkeys(about["msg"] for about, at in zip(wrong, places, strict=True) if at == place))
    raise DataError(f"{': '.join(filter(None, [where, ', '.join(place), told]))}. Write {example}")


def _place(tree: Any, location: tuple[int | str, ...], missing: bool) -> list[str]:
    """Where in a tree something is wrong; pydantic's names of its own kinds are left out."""
    names = []
    for step in location:
        if isinstance(tree, list) and isinstance(step, int):
            names.append(f"entry {step + 1}")
            tree = tree[step]
        elif isinstance(tree, dict) and str(step) in map(str, tree):
            key = next(key for key in tree if str(key) == str(step))
            names.append(repr(key))
            tree = tree[key]
    return [*names, repr(location[-1])] if missing else names


def parse_json(text: str, source: str) -> Any:
    """JSON, every key once.

    Raises:
        DataError: it is not JSON, or a key is written twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            lines = [number for number, line in enumerate(text.splitlines(), 1) if f'"{twice}"' in line]
            raise DataError(f"'{twice}' is written twice, see lines {', '.join(map(str, lines))}: only one could act.")
        return tree

    try:
        return json.loads(text, object_pairs_hook=once)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not valid JSON: {error}") from error
