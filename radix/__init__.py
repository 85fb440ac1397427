"""The index: block keys, and the tree of who holds them. Pure: no wire, no clock, no I/O."""
