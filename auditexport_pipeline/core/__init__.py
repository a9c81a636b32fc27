"""What exporting means.

Two databases, no transaction between them, and a promise: every committed event of a known version is in
ClickHouse exactly once, or is a dead letter with a reason. This is how the promise is kept.

States. The ledger, a table in the outbox's own database, is the one source of truth about batches:

    claimed ──▶ sealed ──▶ written ──▶ exported ──▶ verified ──▶ compacted       swept, long ago: only the record
                  │                        └──────▶ discrepant   ClickHouse lost or changed something
                  └──▶ stopped ──▶ sealed                        rows vanished before they were written

* claim   One short transaction under the ledger's lock (its row 0). Open batches of dead owners are
          adopted under a new epoch and key, then new ones are cut from pending rows, oldest pk first. There is
          no watermark: a transaction that commits late with a lower pk is found by the next claim.
* fetch   Rows are read by pk and validated; what cannot be decoded becomes a dead letter; the rest is
          sealed: pks, order, block cuts, `inserted_at` and a digest of the bytes never change again.
* write   One block is one INSERT, one partition, one part, one deduplication token. First attempts
          write at once; later ones look first, by `inserted_at`, which is unique per block. So does an attempt after any
          error (`core.attempt`): a materialized view fails after the block is stored.
* mark    `deleted_at` in chunks, each fenced by the ledger row; the last chunk and `exported` commit together. Read again
          right after: where rows are locked, or a trigger undoes the mark, the batch stays `written` and is marked later.
* verify  Count and fingerprint, computed here from the outbox and there from the columns.

What each crash leaves, and why it is harmless:

    after …                       the next run finds        and does
    the claim                     claimed, unsealed         reads and seals; the same rows, perhaps fewer
    the seal                      sealed, 0 attempts        writes; the bytes are read again, held to the digest
    an INSERT, answer lost        sealed, 1 attempt         looks first: the block is there whole, or not at all
    some of several INSERTs       sealed, 1 attempt         looks block by block, sends the missing ones
    all INSERTs                   sealed, 1 attempt         finds all, records `written`
    `written`                     written                   marks
    some chunks of marks          written                   marks the rest; the stamp is the same, so it can tell
    `exported`                    exported                  verifies
    a refused block               sealed, cut as before     is refused again, and cuts again
    the new cut of one            sealed, cut anew          sends the new blocks; rows given back are pending
    a failing view's INSERT       sealed, 1 attempt         looks first: the block is there, and counts as written
    the mark on a large block     sealed, marked            splits it, once no INSERT of it can be at work

Two writers at once. An owner that was declared dead may not be. Everything it does to MySQL is refused
because the ledger holds another epoch and key. (The key, random for each plan, is for a failover that loses commits: then
batch ids and epochs recur.) What it sends to ClickHouse is fenced twice: the token makes a
replay of the same block nothing, and the INSERT itself carries a deadline, which ClickHouse checks against its own clock
before it takes a row. So a process that was paused for an hour
and wakes inside `write` is refused by ClickHouse. That is also why giving up a batch that can no longer
be reproduced (`stopped`) waits until the deadline and the INSERT's own time-out have passed (`inserts_until_ms`): then no
INSERT of it can be on its way. The lease is another value: short, and renewed while a verb is at work (`core.lease`), so
that a dead run holds its rows for less than a minute. A process of the same machine that is gone counts as dead at once.

After the export. A requeue (`core.requeue`, or a mark cleared by hand) makes rows pending again. The next claim sees that a
closed batch had their pks, and the seal proves which of the rows are the events that were exported (`core.origins`): those
go out under their first `inserted_at`, so that copies collapse and retention does not start over; the others as new. So
one batch can hold both, and `Batch.is_requeue` says it of a block. Reconciliation (`core.reconcile`) holds both stores against each other
long after: by count, by the fingerprint that was sealed, and by a hash of all columns that was observed at the
verification; where they differ, `core.compare` goes entry by entry and knows what merges, the TTL, requeues and
recorded erasures take away or add. A batch that was `discrepant` is `verified` again once nothing differs.

Dead letters. An open or a discarded one holds its row: no batch takes it. Retried, the row is pending again;
`core.dead_letters` has the states. What an attempt does about rows that ClickHouse refuses is bounded
(`core.poison`), so that one workspace's flood costs the others nothing but that.

Looking on. `core.status` says how it all stands at a moment and `core.advice` what an operator should do; page, prompt and
alerts show the same. Without Dagster, `core.drain` does the rounds. What a run did is what the ledger says (`core.outcome`),
not what the last attempt of a step remembers.

The look-up by `inserted_at` is what exactly-once rests on; deduplication windows only cover the seconds
in which a first attempt is still running.

Invariants (the tests are named after them):

 1. A row is marked only after ClickHouse acknowledged the batch that holds it: `mark` takes a receipt.
 2. The same sealed batch always yields the same blocks and tokens; nothing at write time reads a clock.
 3. One batch: one version. One block: one INSERT, one `inserted_at`, one partition, one token, one part.
 4. After the first write attempt a batch is only replayed, never regrouped; but for a block that ClickHouse does not hold
    once no INSERT of it can be at work any more (`inserts_until_ms`, by ClickHouse's clock): that may be split.
 5. No MySQL transaction is open while ClickHouse, Dagster or the network is asked. READ COMMITTED, stated.
 6. Every effect of an owner is fenced.
 7. Rows of an unknown version are never touched, and always visible as a number.
 8. An undecodable row never blocks its neighbours and never vanishes.
 9. Retention deletes only rows that are exported, older than the window and verified present, looked at once more
    right before they go (`core.sweep`).
10. Payloads are nowhere but in the two databases: not in Dagster, logs, metadata or errors.
12. Identity is the event, never the pk; what cannot be proven to be a repetition is new.
"""
