"""The run record: what head office can show of a run, hash-chained and signed (fedllm.chain), in `record.jsonl`.

One entry a line, signed by head office's identity; in a simulation by a key made in the run's folder (`record.key`).
Bodies, by the entry's kind:

    plan     plan           the RunPlan, as JSON, and so is
             plan_digest    its digest; `spec_digest` is that of the adapter's shape
             versions       {package: version} at head office
             sites          {name: public identity, 128 hex digits} of the roster; {} in a simulation
             adapter        digest of the adapter that the run starts from
    round    round          1, 2, ...
             counts         whether the round was used; false where the quorum was lost after sites had answered
             answered       {site: its signed statement, word for word (fedllm.statement)}
             declined       {site: reason}
             failed         {site or node: what was wrong}
             adapter_before, adapter_after   digests; equal where the round does not count
             bytes_up, bytes_down            of updates and of requests
    resumed  round          the last completed round, from which the run goes on; later `round` entries before this one
                            are superseded: those rounds are repeated, and have entries of their own further on
             adapter        digest of the adapter it goes on with
    key      identity       head office's new identity, signed by the one before: both hold from here on
    end      round          the last completed round
             stopped        why the run ended early, or ""
             adapter        digest of the final adapter

An adapter's digest is SHA-256 over its float32[d], little endian. An `end` may be followed by `resumed`. A round's
entry is on disk before the checkpoint, so the record is never behind; nothing that was signed is ever removed.
"""
