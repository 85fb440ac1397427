"""A cut of the tree as lines for people, and as a graph for Graphviz. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kv_events.inspect.tree_cut import CutNode, NodeHolder, TreeCut
from kv_events.inspect.words import counted, key_text, printable, tiers_of
from radix.tree import Tier

NAMES_SHOWN = 4

_ON_DEVICE = 1 << Tier.DEVICE
_SHADES = 9


class Segment(NamedTuple):
    """A piece of a line, and what it is: guide, blocks, key, holders, hits or note."""

    text: str
    role: str


def text_lines(cut: TreeCut, whose: str = "") -> Iterator[list[Segment]]:
    """The cut as lines; `whose` tree it is stands in the first one."""
    totals = (counted(cut.blocks, "block"), counted(cut.entries, "entry", "entries"), counted(cut.workers, "worker"))
    yield [Segment(f"{printable(whose)}: {', '.join(totals)}" if whose else ", ".join(totals), "note")]
    if cut.top.blocks:
        yield _line(cut.top)
    waiting = _below("", cut.top)
    while waiting:
        indent, node, last = waiting.pop()
        guide = Segment(f"{indent}{'└─ ' if last else '├─ '}", "guide")
        if isinstance(node, str):
            yield [guide, Segment(node, "note")]
        else:
            yield [guide, *_line(node)]
            waiting += _below(indent + ("   " if last else "│  "), node)
    if cut.circling:
        yield [Segment(f"{counted(cut.circling, 'block')} whose parents go in a circle are left out", "note")]


def _below(indent: str, node: CutNode) -> list[tuple[str, CutNode | str, bool]]:
    """What hangs on a node, the last first: its children, and a line for those that are left out."""
    parts: list[CutNode | str] = [*node.children]
    if node.hidden:
        more = "more " if node.children else ""
        branches = counted(node.hidden, f"{more}branch", f"{more}branches")
        parts.append(f"… {branches}, {counted(node.hidden_blocks, 'block')}")
    return [(indent, part, place == len(parts) - 1) for place, part in reversed(list(enumerate(parts)))]


def _line(node: CutNode) -> list[Segment]:
    segments = [Segment(counted(node.blocks, "block"), "blocks"), Segment(f" {keys_text(node)}", "key")]
    segments.append(Segment(f"  {holders_text(node.holders)}", "holders"))
    if node.hits:
        segments.append(Segment(f"  {counted(node.hits, 'hit')}", "hits"))
    if node.orphaned:
        segments.append(Segment(f"  after {key_text(node.parent_hash)}, which nobody holds", "note"))
    return segments


def keys_text(node: CutNode) -> str:
    """Its block's hash, or the first and the last one."""
    return key_text(node.first) if node.blocks == 1 else f"{key_text(node.first)}…{key_text(node.last)}"


def holders_text(holders: Sequence[NodeHolder], names_shown: int = NAMES_SHOWN) -> str:
    """As in `worker-0, worker-1 (device+host)`; a tier is named where it is not the device alone."""
    shown = []
    for holder in holders[:names_shown]:
        tiers = "" if holder.tiers == _ON_DEVICE else f" ({'+'.join(tiers_of(holder.tiers))})"
        shown.append(printable(holder.worker) + tiers)
    if len(holders) > names_shown:
        shown.append(f"{len(holders) - names_shown} more")
    return ", ".join(shown)


def dot(cut: TreeCut) -> str:
    """A directed graph in Graphviz's language: the more workers hold a node, the darker it is."""
    lines = ["digraph tree {", "  rankdir=LR;", '  node [shape=box, style="filled,rounded", fontname="sans-serif"];']
    whole = f"{counted(cut.blocks, 'block')}\n{counted(cut.workers, 'worker')}"
    if not cut.top.blocks:
        lines.append(f"  root [label={_quoted(whole)}, shape=plaintext, style=solid];")
        lines += _hidden(cut.top, "root")
    names: dict[int, str] = {}
    for place, (node, upper) in enumerate(cut.nodes()):
        name = names[id(node)] = f"n{place}"
        shade = 1 + round((_SHADES - 1) * (len(node.holders) - 1) / max(1, cut.workers - 1) / 2)
        lines.append(f'  {name} [label={_quoted(_label(node))}, fillcolor="/blues9/{shade}"];')
        if upper is not None or not cut.top.blocks:
            style = " [style=dashed]" if node.orphaned else ""
            lines.append(f"  {'root' if upper is None else names[id(upper)]} -> {name}{style};")
        lines += _hidden(node, name)
    return "\n".join([*lines, "}", ""])


def _hidden(node: CutNode, name: str) -> list[str]:
    if not node.hidden:
        return []
    label = _quoted(f"… {counted(node.hidden, 'branch', 'branches')}\n{counted(node.hidden_blocks, 'block')}")
    return [f"  {name}_more [label={label}, shape=plaintext, style=solid];", f"  {name} -> {name}_more [style=dotted];"]


def _label(node: CutNode) -> str:
    ends = key_text(node.first) if node.blocks == 1 else f"{key_text(node.first)}\n{key_text(node.last)}"
    hits = f"\n{counted(node.hits, 'hit')}" if node.hits else ""
    return f"{counted(node.blocks, 'block')}\n{ends}\n{holders_text(node.holders)}{hits}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
