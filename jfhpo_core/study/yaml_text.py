"""The YAML of study files: YAML 1.2 ('1e-6' is a number, '1:30' and 'on' are texts), read with its line numbers.

YAML that a study cannot mean is rejected here: repeated keys, keys that are no words, aliases of themselves, and texts
whose nesting or aliases would keep a reader busy for ever.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from jfhpo_core.errors import SpecError

LARGEST_TEXT = 1_000_000
"""Characters of a study file."""

DEEPEST = 20
"""Levels of nested lists and mappings; a study has up to seven."""

MOST_VALUES = 10_000
"""Values of a study, aliases expanded; as many are read in a quarter of a second."""

LINE_WIDTH = 110

WORDS = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"}
"""Tags of keys: field names, and `<<`, which merges the fields of an alias."""


@dataclass(frozen=True)
class Document:
    """The content of a study file and where its values stand.

    Attributes:
        data: Plain Python values; None if the text is empty.
        root: The same as ruamel's nodes, which know their lines; None if the content comes from no text.
    """

    data: Any
    root: Node | None = None

    def locate(self, location: Sequence[int | str]) -> tuple[int | None, str]:
        """Line and dotted field of the deepest value on a path that stands in the document; no line without a text.

        Args:
            location: Keys and positions. Parts that are not in the document are skipped, because pydantic adds parts
                for the members of a union.
        """
        data, node, field = self.data, self.root, []
        line = _line(node) if node is not None else None
        for part in location:
            if isinstance(data, Mapping) and part in data:
                data = data[part]
                pairs = node.value if isinstance(node, MappingNode) else []
                # A merged field (`<<: *alias`) has no line of its own.
                key, node = next((pair for pair in pairs if pair[0].value == part), (None, None))
                line = _line(key) if key is not None else line
            elif isinstance(data, list) and isinstance(part, int) and part < len(data):
                data = data[part]
                node = node.value[part] if isinstance(node, SequenceNode) else None
                line = _line(node) if node is not None else line
            else:
                continue
            field.append(str(part))
        return line, ".".join(field)


def read_yaml(text: str, source: str) -> Document:
    """Read one YAML document.

    Args:
        text: YAML.
        source: Name for messages.

    Raises:
        SpecError: It is not YAML, or YAML that makes no sense in a study; with the line.
    """
    if len(text) > LARGEST_TEXT:
        raise SpecError(f"{source}: {len(text):,} characters are too many for a study file (limit {LARGEST_TEXT:,})")
    try:
        _check_size(text, source)
        yaml = _yaml()
        root = yaml.compose(text)
        _check_nodes(root, source)
        data = yaml.constructor.construct_document(root) if root is not None else None
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SpecError(f"{source}{line}: this is not valid YAML: {error.problem}") from None
    except (YAMLError, ValueError) as error:
        raise SpecError(f"{source}: this is not valid YAML: {str(error).splitlines()[0]}") from None
    return Document(data, root)


def write_yaml(data: Any) -> str:
    """YAML that `read_yaml` reads back to equal data."""
    text = io.StringIO()
    _yaml().dump(data, text)
    return text.getvalue()


def _yaml() -> Any:
    yaml: Any = YAML(typ="safe", pure=True)  # the C parser knows YAML 1.1 only
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.width = LINE_WIDTH
    return yaml


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _check_size(text: str, source: str) -> None:
    """Reject deep nesting and masses of values before the composer, which is recursive and slow, meets them."""
    depth = 0
    for count, event in enumerate(_yaml().parse(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        place = f"{source}, line {event.start_mark.line + 1}"
        if depth > DEEPEST:
            raise SpecError(f"{place}: more than {DEEPEST} levels of nested lists and mappings")
        if count > 2 * MOST_VALUES:
            raise SpecError(f"{place}: more than {MOST_VALUES:,} values; a study has a few dozen")


def _check_nodes(root: Node | None, source: str) -> None:
    """Reject valid YAML that makes no sense here: duplicate keys, non-scalar keys, recursive aliases, alias bombs."""
    sizes: dict[int, int] = {}

    def size(node: Node, above: tuple[Node, ...]) -> int:
        """Number of values in a node, aliases expanded."""
        if isinstance(node, ScalarNode):
            return 1
        if node in above:
            raise SpecError(f"{source}, line {_line(node)}: an alias refers to a value that contains it")
        if id(node) not in sizes:
            values = node.value
            if isinstance(node, MappingNode):
                _check_keys([key for key, _ in node.value], source)
                values = [value for _, value in node.value]
            sizes[id(node)] = 1 + sum(size(value, (*above, node)) for value in values)
        if sizes[id(node)] > MOST_VALUES:
            raise SpecError(
                f"{source}, line {_line(node)}: more than {MOST_VALUES:,} values once the aliases are expanded; "
                "write the values out, or remove aliases of aliases"
            )
        return sizes[id(node)]

    if root is not None:
        size(root, ())


def _check_keys(keys: Sequence[Node], source: str) -> None:
    seen: set[str] = set()
    for key in keys:
        if not isinstance(key, ScalarNode):
            raise SpecError(f"{source}, line {_line(key)}: a field's name must be a word, not a list or a mapping")
        if key.tag not in WORDS:
            raise SpecError(f"{source}, line {_line(key)}: a field's name must be a word; put {key.value!r} in quotes")
        if key.value in seen:
            raise SpecError(f"{source}, line {_line(key)}: {key.value!r} is given twice; keep one")
        seen.add(key.value)
