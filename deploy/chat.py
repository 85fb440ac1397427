"""The interactive client: a conversation over several turns, with what each turn cost."""

from __future__ import annotations

import io
import sys
import time
from itertools import islice

import grpc
from rich.console import Console
from rich.markup import escape

from router.client import SyncClient

HELP = "/new starts a new conversation, /quit (or Ctrl-D) ends, Ctrl-C stops an answer"


def run_chat(router: str, system: str, max_tokens: int, temperature: float) -> None:
    """Read turns from standard input until its end."""
    console = Console(highlight=False)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 must not end a conversation
    with SyncClient(router) as client:
        console.print(f"[dim]{router}: {len(client.workers())} worker(s). {HELP}[/dim]")
        opening = [{"role": "system", "content": system}] if system else []
        messages = list(opening)
        while (line := _read(console)) not in (None, "/quit"):
            if line == "/new":
                messages = list(opening)
                console.print("[dim]a new conversation[/dim]")
            elif line.startswith("/"):
                console.print(f"[dim]{HELP}[/dim]")
            elif line:
                messages.append({"role": "user", "content": line})
                answer = _turn(console, client, messages, max_tokens, temperature)
                if answer is None:
                    messages.pop()
                else:
                    messages.append({"role": "assistant", "content": answer})


def _read(console: Console) -> str | None:
    """One line; None at the end of the input."""
    try:
        return console.input("[bold]you:[/bold] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _turn(
    console: Console, client: SyncClient, messages: list[dict[str, str]], max_tokens: int, temperature: float
) -> str | None:
    """Stream one answer to the screen; returns it, or None when it failed or was stopped."""
    started, ttft_s = time.perf_counter(), 0.0
    answer, summary, workers = "", "", list[str]()
    # The limit is kept here: asked of the worker it would be refused once the model's length leaves less room.
    chunks = client.generate(messages=messages, temperature=temperature)
    try:
        for chunk in islice(chunks, max_tokens):
            if chunk.worker_id:
                workers.append(chunk.worker_id)
                ttft_s = ttft_s or time.perf_counter() - started
                summary = (
                    f"{' > '.join(workers)} · {chunk.usage.prompt_tokens} prompt tokens, "
                    f"{chunk.usage.cached_tokens} cached · TTFT {ttft_s * 1000:.0f} ms"
                )
            answer += chunk.text
            console.out(chunk.text, end="")
    except KeyboardInterrupt:
        console.print("\n[dim]stopped[/dim]")
        return None
    except grpc.RpcError as error:
        console.print(f"[red]{error.code().name}: {escape(error.details() or '')}[/red] [dim](/new starts over)[/dim]")
        return None
    finally:
        chunks.close()
    console.print(f"\n[dim]{escape(summary)}[/dim]")
    return answer
