"""Speculative decoding: who proposes tokens, and how many. Verification is `stepgraph.ops.commit`."""
