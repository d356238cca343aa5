"""Files in, tables and pixels out; no torch."""
