"""One file a verb: arguments and printing. The logic lives on the floors below."""
