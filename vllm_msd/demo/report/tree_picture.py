"""One verified tree as inline SVG: depths are columns, the accepted path is filled."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from vllm_msd.measure.engine import VerifiedTree

COLUMN, ROW, HEIGHT = 132, 30, 22  # px
MAX_LETTERS = 13


@dataclass
class _Node:
    """One box: ``x`` and ``y`` are its left edge and its middle, in px."""

    label: str
    kind: str
    hint: str
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        return 18 + 7.6 * len(self.label)


def tree_svg(tree: VerifiedTree, text_of: Callable[[int], str]) -> str:
    """The picture; ``text_of`` gives a token's text. The target's own token ends the path."""
    boxes, children = _boxes(tree, text_of)
    rows = _place(boxes, children)
    width = max(box.x + box.width for box in boxes) + 2
    edges, shapes = [], []
    for parent, below in enumerate(children):
        start = boxes[parent]
        for child in below:
            end = boxes[child]
            x = start.x + start.width
            bend = (x + end.x) / 2
            edges.append(
                f'<path class="edge {end.kind}" d="M{x:.1f} {start.y:.1f}C{bend:.1f} '
                f'{start.y:.1f} {bend:.1f} {end.y:.1f} {end.x:.1f} {end.y:.1f}"/>'
            )
    for box in boxes:
        shapes.append(
            f'<g class="node {box.kind}"><title>{escape(box.hint)}</title>'
            f'<rect x="{box.x:.1f}" y="{box.y - HEIGHT / 2:.1f}" width="{box.width:.1f}" '
            f'height="{HEIGHT}" rx="5"/>'
            f'<text x="{box.x + box.width / 2:.1f}" y="{box.y + 4.5:.1f}">'
            f"{escape(box.label)}</text></g>"
        )
    heads = "".join(
        f'<text class="soft" x="{depth * COLUMN}" y="14">'
        f"{'root' if depth == 0 else f'depth {depth}'}</text>"
        for depth in range(1 + max(_depths(tree)))
    )
    said = escape(" ".join(_quoted(text_of(token)) for token in tree.drawn))
    return (
        f'<svg class="tree" viewBox="0 0 {width:.0f} {26 + rows * ROW}" '
        f'style="max-width:{width:.0f}px" role="img" aria-label="Draft tree of '
        f'{len(tree.tokens) - 1} nodes; the target said {said}">'
        f"{heads}{''.join(edges)}{''.join(shapes)}</svg>"
    )


def tells(tree: VerifiedTree) -> tuple[bool, int]:
    """How much a tree shows, to be compared: went past a wrong first guess, and how far."""
    other_branch = any(tree.parents.index(tree.parents[node]) != node for node in tree.path[1:])
    return other_branch, len(tree.path)


def _depths(tree: VerifiedTree) -> list[int]:
    depths = [0]
    for parent in tree.parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def _boxes(
    tree: VerifiedTree, text_of: Callable[[int], str]
) -> tuple[list[_Node], list[list[int]]]:
    """Nodes in their order, the target's own token last; and the children of each."""
    depths = _depths(tree)
    said = dict(zip(tree.path, (text_of(token) for token in tree.drawn), strict=True))
    children: list[list[int]] = [[] for _ in range(len(tree.tokens) + 1)]
    boxes = []
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        text = text_of(token)
        if node == 0:
            boxes.append(_Node(_label(text), "root", f"{_quoted(text)}: said before"))
            continue
        children[parent].append(node)
        rank = f"guess {len(children[parent])} after {_quoted(text_of(tree.tokens[parent]))}"
        kind = "accepted" if node in said else "rejected"
        if node in said:
            fate = "accepted"
        elif parent in said:
            fate = f"rejected, the target said {_quoted(said[parent])}"
        else:
            fate = "rejected with the nodes above it"
        boxes.append(_Node(_label(text), kind, f"{_quoted(text)}, {rank}: {fate}"))
    for node, box in enumerate(boxes):
        box.x = depths[node] * COLUMN
    last = tree.path[-1]
    own = text_of(tree.drawn[-1])
    box = _Node(_label(own), "own", f"{_quoted(own)}: the target's own token after the path")
    box.x = (depths[last] + 1) * COLUMN
    boxes.append(box)
    children[last].append(len(boxes) - 1)
    return boxes, children


def _place(boxes: list[_Node], children: list[list[int]]) -> int:
    """Give every box its row; returns how many there are. A parent stands beside its first."""
    rows = 0

    def place(node: int) -> None:
        nonlocal rows
        for child in children[node]:
            place(child)
        if children[node]:
            boxes[node].y = boxes[children[node][0]].y
        else:
            boxes[node].y = 26 + rows * ROW + HEIGHT / 2
            rows += 1

    place(0)
    return rows


def _label(text: str) -> str:
    label = text.strip(" ").replace("\n", "\u23ce") or "\u2423"
    return label if len(label) <= MAX_LETTERS else label[: MAX_LETTERS - 1] + "\u2026"


def _quoted(text: str) -> str:
    return f"\u201c{text}\u201d"
