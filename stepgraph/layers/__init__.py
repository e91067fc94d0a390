"""Building blocks of native models: thin modules over `stepgraph.ops`."""
