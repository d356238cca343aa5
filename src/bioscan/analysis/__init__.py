"""Pure numbers: arrays and tables in, numbers out; no file, no print, no torch, no clock."""
