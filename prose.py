"""Markdown that others have written, as HTML that can do no harm.

Nothing of the text becomes HTML of its own: tags are shown as they stand, links lead only to web
and mail addresses, and a picture is a link, so that looking at a plan asks nothing of anybody.
"""

import re
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

TEXT_MOST = 50_000  # characters; a longer text is shown as it was written
BRACKETS_MOST = 2000  # `[` without end make the search for links slow: measured 3 s for 50,000
NESTING_MOST = 20
KEPT = 256  # texts whose HTML is kept: a page is read again at every event
HEADING_SHIFT = 2  # below a page's and a card's own headings
ADDRESS = re.compile(r"(https?://|mailto:)", re.IGNORECASE)


def marked(text: str) -> Markup:
    """A text in Markdown as safe HTML; one too large to be read quickly as preformatted text."""
    if len(text) > TEXT_MOST or text.count("[") > BRACKETS_MOST:
        return Markup('<pre class="prose">{}</pre>').format(text)
    return _marked(text)


def read(text: str) -> list[Token] | None:
    """Markdown as tokens, for who writes it otherwise; None when it is too large to be read
    quickly."""
    if len(text) > TEXT_MOST or text.count("[") > BRACKETS_MOST:
        return None
    return _reader.parse(text)


@lru_cache(maxsize=KEPT)
def _marked(text: str) -> Markup:
    return Markup(_reader.render(text))  # noqa: S704


def _pictures_as_links(state) -> None:
    """`![alt](address)` as a link, within another link as its words alone."""
    for token in state.tokens:
        if token.type == "inline":
            token.children = list(_without_pictures(token.children))


def _without_pictures(tokens):
    within = 0
    for token in tokens:
        within += {"link_open": 1, "link_close": -1}.get(token.type, 0)
        if token.type != "image":
            yield token
            continue
        words = Token("text", "", 0, content=f"[picture: {token.content or 'without words'}]")
        if within or not ADDRESS.match(str(token.attrs["src"])):
            yield words
            continue
        yield Token("link_open", "a", 1, attrs={"href": token.attrs["src"]})
        yield words
        yield Token("link_close", "a", -1)


def _lower_headings(state) -> None:
    for token in state.tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + HEADING_SHIFT)}"


def _link(renderer, tokens, index, options, _env) -> str:
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return renderer.renderToken(tokens, index, options, _env)


def _cell(renderer, tokens, index, options, _env) -> str:
    """The side a column keeps to as a class: the pages take no style from a text."""
    side = str(tokens[index].attrs.pop("style", "")).partition(":")[2]
    if side in ("right", "center"):
        tokens[index].attrSet("class", f"to-{side}")
    return renderer.renderToken(tokens, index, options, _env)


def _table_open(renderer, tokens, index, options, env) -> str:
    """A wide table is moved within a frame of its own, which the keyboard reaches."""
    frame = '<div class="marked-wide" role="group" aria-label="Table" tabindex="0">'
    return frame + renderer.renderToken(tokens, index, options, env)


def _table_close(renderer, tokens, index, options, env) -> str:
    return renderer.renderToken(tokens, index, options, env) + "</div>"


def _code(_renderer, tokens, index, _options, _env) -> str:
    return f"<pre><code>{escape(tokens[index].content)}</code></pre>\n"


def _make_reader() -> MarkdownIt:
    reader = MarkdownIt("js-default", {"html": False, "linkify": False})
    reader.options["maxNesting"] = NESTING_MOST
    reader.validateLink = lambda address: bool(ADDRESS.match(address.strip()))
    reader.core.ruler.after("inline", "pictures", _pictures_as_links)
    reader.core.ruler.push("headings", _lower_headings)
    for name, rule in (
        ("link_open", _link),
        ("th_open", _cell),
        ("td_open", _cell),
        ("table_open", _table_open),
        ("table_close", _table_close),
        ("fence", _code),
        ("code_block", _code),
    ):
        reader.add_render_rule(name, rule)
    return reader


_reader = _make_reader()
