"""`python -m mergeflow`: the command line."""

from mergeflow.cli import main

if __name__ == "__main__":
    main()
