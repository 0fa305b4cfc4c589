"""Texts as Telegram takes them: pieces with styles, cut to what a message may hold and written as
its HTML, in which nothing of the text can become markup.

A message may have 4,096 characters after its markup is read, counted in UTF-16 code units
(https://core.telegram.org/bots/api#sendmessage).
"""

import re
from html import escape

import prose

MESSAGE_MOST = 4096
CUT = "…"

# Sequences of a terminal: OSC, DCS and their like up to their end, CSI, and the short ones.
ANSI = re.compile(
    r"\x1b(?:[\]PX^_].*?(?:\x07|\x1b\\|$)|\[[0-?]*[ -/]*[@-~]|[ -/]*[0-~])|\x9b[0-?]*[ -/]*[@-~]",
    re.DOTALL,
)
# Control characters, and those that turn the direction of the text around them.
HOSTILE = dict.fromkeys(
    [c for c in range(0x20) if chr(c) not in "\t\n"]
    + [*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]
    + [*range(0xD800, 0xE000)],
    "\N{REPLACEMENT CHARACTER}",
)


def clean(text) -> str:
    """A text without what steers a terminal or turns the direction of what stands around it."""
    return ANSI.sub("", str(text)).replace("\r\n", "\n").replace("\r", "\n").translate(HOSTILE)


def units(text: str) -> int:
    """How long Telegram says a text is."""
    return len(text) + sum(ord(sign) > 0xFFFF for sign in text)


def cut(text: str, most: int) -> str:
    """A text of at most so many units, with an ellipsis where it was longer."""
    return text if units(text) <= most else _first(text, most - 1).rstrip() + CUT


def _first(text: str, most: int) -> str:
    part = text[: max(most, 0)]
    while units(part) > most:
        part = part[:-1]
    return part


def last(text: str, most: int) -> str:
    """The end of a text, of whole lines where that is possible."""
    if units(text) <= most:
        return text
    kept = text[-most:] if most > 0 else ""
    while units(kept) > most:
        kept = kept[1:]
    _, line, rest = kept.partition("\n")
    return rest if line and rest else kept


class Text:
    """A text in pieces: `Text("Task ", b(title))`. Pieces are strings, other texts, or None."""

    def __init__(self, *pieces):
        self.spans: list[tuple[str, tuple[str, ...]]] = []
        self.add(*pieces)

    def add(self, *pieces) -> "Text":
        for piece in pieces:
            if isinstance(piece, Text):
                self.spans += piece.spans
            elif piece:
                self.spans.append((clean(piece), ()))
        return self

    def styled(self, tag: str) -> "Text":
        """The same within an element, such as `b` or `a href="…"`."""
        self.spans = [(text, (tag, *tags)) for text, tags in self.spans]
        return self

    def __bool__(self) -> bool:
        return bool(self.spans)

    @property
    def size(self) -> int:
        return sum(units(text) for text, _ in self.spans)

    @property
    def plain(self) -> str:
        return "".join(text for text, _ in self.spans)

    def cut(self, most: int = MESSAGE_MOST) -> "Text":
        """As much of it as a message may hold."""
        if self.size <= most:
            return self
        short, left = Text(), most - 1
        for text, tags in self.spans:
            short.spans.append((_first(text, left), tags))
            left -= units(text)
            if left <= 0:
                break
        short.spans.append((CUT, ()))
        return short

    def html(self) -> str:
        parts, opened = [], ()
        for text, tags in self.spans:
            if not text:
                continue
            shared = _shared(opened, tags)
            parts += [f"</{tag.partition(' ')[0]}>" for tag in reversed(opened[shared:])]
            parts += [f"<{tag}>" for tag in tags[shared:]]
            parts.append(escape(text))
            opened = tags
        parts += [f"</{tag.partition(' ')[0]}>" for tag in reversed(opened)]
        return "".join(parts).replace("&#x27;", "'")


def _shared(one: tuple, other: tuple) -> int:
    count = 0
    for mine, yours in zip(one, other, strict=False):
        if mine != yours:
            break
        count += 1
    return count


def b(text) -> Text:
    return Text(text).styled("b")


def i(text) -> Text:
    return Text(text).styled("i")


def code(text) -> Text:
    return Text(text).styled("code")


def pre(text) -> Text:
    return Text(text).styled("pre")


def quote(text) -> Text:
    return Text(text).styled("blockquote")


def link(text, address: str) -> Text:
    return Text(text).styled(f'a href="{escape(address)}"')


def joined(pieces, between: str = "\n") -> Text:
    """Texts one after the other with something between them; empty ones are left out."""
    whole = Text()
    for piece in pieces:
        if piece:
            whole.add(between if whole else None, piece)
    return whole


