"""Verbs, pages and files for people: the only room with words and exit codes."""
