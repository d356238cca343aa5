"""`bioscan` and `python -m bioscan`."""

from bioscan.app.cli import main

if __name__ == "__main__":
    main()
