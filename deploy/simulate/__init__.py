"""A fleet in virtual time: real routers, schedulers, block pools, event logs and cursors; trace replay."""
