"""`python -m unilatent`, which launchers such as torchrun can start too."""

from .cli import main

if __name__ == "__main__":
    main()
