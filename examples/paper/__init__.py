"""The experiments of the ASAM paper: each row of its tables is one command."""
