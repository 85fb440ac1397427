"""Sessions of a trace: as its lines tell them, else inferred from prompts that extend earlier ones."""

from __future__ import annotations

from deploy.traces.trace import Trace


def sessions_of(trace: Trace) -> list[list[int]]:
    """The numbers of each session's requests, sessions in order of their first request.

    A request without a session name continues the session whose latest prompt it extends: it holds all full blocks of
    that prompt and is longer. The last of those blocks must be the session's own (nobody had it before): who only
    shares a system prompt with others cannot be told from them, and counts as a session of one.
    """
    sessions: list[list[int]] = []
    named: dict[str, int] = {}
    owners: dict[int, int] = {}  # block -> the session that came with it
    ends: dict[int, int] = {}  # last full block of a session's latest prompt -> session
    for number, request in enumerate(trace.requests):
        blocks = request.block_ids
        if request.session:
            session = named.setdefault(request.session, len(sessions))
        else:
            session = _continued(trace, sessions, ends, number)
        if session == len(sessions):
            sessions.append([])
        elif not request.session:
            ends.pop(_end(trace, sessions[session][-1]), None)
        sessions[session].append(number)
        for block in blocks:
            owners.setdefault(block, session)
        end = _end(trace, number)
        if end >= 0 and owners[end] == session and not request.session:
            ends[end] = session
    return sessions


def _continued(trace: Trace, sessions: list[list[int]], ends: dict[int, int], number: int) -> int:
    """The session that a request continues, or the number of the next new one."""
    request = trace.requests[number]
    for block in reversed(request.block_ids):
        session = ends.get(block)
        if session is not None:
            longer = request.input_tokens > trace.requests[sessions[session][-1]].input_tokens
            return session if longer else len(sessions)
    return len(sessions)


def _end(trace: Trace, number: int) -> int:
    """The last full block of a prompt, -1 where it has none."""
    request = trace.requests[number]
    full = min(request.input_tokens // trace.block_size, len(request.block_ids))
    return request.block_ids[full - 1] if full else -1
