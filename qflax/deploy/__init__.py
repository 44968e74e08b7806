"""What was trained, as files that others execute, and the means to run and check them."""
