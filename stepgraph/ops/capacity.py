"""Sizes that kernels are compiled or launched for, of steps of which only the most is known."""


def row_capacity(num_rows: int) -> int:
    """The power of two such a kernel is compiled for: one of three, so that a pool of graphs needs few compilations.

    Rows beyond `num_rows` are masked, which costs nothing against a launch.
    """
    assert num_rows <= 1024, num_rows
    return 8 if num_rows <= 8 else 128 if num_rows <= 128 else 1024


def max_tiles(num_rows: int, num_groups: int, tile: int) -> int:
    """Most tiles of so many rows that any split of the rows into groups gives, where a tile has rows of one group: a row in each
    group, then whole tiles more."""
    groups = min(num_rows, num_groups)
    return groups + (num_rows - groups) // tile
