"""One file a verb: it reads flags, calls one job, prints the result."""
