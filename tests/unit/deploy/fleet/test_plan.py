"""A fleet's servers: what each process is told, and how their number changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from deploy import cli
from deploy.fleet.commands import fleet_of_options
from deploy.fleet.plan import plan_fleet
from deploy.fleet.reading import BadConfig, parse_fleet, read_fleet
from deploy.processes import WorkerSettings
from kv_events.bus.redis_stream import AUTH_VARIABLE, credentials
from kv_events.bus.url import parse_bus_url
from rhizome.errors import InvalidRequest

TEXT = """
name: demo
model: {simulated: 8b-1xh100, time_scale: 10, name: eight}
routers: {count: 2, port: 7800, policy: round-robin}
workers:
  - {name: first, role: prefill, count: 2, block_size: 32, max_running: 8, resources: {cpus: 2, custom: {big: 1}}}
  - {name: then, role: decode, block_size: 32, events: ["zmq://127.0.0.1:0"], event_token_ids: true, threads: 3}
"""
NO_OPTIONS = {
    "model": None, "workers": None, "port": None, "kv_cache_mib": None, "simulated": False, "hardware": None,
    "time_scale": None, "events": [],
}  # fmt: skip


def worker_settings(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    """What `rhizome` makes of a worker's arguments."""
    made: list[WorkerSettings] = []
    monkeypatch.setattr("deploy.processes.running_worker", made.append)
    monkeypatch.setattr("deploy.processes.serve_until_stopped", lambda serving, supervised: None)
    monkeypatch.setattr("asyncio.run", lambda work: None)
    typer.main.get_command(cli.app).main(arguments, standalone_mode=False)
    return made[0]


def test_servers_are_named_by_their_group_and_place() -> None:
    """Routers have ports in a row; a worker's resources are its group's."""
    plan = plan_fleet(parse_fleet(TEXT, "fleet.yaml"))
    assert [(router.name, router.port) for router in plan.routers] == [("router-0", 7800), ("router-1", 7801)]
    assert [(worker.name, worker.role) for worker in plan.workers] == [
        ("first-0", "prefill"),
        ("first-1", "prefill"),
        ("then-0", "decode"),
    ]
    assert plan.workers[0].resources.custom == {"big": 1}
    assert plan.routers[1].arguments() == ["router", "--host=127.0.0.1", "--port=7801", "--policy=round-robin"]


