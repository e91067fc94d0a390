"""Between the engine and the devices that run its steps. Start at `stepgraph.executor.base`."""
