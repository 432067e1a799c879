"""YAML and JSON in which nothing that is written is dropped: a key written twice is an error, with both places."""

from __future__ import annotations

import json
from collections.abc import Hashable
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
