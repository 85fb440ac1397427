"""`rhizome events …`: the tools that look into event streams, thin shells around kv_events.inspect."""
