"""Markdown that others have written does no harm, and does not hold up the hub."""

import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prose

HARMLESS = {"p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "em", "strong", "s", "a", "code", "pre"}
HARMLESS |= {"blockquote", "hr", "br", "table", "thead", "tbody", "tr", "th", "td", "div"}
ATTRIBUTES = {
    "a": {"href", "title", "target", "rel"},
    "ol": {"start"},
    "th": {"class"},
    "td": {"class"},
    "pre": {"class"},
    "div": {"class", "role", "aria-label", "tabindex"},
}
MARKDOWN = """# Title

See [the notes](https://example.org/n), `code` and *words*.

1. one
2. two

| a | b |
|---|--:|
| 1 | 2 |

```py
x < 1
```
"""
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:x)",
    "[x](//evil.example/)",
    "[x](/logout)",
    "<javascript:alert(1)>",
    "![x](data:image/svg+xml;base64,AA)",
    "![x](javascript:alert(1))",
    "[![x](javascript:1)](javascript:2)",
    '[x](https://e.org "a\\" onclick=alert(1)")',
    "[x]: javascript:alert(1)\n\n[x]",
    "```x onload=alert(1)\n<b>\n```",
    "|a|\n|:-:|\n|<b>|",
    "&lt;script&gt;",
    "\u202e\x1b[2J\0",
]


class Read(HTMLParser):
    """Checks every tag and attribute of a text."""

    def __init__(self, text):
        super().__init__()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag in HARMLESS, tag
        given = dict(attrs)
        assert set(given) <= ATTRIBUTES.get(tag, set()), (tag, given)
        if tag == "a":
            self.links.append(given["href"])
            assert given["href"].lower().startswith(("http://", "https://", "mailto:"))
            assert (given["target"], given["rel"]) == ("_blank", "noopener noreferrer nofollow")


def test_markdown_is_read():
    html = prose.marked(MARKDOWN)
    assert Read(html).links == ["https://example.org/n"]
    for part in (
        "<h3>Title</h3>",
        "<em>words</em>",
        "<li>one</li>",
        'class="to-right"',
        "x &lt; 1",
    ):
        assert part in html


def test_a_picture_is_a_link_and_within_a_link_only_its_words():
    assert Read(prose.marked("![plan](https://e.org/p.png)")).links == ["https://e.org/p.png"]
    within = prose.marked("[![plan](https://e.org/p.png)](https://e.org/)")
    assert Read(within).links == ["https://e.org/"]
    assert "[picture: plan]" in within


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_only_text(text):
    assert all("script" not in link for link in Read(prose.marked(text)).links)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("[]()<>!*_`~|#-:/\\&;\"' \nahtps1."), max_size=80))
def test_whatever_is_written_only_harmless_tags_come_of_it(text):
    Read(prose.marked(text))


@pytest.mark.parametrize(
    "text",
    [
        ">" * 10_000 + "x",
        "- " * 10_000,
        "[" * 40_000,
        "![" * 20_000,
        "*a **b " * 7000,
        "[a](" * 2000,
        "`" * 40_000,
        "<" * 40_000,
        "|a" * 20_000,
        "word\n" * 200_000,  # a megabyte
    ],
    ids=lambda text: repr(text[:8]),
)
def test_no_text_takes_long(text):
    began = time.process_time()
    Read(prose.marked(text))
    assert time.process_time() - began < 3  # seconds; the worst takes 0.4 on a slow machine


def test_a_text_too_long_to_be_read_is_shown_as_it_is():
    text = "# <b>" + "x" * prose.TEXT_MOST
    assert prose.marked(text) == f'<pre class="prose"># &lt;b&gt;{"x" * prose.TEXT_MOST}</pre>'
