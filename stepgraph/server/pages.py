"""What a browser is shown: the list of endpoints and the fields of requests. Pages hold all that they show, and load nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from starlette.responses import HTMLResponse

from stepgraph.server.directory import Endpoint

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884 }
code { font: 14px ui-monospace, monospace }
summary { cursor: pointer; padding: .2rem 0 }
details > div { margin-left: 1.2rem }
"""
_REF = "#/components/schemas/"
_NOT_SHOWN = frozenset({"HTTPValidationError", "ValidationError"})
"""FastAPI's own, which no reply here has."""


def index_page(version: str, endpoints: Sequence[Endpoint], root_path: str) -> HTMLResponse:
    """What there is, for a person who opens the server's address. `root_path` is what a proxy puts before all paths."""
    rows = ([_code(" ".join(e.methods)), _code(e.path), escape(e.summary)] for e in endpoints)
    return _page(
        f"stepgraph {version}",
        "<p>This server answers the OpenAI API: give clients its address with <code>/v1</code> as base URL, and those of "
        "Anthropic's API the address alone. "
        f'<a href="{escape(root_path)}/docs">The fields of all requests</a>, '
        f'<a href="{escape(root_path)}/openapi.json">as OpenAPI document</a>.</p>',
        _table(("", "Path", ""), rows),
    )


def reference_page(document: Mapping[str, Any]) -> HTMLResponse:
    """An OpenAPI document for people."""
    schemas: Mapping[str, Any] = document.get("components", {}).get("schemas", {})
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for tag in operation.get("tags", ["further"]):
                by_tag.setdefault(tag, []).append(_operation(method, path, operation, schemas))
    sections = [part for tag, shown in by_tag.items() for part in (f"<h2>{escape(tag.capitalize())}</h2>", *shown)]
    types = [
        f'<details id="{escape(name)}"><summary>{_code(name)}</summary><div>{_fields(schema)}</div></details>'
        for name, schema in schemas.items()
        if name not in _NOT_SHOWN
    ]
    return _page(
        f"{document['info']['title']} {document['info']['version']}",
        f"<p>{escape(document['info'].get('description', ''))} "
        '<a href="openapi.json">The same as OpenAPI document</a>.</p>',
        *sections,
        "<h2>Objects in requests</h2>",
        *types,
    )


def _page(title: str, *parts: str) -> HTMLResponse:
    content = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "</body></html>\n"
    )
    return HTMLResponse(content, headers=_HEADERS)


def _operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    parts = [f"<p>{escape(operation['description'])}</p>"] if "description" in operation else []
    if parameters := operation.get("parameters"):
        rows = (
            [_code(each["name"]), _type(each["schema"]), _about(each["schema"] | each, required=each.get("required"))]
            for each in parameters
        )
        parts.append(_table(("In the URL", "Type", ""), rows))
    if body := operation.get("requestBody"):
        schema = body["content"]["application/json"]["schema"]
        parts.append(_fields(schemas[_name(schema)] if "$ref" in schema else schema))
    title = f"{_code(f'{method.upper()} {path}')} {escape(operation.get('summary', ''))}"
    return f"<details><summary>{title}</summary><div>{''.join(parts)}</div></details>"


def _fields(schema: Mapping[str, Any]) -> str:
    """A table of an object's fields; another type in a line."""
    about = f"<p>{escape(schema['description'])}</p>" if "description" in schema else ""
    if "properties" not in schema:
        return f"{about}<p>{_type(schema)}</p>"
    required = schema.get("required", ())
    rows = (
        [_code(name), _type(field), _about(field, required=name in required)]
        for name, field in schema["properties"].items()
    )
    return about + _table(("Field", "Type", ""), rows)


def _about(field: Mapping[str, Any], *, required: bool | None) -> str:
    default = field.get("default")
    notes = ["required"] if required else [] if default is None else [f"default {_code(_plain(default))}"]
    return "; ".join([*([escape(field["description"])] if "description" in field else []), *notes])


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema's type, in words."""
    if "$ref" in schema:
        name = _name(schema)
        return f'<a href="#{escape(name)}">{escape(name)}</a>'
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_type(each) for each in schema[several] if each.get("type") != "null"))
    if "const" in schema:
        return _code(_plain(schema["const"]))
    if "enum" in schema:
        return ", ".join(_code(_plain(value)) for value in schema["enum"])
    kind = schema.get("type", "any value")
    return f"list of {_type(schema['items'])}" if kind == "array" and "items" in schema else escape(str(kind))


def _name(schema: Mapping[str, Any]) -> str:
    return str(schema["$ref"]).removeprefix(_REF)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML."""
    lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table><tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>{''.join(lines)}</table>"
