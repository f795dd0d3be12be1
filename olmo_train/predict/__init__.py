"""Many runs: compare them, and choose by them."""
