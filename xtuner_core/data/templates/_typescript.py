"""Functions as TypeScript types, the way gpt-oss is told of its tools; source: the chat template published with gpt-oss (OpenAI, 2025).

Line breaks and blanks are the template's, odd as some are: the model has seen them so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.templates._parts import tojson

ARRAYS = {"string": "string[]", "number": "number[]", "integer": "number[]", "boolean": "boolean[]"}
SCALARS = {"number": "number", "integer": "number", "boolean": "boolean"}
LONG = 50
"""An array's inner type of more characters becomes `any`."""


def namespace(name: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools, OpenAI's JSON schemas, as functions of one namespace."""
    functions = "".join(_function(tool["function"]) for tool in tools)
    return f"## {name}\n\nnamespace {name} {{\n\n{functions}}} // namespace {name}"


def _function(function: Mapping[str, Any]) -> str:
    if "description" not in function:
        raise Rejected(f"the tool {function['name']!r} has no description, which the gpt-oss template needs")
    head = f"// {function['description']}\ntype {function['name']} = "
    parameters = function.get("parameters") or {}
    if not parameters.get("properties"):
        return head + "() => any;\n\n"
    required = parameters.get("required") or []
    lines = "".join(_parameter(name, spec, required) for name, spec in parameters["properties"].items())
    return head + "(_: {\n" + lines + "}) => any;\n\n"


def _parameter(name: str, spec: Mapping[str, Any], required: Sequence[str]) -> str:
    comment = f"// {spec['description']}\n" if spec.get("description") else ""
    optional = "" if name in required else "?"
    return f"{comment}{name}{optional}: {_type(spec)}{_default(spec)},\n"


def _default(spec: Mapping[str, Any]) -> str:
    if "default" not in spec:
        return ""
    if spec.get("enum"):
        return f", // default: {spec['default']}"
    return f"// default: {spec['default']}" if spec.get("oneOf") else f", // default: {tojson(spec['default'])}"


def _type(spec: Mapping[str, Any]) -> str:
    kind = spec.get("type")
    if kind == "array":
        return _array(spec)
    if isinstance(kind, (list, tuple)) and kind:
        return " | ".join(str(one) for one in kind)
    if spec.get("oneOf"):
        return " | \n".join(_variant(variant) for variant in spec["oneOf"])
    if kind == "string":
        return '"' + '" | "'.join(map(str, spec["enum"])) + '"' if spec.get("enum") else "string" + _nullable(spec)
    if kind == "object":
        return _object(spec)
    return SCALARS.get(kind, "any") if isinstance(kind, str) else "any"


def _nullable(spec: Mapping[str, Any]) -> str:
    return " | null" if spec.get("nullable") else ""


def _array(spec: Mapping[str, Any]) -> str:
    items = spec.get("items")
    if not items:
        return "any[]" + _nullable(spec)
    kind = items.get("type")
    if isinstance(kind, str) and kind in ARRAYS:
        return ARRAYS[kind] + _nullable(spec)
    inner = _type(items)
    return ("any[]" if inner == "object | object" or len(inner) > LONG else inner + "[]") + _nullable(spec)


def _variant(variant: Mapping[str, Any]) -> str:
    comment = f"// {variant['description']}" if variant.get("description") else ""
    default = " " * 20 + f"// default: {tojson(variant['default'])}" if "default" in variant else ""
    return _type(variant) + comment + default


def _object(spec: Mapping[str, Any]) -> str:
    if not spec.get("properties"):
        return "object"
    required = spec.get("required") or []
    return "{\n" + ", ".join(_property(name, inner, required) for name, inner in spec["properties"].items()) + "}"


def _property(name: str, spec: Mapping[str, Any], required: Sequence[str]) -> str:
    optional = "" if name in required else "?"
    return f"{name}{optional}: \n" + " " * 16 + _type(spec)
