"""The interactive client: a conversation over several turns, with what each turn cost."""

from __future__ import annotations

import asyncio
import time

import grpc
from rich.console import Console
from rich.markup import escape

from router.client import Client

HELP = "/new starts a new conversation, /quit (or Ctrl-D) ends"


async def run_chat(router: str, system: str, max_tokens: int, temperature: float) -> None:
    """Read turns from standard input until its end."""
    console = Console(highlight=False)
    async with Client(router) as client:
        workers = await client.workers()
        console.print(f"[dim]{router}: {len(workers)} worker(s). {HELP}[/dim]")
        opening = [{"role": "system", "content": system}] if system else []
        messages = list(opening)
        while True:
            try:
                line = (await asyncio.to_thread(console.input, "[bold]you:[/bold] ")).strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line == "/new":
                messages = list(opening)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    answer = await _turn(console, client, messages, max_tokens, temperature)
                except grpc.aio.AioRpcError as error:
                    console.print(f"[red]{error.code().name}: {escape(error.details() or '')}[/red]")
                    messages.pop()
                else:
                    messages.append({"role": "assistant", "content": answer})


async def _turn(
    console: Console, client: Client, messages: list[dict[str, str]], max_tokens: int, temperature: float
) -> str:
    """Stream one answer to the screen; returns it whole."""
    started = time.perf_counter()
    first_s = 0.0
    answer, worker, prompt_tokens, cached_tokens = "", "", 0, 0
    async for chunk in client.generate(messages=messages, max_tokens=max_tokens, temperature=temperature):
        if chunk.worker_id:
            first_s = time.perf_counter() - started
            worker = chunk.worker_id
            prompt_tokens, cached_tokens = chunk.usage.prompt_tokens, chunk.usage.cached_tokens
        answer += chunk.text
        console.print(escape(chunk.text), end="")
    console.print()
    console.print(
        f"[dim]{escape(worker)} · {prompt_tokens} prompt tokens, {cached_tokens} cached · "
        f"TTFT {first_s * 1000:.0f} ms[/dim]"
    )
    return answer
