"""Pictures of tasks, in pixels: the graph of what waits for what, and what ran when and where."""

import math
import unicodedata
from collections import defaultdict
from graphlib import TopologicalSorter

NODE_W, NODE_H, GAP_X, GAP_Y, MARGIN = 224, 62, 64, 20, 8
NODE_TEXT = 25  # columns of text that fit into a box, in a wide font
BEND_H = 10  # height of the place an arrow takes where it passes a column
SWEEPS = 8  # over the columns, there and back: more change little
ALONE_COLUMNS = 5  # of tasks that nothing joins to another


# ── the graph ─────────────────────────────────────────────────────────────────────────────────


def draw(shown: list[dict], keys: dict[str, str]) -> dict:
    """Boxes and arrows: {width, height, node: (w, h), nodes, edges}.

    A task stands right of everything it waits for; within a column the order keeps arrows short
    and uncrossed; tasks that nothing joins stand below. shown: tasks as the API shows them,
    keys: the pipeline's own name of a task by its id, if any.
    """
    inside = {t["id"] for t in shown}
    links = [
        (d["depends_on_task_id"], t["id"], d)
        for t in shown
        for d in t["dependencies"]
        if d["depends_on_task_id"] in inside and d["dependency_type"] != "related"
    ]
    joined = {end for start, stop, _ in links for end in (start, stop)}
    place, bends, height = _lay_out([t["id"] for t in shown if t["id"] in joined], links)
    place |= _grid([t["id"] for t in shown if t["id"] not in joined], height)
    right = max((x for x, _ in place.values()), default=0)
    bottom = max((y for _, y in place.values()), default=0)
    return {
        "node": (NODE_W, NODE_H),
        "width": right + NODE_W + MARGIN,
        "height": max(bottom + NODE_H, height) + MARGIN,
        "nodes": [_node(t, keys.get(t["id"], ""), *place[t["id"]]) for t in shown],
        "edges": [
            _edge([place[start], *bends.get((start, stop), ()), place[stop]], start, d)
            for start, stop, d in links
        ],
    }


def _lay_out(ids: list[str], links: list[tuple]) -> tuple[dict, dict, float]:
    """(corner of each box, points an arrow passes by its ends, height)."""
    depth = _depths(ids, links)
    columns = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for task_id in ids:
        columns[depth[task_id]].append(task_id)
    chains = _chains(depth, columns, links)
    _order(columns, chains)
    where, height = _heights(columns)
    place = {i: (_left(depth[i]), where[i]) for i in ids}
    bends = {
        (chain[0], chain[-1]): [(_left(bend[2]), where[bend]) for bend in chain[1:-1]]
        for chain in chains
    }
    return place, bends, height


def _depths(ids: list[str], links: list[tuple]) -> dict[str, int]:
    ups = {task_id: [] for task_id in ids}
    for start, stop, _ in links:
        ups[stop].append(start)
    depth = {}
    for task_id in TopologicalSorter(ups).static_order():
        depth[task_id] = 1 + max((depth[up] for up in ups[task_id]), default=-1)
    return depth


def _chains(depth: dict, columns: list[list], links: list[tuple]) -> list[list]:
    """Each arrow as what stands for it in every column it crosses; its bends join the columns."""
    chains = {}
    for start, stop, _ in links:
        between = range(depth[start] + 1, depth[stop])
        chains[start, stop] = [start, *((start, stop, n) for n in between), stop]
    for chain in chains.values():
        for bend in chain[1:-1]:
            columns[bend[2]].append(bend)
    return list(chains.values())


def _order(columns: list[list], chains: list[list]) -> None:
    """Sort each column by where its neighbours stand, forth and back."""
    before, after = defaultdict(list), defaultdict(list)
    for chain in chains:
        for one, other in zip(chain, chain[1:], strict=False):
            before[other].append(one)
            after[one].append(other)
    rank = {one: n for column in columns for n, one in enumerate(column)}
    for sweep in range(SWEEPS):
        back = sweep % 2
        for column in reversed(columns) if back else columns:
            near = after if back else before
            column.sort(key=lambda one: _mean([rank[o] for o in near[one]], rank[one]))  # noqa: B023
            rank |= {one: n for n, one in enumerate(column)}


def _mean(values: list[int], otherwise: int) -> float:
    return sum(values) / len(values) if values else otherwise


def _heights(columns: list[list]) -> tuple[dict, float]:
    """Upper edges; short columns stand in the middle."""
    tall = [sum(_tall(one) + GAP_Y for one in column) - GAP_Y for column in columns]
    most = max(tall, default=0)
    where = {}
    for column, height in zip(columns, tall, strict=True):
        y = MARGIN + (most - height) / 2
        for one in column:
            where[one] = y
            y += _tall(one) + GAP_Y
    return where, MARGIN + most if columns else 0


def _tall(one) -> int:
    return BEND_H if isinstance(one, tuple) else NODE_H


def _left(column: int) -> int:
    return MARGIN + column * (NODE_W + GAP_X)


