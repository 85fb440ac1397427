"""The transfer benchmark: it runs, with NIXL where that is here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import transfer
from benchmarks.transfer import Plan, size_name
from worker.transfer.transports.nixl import has_nixl

TINY = Plan(total_bytes=2 << 20, block_bytes=(64 << 10,), rounds=2, single_rounds=2, singles=2)


@pytest.mark.skipif(sys.platform != "linux", reason="it shares memory")
def test_every_way_gives_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows have the names that others look for, and go to the table and the JSON alike; every way brought the right
    bytes, or it would not have ended."""
    path = tmp_path / "transfer.json"
    assert transfer.main(["--json", str(path)], TINY) == 0
    report = json.loads(path.read_text())
    assert report["name"] == "transfer"
    rows = {each["what"]: each for each in report["rows"]}
    assert len(rows) == len(report["rows"]), "two rows have one name"
    expected = {"shm vs memcpy 64K", "tcp vs grpc 64K", "tcp vs socket 64K", "digests shm 64K", "digests tcp 64K"}
    expected |= {"one block p50 shm 64K", "limit seal 64K", "limit one block p50 memcpy 64K"}
    of_nixl = {"shm vs nixl 64K", "nixl vs nixl 64K", "one block p90 nixl 64K"}
    assert expected <= rows.keys()
    assert of_nixl & rows.keys() == (of_nixl if has_nixl() else set())
    assert rows["shm vs memcpy 64K"]["goal"] == 0.85
    assert "tcp vs grpc 64K" in capsys.readouterr().out


def test_sizes_have_names() -> None:
    """As rows are called."""
    assert [size_name(size << 10) for size in (64, 256, 1024)] == ["64K", "256K", "1M"]


def test_bad_usage_is_told(tmp_path: Path) -> None:
    """Before anything is measured, with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        transfer.main(["--json", str(tmp_path / "nowhere" / "x.json")])
    assert ended.value.code == 2
