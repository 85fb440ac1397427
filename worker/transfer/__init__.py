"""Moving KV blocks between workers: leased under a ticket, pulled by key, digested before they count.

    holder's worker                                                     puller's worker
    ---------------                                                     ---------------
    Holder.lease(keys) pins blocks --- ticket (signed, with offers) --> Puller.pull(ticket, keys, slots)
         |                                                                   | best transport that both have
    Holder.serve  <------------------ PULL ticket, first, count ------------ Channel.open
         |        ------------------- GRANT ------------------------------->     |
         |        ------------------- digests (and blocks) ---------------->  Channel.fetch: into its own pool's slots
         |                                                                   | each block's digest is compared
    Leases        <------------------ RELEASE ------------------------------ PullResult: so many leading blocks arrived
    expired ones free their blocks

`memory` is a pool's bytes; `leases` and `holder` know who may read what until when; `messages` is the wire, bounded;
`puller` decides; `server` opens the holder's doors; `transports` move bytes: `local`, `tcp` and `grpc` carry blocks in
the stream, `shm` and `nixl` read the holder's memory and carry only digests in it. All of them run in threads of their
own and block until a deadline.

What holds, whatever fails:
- A block counts when its bytes lie in its slot and have the digest that the holder told, and all before it count.
- A holder tells a digest only if the block was pinned from before its lease's start until after the digest was taken.
- A slot whose block does not count is zeroed before `pull` returns, and nothing writes into slots after that; but for
  those in the memory's `in_flight`, which NIXL cannot take back.
- Pinned blocks are free after their lease's end, which is at most MAX_LEASE_S away.
"""
