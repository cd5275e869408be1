"""What a package for a GPU answers, computed without one: its kernels interpreted, ATen on the CPU.

In a process under the stand-in, whose device memory has a second mapping that the host may touch.
"""


class NotInterpreted(Exception):
    """Something that the interpreter cannot compute, with its name and why."""
