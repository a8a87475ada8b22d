"""`python -m fastssl` is the command `fastssl`."""

from fastssl.cli import main

if __name__ == "__main__":
    main()
