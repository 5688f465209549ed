"""`python -m mergeflow`: the command line."""

from mergeflow.cli import program

if __name__ == "__main__":
    program()
