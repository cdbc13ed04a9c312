"""Row passes in C, compiled on first use, for CPUs with a C compiler."""
