"""``python -m gist_fast``, as ``torchrun -m gist_fast train ...`` starts it."""

from gist_fast.cli.main import main

if __name__ == "__main__":
    main()
