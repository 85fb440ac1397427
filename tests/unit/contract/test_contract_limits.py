"""Limits, tickets and proofs: what router and worker check alike."""

from __future__ import annotations

import pytest

from rhizome import rpc, ticket, validate
from rhizome.errors import Denied, InvalidRequest
from rhizome.v1 import fleet_pb2, generation_pb2, worker_pb2

SECRET = b"secret"


def check(params: generation_pb2.SamplingParams) -> None:
    validate.check_sampling(params, vocab_size=100, prompt_tokens=10, max_model_len=50)


def test_the_defaults_and_the_edges_are_allowed() -> None:
    """An empty message, and every limit itself."""
    check(generation_pb2.SamplingParams())
    check(
        generation_pb2.SamplingParams(
            temperature=100, top_p=1, min_p=1, top_k=100, max_tokens=40, min_tokens=40, logprobs=20, n=16,
            repetition_penalty=100, presence_penalty=-2, frequency_penalty=2, stop=["x" * 256] * 16,
            stop_token_ids=[99] * 64,
        )
    )  # fmt: skip


def test_a_long_value_is_cut_in_the_message() -> None:
    """An error is no way to send megabytes back."""
    with pytest.raises(InvalidRequest) as caught:
        check(generation_pb2.SamplingParams(stop=["x" * 10_000]))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("field", "value"), [("token_ids", b"other"), ("salt", b"other"), ("block_keys", b"other"), ("hold", True)]
)
def test_a_ticket_covers_all_that_decides_what_is_reused_and_kept(field: str, value: object) -> None:
    """Another prompt, salt or key under the same ticket is refused, and to hold what was not to be held."""
    request = worker_pb2.WorkerGenerateRequest(token_ids=b"1234", salt=b"s", block_keys=b"k")
    ticket.sign_request(SECRET, request, "w", 7, unix_ms=1000)
    assert ticket.has_valid_ticket(SECRET, request, "w", 7, unix_ms=1000 + ticket.TICKET_LIFETIME_MS)
    setattr(request, field, value)
    with pytest.raises(Denied, match="signature"):
        ticket.has_valid_ticket(SECRET, request, "w", 7, unix_ms=1000)


def test_a_ticket_is_for_one_worker_one_epoch_and_a_minute() -> None:
    """Elsewhere, after a restart, or too late it does not hold."""
    request = worker_pb2.WorkerGenerateRequest(token_ids=b"1234")
    ticket.sign_request(SECRET, request, "w", 7, unix_ms=0)
    for worker, epoch, unix_ms in (("v", 7, 0), ("w", 8, 0), ("w", 7, ticket.TICKET_LIFETIME_MS + 1)):
        with pytest.raises(Denied):
            ticket.has_valid_ticket(SECRET, request, worker, epoch, unix_ms)


def test_without_a_secret_nothing_is_signed_and_nothing_believed() -> None:
    """A ticket cannot be checked, so keys do not count; registrations are free."""
    request = worker_pb2.WorkerGenerateRequest(token_ids=b"1234")
    ticket.sign_request(b"", request, "w", 7, unix_ms=0)
    assert not request.HasField("ticket")
    ticket.sign_request(SECRET, request, "w", 7, unix_ms=0)
    assert not ticket.has_valid_ticket(b"", request, "w", 7, unix_ms=0)
    ticket.check_member(b"", fleet_pb2.RegisterRequest())
    request_of_a_fleet = fleet_pb2.HeartbeatRequest(status=worker_pb2.WorkerStatus(worker_id="w"))
    ticket.sign_member(SECRET, request_of_a_fleet)
    with pytest.raises(Denied, match="of worker w: it is signed, and here is no RHIZOME_FLEET_SECRET"):
        ticket.check_member(b"", request_of_a_fleet)


def test_a_registration_is_signed_over_who_and_where() -> None:
    """A proof cannot be taken over for another address."""
    request = fleet_pb2.RegisterRequest(worker_id="w", epoch=1, address="127.0.0.1:1")
    ticket.sign_member(SECRET, request)
    ticket.check_member(SECRET, request)
    request.address = "127.0.0.1:2"
    with pytest.raises(Denied, match="not signed"):
        ticket.check_member(SECRET, request)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_a_host_off_loopback_needs_to_be_wanted(host: str) -> None:
    """In the clear only with --insecure; a name is not taken for loopback."""
    with pytest.raises(InvalidRequest, match="--insecure"):
        rpc.check_bind_host(host, insecure=False)
    rpc.check_bind_host(host, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_is_free(host: str) -> None:
    """No switch is needed on the host itself."""
    rpc.check_bind_host(host, insecure=False)
