"""`rhizome demo`: the same conversations served in several ways, here or on Ray, with answers that must be the same."""
