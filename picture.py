"""The picture of a graph of tasks: boxes in columns and the arrows between them, in pixels."""

import unicodedata
from graphlib import TopologicalSorter
from itertools import pairwise

# A layered picture: a task stands one column right of the last task it waits for.

NODE_W, NODE_H, GAP_X, GAP_Y, MARGIN = 224, 62, 64, 20, 8
NODE_TEXT = 25  # columns of text that fit into a box, in a wide font


def draw(shown: list[dict], keys: dict[str, str]) -> dict:
    """Boxes and arrows in pixels: {width, height, node: (w, h), nodes, edges}."""
    inside = {t["id"] for t in shown}
    ups = {
        t["id"]: [
            d
            for d in t["dependencies"]
            if d["depends_on_task_id"] in inside and d["dependency_type"] != "related"
        ]
        for t in shown
    }
    columns = _columns({i: [d["depends_on_task_id"] for d in deps] for i, deps in ups.items()})
    place = _places(columns)
    return {
        "width": 2 * MARGIN + len(columns) * (NODE_W + GAP_X) - GAP_X,
        "node": (NODE_W, NODE_H),
        "height": 2 * MARGIN + max(map(len, columns), default=0) * (NODE_H + GAP_Y) - GAP_Y,
        "nodes": [_node(t, keys.get(t["id"], ""), *place[t["id"]]) for t in shown],
        "edges": [
            _edge(place[d["depends_on_task_id"]], place[task_id], d)
            for task_id, deps in ups.items()
            for d in deps
        ],
    }


def _columns(ups: dict[str, list[str]]) -> list[list[str]]:
    """Ids by column, each column in the order that keeps arrows short."""
    depth: dict[str, int] = {}
    for task_id in TopologicalSorter(ups).static_order():
        depth[task_id] = 1 + max((depth[up] for up in ups[task_id]), default=-1)
    columns = [
        [i for i in ups if depth[i] == n] for n in range(max(depth.values(), default=-1) + 1)
    ]
    for before, column in pairwise(columns):
        rank = {task_id: n for n, task_id in enumerate(before)}
        column.sort(key=lambda i: _mean([rank[up] for up in ups[i] if up in rank]))  # noqa: B023
    return columns


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _places(columns: list[list[str]]) -> dict[str, tuple[float, float]]:
    """The upper left corner of each box; short columns stand in the middle."""
    tallest = max(map(len, columns), default=0)
    return {
        task_id: (
            MARGIN + n * (NODE_W + GAP_X),
            MARGIN + (row + (tallest - len(column)) / 2) * (NODE_H + GAP_Y),
        )
        for n, column in enumerate(columns)
        for row, task_id in enumerate(column)
    }


def _node(shown: dict, key: str, x: float, y: float) -> dict:
    title = shown["title"].removeprefix(key).lstrip(" :") or shown["title"]
    return {
        "task": shown,
        "key": cut(key, 8),
        "title": cut(title, NODE_TEXT - min(len(key), 8)),
        "where": cut(shown["assigned_server_name"] or shown["target_repo"] or "", 14),
        "x": x,
        "y": y,
    }


def _edge(start: tuple, end: tuple, dependency: dict) -> dict:
    x1, y1 = start[0] + NODE_W, start[1] + NODE_H / 2
    x2, y2 = end[0] - 8, end[1] + NODE_H / 2
    bend = (x2 - x1) / 2
    return {
        "path": f"M{x1:g} {y1:g}C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2:g} {y2:g}",
        "resolved": dependency["resolved"],
        "key": dependency["contract_key"],
    }


def cut(text: str, width: int) -> str:
    """`text` in at most `width` columns (wide characters take two), with … where it was cut."""
    taken, room = "", width
    for char in text:
        room -= 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if room < 0:
            return taken[:-1] + "…"
        taken += char
    return taken
