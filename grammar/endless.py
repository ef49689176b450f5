"""Whether a JSON Schema asks for itself without end, as {"$ref": "#"} does: a grammar of it compiles, and then no token
fits, or no answer ever ends.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

_MAX_NODES = 20_000
_MAX_ROUNDS = 50


def endless(schema: Any) -> bool:
    """True: no finite value fits. False where that is not certain."""
    clauses: dict[int, list[list[Any]]] = {}
    order: list[int] = []  # those asked for come after those that ask
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if id(node) in clauses:
            continue
        if len(order) == _MAX_NODES:
            return False
        clauses[id(node)] = _demands(node, schema)
        order.append(id(node))
        waiting += [child for clause in clauses[id(node)] for child in clause]
    ending: set[int] = set()
    for _ in range(_MAX_ROUNDS):
        before = len(ending)
        for node in reversed(order):
            if all(any(id(child) in ending for child in clause) for clause in clauses[node]):
                ending.add(node)
        if id(schema) in ending:
            return False
        if len(ending) == before:
            return True
    return False


def _demands(node: Any, root: Any) -> list[list[Any]]:
    """Schemas that a value, or a part of it, must fit: one of each list."""
    if not isinstance(node, dict) or ("$id" in node and node is not root):  # the second has references of its own
        return []
    found: list[list[Any]] = []
    target = _target(node.get("$ref"), root)
    if target is not None:
        found.append([target])
    for name in ("anyOf", "oneOf"):
        if isinstance(node.get(name), list) and node[name]:
            found.append(node[name])
    if isinstance(node.get("allOf"), list):
        found += [[child] for child in node["allOf"]]
    properties, required = node.get("properties"), node.get("required")
    if node.get("type") == "object" and isinstance(properties, dict) and isinstance(required, list):
        found += [[properties[name]] for name in required if isinstance(name, str) and name in properties]
    least = node.get("minItems")
    if node.get("type") == "array" and isinstance(least, int) and least > 0:
        first = node.get("prefixItems")
        given = first if isinstance(first, list) else []
        found += [[child] for child in given[:least]]
        if least > len(given) and "items" in node:
            found.append([node["items"]])
    return found


def _target(reference: Any, root: Any) -> Any:
    """None: it is elsewhere, or nowhere, which the grammar library says better."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    node = root
    for step in reference.split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and len(key) < 9 and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node
