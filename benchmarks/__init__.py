"""What is claimed about speed, runnable: ``python -m benchmarks.NAME`` prints JSON lines, ``make bench`` a table."""