# ── Markdown ──────────────────────────────────────────────────────────────────────────────────

STYLES = {"strong": "b", "em": "i", "s": "s"}
ADDRESS = re.compile(r"https?://[^\s.]+\.[^\s]+", re.IGNORECASE)


def marked(text: str) -> Text:
    """A text in Markdown with the styles a message can have; one too large to be read quickly as
    it was written."""
    tokens = prose.read(clean(text))
    if tokens is None:
        return Text(text)
    writer = _Writer()
    for token in tokens:
        writer.take(token)
    return writer.text


class _Writer:
    """Markdown's tokens as a text: blocks with a line between them, lists with their marks."""

    def __init__(self):
        self.text = Text()
        self._styles: list[str] = []
        self._lists: list[int | None] = []
        self._gap = ""  # what goes before the next block
        self._cells = 0

    def take(self, token) -> None:
        kind = token.type
        if kind == "inline":
            for child in token.children:
                self._inline(child)
        elif kind in ("fence", "code_block"):
            self._block()
            self._put(token.content.rstrip("\n"), "pre")
            self._gap = "\n"
        elif kind == "hr":
            self._block()
            self._put("―――")
            self._gap = "\n\n"
        elif kind in ("paragraph_open", "heading_open"):
            self._block()
            self._styles += ["b"] if kind == "heading_open" else []
        elif kind in ("paragraph_close", "heading_close"):
            self._gap = "\n" if self._lists else "\n\n"
            if kind == "heading_close":
                self._styles.remove("b")
        elif kind in OPENS:
            OPENS[kind](self, token)

    def _begin_list(self, token) -> None:
        first = int(token.attrGet("start") or 1) if token.type == "ordered_list_open" else None
        if self._lists:
            self._gap = "\n"
        self._lists.append(first)

    def _end_list(self, _token) -> None:
        self._lists.pop()
        self._gap = "\n" if self._lists else "\n\n"

    def _item(self, _token) -> None:
        self._block()
        number = self._lists[-1]
        self._put("    " * (len(self._lists) - 1) + ("• " if number is None else f"{number}. "))
        self._lists[-1] = None if number is None else number + 1
        self._gap = ""

    def _quote(self, _token) -> None:
        self._block()
        self._styles.append("blockquote")

    def _unquote(self, _token) -> None:
        self._styles.remove("blockquote")
        self._gap = "\n"

    def _row(self, _token) -> None:
        self._block()
        self._cells, self._gap = 0, "\n"

    def _cell(self, _token) -> None:
        if self._cells:
            self._put(" | ")
        self._cells += 1
        self._gap = ""

    def _end_row(self, _token) -> None:
        self._gap = "\n"

    def _block(self) -> None:
        if self.text and self._gap:
            self.text.add(self._gap)
        self._gap = ""

    def _inline(self, token) -> None:
        kind, _, edge = token.type.rpartition("_")
        if token.type in ("text", "text_special"):
            self._put(token.content)
        elif token.type in ("softbreak", "hardbreak"):
            self._put("\n")
        elif token.type == "code_inline":
            self._put(token.content, "code")
        elif kind in STYLES:
            self._style(STYLES[kind], edge == "open")
        elif kind == "link":
            self._link(token, edge == "open")

    def _style(self, tag: str, on: bool) -> None:
        if on:
            self._styles.append(tag)
        elif tag in self._styles:
            self._styles.remove(tag)

    def _link(self, token, on: bool) -> None:
        if not on:
            self._styles = [tag for tag in self._styles if not tag.startswith("a ")]
        elif ADDRESS.fullmatch(str(token.attrGet("href"))):
            self._styles.append(f'a href="{escape(str(token.attrGet("href")))}"')

    def _put(self, text: str, tag: str | None = None) -> None:
        piece = Text(text)
        # code holds no other style: https://core.telegram.org/bots/api#html-style
        tags = [tag] if tag else dict.fromkeys(self._styles)
        for style in reversed(list(tags)):
            piece.styled(style)
        self.text.add(piece)


OPENS = {
    "bullet_list_open": _Writer._begin_list,
    "ordered_list_open": _Writer._begin_list,
    "bullet_list_close": _Writer._end_list,
    "ordered_list_close": _Writer._end_list,
    "list_item_open": _Writer._item,
    "blockquote_open": _Writer._quote,
    "blockquote_close": _Writer._unquote,
    "tr_open": _Writer._row,
    "th_open": _Writer._cell,
    "td_open": _Writer._cell,
    "tr_close": _Writer._end_row,
}
