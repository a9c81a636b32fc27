"""What exporting means.

There are two databases and no transaction between them. The promise: every committed event of a known version is in
ClickHouse exactly once, or is a dead letter with a reason. This page explains how.

States. The ledger is a table in the outbox's own database. It is the one source of truth about batches:

    claimed ──▶ sealed ──▶ written ──▶ exported ──▶ verified ──▶ compacted       swept long ago: counts and digests only
                  │                        └──────▶ discrepant   ClickHouse lost or changed entries
                  └──▶ stopped ──▶ sealed                        rows vanished before they were written

* claim   One short transaction, under the ledger's lock (its row 0). It adopts open batches of dead owners, under a new
          epoch and key. Then it cuts new batches from pending rows, oldest pk first. There is no watermark: a row that
          commits late with a lower pk is found by the next claim.
* fetch   Rows are read by pk and validated. A row that cannot be decoded becomes a dead letter. The rest is
          sealed: pks, order, blocks, `inserted_at` and a digest of the bytes never change again.
* write   One block is one INSERT, one partition, one part, one deduplication token. A first attempt sends the blocks at
          once. Any later attempt looks first: it asks ClickHouse by `inserted_at`, which is unique per block. So does every
          attempt after an error (`core.attempt`), because a materialized view fails after the block is stored.
* mark    Sets `deleted_at` in chunks, each fenced by the ledger's row; the last chunk and `exported` commit together. The
          marks are read again at once: where rows are locked, or a trigger undoes the mark, the batch stays `written` and
          a later run marks the rest.
* verify  Compares count and fingerprint: ours from the outbox, ClickHouse's from its columns.

Of a plan that is one small batch, the claim, the seal and the first attempt share a commit, and so do `written`, the marks
and `exported` (`core.small`). Larger batches, requeues, adopted batches, and whatever failed once commit them one by one,
and so do the steps of Dagster's graph.

What each crash leaves, and why it does no harm:

    crash after …                 the next run finds        and does this
    the claim                     claimed, not sealed       reads and seals the same rows, perhaps fewer
    the seal                      sealed, 0 attempts        reads the rows again, compares them with the digest, writes
    an INSERT, answer lost        sealed, 1 attempt         looks first: the whole block is there, or nothing of it
    some of several INSERTs       sealed, 1 attempt         looks first, sends the missing blocks
    all INSERTs                   sealed, 1 attempt         finds all blocks, records `written`
    `written`                     written                   marks
    some chunks of marks          written                   marks the rest, with the same stamp
    `exported`                    exported                  verifies
    a small batch's first commit  sealed, 1 attempt         looks first, sends the block
    a small batch's second one    exported                  verifies
    a refused block               sealed, cut as before     sends it, is refused again, splits it
    the split of a block          sealed, with new blocks   sends the new blocks; released rows are pending
    a failing view's INSERT       sealed, 1 attempt         looks first: the block is there, and counts as written
    the flag on a large block     sealed, flagged           splits it, once no INSERT of it can be at work

Two writers at once. An owner that was declared dead may still be alive. MySQL refuses all of its effects, because the
ledger has another epoch and key. (The key is random for each plan, because a failover that loses commits repeats batch
ids and epochs.) ClickHouse refuses its INSERTs in two ways. Under the same token, the same block is written once. And
each INSERT carries a deadline, which ClickHouse compares with its own clock before it takes a row: a process that was
paused for an hour and wakes up in `write` is refused. For the same reason, a batch whose rows were altered (`stopped`)
is released only after the deadline and the INSERT's own time-out (`inserts_until_ms`): then no INSERT of it can be at
work. The lease is another value. It is short and is renewed while a verb works (`core.lease`), so a dead run holds its
rows for less than a minute, or for five where an executor gives the steps to several processes. A process of the same
machine that is gone counts as dead at once.

After the export. A requeue (`core.requeue`, or a mark that was cleared by hand) makes rows pending again. The next
claim sees that a closed batch had their pks, and the fetch proves which rows are the exported events (`core.origins`).
Those keep their first `inserted_at`, so that copies collapse and retention does not start again; the others go out as
new. One batch can have blocks of both kinds (`Batch.is_requeue`). Reconciliation (`core.reconcile`) compares both
stores later: by count, by the sealed fingerprint, and by a hash of all columns that was observed at the verification.
Where they differ, `core.compare` compares each entry, and takes into account what merges, the TTL, requeues and
recorded erasures remove or add. A `discrepant` batch becomes `verified` again when nothing differs.

Dead letters. An open or discarded dead letter holds its row: no batch takes it. A retry makes the row pending again;
`core.dead_letters` has the states. An attempt spends a bounded number of probes on rows that ClickHouse refuses
(`core.poison`), so that a flood of bad rows from one workspace does not delay the others.

Observing. `core.status` has the present numbers, `core.advice` the actions for an operator; the Dagster UI, the CLI and
alerts show the same. `core.drain` is the loop over plans. The outcome of a run is read from the ledger
(`core.outcome`), not from the memory of a step.

Exactly-once rests on the look-up by `inserted_at`. Deduplication windows only cover the seconds in which a first
attempt is still at work.

Invariants (tests are named after them):

 1. A row is marked only after ClickHouse acknowledged the batch that holds it: `mark` takes a receipt.
 2. The same sealed batch always yields the same blocks and tokens; nothing at write time reads a clock.
 3. One batch: one version. One block: one INSERT, one `inserted_at`, one partition, one token, one part.
 4. After the first write attempt a batch is only replayed, never regrouped. The exception: a block that ClickHouse does not
    hold may be split once no INSERT of it can be at work any more (`inserts_until_ms`, by ClickHouse's clock).
 5. No MySQL transaction is open while ClickHouse, Dagster or the network is asked. READ COMMITTED, stated.
 6. Every effect of an owner is fenced.
 7. Rows of an unknown version are never touched, and are always visible as a number.
 8. An undecodable row never blocks its neighbours and never vanishes.
 9. Retention deletes only rows that are exported, older than the window and verified present, checked once more right
    before they are deleted (`core.sweep`).
10. Payloads are only in the two databases: not in Dagster, logs, metadata or errors.
11. No decision rests on an answer that may be somebody else's (a proxy, a cache, a replica that lags), nor on a setting or
    a session state that was inherited.
12. Identity is the event, never the pk; what cannot be proven to be a repetition is new.
"""
