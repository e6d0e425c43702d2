"""One page of code for each framework, to be read and to be run."""
