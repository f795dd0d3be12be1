"""One file for each verb: arguments and printing. The logic is in the other folders."""
