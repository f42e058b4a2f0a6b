"""The pieces that pages are made of, and the page: one file with nothing to fetch, readable without scripts.

Every function here takes plain values and escapes them; what is markup already is `Html`. So a name from a file, a
class, a tap or a teacher cannot become markup by being forgotten: text is escaped unless somebody says otherwise.
A Content-Security-Policy with the hash of the page's own script is the second fence.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feedfast.errors import printable
from feedfast.provenance import Provenance
from feedfast.report.style import SCRIPT, STYLE

__all__ = [
    "Html", "Section", "block", "details", "escaped", "facts", "joined", "listing", "made_by", "notes", "page",
    "provenance", "shown", "table", "tiles",
]  # fmt: skip

_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{_HASH}'; base-uri 'none'; "
    "form-action 'none'"
)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ?%| ?[A-Za-z]{1,3}(/s)?)?( ± .+)?")
_BLANK = ("", "–")
_SLASH = re.compile(r"(?<=\w)/(?=\w)")
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?\+00:00")


class Html(str):
    """Markup. Only this module and its neighbors make it, of escaped text."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A part of a page under its heading; nothing is shown of one without a body.

    Attributes:
        title: the heading, ours and never from data.
        body: what stands below it.
    """

    title: str
    body: Html


def escaped(value: Any) -> Html:
    """Any text or number as markup: control characters spelled out, everything else as it is."""
    return value if isinstance(value, Html) else Html(html.escape(printable(shown(value)), quote=True))


def _breakable(value: Any) -> Html:
    """As `escaped`; a long path may be broken behind its slashes, and then not in the middle of a name."""
    text = escaped(value)
    return text if isinstance(value, Html) or len(text) < 24 else Html(_SLASH.sub("/<wbr>", text))


def shown(value: Any) -> str:
    """A value as the tables print it."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return "–" if value is None else str(value)


def joined(parts: Iterable[str]) -> Html:
    """Pieces of markup, one after the other."""
    return Html("".join(escaped(part) for part in parts))


def notes(*sentences: Any, muted: bool = False) -> Html:
    """Paragraphs."""
    kind = ' class="muted"' if muted else ""
    return Html("".join(f"<p{kind}>{escaped(sentence)}</p>" for sentence in sentences))


def table(rows: Sequence[Mapping[str, Any]], caption: str) -> Html:
    """Rows with the same keys: the first column names the row, numbers stand right; nothing without rows.

    It scrolls in a box of its own where the screen is narrow, and can be sorted where scripts run.
    """
    if not rows:
        return Html("")
    keys = list(rows[0])
    numeric = {key for key in keys[1:] if _is_numeric([row.get(key) for row in rows])}
    kinds = {key: ' class="num"' if key in numeric else ' class="words"' if _is_long(key, rows) else "" for key in keys}
    head = "".join(f'<th scope="col"{kinds[key] if key in numeric else ""}>{escaped(key)}</th>' for key in keys)
    lines = []
    for row in rows:
        cells = [f'<th scope="row">{_breakable(row.get(keys[0]))}</th>']
        cells += [f"<td{kinds[key]}>{_breakable(row.get(key))}</td>" for key in keys[1:]]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    sortable = ' class="sortable"' if len(rows) > 2 else ""
    name = escaped(caption)
    return Html(
        f'<div class="scroll" role="group" tabindex="0" aria-label="{name}"><table{sortable}>'
        f"<caption><span>{name}</span></caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _is_numeric(values: Sequence[Any]) -> bool:
    said = [value for value in values if value is not None and value not in _BLANK]
    return bool(said) and all(
        (isinstance(value, int | float) and not isinstance(value, bool))
        or (isinstance(value, str) and not isinstance(value, Html) and _NUMBER.fullmatch(value) is not None)
        for value in said
    )


def _is_long(key: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(len(shown(row.get(key))) > 30 for row in rows)


def tiles(values: Mapping[str, Any]) -> Html:
    """A few numbers that matter, large; those that are None are left out."""
    cells = [
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>"
        for name, value in values.items()
        if value is not None
    ]
    return Html(f'<dl class="tiles">{"".join(cells)}</dl>' if cells else "")


def facts(values: Mapping[str, Any]) -> Html:
    """Names and what they are, a line for each of a list; those that are None are left out."""
    cells = []
    for name, value in values.items():
        lines = value if isinstance(value, list | tuple) else [value]
        if lines and value is not None:
            cells.append(f"<dt>{escaped(name)}</dt><dd>{'<br>'.join(map(_breakable, lines))}</dd>")
    return Html(f'<dl class="facts">{"".join(cells)}</dl>' if cells else "")


def listing(text: str, name: str) -> Html:
    """Text as it is, in a box that scrolls; ``name`` says what it is to those who do not see it."""
    return Html(f'<pre tabindex="0" role="group" aria-label="{escaped(name)}">{escaped(text)}</pre>')


def block(text: str, name: str) -> Html:
    """A listing to be copied: with a button for it where scripts run."""
    return Html(f'<div class="block">{listing(text, name)}</div>')


def details(summary: str, body: Html) -> Html:
    """What is folded away until it is asked for."""
    return Html(f"<details><summary>{escaped(summary)}</summary>{body}</details>") if body else body


def provenance(processes: Sequence[Provenance], caption: str = "Processes that made this") -> Html:
    """Who made something, where and when: a line per process, and everything that is known of them, folded."""
    if not processes:
        return Html("")
    rows = [
        {key: _when(value) if key in ("started", "ended") else value for key, value in p.row().items()}
        for p in processes
    ]
    known = json.dumps([process.model_dump(mode="json") for process in processes], indent=2)
    folded = details(
        f"{caption}: all versions, machines and recipes", listing(known, f"{caption}, everything that is known")
    )
    return joined([table(rows, caption), folded])


def _when(text: str) -> str:
    """A time of `Provenance` to the second; anything else as it is."""
    found = _TIME.fullmatch(text)
    return f"{found[1]} {found[2]} UTC" if found else text


def made_by(processes: Sequence[Provenance]) -> str:
    """The version that made a page, and when: for its last line."""
    if not processes:
        return ""
    last = processes[-1]
    return f" {last.versions.get('feedfast') or ''}, {_when(last.ended or last.started)}"


def page(kind: str, title: str, lead: str, sections: Sequence[Section], made: str = "") -> str:
    """A complete page.

    Args:
        kind: what page this is, above the title.
        title: the heading.
        lead: a sentence below it.
        sections: the content; those without a body are left out.
        made: by which version and when: see `made_by`.
    """
    parts = [section for section in sections if section.body]
    links = "".join(f'<li><a href="#{_anchor(part)}">{escaped(part.title)}</a></li>' for part in parts)
    content = "".join(
        f'<section aria-labelledby="{_anchor(part)}"><h2 id="{_anchor(part)}">{escaped(part.title)}</h2>'
        f"{part.body}</section>\n"
        for part in parts
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escaped(title)} – {escaped(kind)}</title><style>{STYLE}</style></head>\n"
        '<body><a class="skip" href="#main">Skip to the content</a>'
        f'<header><p class="kind">{escaped(kind)}</p><h1>{escaped(title)}</h1>{notes(lead) if lead else ""}</header>\n'
        f'<div class="frame"><nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        f'<main id="main" tabindex="-1">{content}</main></div>\n'
        f"<footer><p>Made by feedfast{escaped(made)}.</p></footer><script>{SCRIPT}</script></body></html>\n"
    )


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")