def _grid(ids: list[str], top: float) -> dict[str, tuple]:
    begin = top + 2 * GAP_Y if top else MARGIN
    return {
        task_id: (_left(n % ALONE_COLUMNS), begin + n // ALONE_COLUMNS * (NODE_H + GAP_Y))
        for n, task_id in enumerate(ids)
    }


def _node(shown: dict, key: str, x: float, y: float) -> dict:
    title = shown["title"].removeprefix(key).lstrip(" :") or shown["title"]
    return {
        "task": shown,
        "key": cut(key, 8),
        "title": cut(title, NODE_TEXT - min(len(key), 8)),
        "where": where(shown),
        "x": x,
        "y": y,
    }


def where(shown: dict) -> str:
    """Where a task runs, or is to run, in a few letters."""
    return cut(shown["assigned_server_name"] or shown["target_repo"] or "", 14)


def _edge(points: list[tuple], start: str, dependency: dict) -> dict:
    """A curve from the right side of the first box over the bends to the left of the last."""
    x, y = points[0][0] + NODE_W, points[0][1] + NODE_H / 2
    path = f"M{x:g} {y:g}"
    for n, (left, top) in enumerate(points[1:], 1):
        last = n == len(points) - 1
        to_x, to_y = (left - 8, top + NODE_H / 2) if last else (left, top + BEND_H / 2)
        half = (to_x - x) / 2
        path += f"C{x + half:g} {y:g} {to_x - half:g} {to_y:g} {to_x:g} {to_y:g}"
        if not last:
            path += f"H{left + NODE_W:g}"
        x, y = left + NODE_W, to_y
    return {
        "path": path,
        "from": start,
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


# ── when and where ────────────────────────────────────────────────────────────────────────────

LABEL_W, CHART_W, ROW_H, HEAD_H, BAR_H = 230, 900, 28, 30, 16
SHORTEST = 4  # pixels of a bar
TICKS = 8  # at most, on the axis
STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


def chart(attempts: list[dict], now: float) -> dict | None:
    """Bars of what ran when: {width, height, label, begin, ticks, lanes}; None for nothing.

    attempts: {task_id, title, server, state, number, assigned_at, started_at, ended_at}, times in
    seconds, `ended_at` None while it goes on. A lane is a server, a row a task, a bar an attempt.
    """
    if not attempts:
        return None
    begin = min(a["assigned_at"] for a in attempts)
    end = max(a["ended_at"] or now for a in attempts)
    scale = CHART_W / max(end - begin, 1.0)
    lanes, y = [], HEAD_H
    for server, of_server in _grouped(attempts, "server"):
        lane = {"server": server, "y": y, "rows": []}
        y += ROW_H
        for task_id, of_task in _grouped(of_server, "task_id"):
            bars = [_bar(a, begin, scale, now) for a in of_task]
            last = of_task[-1]
            row = {"task_id": task_id, "title": cut(last["title"], 28), "whole": last["title"]}
            lane["rows"].append(row | {"y": y, "bars": bars, "state": last["state"]})
            y += ROW_H
        lanes.append(lane)
    return {
        "width": LABEL_W + CHART_W + 2 * MARGIN + 60,
        "height": y + MARGIN,
        "label": LABEL_W,
        "bar": BAR_H,
        "row": ROW_H,
        "head": HEAD_H,
        "begin": begin,
        "ticks": _ticks(end - begin, scale),
        "lanes": lanes,
    }


def _grouped(attempts: list[dict], field: str) -> list[tuple]:
    groups = defaultdict(list)
    for attempt in sorted(attempts, key=lambda a: a["assigned_at"]):
        groups[attempt[field]].append(attempt)
    return list(groups.items())


def _bar(attempt: dict, begin: float, scale: float, now: float) -> dict:
    end = attempt["ended_at"] or now
    started = min(attempt["started_at"] or end, end)
    x = LABEL_W + (attempt["assigned_at"] - begin) * scale
    work = LABEL_W + (started - begin) * scale
    stop = LABEL_W + (end - begin) * scale
    return {
        "x": round(x, 1),
        "wait": round(max(work - x, 0.0), 1),
        "work_x": round(work, 1),
        "work": round(max(stop - work, SHORTEST if attempt["started_at"] else 0), 1),
        "state": attempt["state"],
        "number": attempt["number"],
        "took": lasting(end - attempt["assigned_at"]),
    }


def _ticks(seconds: float, scale: float) -> list[dict]:
    step = next((s for s in STEPS if seconds / s <= TICKS), None)
    step = step or math.ceil(seconds / TICKS / STEPS[-1]) * STEPS[-1]
    return [
        {"x": round(LABEL_W + n * step * scale, 1), "text": f"+{lasting(n * step)}" if n else "0"}
        for n in range(int(seconds // step) + 1)
    ]


def lasting(seconds: float) -> str:
    """A time span in words as short as may be: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s".replace(".0 ", " ")
    whole = round(seconds)
    for size, unit, part, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    if whole >= 60:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole} s"


# ── load ──────────────────────────────────────────────────────────────────────────────────────

SPARK_W, SPARK_H, SPARK_MINUTES = 240, 40, 60


def spark(samples: list[dict], kind: str) -> dict | None:
    """A line of the last hour: {width, height, lines, dot, last, least, most}, None for nothing.

    samples: {minute (ago), kind: percent or None}, oldest first. `lines` are the points of each
    piece without a gap, `dot` is the last of them; what is over 100 percent stands at the top.
    """
    known = [(s["minute"], s[kind]) for s in samples if s[kind] is not None]
    if not known:
        return None
    pieces, before = [], None
    for minute, value in known:
        if before is None or before - minute > 2:
            pieces.append([])
        x = 2 + (1 - minute / (SPARK_MINUTES - 1)) * (SPARK_W - 4)
        y = SPARK_H - 1 - min(value, 100.0) / 100 * (SPARK_H - 2)
        pieces[-1].append(f"{x:.1f},{y:.1f}")
        before = minute
    values = [value for _, value in known]
    return {
        "width": SPARK_W,
        "height": SPARK_H,
        "dot": pieces[-1][-1].split(","),
        "lines": [" ".join(piece if len(piece) > 1 else piece * 2) for piece in pieces],
        "last": round(values[-1]),
        "least": round(min(values)),
        "most": round(max(values)),
    }
