"""The index: block keys, and the tree of who holds them. Pure: no wire, no clock, no I/O."""

from radix.reference import ReferenceTree
from radix.tree import PrefixTree


def make_tree() -> PrefixTree:
    """The fastest implementation at hand."""
    return ReferenceTree()
