"""Evaluation: functions return sums; the caller sums them over ranks and divides once."""
