"""A deterministic simulator of faults: the real search, outbox, checkpoint store and ledger in a world of their own.

Clock, disk, tracking server, dispatcher and a second driver are simulated behind one seed, so a schedule of faults that
shows something wrong can be shrunk and replayed. See `docs/evidence/simulator.md`.
"""
