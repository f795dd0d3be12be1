"""Training curves of one or several runs: an HTML page, a figure for a paper, a plot in the terminal.

`runs` and `exports` read runs, `panels` decides which metrics share a panel, `thin` shortens long runs without losing a spike;
`page`, `figure` and `terminal` each draw the same panels, and `write` chooses between page and figure.
"""
