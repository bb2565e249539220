"""What tests share among themselves and with benchmarks: real parts set up for use, and policies and probe sets that are made up.

It imports nothing of either, and no installation of SEDAC contains it.
"""
