"""`python -m bench_dfusion` is the command."""

from bench_dfusion.cli import main

if __name__ == "__main__":
    main()
