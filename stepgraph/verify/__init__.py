"""Tools that drive a runner from above: are its graphs right, and are its kernels compiled?"""
