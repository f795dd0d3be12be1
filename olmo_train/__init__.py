"""olmo_train: OLMo-style pretraining, readable, exact and fast.

Importing the package costs nothing: torch and the other heavy libraries are imported by the rooms that use them.
"""

__version__ = "0.1.0"
