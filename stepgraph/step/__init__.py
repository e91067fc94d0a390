"""The heart: what a step is (`program`), over which memory (`state`), in which sizes (`shape`), decided by whom (`plan`),
and how it is launched (`runner`). Start with `program`."""
