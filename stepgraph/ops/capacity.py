"""Compile-time sizes of kernels that hold all rows of a step at once."""


def row_capacity(num_rows: int) -> int:
    """The power of two such a kernel is compiled for: one of three, so that a pool of graphs needs few compilations.

    Rows beyond `num_rows` are masked, which costs nothing against a launch.
    """
    assert num_rows <= 1024, num_rows
    return 8 if num_rows <= 8 else 128 if num_rows <= 128 else 1024