def test_a_fleet_says_how_long_decode_workers_may_take_for_prompts() -> None:
    """Zero is not the default, and said."""
    text = TEXT.replace("policy: round-robin", "local_prefill_ms: 0")
    assert "--local-prefill-ms=0" in plan_fleet(parse_fleet(text, "fleet.yaml")).routers[0].arguments()
    with pytest.raises(BadConfig, match="routers.local_prefill_ms is -1"):
        parse_fleet(TEXT.replace("policy: round-robin", "local_prefill_ms: -1"), "fleet.yaml")


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT + "registry: redis://127.0.0.1:6379/demo\n",
        "model: {path: /models/m}\nhost: 10.0.0.1\ninsecure: true\nworkers: [{kv_cache_mib: 7, max_model_len: 99}]",
        "model: {tiny: true}\nworkers: [{max_batched_tokens: 64, max_waiting: 9, transports: [tcp, shm]}]",
    ],
)
def test_a_process_gets_the_settings_that_an_actor_gets(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's arguments come to the very settings, so that both launchers run the same."""
    for worker in plan_fleet(parse_fleet(text, "fleet.yaml")).workers:
        settings = worker.settings(["127.0.0.1:1", "127.0.0.1:2"], model_dir=Path("/tmp/tiny"), threads=5)
        assert worker_settings(worker.arguments(settings), monkeypatch) == settings
        assert bool(settings.registry) != bool(settings.routers), "one way to be found"


def test_a_group_is_scaled_within_its_limits() -> None:
    """Names of those that stay do not change; what makes no fleet is refused."""
    plan = plan_fleet(parse_fleet(TEXT, "fleet.yaml"))
    assert [worker.name for worker in plan.scaled("then", 2).workers][2:] == ["then-0", "then-1"]
    assert [worker.name for worker in plan.scaled("first", 1).workers] == ["first-0", "then-0"]
    for group, count, says in [
        ("routers", 3, "routers keep their number in a fleet without a registry"),
        ("last", 1, "one of routers, first, then"),
        ("first", 513, "0 to 512"),
        ("then", 0, "prefill workers need decode workers"),
    ]:
        with pytest.raises(InvalidRequest, match=says):
            plan.scaled(group, count)


def test_routers_are_scaled_where_workers_find_them_by_themselves() -> None:
    """In a registry. New ones have the ports that follow, and nothing else changes."""
    registry = "registry: redis://:secret@127.0.0.1/demo\n"
    plan = plan_fleet(parse_fleet(TEXT + registry, "fleet.yaml"))
    grown = plan.scaled("routers", 3)
    assert [(router.name, router.port) for router in grown.routers][2:] == [("router-2", 7802)]
    assert [worker.name for worker in grown.workers] == [worker.name for worker in plan.workers]
    assert grown.logins is plan.logins
    assert [router.name for router in grown.scaled("routers", 1).routers] == ["router-0"]
    for count in (0, 17):
        with pytest.raises(InvalidRequest, match="count is .*: 1 to 16"):
            plan.scaled("routers", count)
    high = plan_fleet(parse_fleet(TEXT.replace("7800", "65534") + registry, "fleet.yaml"))
    with pytest.raises(InvalidRequest, match="leaves no room for 3 routers"):
        high.scaled("routers", 3)


def test_logins_are_for_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server's settings or arguments have a password, and nothing shows one; the environment has it for that server
    alone, before what it had for others."""
    text = TEXT.replace('"zmq://127.0.0.1:0"', '"redis://ann:a%3A@h:7000/1/{worker}"')
    plan = plan_fleet(parse_fleet(f"{text}registry: rediss://:Xylo%40@redis.example/demo\n", "fleet.yaml"))
    assert plan.config.registry == "rediss://redis.example:6379/demo"
    assert plan.workers[2].group.events == ["redis://h:7000/1/{worker}"]
    told = [repr(plan), repr(plan.servers)]
    told += [" ".join(worker.arguments(worker.settings([]))) for worker in plan.workers]
    told += [" ".join(router.arguments()) for router in plan.routers]
    assert not any("Xylo" in text or "a%3A" in text or "a:" in text for text in told)
    for name, value in plan.logins.environment({AUTH_VARIABLE: ":other@there:1"}).items():
        monkeypatch.setenv(name, value)
    for url, login in [
        ("rediss://redis.example/x", ("", "Xylo@")),
        ("redis://redis.example/x", ("", "")),
        ("redis://h:7000/x", ("ann", "a:")),
        ("rediss://there:1/x", ("", "other")),
    ]:
        assert credentials(parse_bus_url(url)) == login


def test_a_server_has_one_login() -> None:
    """Processes take them by server, not by URL."""
    text = TEXT.replace('"zmq://127.0.0.1:0"', '"redis://:one@h/{worker}"') + "registry: redis://:two@h/demo\n"
    with pytest.raises(InvalidRequest, match=r"registry is 'redis://h:6379/demo': the login that another URL"):
        plan_fleet(parse_fleet(text, "fleet.yaml"))


def test_workers_that_would_share_a_port_are_refused() -> None:
    """In a file, and when a group grows."""
    text = "model: {tiny: true}\nworkers: [{events: ['zmq://127.0.0.1:5557']}]"
    plan = plan_fleet(parse_fleet(text, "fleet.yaml"))
    with pytest.raises(InvalidRequest, match="as 2 workers need one each"):
        plan.scaled("both", 2)


def test_paths_start_where_the_file_lies(tmp_path: Path) -> None:
    """As in a compose file: the command works from any folder."""
    file = tmp_path / "fleet.yaml"
    file.write_text("model: {path: models/m}\nworkers: [{}]\n")
    assert read_fleet(file).model.path == tmp_path / "models/m"
    file.write_text("model: {simulated: mine.toml}\nworkers: [{}]\n")
    with pytest.raises(InvalidRequest, match=rf"{tmp_path}/mine\.toml"):
        plan_fleet(read_fleet(file))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("workers: [{name: router}]", "no group of workers may be called router"),
        ("workers: [{name: routers}]", "no group of workers may be called routers"),
        ("workers: [{kv_cache_mib: 3}]", "not for simulated workers"),
    ],
)
def test_what_no_process_would_take_is_refused_in_the_file(line: str, says: str) -> None:
    """Before anything is started."""
    with pytest.raises(Exception, match=says):
        parse_fleet(f"model: {{simulated: 8b-1xh100}}\n{line}", "fleet.yaml")


def test_options_come_to_a_fleet() -> None:
    """`rhizome up` without a file: one router, and worker-0, worker-1; a bad value is named as an option's."""
    plan = plan_fleet(fleet_of_options(**NO_OPTIONS))  # type: ignore[arg-type]
    assert [router.port for router in plan.routers] == [7700]
    assert [worker.name for worker in plan.workers] == ["worker-0", "worker-1"]
    assert plan.config.model.tiny
    simulated = fleet_of_options(**NO_OPTIONS | {"simulated": True, "workers": 3, "time_scale": 4.0})  # type: ignore[arg-type]
    assert (simulated.model.simulated, simulated.model.time_scale) == ("8b-1xh100", 4.0)
    for options, says in [
        ({"kv_cache_mib": 0}, "kv_cache_mib is 0: "),
        ({"time_scale": 2.0}, "only with --simulated"),
        ({"events": ["kafka://x"]}, "events_url is 'kafka://x'"),
    ]:
        with pytest.raises(InvalidRequest, match=says):
            fleet_of_options(**NO_OPTIONS | options)  # type: ignore[arg-type]
