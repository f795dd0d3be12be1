"""Training curves of one or several runs: an HTML page, a figure for a paper, a plot in the terminal.

`history` and `exports` read runs, `panels` decides what stands together, `thin` keeps long runs small without losing a
spike; `page`, `figure` and `terminal` each draw the same panels.
"""
