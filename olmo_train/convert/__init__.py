"""Checkpoints from and to other frameworks' formats."""
