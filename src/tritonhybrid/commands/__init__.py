"""One file per command: its options, and the call that does the work.

These files are read before the command is known, so they import nothing heavy at the top.
"""
