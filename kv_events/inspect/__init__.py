"""What the event tools compute: recordings, statistics, checks and differences of event streams. Cores: no asyncio, no
clock; recording.py alone reads and writes files."""
