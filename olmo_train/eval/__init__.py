"""Evaluation: functions that return sums; whoever calls them adds up the ranks and divides once."""
